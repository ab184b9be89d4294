"""What a run leaves in its folder, that its numbers agree, and that nothing there gets lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from bads_ppl import Selection, kernel
from bads_ppl.checkpoint import load_checkpoint
from bads_ppl.draws import read_draws
from bads_ppl.errors import InputError
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.posterior import load
from inference import experiment
from inference.folder import WRITTEN, check_folder, prepare_folder, settings
from inference.outcome import mean_acceptance

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

VARIANTS = {
    "reverted": (),
    "restarted": ("model.auxiliary=restarted", "model.window=2"),
    "persistent": ("model.auxiliary=persistent", "chains=2"),
    "joint": ("model=joint",),
    "running mean": ("model=joint", "prior.total=running_mean"),
    "network": ("weights=network",),
    "joint network": ("model=joint", "weights=network"),
    "ten classes": ("task=mnist10", "sampler.train_batch=20"),
    "wrong labels": ("task=mnist10_noise",),
    "both troubles": ("task=mnist10_noisy", "model=joint"),
    "blo": ("method=blo",),
    "mixing": ("method=mixing",),
    "meta_only": ("method=meta_only",),
    "random_select": ("method=random_select", "sparsity=0.2"),
    "dup_meta": ("method=dup_meta", "task=mnist10"),
    "paper": ("preset=paper", "steps=6", "sampler.train_batch=10"),
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())

KEYS = {
    "task",
    "dataset",
    "method",
    "model",
    "weights",
    "sampler",
    "seed",
    "steps",
    "test",
    "groups",
    "cost",
    "versions",
}


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def chain_files(folder: Path) -> dict[str, bytes]:
    """What a chain made, byte by byte; the checkpoint's tensors but not its clock."""
    files: dict[str, bytes] = {}
    for path in sorted(folder.glob("chain-*/*")):
        name = f"{path.parent.name}/{path.name}"
        if path.name == "checkpoint.safetensors":
            tensors, about = load_checkpoint(path)
            for key, tensor in tensors.items():
                files[f"{name}:{key}"] = tensor.numpy().tobytes()
            files[f"{name}:draws"] = str(about["draws"]).encode()
        elif not path.name.startswith("snapshot"):
            files[name] = path.read_bytes()
    assert any(name.endswith("w.f32") for name in files)
    return files


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------- the run's folder


@variants
def test_a_run_leaves_all_its_files_and_nothing_else(options, finished):
    folder = finished(*options)
    plots = {path.name for path in (folder / "plots").iterdir()}
    wanted = {"test_accuracy.png", "weights_by_group.png", "weight_histogram.png"}
    wanted |= {"diagnostics_traces.png"}  # two draws have no R-hat and no ESS
    if "chains=2" in options:
        wanted.add("diagnostics_ranks.png")
    assert plots == wanted
    for name in plots:
        assert (folder / "plots" / name).read_bytes().startswith(b"\x89PNG")
    chains = {f"chain-{k}" for k in range(OmegaConf.load(folder / "config.yaml").chains)}
    fixed = {"plots", "config.yaml", "results.json", "metrics.jsonl", "weights.parquet"}
    assert {path.name for path in folder.iterdir()} == fixed | {"posterior.nc"} | chains
    for chain in chains:
        names = {path.name for path in (folder / chain).iterdir()}
        assert {"checkpoint.safetensors", "w.f32", "functions.f64", "metrics.jsonl"} <= names


@variants
def test_results_have_every_key_and_finite_numbers(options, finished, results):
    found = results(finished(*options))
    assert set(found) >= KEYS
    assert 0 <= found["test"]["accuracy"] <= 1 and 0 <= found["test"]["accuracy_last"] <= 1
    assert len(found["groups"]) >= 2
    assert all(found["cost"][name] > 0 for name in ("seconds", "ms_per_step", "peak_memory_mib"))
    assert {"torch", "pyro-ppl", "bads-ppl", "numpy", "arviz", "python"} <= set(found["versions"])
    assert found["dataset"] == "digits" and "not MNIST" in found["warnings"][0]
    assert found["steps"] == 6 and found["seed"] == 0 and found["sampler"] == "sgld"


@variants
def test_diagnostics_of_two_draws_say_that_nothing_is_known(options, finished):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    folder = finished(*options)
    found = json.loads((folder / "results.json").read_text(), parse_constant=refuse)
    block = found["diagnostics"]
    # The start is no collapse, and so few steps lead to none.
    verdicts = {"fixed": "fixed", "optimisation path": "optimisation path"}
    assert block["verdict"] == verdicts.get(found["evidence"], "unknown")
    assert block["sentence"].endswith(".")
    for name in ("rhat_max", "rhat_99pct", "ess_bulk_min", "ess_bulk_median", "ess_tail_min"):
        assert block[name] is None
    assert {"potential", "train_loss", "meta_loss", "test_loss"} <= set(block["functions"])
    columns = Selection.from_parquet(folder / "weights.parquet").columns
    assert {"rhat", "ess_bulk", "ess_tail", "mcse_mean", "mcse_sd"} <= set(columns)


def test_diagnostics_of_a_run_are_those_of_arviz(tmp_path, call):
    size = ("data.source=digits", "steps=40", "burn_in=10", "thinning=3", "chains=2")
    outcome = call(*size, f"run_dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    block = json.loads((tmp_path / "results.json").read_text())["diagnostics"]
    columns = Selection.from_parquet(tmp_path / "weights.parquet").columns
    w = np.asarray(load(tmp_path / "posterior.nc")["posterior"]["w"], dtype=float)
    potential = np.asarray(load(tmp_path / "posterior.nc")["sample_stats"]["potential"])
    for point in np.linspace(0, w.shape[2] - 1, 20).astype(int):
        assert columns["rhat"][point] == pytest.approx(arviz.rhat(w[..., point]), rel=1e-8)
        ess = arviz.ess(w[..., point])
        assert columns["ess_bulk"][point] == pytest.approx(ess, rel=1e-8)
    assert block["functions"]["potential"]["rhat"] == pytest.approx(float(arviz.rhat(potential)))
    assert block["rhat_max"] == np.nanmax(columns["rhat"])
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {f"diagnostics_{name}.png" for name in ("rhat", "ess", "traces", "ranks")} <= plots


@variants
def test_weights_of_results_parquet_posterior_and_draws_agree(options, finished, results):
    folder = finished(*options)
    found, selection = results(folder), Selection.from_parquet(folder / "weights.parquet")
    chains = sorted(folder.glob("chain-*"))
    draws = [read_draws(chain) for chain in chains]
    posterior = load(folder / "posterior.nc")
    w = np.asarray(posterior["posterior"]["w"])
    assert w.shape == (len(chains), 2, len(selection))  # (6 - 2) / 2 draws a chain
    assert np.array_equal(w, np.stack([one.w for one in draws]))
    assert np.array_equal(posterior["posterior"]["point"], selection.ids)
    assert np.allclose(selection.mean, w.astype(float).mean((0, 1)))
    assert ((w >= 0) & (w <= 1)).all()
    group = np.asarray(selection.columns["group"])
    assert np.array_equal(posterior["constant_data"]["group"], group)
    for name, numbers in found["groups"].items():
        assert numbers["count"] == (group == name).sum() > 0
        assert numbers["mean_weight"] == pytest.approx(selection.mean[group == name].mean())
        assert numbers["high"] == (name not in ("frequent", "wrong"))
    assert np.array_equal(posterior["sample_stats"]["step"], [[4, 6]] * len(chains))
    assert np.allclose(posterior["sample_stats"]["lp"], -posterior["sample_stats"]["potential"])
    assert np.isfinite(posterior["sample_stats"]["potential"]).all()
    assert selection.draws == 2 * len(chains) == found["chains"] * 2


@variants
def test_metrics_are_those_of_the_chains_in_order(options, finished, results):
    folder = finished(*options)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    chains = sorted(folder.glob("chain-*"))
    assert [(row["chain"], row["step"]) for row in rows] == [
        (chain, step) for chain in range(len(chains)) for step in (2, 4, 6)
    ]
    apart = "".join((chain / "metrics.jsonl").read_text() for chain in chains)
    assert apart == (folder / "metrics.jsonl").read_text()
    last = [row["test.accuracy"] for row in rows if row["step"] == 6]
    assert results(folder)["test"]["accuracy_last"] == pytest.approx(np.mean(last))
    named = {
        "test.accuracy",
        "test.loss",
        "meta_loss",
        "weighted_train_loss",
    } | {f"groups.{name}.mean_weight" for name in results(folder)["groups"]}
    assert all(named <= set(row) and all(map(np.isfinite, row.values())) for row in rows)


def test_the_method_shows_in_the_results(finished, results):
    names = ("method", "model", "weights", "evidence")
    seen = {v: tuple(results(finished(*o))[n] for n in names) for v, o in VARIANTS.items()}
    assert seen["reverted"] == ("bads", "normalised", "instance", "approximate")
    assert seen["joint network"] == ("bads", "joint", "network", "approximate")
    assert seen["paper"] == ("bads", "joint", "network", "optimisation path")
    assert seen["mixing"] == ("mixing", "joint", "fixed", "fixed")


def test_fixed_weights_are_recorded_as_the_method_gave_them(finished):
    def mean(variant: str) -> np.ndarray:
        return Selection.from_parquet(finished(*VARIANTS[variant]) / "weights.parquet").mean

    assert set(mean("mixing")) == {1.0} and set(mean("meta_only")) == {0.0}
    chosen = mean("random_select")
    assert set(chosen) == {0.0, 1.0} and chosen.sum() == np.floor(0.2 * len(chosen))


def test_latent_weights_move_and_chains_differ(finished):
    first, second = (read_draws(finished(*VARIANTS["persistent"]) / f"chain-{k}") for k in (0, 1))
    assert not np.array_equal(first.w, second.w)
    assert first.w[0].std() > 0 and not np.array_equal(first.w[0], first.w[1])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, command, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        assert command(f"seed={seed}", f"run_dir={tmp_path / name}").code == 0
    assert chain_files(finished()) == chain_files(tmp_path / "same")
    assert chain_files(finished()) != chain_files(tmp_path / "other")


def test_the_configuration_that_is_saved_is_resolved(finished):
    config = OmegaConf.load(finished() / "config.yaml")
    assert config.sparsity == 0.05 and config.weights.build.mean == 0.05
    assert config.task.label == "mnist" and config.task.data.meta_per_class == 25


# ------------------------------------------------------------------------------------- resuming


@variants
def test_a_lengthened_chain_equals_one_that_was_never_stopped(options, finished, command, tmp_path):
    folder = tmp_path / "run"
    shorter = command(*options, "steps=4", f"run_dir={folder}")
    assert shorter.code == 0, shorter.err
    (folder / "chain-0" / "w.f32").open("ab").write(b"half a row")
    longer = command(*options, f"run_dir={folder}", "resume=true")
    assert longer.code == 0, longer.err
    assert chain_files(folder) == chain_files(finished(*options))


def test_resuming_a_finished_run_changes_no_draw_and_no_result(finished, command, tmp_path):
    folder = copy(finished(), tmp_path / "run")
    assert command(f"run_dir={folder}", "resume=true").code == 0
    assert chain_files(folder) == chain_files(finished())
    before, after = (json.loads((f / "results.json").read_text()) for f in (finished(), folder))
    for found in (before, after):
        del found["run_dir"], found["cost"]["peak_memory_mib"]
    assert before == after


@pytest.mark.parametrize(
    ("option", "change"),
    [
        ("seed=1", "seed was 0, now 1"),
        ("method.learning_rate=0.05", "method.learning_rate was 0.3, now 0.05"),
        ("model=joint", "model._target_ was models.normalised, now models.joint"),
        ("sparsity=0.1", "sparsity was 0.05, now 0.1"),
        ("task.meta_per_class=10", "task.meta_per_class was 25, now 10"),
        ("burn_in=1", "burn_in was 2, now 1"),
    ],
)
def test_resuming_with_other_settings_is_refused(option, change, finished, command, tmp_path):
    folder = copy(finished(), tmp_path / "run")
    outcome = command(f"run_dir={folder}", "resume=true", option)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "holds a run with other settings: " in outcome.err and change in outcome.err
    assert tree(folder) == tree(finished())


def test_resuming_may_change_how_often_a_checkpoint_is_written(finished, command, tmp_path):
    folder = copy(finished(), tmp_path / "run")
    assert command(f"run_dir={folder}", "resume=true", "checkpoint_seconds=1").code == 0


def test_resuming_with_other_data_is_refused(finished, command, tmp_path, monkeypatch):
    folder = copy(finished(), tmp_path / "run")
    from inference import tasks

    monkeypatch.setattr(tasks, "normalise", lambda images: images.float().unsqueeze(1) / 255)
    outcome = command(f"run_dir={folder}", "resume=true")
    assert outcome.code == 2 and "belongs to another run: its train is" in outcome.err
    assert tree(folder) == tree(finished())


def test_a_chain_cannot_be_shortened(finished, command, tmp_path):
    folder = copy(finished(), tmp_path / "run")
    outcome = command(f"run_dir={folder}", "resume=true", "steps=4")
    assert outcome.code == 2 and "has 6 steps already, more than the 4 asked for" in outcome.err
    assert tree(folder) == tree(finished())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 200)


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "it is damaged; remove it to start that chain anew"),
        (empty, "it is damaged; remove it to start that chain anew"),
        (overwrite_header, "it is damaged; remove it to start that chain anew"),
        (foreign, "is not a bads-ppl checkpoint"),
    ],
)
def test_a_damaged_or_foreign_checkpoint_is_refused(damage, message, finished, command, tmp_path):
    folder = copy(finished(), tmp_path / "run")
    path = folder / "chain-0" / "checkpoint.safetensors"
    damage(path)
    before = tree(folder)
    outcome = command(f"run_dir={folder}", "resume=true")
    assert outcome.code == 2 and message in outcome.err and str(path) in outcome.err
    assert "Traceback" not in outcome.err
    assert tree(folder) == before
    path.unlink()  # the remedy that the message names
    assert command(f"run_dir={folder}", "resume=true").code == 0
    assert chain_files(folder) == chain_files(finished())


def test_the_checkpoint_of_another_chain_is_refused(finished, command, tmp_path):
    options = VARIANTS["persistent"]
    folder = copy(finished(*options), tmp_path / "run")
    paths = [folder / f"chain-{k}" / "checkpoint.safetensors" for k in (0, 1)]
    shutil.copy(paths[1], paths[0])
    outcome = command(*options, f"run_dir={folder}", "resume=true")
    assert outcome.code == 2 and "its chain is 1, expected 0" in outcome.err


def test_lost_draws_are_noticed(finished, command, tmp_path):
    folder = copy(finished(), tmp_path / "run")
    path = folder / "chain-0" / "w.f32"
    path.write_bytes(path.read_bytes()[:-1])
    outcome = command(f"run_dir={folder}", "resume=true")
    assert outcome.code == 2 and "holds fewer draws than its checkpoint says (2)" in outcome.err


# ---------------------------------------------------------------------------- folders and disks


def test_a_folder_with_another_run_is_left_alone(finished, command, tmp_path):
    folder = copy(finished(), tmp_path / "run")
    outcome = command(f"run_dir={folder}", "seed=5")
    assert outcome.code == 2
    assert "already holds a run: use resume=true" in outcome.err and "overwrite=true" in outcome.err
    assert tree(folder) == tree(finished())


@pytest.mark.parametrize("option", ["resume=true", "overwrite=true", "resume=false"])
def test_a_folder_that_holds_something_else_is_left_alone(option, command, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    outcome = command(f"run_dir={tmp_path}", option)
    assert outcome.code == 2 and "is not empty and holds no run" in outcome.err
    assert tree(tmp_path) == {"thesis.txt": b"years of work"}


def test_overwrite_replaces_the_run_and_spares_what_no_run_wrote(finished, command, tmp_path):
    folder = copy(finished(*VARIANTS["persistent"]), tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    (folder / "chain-of-thought").mkdir()
    assert command(f"run_dir={folder}", "overwrite=true").code == 0
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "chain-of-thought").is_dir()
    assert not (folder / "chain-1").exists()
    assert chain_files(folder) == chain_files(finished())


@pytest.mark.parametrize(
    "mistake",
    [
        "sampler.train_batch=1000",
        "sampler.meta_batch=1000",
        "sparsity=5",
        "device=cuda:99",
        "task.meta_per_class=0",
        "data.source=files",
        "chains=0",
        "workers=0",
        "model.window=0",
        "weights.group=v",
        "method.prior_scale=0",
        "table=disc",
        "cuda_graph=true",
    ],
)
def test_a_mistake_beside_overwrite_does_not_cost_the_old_run(mistake, finished, command, tmp_path):
    folder = copy(finished(), tmp_path / "run")
    options = (f"run_dir={folder}", "overwrite=true", "data.root=none", "device=cpu", mistake)
    outcome = command(*options)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert tree(folder) == tree(finished())


def test_steps_are_checked_on_the_network_that_the_chain_starts_with(
    command, tmp_path, monkeypatch
):
    starts = []

    def look(kernel: MinibatchKernel) -> None:
        parameters = kernel.latents.networks["theta"].module.parameters()
        starts.append(torch.cat([one.detach().flatten() for one in parameters]))

    monkeypatch.setattr(experiment, "check_stiffness", look)
    monkeypatch.setattr(kernel, "check_stiffness", look)
    assert command(f"run_dir={tmp_path / 'run'}").code == 0
    before, first_step = starts
    assert torch.equal(before, first_step)


def test_a_refused_run_leaves_no_folder_behind(command, tmp_path):
    assert command(f"run_dir={tmp_path / 'run'}", "sampler.train_batch=1000").code == 2
    assert not (tmp_path / "run").exists()


def test_a_run_dir_that_cannot_be_made_is_named_with_the_remedy(command, tmp_path):
    (tmp_path / "file").write_text("in the way")
    under = command(f"run_dir={tmp_path / 'file' / 'run'}")
    assert under.code == 1 and "cannot make run_dir" in under.err
    assert "choose another folder" in under.err and "Traceback" not in under.err
    itself = command(f"run_dir={tmp_path / 'file'}")
    assert itself.code == 2 and "is a file: choose a folder" in itself.err
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture
def largest_file() -> Callable[[int], None]:
    """Sets how large a file may grow, as a disk that fills up would; lifted after the test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "what"), [(200_000, "checkpoint.safetensors"), (600, "chain-0 (")]
)
def test_a_write_that_fails_keeps_the_last_checkpoint(
    size, what, command, finished, tmp_path, largest_file
):
    folder = tmp_path / "run"
    options = (f"run_dir={folder}", "thinning=1", "snapshots=0", "checkpoint_seconds=0")
    assert command(*options, "steps=4").code == 0
    before = load_file(folder / "chain-0" / "checkpoint.safetensors")
    largest_file(size)
    outcome = command(*options, "resume=true")
    largest_file(resource.RLIM_INFINITY)
    assert outcome.code == 1, outcome.err
    assert "cannot write" in outcome.err and what in outcome.err
    assert "choose another folder" in outcome.err
    assert "Traceback" not in outcome.err
    after = load_file(folder / "chain-0" / "checkpoint.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert command(*options, "resume=true").code == 0
    assert chain_files(folder) == chain_files(finished("thinning=1"))


@pytest.mark.parametrize("file", ["results.json", "weights.parquet", "posterior.nc", "config.yaml"])
def test_a_full_disk_is_named_and_what_was_there_stays(
    file, finished, command, tmp_path, monkeypatch
):
    folder = copy(finished(), tmp_path / "run")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    outcome = command(f"run_dir={folder}", "resume=true")
    assert outcome.code == 1 and "the disk is full: free some space" in outcome.err
    assert file in outcome.err and "Traceback" not in outcome.err
    assert (folder / file).read_bytes() == (finished() / file).read_bytes()
    assert not [path for path in folder.rglob(".*") if path.is_file()]
    assert chain_files(folder) == chain_files(finished())


def test_a_folder_is_checked_without_a_change_and_prepared_without_a_loss(tmp_path):
    config = OmegaConf.create({"overwrite": False, "resume": False, "steps": 1, "seed": 0})
    check_folder(tmp_path / "new", config)
    assert not (tmp_path / "new").exists()
    prepare_folder(tmp_path / "new", config)
    with pytest.raises(InputError, match="already holds a run"):
        check_folder(tmp_path / "new", config)
    resumed = OmegaConf.merge(config, {"resume": True, "steps": 9})
    check_folder(tmp_path / "new", resumed)
    with pytest.raises(InputError, match="seed was 0, now 1"):
        check_folder(tmp_path / "new", OmegaConf.merge(resumed, {"seed": 1}))
    (tmp_path / "new" / "config.yaml").write_text("{half")
    with pytest.raises(InputError, match=r"cannot be read .*: the run cannot be resumed"):
        check_folder(tmp_path / "new", resumed)


def test_all_that_a_run_writes_is_known_to_overwrite(finished):
    folder = finished(*VARIANTS["persistent"])
    known = {path for pattern in WRITTEN for path in folder.glob(pattern)}
    assert known == set(folder.iterdir())


def test_settings_leave_out_what_may_change():
    may = {"steps": 5, "chains": 2, "resume": True, "run_dir": "x"}
    assert settings(OmegaConf.create({"seed": 3, "thinning": 2, **may})) == {
        "seed": 3,
        "thinning": 2,
    }


# ------------------------------------------------------------------------------------ divergence


@pytest.mark.parametrize("options", [("model=joint",), ("weights=network",), ("method=mixing",)])
def test_a_chain_that_diverges_names_a_step_size_and_keeps_a_good_checkpoint(
    options, command, tmp_path
):
    huge = ("method.learning_rate=1e9", "method.clip=1e30", "steps=200", "checkpoint_seconds=0")
    outcome = command(*huge, *options, f"run_dir={tmp_path / 'run'}")
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "the chain diverged: the potential is not finite at step" in outcome.err
    assert "method.learning_rate=2.5e+08" in outcome.err
    assert ("weights.step_size=" in outcome.err) == (options != ("method=mixing",))
    tensors, about = load_checkpoint(tmp_path / "run" / "chain-0" / "checkpoint.safetensors")
    assert about["settings"]["method"]["learning_rate"] == 1e9
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    assert floating and all(bool(tensor.isfinite().all()) for tensor in floating)
    assert not (tmp_path / "run" / "results.json").exists()


def test_chains_added_on_resuming_are_those_of_a_run_with_as_many(command, tmp_path):
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    assert command(f"run_dir={grown}").code == 0
    assert command(f"run_dir={grown}", "chains=2", "resume=true").code == 0
    assert command(f"run_dir={whole}", "chains=2").code == 0
    assert chain_files(grown) == chain_files(whole)


def test_acceptance_is_averaged_over_evaluations_after_burn_in_of_all_chains():
    rows = [{"step": step, "acceptance.w": rate} for step, rate in ((2, 0.1), (4, 0.6), (4, 0.8))]
    assert mean_acceptance(rows, 2) == {"w": pytest.approx(0.7)}
    assert mean_acceptance([{"step": 4, "test.loss": 1.0}], 2) == {}


def test_results_tell_how_often_a_metropolis_test_would_accept(finished, results):
    found = results(finished("model=joint"))["acceptance"]
    assert set(found) == {"theta", "w"} and all(0 <= rate <= 1 for rate in found.values())
    assert results(finished())["acceptance"] == {}  # a companion leaves no density


def test_results_tell_how_well_weights_find_wrong_labels(finished, results):
    folder = finished("task=mnist10_noise")
    found = results(folder)["right"]
    table = Selection.from_parquet(folder / "weights.parquet").to_frame()
    right = (table["group"] == "right").to_numpy()
    mean = table["mean"].to_numpy()
    pairs = mean[right][:, None] - mean[~right][None, :]
    by_hand = ((pairs > 0) + 0.5 * (pairs == 0)).mean()  # chance that a right one weighs more
    assert found["auc"] == pytest.approx(by_hand)
    assert 0 < found["average_precision"] <= 1
    assert "right" not in results(finished()) and "right" not in results(finished("method=mixing"))
