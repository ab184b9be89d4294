"""The command in two processes: the same files and weights as in one, also when it was stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from bads_ppl.checkpoint import load_checkpoint
from bads_ppl.errors import InputError
from bads_ppl.ranks import ALONE, Ranks
from inference.experiment import prepare
from inference.processes import joined
from inference.run import compose_run
from tests.inference.test_run import LONG as RUN
from tests.inference.test_run import state

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0")  # fmt: skip
LANGUAGE = (
    "task=llm",
    "data.source=generated",
    "task.data.vocabulary=300",
    "task.data.tested=20",
    "task.data.pretraining=0",
    "method.temperature=0",  # noise is drawn in another order where networks are sharded
    "steps=6",
    "burn_in=2",
    "thinning=2",
    "evaluate_every=2",
    "chains=1",
    "sampler.train_batch=8",
    "sampler.meta_batch=4",
)
# Two processes round otherwise than one. Importance minibatches make other rows of that, and gains
# that are small differences of losses make it grow.
LONG = (*RUN, "model=joint", "weights.minibatches=uniform")
together = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available() or not torch.distributed.is_available(),
    reason="needs processes on the CPU",
)

Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def begin(tmp_path_factory) -> Iterator[Begin]:
    """Starts the command in two processes; none outlives the tests."""
    started: list[subprocess.Popen[str]] = []
    where = tmp_path_factory.mktemp("begun")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

    def launch(*options: str, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, "-m", "inference.run", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=where,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield launch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="module")
def straight(begin, tmp_path_factory) -> Path:
    """The folder of a run of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    process = begin(*LONG, f"run_dir={folder}", launcher=ACCELERATE)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert out.count("results in") == 1
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def when_in_second_chain(process: subprocess.Popen[str], folder: Path) -> None:
    checkpoint = folder / "chain-1" / "checkpoint.safetensors"
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def steps(folder: Path) -> int:
    return int(load_checkpoint(folder / "chain-1" / "checkpoint.safetensors")[0]["kernel/steps"])


@together
@pytest.mark.slow
def test_two_processes_leave_the_files_and_weights_of_one(straight, call, tmp_path):
    outcome = call(*LONG, "workers=1", f"run_dir={tmp_path / 'one'}")
    assert outcome.code == 0, outcome.err
    assert files(straight) == files(tmp_path / "one")
    one, two = (pd.read_parquet(f / "weights.parquet") for f in (tmp_path / "one", straight))
    assert one.index.equals(two.index)
    assert float((one["mean"] - two["mean"]).abs().max()) < 1e-4 * float(one["mean"].max())
    for chain in ("chain-0", "chain-1"):  # written once: the size is that of the draws
        sizes = [(f / chain / "w.f32").stat().st_size for f in (tmp_path / "one", straight)]
        assert sizes[0] == sizes[1] > 0
    a, b = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "one", straight))
    assert b["test"]["accuracy"] == pytest.approx(a["test"]["accuracy"], abs=0.01)


@together
@pytest.mark.slow
def test_a_run_goes_on_after_a_signal_and_after_the_death_of_a_process(begin, straight, tmp_path):
    folder = tmp_path / "run"
    process = begin(*LONG, f"run_dir={folder}")
    when_in_second_chain(process, folder)
    process.terminate()  # the launcher tells its processes
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.count("stopped by SIGTERM with a checkpoint") == 2, err
    stopped = steps(folder)
    assert 0 < stopped < 150 and not (folder / "results.json").exists()

    process = begin(*LONG, f"run_dir={folder}", "resume=true")
    while steps(folder) == stopped:
        assert process.poll() is None, process.communicate()
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert stopped < steps(folder) < 150 and not (folder / "results.json").exists()

    process = begin(*LONG, f"run_dir={folder}", "resume=true")
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert state(folder) == state(straight)
    assert files(folder) == files(straight)


@together
@pytest.mark.slow
def test_processes_with_chains_of_their_own_make_those_of_one_process(begin, call, tmp_path):
    short = (*LONG, "steps=30")
    process = begin(*short, f"run_dir={tmp_path / 'two'}", "parallel=chains")
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert call(*short, f"run_dir={tmp_path / 'one'}").code == 0
    assert state(tmp_path / "two") == state(tmp_path / "one")
    assert files(tmp_path / "two") == files(tmp_path / "one")


@together
@pytest.mark.slow
def test_sharded_networks_move_as_whole_ones_do_and_their_runs_go_on_in_one_process(
    begin, call, tmp_path, monkeypatch
):
    monkeypatch.setattr("bads_ppl.plots.save", lambda figure, path: Path(path).touch())
    options = (*LANGUAGE, f"cache={tmp_path / 'cache'}")
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    process = begin(*options, f"run_dir={sharded}", "parallel=fsdp")
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert call(*options, f"run_dir={whole}").code == 0
    close(sharded, whole)
    assert files(sharded) == files(whole)
    for folder in (sharded, whole):
        outcome = call(*options, f"run_dir={folder}", "resume=true", "steps=8")
        assert outcome.code == 0, outcome.err
    close(sharded, whole)


def close(one: Path, other: Path) -> None:
    """Two runs have the same weights, and networks that differ by rounding."""
    a, b = (pd.read_parquet(folder / "weights.parquet")["mean"] for folder in (one, other))
    assert float((a - b).abs().max()) < 1e-3 * float(a.std())
    kept = [load_checkpoint(f / "chain-0" / "checkpoint.safetensors")[0] for f in (one, other)]
    assert kept[0].keys() == kept[1].keys()
    for name, value in kept[0].items():
        if "network/theta" in name:
            apart = (value - kept[1][name]).abs().max() / value.abs().max()
            assert float(apart) < 1e-4, name


TWO = Ranks(0, 2)


def prepared(*options: str, ranks: Ranks = TWO):
    config, choices = compose_run(options, "a test")
    return prepare(config, choices, ranks=ranks)


def test_batches_that_cannot_be_shared_are_refused_before_anything_is_written(small, tmp_path):
    options = (*small, f"run_dir={tmp_path / 'run'}", "sampler.train_batch=21")
    with pytest.raises(InputError, match="multiple of the number of processes, 2, got 21: take 20"):
        prepared(*options)
    assert not (tmp_path / "run").exists()
    assert prepared(*options, "parallel=chains").apart
    assert prepared(*options, ranks=ALONE).ranks.alone


def test_methods_that_choose_within_batches_are_refused(small, tmp_path):
    options = (*small, f"run_dir={tmp_path / 'run'}", "method=rho_loss")
    with pytest.raises(InputError, match="method=rho_loss chooses points within each batch"):
        prepared(*options)
    assert prepared(*options, "parallel=chains").setup.membership is not None


def test_options_that_do_not_fit_several_processes_are_refused(monkeypatch):
    def options(**given: str):
        return OmegaConf.create({"parallel": "data", "device": "auto", **given})

    assert joined(options()) == ALONE
    with pytest.raises(InputError, match="parallel must be one of data, fsdp, chains, got 'all'"):
        joined(options(parallel="all"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="device must be auto, cpu or cuda in a run of 2 proc"):
        joined(options(device="cuda:1"))
    for name, value, said in (
        ("USE_FSDP", "true", r"ask for use_fsdp=true, .* got parallel=data: .*take parallel=fsdp"),
        ("MIXED_PRECISION", "bf16", r"mixed_precision=bf16.*backbone.precision=bfloat16"),
    ):
        with monkeypatch.context() as launched:
            launched.setenv(f"ACCELERATE_{name}", value)
            with pytest.raises(InputError, match=said):
                joined(options())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # which is what this is
    with pytest.raises(InputError, match=r"pip install bads-ppl\[llm\]"):
        joined(options(parallel="fsdp"))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    with pytest.raises(InputError, match=r"pip install bads-ppl\[llm\]"):
        joined(options())
