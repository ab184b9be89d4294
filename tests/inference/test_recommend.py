"""The command that recommends: what it runs, what it leaves alone, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bads_ppl.errors import InputError, Stopped
from inference import recommend as module
from inference.experiment import Experiment
from inference.recommend import CANDIDATES, main, make_candidates, named_candidates
from inference.runs import find_runs

SMALLER = ("sampler.train_batch=10", "sampler.meta_batch=5")
TWO = ("--candidate", "mixing", "--candidate", "only: method=meta_only")


@pytest.fixture(scope="module")
def ask(small) -> Callable[..., tuple[int, str, str]]:
    """Calls the command at the smallest size; exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main([*small, *SMALLER, *arguments])
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
        return code, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="module")
def done(ask, tmp_path_factory) -> tuple[Path, str]:
    """A finished comparison of two candidates, and what it said."""
    folder = tmp_path_factory.mktemp("recommend")
    code, out, err = ask(*TWO, f"run_dir={folder}")
    assert code == 0, err
    return folder, out


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "recommendation.json").read_text())
    return found


def test_every_meta_point_is_predicted_once_by_runs_that_have_not_seen_it(
    ask, tmp_path, monkeypatch
):
    seen: list[Experiment] = []
    sample = module.sample
    monkeypatch.setattr(module, "sample", lambda one: (seen.append(one), sample(one))[1])
    assert ask(*TWO, f"run_dir={tmp_path}", "--folds", "3")[0] == 0
    assert len(seen) == 6
    for runs in (seen[:3], seen[3:]):
        held = torch.cat([run.task.test.ids for run in runs])
        assert len(held) == len(held.unique()) == 50
        for run in runs:
            known = torch.cat([run.task.meta.ids, run.setup.train.ids])
            assert not torch.isin(run.task.test.ids, known).any()
            assert len(run.task.meta) + len(run.task.test) == 50
    points = read(tmp_path)["points"]
    for k, run in enumerate(seen[:3]):
        held = {
            one for one, fold in zip(points["id"], points["fold"], strict=True) if fold == k + 1
        }
        assert held == set(run.task.test.ids.tolist())


def test_the_test_set_does_not_enter(done, ask, tmp_path, monkeypatch):
    from inference import tasks

    load = tasks.load_mnist

    def other_test_set(root: Path, source: str) -> Any:
        splits = load(root, source)
        noise = torch.randint(0, 256, splits.test_images.shape, dtype=torch.uint8)
        labels = splits.test_labels.flip(0)
        return replace(splits, test_images=noise, test_labels=labels)

    monkeypatch.setattr(tasks, "load_mnist", other_test_set)
    assert ask(*TWO, f"run_dir={tmp_path}")[0] == 0
    assert read(tmp_path)["points"] == read(done[0])["points"]


def test_scores_are_those_of_a_run_on_the_fold(done, call, small, tmp_path, results):
    options = (*small, *SMALLER, "fold=2/2", "method=mixing", f"run_dir={tmp_path / 'run'}")
    assert call(*options).code == 0
    found = read(done[0])["points"]
    held = np.array(found["fold"]) == 2
    accuracy = np.array(found["right"]["mixing"])[held].mean()
    assert results(tmp_path / "run")["test"]["accuracy"] == pytest.approx(accuracy)
    assert results(tmp_path / "run")["dataset"] == "digits, meta fold 2/2"


def test_files_table_and_sentence_agree(done):
    folder, out = done
    found = read(folder)
    loss = {name: np.mean(values) for name, values in found["points"]["log_loss"].items()}
    best = min(loss, key=loss.get)
    assert found["recommended"] == best
    assert f"Recommended: {best}, " in out and found["sentence"] in out and found["limits"] in out
    rows = list(csv.DictReader((folder / "recommendation.csv").open()))
    assert [row["candidate"] for row in rows] == sorted(loss, key=loss.get)
    for row in rows:
        assert float(row["log_loss"]) == pytest.approx(loss[row["candidate"]])
    assert (folder / "recommendation.png").read_bytes()[:4] == b"\x89PNG"
    assert "Run it: python -m inference.run data.source=digits" in out and "run_dir" not in out


def test_the_candidate_that_is_clearly_better_is_recommended(ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Where nine of ten labels are wrong the curated points alone are the better teacher.
    options = ("task=mnist10_noise", "task.data.noise=0.9", "task.meta_per_class=4")
    options += ("steps=60", "burn_in=30", "evaluate_every=10", "seed=1")
    code, _, err = ask(*options, *TWO)
    assert code == 0, err
    found = read(tmp_path / "runs" / "mnist10_noise-4-recommend" / "seed1")
    best, other = found["candidates"]
    assert found["recommended"] == best["candidate"] == "only" and best["accuracy"] > 0.5
    assert other["candidate"] == "mixing" and not other["near"] and other["low"] > 0


def test_what_is_there_is_used_again(done, ask, tmp_path, monkeypatch):
    folder, _ = done
    before = read(folder)
    paths = sorted(folder.rglob("checkpoint.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in paths]
    assert len(paths) == 4
    assert ask(*TWO, f"run_dir={folder}")[0] == 0
    assert [path.stat().st_mtime_ns for path in paths] == stamps
    assert read(folder) == before


def test_a_comparison_that_was_stopped_goes_on(done, ask, tmp_path, monkeypatch):
    sample, calls = module.sample, []

    def stopped(experiment: Experiment) -> Any:
        calls.append(experiment)
        if len(calls) == 3:
            raise Stopped(signal.SIGTERM)
        return sample(experiment)

    (tmp_path / "recommendation.json").write_text("of other candidates")
    monkeypatch.setattr(module, "sample", stopped)
    code, _, err = ask(*TWO, f"run_dir={tmp_path}")
    assert code == 143 and "stopped by SIGTERM" in err
    assert not (tmp_path / "recommendation.json").exists()
    monkeypatch.undo()
    assert ask(*TWO, f"run_dir={tmp_path}")[0] == 0
    assert read(tmp_path)["points"] == read(done[0])["points"]


def test_other_settings_in_the_same_folder_are_refused(done, ask):
    folder, _ = done
    before = (folder / "recommendation.json").read_bytes()
    code, _, err = ask(*TWO, f"run_dir={folder}", "sparsity=0.3")
    assert code == 2 and "sparsity was 0.05, now 0.3" in err
    assert (folder / "recommendation.json").read_bytes() == before


WILD = "method=mixing method.learning_rate=1e9 method.clip=1e30"
STIFF = "model=joint prior.sparsity_scale=1e-4"


@pytest.mark.parametrize(
    ("options", "message"), [(WILD, "the chain diverged"), (STIFF, "run away: take step_size")]
)
def test_a_candidate_that_cannot_run_is_recorded_and_the_others_go_on(
    options, message, ask, tmp_path
):
    code, out, err = ask(f"run_dir={tmp_path}", *TWO, "--add", f"bad: {options}")
    assert code == 0, err
    failed = next(row for row in read(tmp_path)["candidates"] if row["candidate"] == "bad")
    assert message in failed["failed"] and failed["log_loss"] is None
    assert any(line.startswith("bad ") and message in line for line in out.splitlines())
    assert set(read(tmp_path)["points"]["right"]) == {"mixing", "only"}


@pytest.mark.parametrize("options", [WILD, STIFF])
def test_it_fails_where_every_candidate_does(options, ask, tmp_path):
    bad = ("--candidate", f"a: {options}", "--candidate", f"b: {options}")
    code, out, _ = ask(f"run_dir={tmp_path / 'runs'}", *bad)
    assert code == 1 and "No recommendation: every candidate failed." in out
    assert read(tmp_path / "runs")["recommended"] is None


def test_its_runs_are_no_runs_for_the_report(done):
    with pytest.raises(InputError, match="no runs in"):
        find_runs(done[0])


def test_the_candidates_there_are_compose_and_options_are_for_all(small):
    assert list(named_candidates([], [])) == list(CANDIDATES)
    found = {one.name: one for one in make_candidates(CANDIDATES, [*small, "seed=7"])}
    assert {one.config.seed for one in found.values()} == {7}
    assert found["joint"].config.impact.weight == 20 and found["joint"].choices.model == "joint"
    assert found["blo"].choices.method == "blo" and found["normalised"].choices.method == "bads"


def test_candidates_can_be_chosen_and_added():
    assert named_candidates(["blo", "mixing"], []) == {
        "blo": "method=blo",
        "mixing": "method=mixing",
    }
    assert list(named_candidates([], ["beta: sparsity=0.1"])) == [*CANDIDATES, "beta"]
    assert named_candidates(["blo"], ["beta: sparsity=0.1"])["beta"] == "sparsity=0.1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (*TWO, "--folds", "1"),
            "folds must be from 2 to 25, the number of meta points of class 0",
        ),
        ((*TWO, "--folds", "26"), "got 26: every fold needs a point of every class"),
        (
            (
                *TWO,
                "task.meta_per_class=1",
            ),
            "1 point of class 0, folds need at least 2 of every class",
        ),
        (("--candidate", "bol", "--add", "mixing"), "no candidate 'bol': did you mean blo?"),
        (("--add", "method=blo"), "there is no candidate 'method=blo'"),
        (("--add", "blo: method=blo"), "must have names of their own, got 'blo' twice"),
        (("--add", "../x: method=blo"), "letters, digits, _ and -, got '../x'"),
        (("--candidate", "blo"), "a comparison needs at least 2 candidates, got blo"),
        ((*TWO, "--add", "new: method=bol"), "candidate 'new' (method=bol) do not fit: "),
        ((*TWO, "--add", "new: model.windw=3"), "Could not override 'model.windw'"),
        (
            (*TWO, "--add", "new: +model.windw=3"),
            "there is no option model.windw: did you mean window?",
        ),
        (
            (*TWO, "--add", "new: model.window=0"),
            "a companion must restart every 1 or more steps, got 0",
        ),
        (
            (*TWO, "--add", "new: steps=x"),
            "Value 'x' of type 'str' could not be converted to Integer",
        ),
        ((*TWO, "--add", "new: seed=5"), "sets seed, which all candidates must share"),
        ((*TWO, "--add", "new: task=mnist10"), "sets task, which all candidates must share"),
        (
            (
                *TWO,
                "fold=1/2",
            ),
            "give folds with --folds",
        ),
        (
            (
                *TWO,
                "stesp=5",
            ),
            "the options of all candidates do not fit: Could not override 'stesp'",
        ),
        (
            (
                *TWO,
                "sampler.meta_batch=26",
            ),
            "the size of the meta set, 25, got 26",
        ),
        (
            (
                *TWO,
                "seed=-1",
            ),
            "seed must be at least 0, got -1",
        ),
        (
            (
                *TWO,
                "chains=0",
            ),
            "chains must be at least 1, got 0",
        ),
    ],
)
def test_wrong_input_is_refused_before_anything_runs(arguments, message, ask, tmp_path):
    code, out, err = ask(f"run_dir={tmp_path / 'runs'}", *arguments)
    assert message in err and code == 2 and out == ""
    assert not (tmp_path / "runs").exists()
