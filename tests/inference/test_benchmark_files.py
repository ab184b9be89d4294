"""Benchmarks: their prompts, which questions are for what, what is refused, and the real files."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from bads_ppl.errors import InputError
from inference.benchmark_files import (
    BENCHMARKS,
    BenchmarkSplits,
    Question,
    benchmark_splits,
    conversation,
    read_benchmark,
)

ROOT = Path(os.environ.get("BADS_DATA", "data"))
SIZES = {
    "mmlu": {"dev": 285, "val": 1_531, "test": 14_042},
    "arc_easy": {"train": 2_251, "dev": 570, "test": 2_376},
    "arc_challenge": {"train": 1_119, "dev": 299, "test": 1_172},
    "hellaswag": {"val": 10_042},
}
ROW = {
    "benchmark": "arc_easy",
    "split": "train",
    "id": "a",
    "question": "Which is a fish?",
    "choices": ["eel", "owl", "elk"],
    "answer": 0,
}
ACTIVITY = {**ROW, "benchmark": "hellaswag", "split": "val", "subject": "Fishing"}


def write(root: Path, *rows: dict, name: str = "arc_easy") -> Path:
    """A data folder with the benchmark's file."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / BENCHMARKS[name].file).write_bytes(gzip.compress(text.encode()))
    return root


def question(
    split: str, number: int, words: str = "", *, name: str = "arc_easy", subject: str | None = None
) -> Question:
    own = f"{name} {split} {subject} {number}?"
    return Question(
        name, split, subject, words or own, ("x", "y"), 0, f"{split}/{subject}/{number}"
    )


def arc(*more: Question, train: int = 40, dev: int = 30, test: int = 20) -> list[Question]:
    sizes = {"train": train, "dev": dev, "test": test}
    return [*(question(split, n) for split, count in sizes.items() for n in range(count)), *more]


def ids(questions: list[Question]) -> set[str]:
    return {one.id for one in questions}


def words(questions: list[Question]) -> set[str]:
    return {" ".join(one.question.lower().split()) for one in questions}


# ---------------------------------------------------------------------------------------- prompts


def test_prompts_are_those_of_lm_eval_without_examples():
    mmlu = Question("mmlu", "dev", "us_history", " Who? \n", ("Ada", "Bo", "Cy", "Di"), 2, "x")
    assert conversation(mmlu) == (
        (
            "user",
            "The following are multiple choice questions (with answers) about us history.\n\n"
            "Who?\nA. Ada\nB. Bo\nC. Cy\nD. Di\nAnswer:",
        ),
        ("assistant", "C"),
    )
    for name in ("arc_easy", "arc_challenge"):
        arc = Question(name, "dev", None, "Who?", ("Ada", "Bo", "Cy"), 1, "x")
        assert conversation(arc) == (("user", "Question: Who?\nAnswer:"), ("assistant", "Bo"))


@pytest.mark.parametrize(
    ("context", "prompt"),
    [
        ("Roofing: A man sits on a roof. he", "Roofing: A man sits on a roof. He"),
        ("Roofing: Two men sit! the men from Rome", "Roofing: Two men sit! The men from rome"),
        (
            "Roofing: How to mend a roof. Use e.g. tar.",
            "Roofing: How to mend a roof. Use e.g. tar.",
        ),
        ("Roofing: a man", "Roofing: a man"),
    ],
)
def test_the_context_of_hellaswag_goes_on_with_a_capital_as_in_lm_eval(context, prompt):
    one = Question("hellaswag", "val", "Roofing", context, ("falls.", "climbs down."), 1, "x")
    assert conversation(one) == (("user", prompt), ("assistant", "climbs down."))


# ---------------------------------------------------------------------------------------- reading


def test_a_row_is_read_as_a_question_of_its_benchmark(tmp_path):
    rows = [{**ROW, "id": ""}, {**ROW, "benchmark": "arc_challenge", "id": ""}, ROW]
    root = write(tmp_path, *rows, {**ROW, "id": ""}, {**ROW, "split": "dev", "id": ""})
    found = read_benchmark(root, "arc_easy")
    assert found[1] == Question(
        "arc_easy", "train", None, "Which is a fish?", ("eel", "owl", "elk"), 0, "a"
    )
    assert [one.id for one in found] == ["train/0", "a", "train/2", "dev/0"]
    assert [one.id for one in read_benchmark(root, "arc_challenge")] == ["train/0"]
    swag = read_benchmark(write(tmp_path, ACTIVITY, name="hellaswag"), "hellaswag")
    assert (swag[0].subject, swag[0].split) == ("Fishing", "val")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answer": 3}, "'answer' must be the place of a choice, 0 to 2, got 3"),
        ({"answer": -1}, "'answer' must be the place of a choice, 0 to 2, got -1"),
        ({"answer": "0"}, "'answer' must be the place of a choice, 0 to 2, got '0'"),
        ({"answer": True}, "'answer' must be the place of a choice, 0 to 2, got True"),
        ({"choices": []}, r"'choices' must be a list of texts, 2 to 26, none blank, got \[\]"),
        ({"choices": ["eel"]}, r"'choices' must be a list of texts, .* got \['eel'\]"),
        ({"choices": ["eel", " "]}, r"'choices' must be a list of texts, .* got \['eel', ' '\]"),
        ({"choices": "eel"}, "'choices' must be a list of texts, .* got 'eel'"),
        ({"question": " "}, "'question' must be text that is not blank, got ' '"),
        ({"split": "val"}, "'split' must be one of dev, test, train, got 'val'"),
        ({"benchmark": "mmlu"}, "'benchmark' must be one of arc_easy, arc_challenge, got 'mmlu'"),
        ({"id": 3}, "'id' must be text, got 3"),
        ({"id": "a"}, r"'id' must be unique \(.*arc\.jsonl\.gz, line 1 has it too\), got 'a'"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_line(changed, message, tmp_path):
    root = write(tmp_path, ROW, {**ROW, "id": "b", **changed})
    with pytest.raises(
        InputError, match=r"arc\.jsonl\.gz, line 2: " + message + ": mend that line"
    ):
        read_benchmark(root, "arc_easy")


def test_rows_without_keys_and_files_that_are_missing_damaged_or_of_another(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*arc\.jsonl\.gz: put arc_easy there"):
        read_benchmark(tmp_path, "arc_easy")
    with pytest.raises(InputError, match=r"must be one of mmlu, arc_easy, .* got 'arc'"):
        read_benchmark(tmp_path, "arc")
    lacking = {key: value for key, value in ROW.items() if key not in ("choices", "answer")}
    with pytest.raises(InputError, match=r"line 1: expected the keys .* got no choices, answer"):
        read_benchmark(write(tmp_path, lacking), "arc_easy")
    no_subject = {key: value for key, value in ACTIVITY.items() if key != "subject"}
    with pytest.raises(InputError, match=r"line 1: expected the keys .* got no subject"):
        read_benchmark(write(tmp_path, no_subject, name="hellaswag"), "hellaswag")
    with pytest.raises(InputError, match="has no questions of arc_challenge"):
        read_benchmark(write(tmp_path, ROW), "arc_challenge")
    path = write(tmp_path, *({**ROW, "id": str(n)} for n in range(999))) / "arc.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="expected a whole gzip file"):
        read_benchmark(tmp_path, "arc_easy")


# ------------------------------------------------------------------------------------------ splits


def test_meta_is_of_train_and_validation_of_dev_as_far_as_they_go():
    splits = benchmark_splits(arc(), "arc_easy", seed=0)
    assert [Counter(q.split for q in part) for part in (splits.meta, splits.validation)] == [
        {"train": 25},
        {"dev": 25},
    ]
    assert ids(splits.test) == {f"test/None/{n}" for n in range(20)} and splits.left_out == 0
    larger = benchmark_splits(arc(), "arc_easy", seed=0, count=35)
    assert Counter(q.split for q in larger.meta) == {"train": 35}
    assert Counter(q.split for q in larger.validation) == {"dev": 30, "train": 5}


def test_the_seed_draws_meta_and_validation_and_leaves_the_test_as_it_is():
    first, again, other = (
        benchmark_splits(arc(), "arc_easy", seed=seed, count=10) for seed in (0, 0, 1)
    )
    assert first == again and first.test == other.test
    assert ids(first.meta) != ids(other.meta) and ids(first.validation) != ids(other.validation)


def test_of_mmlu_each_subject_has_its_own_draw():
    rows = [
        question(split, n, name="mmlu", subject=subject)
        for subject in ("law", "art")
        for split, count in (("dev", 5), ("val", 8), ("test", 9))
        for n in range(count)
    ]
    splits = benchmark_splits(rows, "mmlu", seed=0)
    counts = Counter((q.subject, q.split) for q in splits.meta + splits.validation)
    assert counts == {(s, split): 5 for s in ("law", "art") for split in ("dev", "val")}
    assert {q.split for q in splits.meta} == {"dev"} and len(splits.test) == 18
    some = benchmark_splits(rows, "mmlu", seed=0, count=2)
    assert Counter(q.subject for q in some.meta) == {"law": 2, "art": 2}
    with pytest.raises(InputError, match=r"mmlu, art has 13 questions .* count of 7 .* at most 6"):
        benchmark_splits(rows, "mmlu", seed=0, count=7)
    lonely = [*rows, question("test", 0, name="mmlu", subject="zoology")]
    with pytest.raises(InputError, match=r"mmlu, zoology has 0 questions .* give all questions of"):
        benchmark_splits(lonely, "mmlu", seed=0)


def test_of_hellaswag_a_fixed_tenth_is_for_meta_and_validation():
    rows = [question("val", n, name="hellaswag") for n in range(1_000)]
    splits = [benchmark_splits(rows, "hellaswag", seed=seed) for seed in range(4)]
    assert all(one.test == splits[0].test for one in splits)
    assert 850 < len(splits[0].test) < 950
    drawn = set().union(*(ids(one.meta + one.validation) for one in splits))
    assert 50 < len(drawn) <= 1_000 - len(splits[0].test)
    assert drawn.isdisjoint(ids(splits[0].test))
    pairs = [
        question("val", 2_000 + n, one.question.upper(), name="hellaswag")
        for n, one in enumerate(rows)
    ]
    both = benchmark_splits(rows + pairs, "hellaswag", seed=0)
    assert len(both.test) == 2 * len(splits[0].test) and both.left_out == 0


def test_a_question_that_is_repeated_is_never_on_two_sides():
    rows = arc(
        question("test", 90, "ARC_EASY  train None 3?"),
        question("test", 91, "arc_easy dev None 4?\n"),
        question("test", 92, "arc_easy test None 5?"),
        *(question("dev", 100 + n, f"arc_easy train None {n}?") for n in range(40)),
    )
    for seed in range(5):
        splits = benchmark_splits(rows, "arc_easy", seed=seed, count=35)
        meta, validation, test = map(words, (splits.meta, splits.validation, splits.test))
        assert len(meta) == len(validation) == 35
        assert not meta & validation and not test & (meta | validation)
        assert ids(splits.test) == {f"test/None/{n}" for n in (*range(20), 92)}
        assert splits.left_out == 2
    with pytest.raises(InputError, match=r"arc_easy has 70 questions .* take at most 35"):
        benchmark_splits(rows, "arc_easy", seed=0, count=36)


def test_what_repeats_a_test_question_of_another_benchmark_is_not_drawn():
    other = [
        question("test", n, f"arc_easy train None {n}?", name="arc_challenge") for n in range(15)
    ]
    splits = benchmark_splits(arc() + other, "arc_easy", seed=0)
    assert ids(splits.meta) == {f"train/None/{n}" for n in range(15, 40)}
    assert {q.benchmark for q in splits.test} == {"arc_easy"} and len(splits.test) == 20


def test_splits_that_share_a_question_are_refused():
    one, again, two = question("dev", 1), question("test", 2, "Arc_easy dev None 1? "), arc()[0]
    assert BenchmarkSplits([one, one], [two], []).meta == [one, one]
    with pytest.raises(InputError, match=r"meta and test questions must differ, .*None/1 and test"):
        BenchmarkSplits([one], [two], [again])
    with pytest.raises(InputError, match="meta and validation questions must differ"):
        BenchmarkSplits([two], [two], [])


def test_counts_and_names_that_do_not_fit():
    with pytest.raises(InputError, match="arc_easy: the count must be at least 1, got 0"):
        benchmark_splits(arc(), "arc_easy", seed=0, count=0)
    with pytest.raises(InputError, match=r"must be one of mmlu, .* got 'piqa'"):
        benchmark_splits(arc(), "piqa", seed=0)
    with pytest.raises(InputError, match="has 0 questions for meta and validation, got a count of"):
        benchmark_splits(arc(train=0, dev=0), "arc_easy", seed=0)
    with pytest.raises(InputError, match="arc_easy has no questions to test on, of the 70 that"):
        benchmark_splits(arc(test=0), "arc_easy", seed=0)
    with pytest.raises(InputError, match="mmlu has no questions to test on, of the 0 that were"):
        benchmark_splits(arc(), "mmlu", seed=0)


# -------------------------------------------------------------------------------------- real files

LEFT_OUT = {"mmlu": 53, "arc_easy": 7, "arc_challenge": 9, "hellaswag": 0}
"""Test questions whose words stand in a split for meta and validation."""


@pytest.fixture(scope="module")
def real() -> dict[str, list[Question]]:
    if not all((ROOT / form.file).is_file() for form in BENCHMARKS.values()):
        pytest.skip("BADS_DATA names no folder with the benchmarks")
    return {name: read_benchmark(ROOT, name) for name in BENCHMARKS}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_real_files_are_read_whole(name, real):
    found = real[name]
    assert Counter(one.split for one in found) == SIZES[name]
    assert len(ids(found)) == len(found)
    if name == "mmlu":
        answers = Counter(one.answer for one in found if one.split == "test")
        assert answers == {0: 3_222, 1: 3_462, 2: 3_582, 3: 3_776}
        assert len({one.subject for one in found}) == 57
    if name == "hellaswag":
        begun = sum(conversation(one)[0].content != one.question for one in found)
        assert conversation(found[0])[0].content == (
            "Roof shingle removal: A man is sitting on a roof. He"
        )
        assert begun == 3_236


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_real_splits_are_disjoint_under_every_seed(name, real):
    count = 285 if name == "mmlu" else 25
    everything = [one for questions in real.values() for one in questions]
    drawn, tests = [], []
    for seed in range(5):
        splits = benchmark_splits(everything, name, seed=seed)
        assert len(splits.meta) == len(splits.validation) == count
        assert not words(splits.meta) & words(splits.validation)
        drawn += splits.meta + splits.validation
        tests.append(splits.test)
    assert all(test == tests[0] for test in tests)
    assert not words(drawn) & words(tests[0]) and not ids(drawn) & ids(tests[0])
    assert splits.left_out == LEFT_OUT[name]
    if name == "hellaswag":
        assert 0.89 < len(tests[0]) / len(real[name]) < 0.91
    else:
        assert len(tests[0]) == SIZES[name]["test"] - LEFT_OUT[name]
    if name == "mmlu":
        assert Counter(one.split for one in splits.meta) == {"dev": 284, "val": 1}
        assert set(Counter(one.subject for one in splits.validation).values()) == {5}
