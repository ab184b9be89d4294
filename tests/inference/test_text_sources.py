"""Which texts become train, meta and test points: files, splits, and what the seed draws."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from bads_ppl.errors import InputError
from inference import text_sources
from inference.sentences import sentences
from inference.text_sources import Files, Sets, example


def csv(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("text,label\n" + "".join(f"{a},{b}\n" for a, b in rows))
    return str(path)


def numbered(word: str, count: int) -> list[tuple[str, str]]:
    return [(f"{word} {k}", "ab"[k % 2]) for k in range(count)]


def files(folder: Path, test: bool = True, share: float = 0.25) -> Files:
    train, meta = csv(folder / "n.csv", numbered("n", 9)), csv(folder / "m.csv", numbered("m", 16))
    given = csv(folder / "t.csv", numbered("t", 4)) if test else None
    return Files(train, meta, given, "text", "label", "refuse", share)


def all_ids(sets: Sets) -> list[int]:
    return [i for part in (sets.train, sets.meta, sets.test) for i in part.ids.tolist()]


def dolly(folder: Path, per_class: int = 60) -> Path:
    """A small Dolly, in which every fifth prompt stands twice."""
    rows = [{"prompt": f"p{k}", "category": f"c{k % 3}"} for k in range(3 * per_class)]
    rows += rows[::5]
    with gzip.open(folder / text_sources.DOLLY, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_files_are_taken_as_they_are_and_ids_are_rows_of_the_train_file(tmp_path):
    sets = files(tmp_path).read("test", 0)
    assert sets.name == "n.csv" and not sets.example and sets.warnings == ()
    assert [len(p) for p in (sets.train, sets.meta, sets.test)] == [9, 16, 4]
    assert sets.train.ids.tolist() == list(range(9)) and sets.train.texts[3] == "n 3"
    assert len(set(all_ids(sets))) == 29


@pytest.mark.parametrize("split", ["test", "validation"])
def test_without_a_test_file_a_share_of_each_meta_class_is_set_aside(split, tmp_path):
    sets = files(tmp_path, test=False).read(split, 0)
    assert sorted(sets.test.labels) == ["a", "a", "b", "b"] and len(sets.meta) == 12
    assert not set(sets.test.texts) & set(sets.meta.texts) and len(set(all_ids(sets))) == 25
    test = "no test file: 4 of the 16 meta texts were set aside to test on, so an accuracy of 80 %"
    said = {"test": f"{test} is known to 39 points (95 %)", "validation": "validation: 4 of the 16"}
    assert said[split] in sets.warnings[0]
    other = files(tmp_path, test=False).read(split, 1)
    assert other.test.texts != sets.test.texts  # drawn by the seed


def test_validation_leaves_the_test_file_alone(tmp_path):
    given = files(tmp_path)
    Path(given.test).write_text("not even a table")
    assert set(given.read("validation", 0).test.texts) < {f"m {k}" for k in range(16)}


def test_a_class_with_one_meta_text_cannot_be_split(tmp_path):
    given = files(tmp_path, test=False)
    csv(tmp_path / "m.csv", [("x", "a"), ("y", "a"), ("z", "b")])
    with pytest.raises(InputError, match=r"one text of class 'b'.*two at least, or a test file"):
        given.read("test", 0)
    with pytest.raises(InputError, match=r"test_share must be in \(0, 1\), got 1.0"):
        files(tmp_path, test=False, share=1.0).read("test", 0)


def test_a_class_that_the_train_set_lacks_stays_in_the_meta_set_whole(tmp_path):
    """Whether such rows are refused or dropped is decided for all sets alike."""
    given = files(tmp_path, test=False)
    csv(tmp_path / "m.csv", [("x", "typo"), *numbered("m", 16)])
    sets = given.read("test", 0)
    assert "x" in sets.meta.texts and len(sets.test) == 4
    csv(tmp_path / "m.csv", [("x", "typo"), ("y", "slip")])
    sets = given.read("test", 0)
    assert len(sets.meta) == 2 and len(sets.test) == 0


def test_one_file_alone_is_not_enough(tmp_path):
    with pytest.raises(InputError, match=r"data.meta is missing"):
        Files("n.csv", None, None, "text", "label", "refuse", 0.25).read("test", 0)
    with pytest.raises(InputError, match=r"data.train is missing"):
        Files(None, None, "t.csv", "text", "label", "refuse", 0.25).read("test", 0)


def test_texts_that_stand_in_two_files_are_told(tmp_path):
    given = files(tmp_path)
    csv(tmp_path / "m.csv", [*numbered("m", 4), *numbered("n", 2)])
    csv(tmp_path / "t.csv", [*numbered("m", 1), *numbered("n", 3)])
    told = given.read("test", 0).warnings
    assert told[0].startswith("2 texts of the meta set stand in the train set too")
    assert told[1].startswith("4 test texts stand in the train or meta set too")


def test_dolly_gives_disjoint_sets_without_repeated_prompts(tmp_path, monkeypatch):
    monkeypatch.setitem(text_sources.TEST, "dolly", 30)
    made = example(dolly(tmp_path), "auto", "test", 3, meta_per_class=5, per_class=None)
    parts = (made.train, made.meta, made.test)
    texts = [one for part in parts for one in part.texts]
    assert made.name == "dolly" and sorted(texts) == sorted(f"p{k}" for k in range(180))
    assert np.unique(made.meta.labels, return_counts=True)[1].tolist() == [5, 5, 5]
    assert made.test.texts == [f"p{k}" for k in range(150, 180)]
    other = example(tmp_path, "auto", "test", 4, meta_per_class=5, per_class=7)
    assert other.test.texts == made.test.texts and other.meta.texts != made.meta.texts
    assert np.unique(other.train.labels, return_counts=True)[1].tolist() == [7, 7, 7]


def test_validation_scores_on_prompts_that_neither_train_nor_test_has(tmp_path, monkeypatch):
    monkeypatch.setitem(text_sources.TEST, "dolly", 30)
    made = example(dolly(tmp_path), "auto", "validation", 3, meta_per_class=5, per_class=None)
    assert made.test.texts == [f"p{k}" for k in range(135, 150)]
    assert not set(made.test.texts) & set(made.train.texts + made.meta.texts)


def test_sentences_stand_in_with_a_warning_unless_files_are_asked_for(tmp_path):
    with pytest.warns(UserWarning, match=r"2400 sentences .* stand in .* 'sentences'"):
        made = example(tmp_path, "auto", "test", 0, meta_per_class=2, per_class=3)
    assert made.name == "sentences" and "say nothing about real texts" in made.warnings[0]
    assert len(set(sentences().texts)) == 2400 and sentences().texts == sentences().texts
    with pytest.raises(InputError, match=r"data.source=files, but there is no dolly_15k"):
        example(tmp_path, "files", "test", 0, meta_per_class=2, per_class=3)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"meta_per_class": 0, "per_class": None}, "task.meta_per_class must be at least 1, got 0"),
        ({"meta_per_class": 2, "per_class": 0}, "task.data.per_class must be at least 1, got 0"),
        (
            {"meta_per_class": 400, "per_class": None},
            "texts of class .* got task.meta_per_class=400",
        ),
    ],
)
def test_impossible_sizes_are_refused(sizes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        example(tmp_path, "generated", "test", 0, **sizes)
