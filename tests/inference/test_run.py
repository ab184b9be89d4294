"""The command: its help, exit codes and messages, signals, sweeps, and models of one's own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from bads_ppl.checkpoint import load_checkpoint
from inference.methods import METHODS
from inference.run import CONFIGS

LONG = (
    "data.source=digits",
    "steps=150",
    "thinning=10",
    "evaluate_every=40",
    "chains=2",
    "sampler.train_batch=20",
    "sampler.meta_batch=10",
    "snapshots=1",
    "checkpoint_seconds=0.05",
)
"""A run that is long enough to be stopped in the middle."""

STAND_IN = "WARNING: dataset is 'digits', not MNIST: its numbers cannot be compared with MNIST's\n"
"""What a run on the digits says first."""


def configuration(*options: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=list(options))


def state(folder: Path) -> dict[str, bytes]:
    """Draws, metrics and the tensors of the checkpoints of all chains, byte by byte."""
    found = {}
    for chain in sorted(folder.glob("chain-*")):
        for name in ("w.f32", "functions.f64", "metrics.jsonl"):
            found[f"{chain.name}/{name}"] = (chain / name).read_bytes()
        for name, tensor in load_checkpoint(chain / "checkpoint.safetensors")[0].items():
            found[f"{chain.name}/{name}"] = tensor.numpy().tobytes()
    return found


# -------------------------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def straight(call, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    assert call(*LONG, f"run_dir={folder}").code == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    number, code, start, call, straight, tmp_path
):
    folder = tmp_path / "run"
    process = start(*LONG, f"run_dir={folder}")
    checkpoint = folder / "chain-1" / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err and out == ""
    if number != signal.SIGKILL:
        name = signal.Signals(number).name
        assert err == STAND_IN + (
            f"error: stopped by {name} with a checkpoint: run again with resume=true to continue\n"
        )
    tensors, _ = load_checkpoint(checkpoint)
    assert 0 < int(tensors["kernel/steps"]) < 150  # in the middle of the second chain
    assert not (folder / "results.json").exists()

    resumed = call(*LONG, f"run_dir={folder}", "resume=true")
    assert resumed.code == 0, resumed.err
    assert state(folder) == state(straight)
    found, expected = (json.loads((f / "results.json").read_text()) for f in (folder, straight))
    for name in ("test", "groups", "steps", "sparsity"):
        assert found[name] == expected[name]


# ----------------------------------------------------------------------- help, sweeps and output


@pytest.mark.slow
def test_the_module_runs_as_a_process_and_prints_its_main_numbers(start, small, tmp_path):
    process = start(*small)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    found = json.loads(
        (tmp_path / "runs/mnist/bads/normalised-instance/seed0/results.json").read_text()
    )
    assert f"test accuracy {found['test']['accuracy']:.4f}" in out
    assert f"rare {found['groups']['rare']['mean_weight']:.4f}" in out
    assert "results in runs/mnist/bads/normalised-instance/seed0" in out
    assert err == STAND_IN  # no progress bar where standard error is no terminal


def test_help_explains_every_knob(call):
    outcome = call("--help")
    assert outcome.code == 0
    for name in configuration():
        assert name in outcome.out, name
    for choice in ("mnist10", "joint", "network", "paper", "custom", *METHODS):
        assert choice in outcome.out
    assert "more: closer to the posterior, longer" in outcome.out and "Exit codes" in outcome.out


def test_every_option_of_every_group_says_what_it_does():
    for path in sorted(CONFIGS.rglob("*.yaml")):
        if path.parent.parent.name == "hydra" or path.parent.name == "preset":
            continue
        first, *lines = path.read_text().splitlines()
        assert first.startswith("#"), path
        assert [line for line in lines if re.search(r": +[-+.\de]+ *$", line)] == [], path


def test_cfg_job_prints_what_is_set(call):
    outcome = call("--cfg", "job", "seed=7", "method=mixing")
    assert outcome.code == 0 and "seed: 7" in outcome.out and "learning_rate: 0.2" in outcome.out


def test_a_sweep_makes_one_folder_per_run(call, small, tmp_path, monkeypatch, results):
    monkeypatch.chdir(tmp_path)
    outcome = call("-m", *small, "seed=0,1", "method=mixing")
    assert outcome.code == 0, outcome.err
    folders = sorted((tmp_path / "runs").glob("*/*/*/seed*"))
    assert [path.name for path in folders] == ["seed0", "seed1"]
    assert folders[0].parent == tmp_path / "runs/mnist/mixing/joint-fixed"
    assert [results(folder)["seed"] for folder in folders] == [0, 1]


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        (("method=mixing",), "mnist/mixing/joint-fixed/seed0"),
        (("task.meta_per_class=5", "method=mixing"), "mnist-5/mixing/joint-fixed/seed0"),
        (("fold=1/2", "method=mixing"), "mnist-fold1of2/mixing/joint-fixed/seed0"),
        (("task=mnist10", "weights=network", "model=joint"), "mnist10/bads/joint-network/seed0"),
        (("preset=paper", "steps=6", "seed=3"), "mnist/bads/joint-network-paper/seed3"),
    ],
)
def test_a_run_has_a_folder_of_its_own(options, folder, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*options).code == 0
    assert [path.parent for path in tmp_path.rglob("results.json")] == [tmp_path / "runs" / folder]


def test_the_preset_of_the_paper_composes_and_says_what_its_draws_are(command, tmp_path, results):
    config = configuration("preset=paper")
    assert config.steps == 15_000 and config.sampler.mode == "paper"
    assert config.method.learning_rate == 1e-3 and config.model._target_ == "models.joint"
    outcome = command("preset=paper", "steps=6", f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    found = results(tmp_path / "run")
    assert found["mode"] == "paper" and found["preset"] == "paper"


def test_the_preset_of_long_chains_takes_most_of_its_steps_for_draws(command, tmp_path, results):
    config, usual = configuration("preset=converged"), configuration()
    assert config.steps > 5 * usual.steps and config.burn_in < config.steps / 4
    short = ("steps=40", "burn_in=10", "thinning=10", f"run_dir={tmp_path / 'run'}")
    outcome = command("preset=converged", *short)
    assert outcome.code == 0, outcome.err
    found = results(tmp_path / "run")
    assert found["preset"] == "converged" and found["evidence"] == "approximate"


def test_the_options_that_other_tools_rely_on_are_there():
    config = configuration(
        "task=mnist10",
        "method=dup_meta",
        "model=joint",
        "weights=network",
        "sampler=sgld",
        "backbone=lenet5",
        "preset=default",
        "seed=1",
        "steps=2",
        "chains=3",
        "sparsity=0.1",
        "device=cpu",
        "run_dir=x",
        "resume=true",
        "overwrite=true",
        "data.root=y",
        "data.source=files",
        "task.meta_per_class=5",
    )
    assert (config.seed, config.chains, config.data.root) == (1, 3, "y")
    assert config.task.data.meta_per_class == 5


# ------------------------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        ("stesp=5", 1, "Could not override 'stesp'"),
        ("+stesp=5", 2, "there is no option stesp: did you mean steps?"),
        ("task.meta_per_clas=5", 1, "Could not override 'task.meta_per_clas'"),
        ("+model.windw=3", 2, "there is no option model.windw: did you mean window?"),
        ("steps=abc", 1, "Value 'abc' of type 'str' could not be converted to Integer"),
        ("steps=2.5", 1, "could not be converted to Integer"),
        ("resume=maybe", 1, "Value 'maybe' is not a valid bool"),
        ("method.learning_rate=abc", 1, "could not be converted to Float"),
        ("impact.train=abc", 1, "could not be converted to Float"),
        ("model.window=2.5", 2, "model.window must be a whole number, got 2.5"),
        ("sampler.train_batch=abc", 2, "sampler.train_batch must be a whole number or null"),
        ("task.meta_per_class=abc", 2, "meta_per_class must be a whole number, got 'abc'"),
        ("task=mnits", 1, "Available options in 'task':"),
        ("method=bdas", 1, "Available options in 'method':"),
        ("seed=-1", 2, "seed must be at least 0, got -1"),
        ("chains=0", 2, "chains must be at least 1, got 0"),
        ("workers=0", 2, "workers must be at least 1, got 0"),
        ("steps=0", 2, "steps must be at least 1, got 0"),
        ("burn_in=6", 2, "burn_in must be from 0 to steps - 1 = 5, got 6"),
        ("thinning=5", 2, "thinning must be at most steps - burn_in = 4, got 5"),
        ("sparsity=5", 2, "sparsity must be in (0, 1), got 5"),
        ("sparsity=0", 2, "sparsity must be in (0, 1), got 0"),
        ("sparsity=0.001", 2, "is less than one point: use at least 0.01"),
        ("task.meta_per_class=0", 2, "task.meta_per_class must be at least 1, got 0"),
        ("task.data.rare=0", 2, "must be at least 1, got 0"),
        ("task.meta_per_class=400", 2, "lower task.meta_per_class"),
        ("sampler.train_batch=101", 2, "the size of the train set, 100, got 101"),
        ("sampler.meta_batch=51", 2, "the size of the meta set, 50, got 51"),
        ("sampler.mode=exact", 2, "sampler.mode must be one of calibrated, paper, got 'exact'"),
        ("method.temperature=-1", 2, "temperature must be a finite number >= 0, got -1"),
        ("method.learning_rate=-1", 2, "must be a positive number, got -"),
        ("method.clip=0", 2, "clip must be a positive number, or None for none, got 0"),
        ("method.prior_scale=0", 2, "a prior scale must be a positive number, got 0"),
        ("prior.total=sum", 2, "total must be 'exact' or 'running_mean', got 'sum'"),
        ("model.auxiliary=fresh", 2, "one of persistent, restarted, reverted, got 'fresh'"),
        ("model._target_=no.such", 2, "model._target_ must be the full name of a callable"),
        ("weights.minibatches=best", 2, "must be 'uniform' or 'importance', got 'best'"),
        ("data.source=web", 2, "data.source must be one of auto, files, torchvision, digits"),
        ("device=gpu", 2, "device must be auto, cpu, cuda or mps, got 'gpu'"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected(option, code, message, command, tmp_path):
    outcome = command(option, f"run_dir={tmp_path / 'run'}")
    assert message in outcome.err and outcome.code == code
    assert "Traceback" not in outcome.err and outcome.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(command, tmp_path):
    outcome = command("device=cuda", f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 2
    assert "device 'cuda' is not there: this machine has cpu" in outcome.err
    assert "device=auto" in outcome.err and "Traceback" not in outcome.err


def write_mnist(folder: Path, count: int = 60) -> None:
    folder.mkdir()
    for split in ("train", "t10k"):
        images = np.zeros((count, 28, 28), np.uint8)
        for name, values in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            sizes = np.array(values.shape, ">u4").tobytes()
            header = bytes((0, 0, 8, values.ndim)) + sizes
            (folder / f"{split}-{name}-ubyte").write_bytes(header + values.astype("u1").tobytes())


FILES = ("data.source=files", "task.meta_per_class=1", "task.data.frequent=4", "task.data.rare=2")


def damage(path: Path, at: int, value: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(bytes(content))


def test_small_files_of_ones_own_run(command, tmp_path, results):
    write_mnist(tmp_path / "data")
    folder = tmp_path / "run"
    options = ("sparsity=0.2", "sampler.train_batch=6", "sampler.meta_batch=2", f"run_dir={folder}")
    outcome = command(*FILES, f"data.root={tmp_path / 'data'}", *options)
    assert outcome.code == 0, outcome.err
    assert results(folder)["dataset"] == "mnist" and results(folder)["warnings"] == []


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "train-labels-idx1-ubyte",
            lambda path: damage(path, 8 + 17, 12),
            "expected labels from 0 to 9, got 12 at index 17",
        ),
        ("train-images-idx3-ubyte", lambda path: damage(path, 3, 9), "expected an IDX file"),
        (
            "t10k-images-idx3-ubyte",
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            "its header tells of 60x28x28 values",
        ),
        ("t10k-labels-idx1-ubyte", lambda path: path.unlink(), "lacks t10k-labels-idx1-ubyte"),
    ],
)
def test_a_damaged_data_file_is_named_with_the_remedy(name, spoil, message, command, tmp_path):
    write_mnist(tmp_path / "data")
    spoil(tmp_path / "data" / name)
    outcome = command(*FILES, f"data.root={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 2 and message in outcome.err and name in outcome.err
    assert "Traceback" not in outcome.err and not (tmp_path / "run").exists()


def test_the_download_offline_is_refused_where_nothing_may_stand_in(command, tmp_path, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    where = (f"data.root={tmp_path / 'none'}", f"run_dir={tmp_path / 'run'}")
    forbidden = command("data.source=torchvision", *where)
    assert forbidden.code == 2 and "Traceback" not in forbidden.err
    assert "none of torchvision's mirrors can be reached" in forbidden.err
    assert "data.source=auto" in forbidden.err and not (tmp_path / "run").exists()


def test_an_interruption_outside_of_the_chains_exits_with_its_code(command, tmp_path, monkeypatch):
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inference.run.report", interrupt)
    outcome = command(f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 130 and "resume=true" in outcome.err
    monkeypatch.undo()
    assert command(f"run_dir={tmp_path / 'run'}", "resume=true").code == 0


# ----------------------------------------------------------------------------- a model of one's own

MODEL = '''
import pyro
import pyro.distributions as dist
import torch


def spike(train, meta, parts, *, odds: float = 0.5):
    """As joint, with another prior of the weights, written from the documented signature alone."""
    network = parts.sample_network()
    output = network(torch.cat([train.input, meta.input]))
    loss = parts.loss(output[: len(train)], train.target)
    with train.plate("train"):
        w = pyro.sample("w", dist.Beta(torch.tensor(odds), torch.tensor(1.0)))
        pyro.factor("train_loss", -w * loss)
    parts.sparsity.factor(w, train)
    parts.observe_meta(output[len(train) :], meta)
'''


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_models.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield tmp_path / "modules"
    sys.modules.pop("my_models", None)


def test_a_model_of_ones_own_runs_with_its_own_options(own_model, command, tmp_path, results):
    own = ("model=custom", "model._target_=my_models.spike")
    assert command(*own, f"run_dir={tmp_path / 'a'}").code == 0
    assert command(*own, "+model.odds=5.0", f"run_dir={tmp_path / 'b'}").code == 0
    assert results(tmp_path / "a")["model"] == "custom"
    drawn = [np.fromfile(tmp_path / run / "chain-0" / "w.f32", "<f4") for run in ("a", "b")]
    assert len(drawn[0]) == 2 * 100 and not np.array_equal(*drawn)
    wrong = command(*own, "+model.ods=1", f"run_dir={tmp_path / 'c'}")
    assert wrong.code == 2 and "there is no option model.ods: did you mean odds?" in wrong.err


@pytest.mark.slow
def test_a_model_of_ones_own_is_found_on_the_python_path(own_model, start, small, tmp_path):
    process = start(
        *small,
        "model=custom",
        "model._target_=my_models.spike",
        PYTHONPATH=os.pathsep.join([str(own_model), os.environ.get("PYTHONPATH", "")]),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert list(tmp_path.glob("runs/mnist/bads/custom-instance/seed0/results.json"))


def test_custom_without_a_model_is_refused(command, tmp_path):
    outcome = command("model=custom", f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 2 and "model._target_ must be the full name" in outcome.err
    assert "Traceback" not in outcome.err
