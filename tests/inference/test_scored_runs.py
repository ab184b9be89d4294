"""Runs of the methods that select by scores: what they leave, resume and refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from bads_ppl import Selection, plots
from bads_ppl.checkpoint import load_checkpoint, save_checkpoint
from bads_ppl.draws import read_draws
from inference import scores
from inference.report import write_report

SMALL = (
    *("data.source=digits", "task=mnist10_noise", "steps=6", "burn_in=2", "thinning=2"),
    *("evaluate_every=2", "chains=1", "method.proxy.steps=12"),
)
NAMES = ["cds", "rho_loss", "classact", "rds"]


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[None]:
    """Figures are not drawn, which would be a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda figure, path: Path(path).touch())
        yield


@pytest.fixture(scope="module")
def folder_of(call, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a method's finished run, beside those of the others and their cache."""
    root = tmp_path_factory.mktemp("runs")

    def find(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            where = (f"method={name}", f"run_dir={folder}", f"cache={root / 'cache'}")
            outcome = call(*SMALL, *where)
            assert outcome.code == 0, outcome.err
            assert "dataset is 'digits'" in outcome.err and outcome.err.count("\n") == 1
        return folder

    return find


@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_what_those_of_other_methods_do_with_scores_beside(name, folder_of, results):
    folder = folder_of(name)
    found = results(folder)
    fixed = name == "rds"
    assert found["evidence"] == ("fixed" if fixed else "optimisation path")
    assert found["diagnostics"]["verdict"] == found["evidence"]
    assert (found["model"], found["weights"]) == (
        ("joint", "fixed") if fixed else ("selective", "scores")
    )
    assert found["acceptance"].keys() <= {"theta"} if fixed else found["acceptance"] == {}
    assert found["cost"]["proxy_seconds"] > 0
    files = {path.name for path in folder.iterdir()}
    assert files == {
        *("config.yaml", "results.json", "metrics.jsonl", "weights.parquet", "posterior.nc"),
        *("plots", "chain-0"),
    }
    selection = Selection.from_parquet(folder / "weights.parquet")
    w, score = read_draws(folder / "chain-0").w, selection.columns["score"]
    assert set(np.unique(w)) == {0.0, 1.0} and np.allclose(selection.mean, w.mean(0))
    right = np.asarray(selection.columns["group"]) == "right"
    assert found["right"]["auc"] == pytest.approx(roc_auc_score(right, score))
    precision = average_precision_score(right, score)
    assert found["right"]["average_precision"] == pytest.approx(precision)
    size, share = len(score), found["sparsity"]
    if name == "cds":
        counts = [round(max(share, 0.5 ** (step / 100)) * size) for step in (4, 6)]
    else:
        counts = [round(share * size)] * 2
    assert w.sum(1).tolist() == counts
    if name in ("cds", "rds"):  # scores that stay: the same points on top in every draw
        top = np.argsort(-score, kind="stable")[: counts[-1]]
        assert w[-1][top].all()


def test_the_report_shows_them_with_their_auc(folder_of, tmp_path):
    root = folder_of("cds").parent
    for name in NAMES:
        folder_of(name)
    page = write_report(root, tmp_path / "page.html").read_text()
    assert all(f"<strong>{name}</strong>" in page for name in NAMES)
    assert "selective · scores" in page and "where a method selects by scores" in page


def state(folder: Path) -> dict[str, bytes]:
    chain = folder / "chain-0"
    tensors, _ = load_checkpoint(chain / "checkpoint.safetensors")
    found = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return found | {name: (chain / name).read_bytes() for name in ("w.f32", "functions.f64")}


def test_a_run_that_draws_its_rows_resumes_bit_for_bit(folder_of, call, tmp_path):
    """ClassAct: a second network, random rows, and scores that are averaged over draws."""
    whole = folder_of("classact")
    options = (*SMALL, "method=classact", f"run_dir={tmp_path}", f"cache={whole.parent / 'cache'}")
    assert call(*options, "steps=4").code == 0
    assert call(*options, "resume=true").code == 0
    assert state(tmp_path) == state(whole)
    mine, theirs = (Selection.from_parquet(f / "weights.parquet") for f in (tmp_path, whole))
    assert np.array_equal(mine.columns["score"], theirs.columns["score"])


def test_colour_images_and_a_learner_with_batch_normalisation_work_too(call, tmp_path, results):
    rng = np.random.default_rng(0)
    counts = {"train": 400, "test": 20}
    arrays = {f"x_{k}": rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for k, n in counts.items()}
    arrays |= {f"y_{k}": np.arange(n) % 10 for k, n in counts.items()}
    np.savez(tmp_path / "cifar10.npz", **arrays)
    outcome = call(
        *(option for option in SMALL if not option.startswith(("data", "task"))),
        *("task=cifar10", "data.source=files", f"data.root={tmp_path}", "task.meta_per_class=5"),
        *("task.data.per_class=20", "backbone.width=4", "backbone.depth=8", "method=classact"),
        *(f"run_dir={tmp_path / 'run'}", f"cache={tmp_path / 'cache'}"),
    )
    assert outcome.code == 0, outcome.err
    assert 0 < results(tmp_path / "run")["right"]["auc"] < 1


# ----------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("method=askllm",), "is for tasks whose points are texts, and those of task mnist10"),
        (("method=cds", "+method.rule.half_lif=3"), "rule.half_lif: did you mean half_life?"),
        (("method=cds", "+method.proxy.stps=3"), "method.proxy.stps: did you mean steps?"),
        (("method=classact", "+method.proxy.backbone.depth=3"), "method.proxy.backbone.depth"),
        (("method=rho_loss", "sampler.train_batch=9000"), "train_batch must be from 1 to the"),
        (("method=rho_loss", "sampler.train_batch=0"), "train_batch must be from 1 to the"),
    ],
)
def test_a_mistake_shows_before_any_proxy_is_trained(options, message, call, tmp_path):
    small = [option for option in SMALL if "proxy" not in option]
    cache, run = tmp_path / "cache", tmp_path / "run"
    outcome = call(*small, *options, f"cache={cache}", f"run_dir={run}")
    assert outcome.code == 2 and message in outcome.err and "Traceback" not in outcome.err
    assert not cache.exists() and not run.exists()


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ids: ids.flip(0), "has the points in another order"),
        (lambda ids: ids + 10_000, "is of another data set"),
    ],
)
def test_a_score_table_of_other_points_is_refused(spoil, message, folder_of, call, tmp_path):
    table = one(folder_of("cds").parent / "cache", "cds-*.safetensors")
    tensors, about = load_checkpoint(table, format=scores.FORMAT)
    tensors["ids"] = spoil(tensors["ids"])
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, tensors, {**about, "points": "of others"}, format=scores.FORMAT)
    run = tmp_path / "run"
    outcome = call(*SMALL, "method=cds", f"method.scores={other}", f"run_dir={run}")
    assert outcome.code == 2 and message in outcome.err and "Traceback" not in outcome.err
    assert not run.exists()


def test_a_table_that_is_named_gives_the_same_run_and_no_other_resumes_it(
    folder_of, call, tmp_path
):
    made = folder_of("cds")
    table = one(made.parent / "cache", "cds-*.safetensors")
    tensors, about = load_checkpoint(table, format=scores.FORMAT)
    mine, run = tmp_path / "mine.safetensors", tmp_path / "run"
    shutil.copy(table, mine)
    options = (*SMALL, "method=cds", f"method.scores={mine}", f"run_dir={run}")
    assert call(*options, f"cache={made.parent / 'cache'}").code == 0
    assert (run / "chain-0/w.f32").read_bytes() == (made / "chain-0/w.f32").read_bytes()
    save_checkpoint(mine, {**tensors, "values": -tensors["values"]}, about, format=scores.FORMAT)
    outcome = call(*options, f"cache={made.parent / 'cache'}", "resume=true")
    assert outcome.code == 2 and "belongs to another run: its scores is" in outcome.err


def test_a_damaged_proxy_is_named_with_the_remedy(folder_of, call, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(folder_of("rho_loss").parent / "cache", cache)
    for path in cache.glob("proxy-meta-*/chain-0/checkpoint.safetensors"):
        path.write_bytes(b"\xff" * 200)
    outcome = call(*SMALL, "method=rho_loss", f"cache={cache}", f"run_dir={run}")
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert f"the proxy in {cache}/proxy-meta-" in outcome.err and "cannot be used" in outcome.err
    assert "Remove that folder" in outcome.err and not run.exists()


def test_metrics_of_a_chain_that_selects_are_finite(folder_of):
    lines = (folder_of("classact") / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["groups.right.mean_weight"] > 0
