"""The task webnlg: its sets, over-long entries, what it refuses, and whole runs of it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from bads_ppl.errors import InputError
from inference.report import render
from inference.runs import find_runs
from inference.tasks import Task
from inference.webnlg import webnlg
from inference.webnlg_splits import generated, splits_of
from inference.writing import Writing
from models.language import IGNORED
from models.seq2seq import Seq2Seq
from models.seq2seq_tokens import SIZES, Pieces

SMALL = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 24, "num_layers": 1}
RUN = (
    "task=webnlg",
    "task.kind=controlled",
    "task.meta_per_domain=4",
    "task.data.curve=5",
    "task.data.max_target=24",
    "data.source=generated",
    "steps=4",
    "burn_in=2",
    "thinning=1",
    "evaluate_every=2",
    "chains=1",
    "sampler.train_batch=8",
    "sampler.meta_batch=4",
)


@pytest.fixture(autouse=True)
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "tiny", SMALL)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built model, which the tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(cache):
    """The task with further options."""

    def build(seed: int = 0, **options) -> Task:
        given = {"root": "none", "source": "generated", "kind": "controlled", "model": "built"}
        return webnlg(seed=seed, cache=cache, **{**given, "meta_per_domain": 4, **options})

    return build


@pytest.fixture
def run(call, cache, tmp_path):
    """A run of the command with further options, and its folder."""

    def build(*options: str) -> Path:
        done = call(*RUN, f"cache={cache}", f"run_dir={tmp_path / 'run'}", *options)
        assert done.code == 0, done.err
        return tmp_path / "run"

    return build


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def file(tmp_path) -> Path:
    """The made-up set as a file, with some of its City entries in a domain of their own."""
    rows = []
    for number, entry in enumerate(generated("controlled").entries):
        moved = entry.domain == "City" and entry.split == "train" and number % 2
        rows.append(
            {
                "split": entry.split,
                "category": "Village" if moved else entry.domain,
                "eid": f"Id{number}",
                "triples": [list(triple) for triple in entry.triples],
                "references": list(entry.references),
            }
        )
    assert rows[-1]["split"] == "test"
    rows[-1]["references"].append("Åß")
    path = tmp_path / "webnlg_en.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_built_model_is_trained_on_domains_that_are_left_out_whatever_the_seed(make, file):
    given = {"root": str(file), "source": "files", "pretraining": 2}
    first, second = (make(seed, **given) for seed in (0, 1))
    assert first.network == second.network and first.network["pretrained"]
    assert not torch.equal(first.meta.input["ids"], second.meta.input["ids"])
    pieces = Pieces(Path(first.network["folder"]), 9, 9)
    assert pieces.text(torch.tensor(pieces.source(["Åß"]))) == ["Åß"]  # of an entry of the test
    (note,) = [note for note in first.warnings if "T5" in note]
    assert "texts of other domains only" in note
    copier = make(
        **given,
        train_domains=["City", "Village", "Astronaut"],
        kind="full",
        target_domains=["Athlete", "Politician", "Artist"],
    )
    assert any("trained to copy only" in note for note in copier.warnings)
    plain = make(**{**given, "pretraining": 0})
    assert not plain.network["pretrained"]
    assert any("without pretraining" in note for note in plain.warnings)


def test_points_are_entries_with_one_text_each(make):
    task = make()
    splits = splits_of(generated("controlled"), "controlled", seed=0, meta_per_domain=4)
    said = [text for entry in splits.train for text in entry.references]
    assert [text.split("\n")[1] for text in task.texts] == said
    assert len(task.train) == len(said) and len(task.meta) == len(splits.meta) == 12
    assert len(task.test) == len(splits.test) == len(task.scoring.references)
    pieces = Pieces(Path(task.network["folder"]), 128, 64)
    assert [pieces.text(task.train.target[[row]])[0] for row in (0, 7)] == [said[0], said[7]]
    assert task.train.input["labels"].equal(task.train.target)
    padded = task.train.input["mask"].sum(1) + (task.train.target != IGNORED).sum(1)
    assert task.train.lengths.equal(padded)


def test_the_close_domain_is_what_should_be_selected(make):
    task = make()
    assert set(task.groups) == {"Astronaut", "City"} and task.high == ("Astronaut",)
    assert task.right.equal(task.groups["Astronaut"]) and task.right_means == "domain is close"
    assert task.sparsity == pytest.approx(float(task.right.double().mean()) / 2)
    other = make(close="City", train_domains=["City", "Astronaut"])
    assert other.high == ("City",) and other.right.equal(task.groups["City"])


def test_one_domain_may_be_named_without_a_list(make):
    given = {"kind": "full", "train_domains": ["City"], "target_domains": ["Athlete"]}
    task = make(**given)
    alone = make(kind="full", train_domains="City", target_domains="Athlete")
    assert set(alone.groups) == {"City"} and alone.texts == task.texts
    assert alone.scoring.sources == task.scoring.sources


def test_with_all_domains_nothing_is_known_of_the_right_ones(make):
    task = make(kind="full")
    assert task.right is None and task.high == () and len(task.groups) == 4
    assert task.sparsity == 0.1


def test_settings_are_chosen_on_other_entries_than_the_test_s(make):
    tested = [set(make(seed).scoring.sources) for seed in (0, 1)]
    chosen = [set(make(seed, split="validation").scoring.sources) for seed in (0, 1)]
    assert chosen[0] == chosen[1] and not chosen[0] & (tested[0] | tested[1])
    assert tested[0] != tested[1]  # the seed draws the meta entries from among them


def test_why_the_usual_model_is_not_taken_is_told(make, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (warning,) = make(model=None).warnings[-1:]
    assert "without pretraining" in warning and "google-t5/t5-small" in warning


def test_networks_depend_on_the_model_and_the_loss(make):
    """Proxies of one must not be taken for those of another."""
    found = [make().depends, make(loss="sequence").depends, make(size="small").depends]
    assert len({json.dumps(one) for one in found}) == 3


def test_a_model_without_pretraining_is_told_of(make):
    (warning,) = make(source="generated", size="tiny").warnings[-1:]
    assert "without pretraining" in warning and make().network["pretrained"] is False


@pytest.mark.parametrize(
    ("long", "says"), [("cut", "points have more than .*: cut"), ("drop", "left out")]
)
def test_long_entries_are_counted_and_cut_or_left_out(make, long, says):
    whole, task = make(), make(max_target=12, long=long)
    fits = (whole.train.target != IGNORED).sum(1) <= 12
    assert 0 < int(fits.sum()) < len(fits)
    cut = (whole.test.target != IGNORED).sum(1) > 12
    said = f"{int(cut.sum())} of {len(cut)} test points have more"
    (of_test,) = [text for text in task.warnings if text.startswith(said)]
    assert cut.any() and of_test.endswith(": cut") and len(task.test) == len(cut)
    told = [text for text in task.warnings if "train points have more" in text]
    assert told[0].startswith(f"{int((~fits).sum())} of {len(fits)} train points")
    assert any(says.split(".*")[-1].strip(": ") in text for text in told)
    assert len(task.train) == (len(fits) if long == "cut" else int(fits.sum()))
    assert task.train.target.shape[1] == 12 and len(task.texts) == len(task.train)
    ends = task.train.target.gather(1, ((task.train.target != IGNORED).sum(1) - 1)[:, None])
    assert set(ends.flatten().tolist()) == {1}  # every text keeps its end token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, "data.source must be one of auto, files, generated, got 'web'"),
        ({"source": "files"}, "there is no WebNLG in none"),
        ({"split": "dev"}, "split must be one of .* got 'dev'"),
        ({"long": "ignore"}, "task.data.long must be one of cut, drop, refuse, got 'ignore'"),
        ({"loss": "word"}, "task.data.loss must be one of token, sequence, got 'word'"),
        ({"long": "refuse", "max_target": 12}, "of .* train points have more than .*: raise task"),
        ({"long": "drop", "max_target": 2}, "no train or no meta point is short enough"),
        ({"kind": "half"}, "half"),
        (
            {"train_domains": ["Astronut", "City"]},
            "train_domains must .* got 'Astronut': there",
        ),
        ({"meta_per_domain": 10_000}, "10000|10,000"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"beams": 0}, "beams must be at least 1, got 0"),
        ({"pretraining": -1}, "task.data.pretraining must be 0 steps or more, got -1"),
    ],
)
def test_what_cannot_be_used_is_refused(make, options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


def test_a_complete_local_folder_is_taken_as_it_is(make, run, tmp_path):
    built, folder = Path(make().network["folder"]), tmp_path / "t5"
    shutil.copytree(built, folder)
    with torch.random.fork_rng():
        Seq2Seq(built, pretrained=False).save(folder)
    task = make(model=str(folder))
    assert task.network == {"folder": str(folder), "pretrained": True}
    assert not any("the network is a T5" in note for note in task.warnings)
    data = results(run("method=mixing", f"task.model={folder}", "steps=2", "burn_in=1"))["data"]
    assert (data["model"], data["pretrained"], data["built"]) == (str(folder), True, False)
    assert data["model_version"] == task.depends["model"]


def test_an_incomplete_model_is_refused(make, tmp_path):
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "config.json").write_text(
        (Path(make().network["folder"]) / "config.json").read_text()
    )
    with pytest.raises(InputError, match=str(folder)):
        make(model=str(folder))


def test_a_run_weighs_entries_and_writes_texts(run, tmp_path):
    folder = run()
    found = results(folder)
    assert list(found["test"])[:2] == ["bleu", "chrf"] and {"bleu_last", "count"} <= set(
        found["test"]
    )
    assert set(found["groups"]) == {"Astronaut", "City"} and 0 <= found["right"]["auc"] <= 1
    assert found["right"]["what"] == "domain is close"
    table = pd.read_parquet(folder / "weights.parquet")
    assert "label" not in table and set(table["group"]) == {"Astronaut", "City"}
    with (folder / "written.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 20 and set(written[0]) == {"source", "written", "reference"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4] and all("test.bleu" in row for row in rows)
    assert (folder / "plots" / "test_bleu.png").stat().st_size > 0
    page = render(find_runs(tmp_path))
    assert "Texts that it wrote" in page and written[0]["reference"][:20] in page


@pytest.mark.parametrize(
    "options",
    [
        ("model=joint", "sampler.bucket=3", "weights.minibatches=uniform"),
        ("weights=network",),
        ("weights=instance",),
        ("method=blo",),
        ("method=mixing", "backbone.rows=3", "task.model=built", "task.data.loss=sequence"),
        ("method=random_select", "task.data.beams=2"),
        ("method=dup_meta", "backbone.precision=bfloat16"),
        ("method=meta_only", "backbone.checkpoint=true"),
        ("method=cds", "method.proxy.steps=2", "method.rule.tuning_steps=2"),
        ("method=rho_loss", "method.proxy.steps=2"),
        ("method=classact", "method.proxy.steps=2"),
        ("method=rds", "method.proxy.steps=2"),
        ("method=askllm", "method.rule.model={judge}", "method.rule.max_tokens=8"),
    ],
    ids=lambda options: "-".join(options[:1]),
)
def test_every_method_runs_on_it(run, judges, options):
    given = [option.format(judge=judges["llama"]) for option in options]
    found = results(run("steps=2", "burn_in=1", "evaluate_every=2", *given))
    assert 0 <= found["test"]["bleu"] <= 100 and found["steps"] == 2


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(run, call, cache, tmp_path, monkeypatch):
    """The mean of theta, from which texts are written, is in the checkpoint too."""
    whole = run()
    arguments = (*RUN, f"cache={cache}", f"run_dir={tmp_path / 'other'}", "checkpoint_seconds=0")
    write, calls = Writing.write, []

    def stop(self, network, test, rows):
        calls.append(len(rows))
        if len(calls) == 3:  # twice along the chain, then at its end
            raise KeyboardInterrupt
        return write(self, network, test, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Writing, "write", stop)
        assert call(*arguments).code == 130
    assert call(*arguments, "resume=true").code == 0
    assert results(tmp_path / "other")["test"] == results(whole)["test"]
    assert (tmp_path / "other" / "written.csv").read_text() == (whole / "written.csv").read_text()
