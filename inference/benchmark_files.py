"""Multiple-choice benchmarks in the data folder: MMLU, ARC-easy, ARC-challenge and HellaSwag.

Meta questions stand in for what a model is to be good at, validation questions choose between its
checkpoints, and scores are measured on test questions. These are the same under every seed: those
of the benchmark's test split, without the few that repeat a question of the other splits. HellaSwag
is here with its val split alone, of which a fixed tenth is for meta and validation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from bads_ppl.errors import InputError
from inference.instructions import Conversation, Message, folded
from inference.text_files import objects
from inference.text_sources import generator

FIELDS = ("benchmark", "split", "question", "choices", "answer")
"""Keys of a row; "subject" and "id" where the benchmark has them."""


@dataclass(frozen=True)
class _Form:
    """What is particular to a benchmark.

    Attributes:
        file: where it is in the data folder.
        pool: splits that meta and validation questions are drawn from; meta questions from the
            first, and validation questions from the last, as far as these go.
        test: the split to test on.
        count: meta questions; of each subject, where `by_subject`.
        by_subject: whether the draw is subject by subject.
        has_subject: whether rows have a subject.
    """

    file: str
    pool: tuple[str, ...]
    test: str
    count: int = 25
    by_subject: bool = False
    has_subject: bool = False


BENCHMARKS = {
    "mmlu": _Form("mmlu.jsonl.gz", ("dev", "val"), "test", 5, by_subject=True, has_subject=True),
    "arc_easy": _Form("arc.jsonl.gz", ("train", "dev"), "test"),
    "arc_challenge": _Form("arc.jsonl.gz", ("train", "dev"), "test"),
    "hellaswag": _Form("hellaswag_val.jsonl.gz", ("val",), "val", has_subject=True),
}
"""By name."""


@dataclass(frozen=True)
class Question:
    """A question with choices, of which one is right.

    Attributes:
        benchmark: its name.
        split: of the benchmark, as the source has it.
        subject: of MMLU, or the activity of HellaSwag.
        question: the text before the choices.
        choices: at least two.
        answer: place of the right one, from 0 on.
        id: unique in the benchmark: that of the source, else "<split>/<number in the split>".
    """

    benchmark: str
    split: str
    subject: str | None
    question: str
    choices: tuple[str, ...]
    answer: int
    id: str


@dataclass(frozen=True)
class BenchmarkSplits:
    """Questions by what they are for.

    No two of the lists share a question, whatever its choices, up to case and white space.

    Attributes:
        meta: questions to learn the weights by.
        validation: as many, to choose checkpoints by.
        test: questions to report on.
        left_out: test questions that repeat one of the splits for meta and validation, and so are
            in none of the lists.

    Raises:
        InputError: if two of the lists share a question.
    """

    meta: list[Question]
    validation: list[Question]
    test: list[Question]
    left_out: int = 0

    def __post_init__(self) -> None:
        seen: dict[str, tuple[str, Question]] = {}
        for name in ("meta", "validation", "test"):
            for one in getattr(self, name):
                where, first = seen.setdefault(_words(one), (name, one))
                if where != name:
                    raise InputError(
                        f"{where} and {name} questions must differ, got {one.question!r:.200} in "
                        f"both ({first.id} and {one.id}): leave one of them out"
                    )


def conversation(question: Question) -> Conversation:
    """The prompt as of lm-eval's task of the same name without examples, and the right response.

    lm-eval puts one blank between the two. Of MMLU the response is a letter, else the choice.
    """
    right = question.choices[question.answer]
    if question.benchmark == "mmlu":
        subject = (question.subject or "").replace("_", " ")
        prompt = "\n".join(
            [
                f"The following are multiple choice questions (with answers) about {subject}.\n",
                question.question.strip(),
                *(f"{a}. {b}" for a, b in zip(ascii_uppercase, question.choices, strict=False)),
                "Answer:",
            ]
        )
        right = ascii_uppercase[question.answer]
    elif question.benchmark == "hellaswag":
        prompt = _begun(question.question)
    else:
        prompt = f"Question: {question.question}\nAnswer:"
    return Message("user", prompt), Message("assistant", right)


def _begun(context: str) -> str:
    """A context with a capital at the begin of its last sentence, if that is left to be finished.

    lm-eval has "A man sits on a roof. He", the source "A man sits on a roof. he".
    """
    return re.sub(r"(?<=[.!?] )[^.!?]+$", lambda found: found[0].capitalize(), context)


# ---------------------------------------------------------------------------------------- reading


def read_benchmark(root: Path, name: str) -> list[Question]:
    """The questions of a benchmark, in the order of its file.

    Args:
        root: the data folder.
        name: one of `BENCHMARKS`.

    Raises:
        InputError: if the name is unknown, the file is missing or damaged, or a row does not fit,
            naming its line.
    """
    form = _form(name)
    path = Path(root) / form.file
    if not path.is_file():
        raise InputError(
            f"there is no file {path.absolute()}: put {name} there, or name another data folder "
            "with data.root (BADS_DATA)"
        )
    found: dict[str, Question] = {}
    places: dict[str, str] = {}
    numbers = dict.fromkeys((*form.pool, form.test), 0)
    for where, row in objects(path, f"an object with the keys {', '.join(FIELDS)}"):
        _check_row(row, where, form)
        if row["benchmark"] != name:
            continue
        split = row["split"]
        id = row.get("id") or f"{split}/{numbers[split]}"
        numbers[split] += 1
        if id in found:
            raise _wrong(where, "id", f"unique ({places[id]} has it too)", id)
        places[id] = where
        found[id] = Question(
            *(name, split, row.get("subject"), row["question"]),
            *(tuple(row["choices"]), row["answer"], id),
        )
    if not found:
        raise InputError(f"{path} has no questions of {name}: replace it by a whole copy")
    return list(found.values())


def _form(name: str) -> _Form:
    if name not in BENCHMARKS:
        raise InputError(f"a benchmark must be one of {', '.join(BENCHMARKS)}, got {name!r}")
    return BENCHMARKS[name]


def _check_row(row: dict[str, Any], where: str, form: _Form) -> None:
    fields = (*FIELDS, "subject") if form.has_subject else FIELDS
    lacking = [field for field in fields if field not in row]
    if lacking:
        raise InputError(
            f"{where}: expected the keys {', '.join(fields)}, got no {', '.join(lacking)}: add "
            "what is missing"
        )
    names = [name for name, other in BENCHMARKS.items() if other.file == form.file]
    splits = sorted({*form.pool, form.test})
    for field, known in (("benchmark", names), ("split", splits)):
        if row[field] not in known:
            raise _wrong(where, field, f"one of {', '.join(known)}", row[field])
    for field in ("question", "subject") if form.has_subject else ("question",):
        if not _is_text(row[field]):
            raise _wrong(where, field, "text that is not blank", row[field])
    if not isinstance(row.get("id", ""), str):
        raise _wrong(where, "id", "text", row["id"])
    choices, answer = row["choices"], row["answer"]
    whole = isinstance(choices, list) and 2 <= len(choices) <= len(ascii_uppercase)
    if not whole or not all(map(_is_text, choices)):
        raise _wrong(where, "choices", "a list of texts, 2 to 26, none blank", choices)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise _wrong(where, "answer", f"the place of a choice, 0 to {len(choices) - 1}", answer)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _wrong(where: str, name: str, expected: str, value: object) -> InputError:
    return InputError(f"{where}: {name!r} must be {expected}, got {value!r:.200}: mend that line")


# ------------------------------------------------------------------------------------------ splits


def benchmark_splits(
    questions: Sequence[Question], name: str, *, seed: int, count: int | None = None
) -> BenchmarkSplits:
    """Meta, validation and test questions of a benchmark.

    Meta and validation questions come from the splits that are not tested on (MMLU: dev and val,
    ARC: train and dev, HellaSwag: the tenth of val with certain hashes), each question once. Meta
    questions are of the first of these splits as far as it goes, validation questions of the last.
    Test questions that repeat any of these splits are left out, so the test is the same under every
    seed and count.

    Args:
        questions: those of the benchmark. There may be others' too: what repeats a test question of
            theirs is not drawn.
        name: of the benchmark.
        seed: draws the meta and validation questions.
        count: how many of each; of MMLU, in every subject. By default 5 of MMLU, else 25.

    Raises:
        InputError: if the name is unknown, or there are too few questions to draw from or to test
            on.
    """
    form = _form(name)
    count = form.count if count is None else count
    if count < 1:
        raise InputError(f"{name}: the count must be at least 1, got {count}")
    own = [one for one in questions if one.benchmark == name]
    offered = [one for one in own if not _is_test(one)]
    known = {_words(one) for one in offered}
    tests = [one for one in own if _is_test(one)]
    test = [one for one in tests if _words(one) not in known]
    foreign = {_words(one) for one in questions if one.benchmark != name and _is_test(one)}
    unique: dict[str, Question] = {}
    for one in sorted(offered, key=lambda one: form.pool.index(one.split)):
        if _words(one) not in foreign:
            unique.setdefault(_words(one), one)
    pools: dict[str, list[Question]] = {_group(one, form): [] for one in own}
    for one in unique.values():
        pools[_group(one, form)].append(one)
    meta: list[Question] = []
    validation: list[Question] = []
    for subject in sorted(pools):
        of = f"{name}, {subject}" if subject else name
        some, others = _drawn(pools[subject], of, seed, count, form)
        meta += some
        validation += others
    if not test:
        raise InputError(
            f"{name} has no questions to test on, of the {len(own)} that were given: give all of "
            "its file"
        )
    return BenchmarkSplits(meta, validation, test, len(tests) - len(test))


def _group(question: Question, form: _Form) -> str:
    """What is drawn by itself."""
    return question.subject or "" if form.by_subject else ""


def _words(question: Question) -> str:
    """What two questions share that are the same one."""
    return folded(question.question)


def _is_test(question: Question) -> bool:
    """Whether it is not for meta or validation; two with the same words in a split are alike."""
    form = BENCHMARKS[question.benchmark]
    if form.test not in form.pool:
        return question.split == form.test
    digest = sha256(_words(question).encode()).digest()
    return int.from_bytes(digest[:8]) % 10 != 0


def _drawn(
    pool: list[Question], of: str, seed: int, count: int, form: _Form
) -> tuple[list[Question], list[Question]]:
    if 2 * count > len(pool):
        most = len(pool) // 2
        raise InputError(
            f"{of} has {len(pool)} questions for meta and validation, got a count of {count} for "
            f"each: {f'take at most {most}' if most else 'give all questions of its file'}"
        )
    order = generator(seed, f"questions {of}").permutation(len(pool))
    mixed = sorted((pool[place] for place in order), key=lambda one: form.pool.index(one.split))
    return mixed[:count], mixed[-count:]
