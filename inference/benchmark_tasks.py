"""Benchmarks as tasks of lm-eval: those made of the files in the data folder, and the hub's own.

Both ask the same questions, those of `benchmark_splits(...).test`, with the same prompts and
choices, so that their scores are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from bads_ppl.errors import InputError
from inference.benchmark_files import (
    BENCHMARKS,
    Question,
    benchmark_splits,
    conversation,
    read_benchmark,
)

FEWSHOT_SEED = 1234
"""Draws the examples before a question; lm-eval's own."""

_HUB_SPLITS = {
    "mmlu": {"dev": "dev", "validation": "val", "test": "test"},
    "arc_easy": {"train": "train", "validation": "dev", "test": "test"},
    "arc_challenge": {"train": "train", "validation": "dev", "test": "test"},
    "hellaswag": {"validation": "val"},
}
"""By benchmark: the hub's splits that have answers, and what the files call them."""


@dataclass(frozen=True)
class BenchmarkTasks:
    """A benchmark's questions, ready to be asked.

    Attributes:
        tasks: lm-eval's task by subject; a single one of the name "" where there are no subjects.
        of: test questions there are, asked or not.
        source: "files" or "hub".
    """

    tasks: dict[str, Any]
    of: int
    source: str


def file_tasks(root: Path, name: str, *, limit: int | None, shots: int) -> BenchmarkTasks:
    """The tasks of a benchmark's file.

    Examples before a question are the first of its subject's dev split (MMLU), drawn from the train
    split (ARC), or from the tenth of val that is not tested on (HellaSwag).

    Args:
        root: the data folder.
        name: of the benchmark.
        limit: most questions, evenly spaced; None: all.
        shots: examples before a question.

    Raises:
        InputError: as `read_benchmark` does, or if there are fewer examples.
    """
    questions = read_benchmark(root, name)
    tests = _tests(questions, name)
    tested, pool = {one.id for one in tests}, BENCHMARKS[name].pool[0]
    examples = [one for one in questions if one.split == pool and one.id not in tested]
    asked: dict[str, list[Question]] = {}
    for one in evenly(tests, limit):
        asked.setdefault(_subject(one), []).append(one)
    tasks = {}
    for subject, some in asked.items():
        shown = [one for one in examples if _subject(one) == subject]
        _check_shots(name, subject, len(shown), shots)
        tasks[subject] = _file_task(f"{name}_{subject}" if subject else name, some, shown)
    return BenchmarkTasks(_with_shots(tasks, name, shots), len(tests), "files")


def hub_tasks(name: str, *, limit: int | None, shots: int) -> BenchmarkTasks:
    """The tasks of a benchmark as lm-eval defines them, on the data sets that the hub has.

    Questions that the files' splits have in meta or validation are left out here too.

    Args:
        name: of the benchmark.
        limit: most questions, evenly spaced; None: all.
        shots: examples before a question.

    Raises:
        InputError: if the hub does not give the data, or there are fewer examples.
    """
    try:
        loaded = _manager().load([name])["tasks"]
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the hub does not give {name} ({' '.join(str(error).split()):.300}): connect this "
            f"machine to the network, or put {BENCHMARKS[name].file} into the data folder and take "
            "source=files"
        ) from error
    found = {
        own.removeprefix(f"{name}_") if own != name else "": loaded[own] for own in sorted(loaded)
    }
    places: dict[str, tuple[str, int]] = {}
    questions = []
    for subject, task in found.items():
        for place, one in _of_hub(name, subject, task):
            places[one.id] = subject, place
            questions.append(one)
    tests = _tests(questions, name)
    rows: dict[str, list[int]] = {}
    for one in evenly(tests, limit):
        subject, place = places[one.id]
        rows.setdefault(subject, []).append(place)
    for subject, some in rows.items():
        split = _asked(found[subject])
        found[subject].dataset[split] = found[subject].dataset[split].select(some)
    tasks = {subject: found[subject] for subject in rows}
    return BenchmarkTasks(_with_shots(tasks, name, shots), len(tests), "hub")


def evenly(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most so many of the questions, evenly spaced."""
    size = len(questions)
    count = size if limit is None else min(limit, size)
    return [questions[k * size // count] for k in range(count)]


def _tests(questions: Sequence[Question], name: str) -> list[Question]:
    return benchmark_splits(questions, name, seed=0, count=1).test


def _subject(question: Question) -> str:
    return question.subject or "" if BENCHMARKS[question.benchmark].by_subject else ""


# ------------------------------------------------------------------------------------- of files


def _file_task(name: str, questions: Sequence[Question], examples: Sequence[Question]) -> Any:
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    splits = {
        "test": questions,
        "examples": examples or questions[:1],
    }  # no split may be empty; without examples none are shown
    made = DatasetDict(
        {split: Dataset.from_list([_row(one) for one in some]) for split, some in splits.items()}
    )
    metrics = ["acc"] if questions[0].benchmark == "mmlu" else ["acc", "acc_norm"]
    config = {
        "task": name,
        "custom_dataset": lambda **_: made,
        "test_split": "test",
        "fewshot_split": "examples",
        "output_type": "multiple_choice",
        "description": "{{description}}",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
    }
    if questions[0].benchmark == "mmlu":
        config["fewshot_config"] = {"sampler": "first_n"}
    return ConfigurableTask(config=config)


def _row(question: Question) -> dict[str, Any]:
    """A question as lm-eval's tasks lay it out, which say what MMLU is about before anything."""
    description, prompt, choices = "", conversation(question)[0].content, question.choices
    if question.benchmark == "mmlu":
        about, gap, prompt = prompt.partition("\n\n")
        description, choices = about + gap, tuple(ascii_uppercase[: len(choices)])
    return {
        "description": description,
        "prompt": prompt,
        "choices": list(choices),
        "answer": question.answer,
    }


# ------------------------------------------------------------------------------------ of the hub


@cache
def _manager() -> Any:
    """What finds lm-eval's tasks by name; it reads all of their files first."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _of_hub(name: str, subject: str, task: Any) -> Iterator[tuple[int, Question]]:
    """The questions of a task of lm-eval, with their places in their splits."""
    for split, ours in _HUB_SPLITS[name].items():
        rows = task.dataset[split]
        if task.config.process_docs is not None:
            rows = task.config.process_docs(rows)
        for place, row in enumerate(rows):
            id = f"{ours}/{subject}/{place}" if subject else f"{ours}/{place}"
            text = row["query" if name == "hellaswag" else "question"]
            yield place, Question(name, ours, subject or None, text, (), 0, id)


def _asked(task: Any) -> str:
    """The split of a task of lm-eval whose questions it asks."""
    return str(task.config.test_split or task.config.validation_split)


def _check_shots(name: str, subject: str, there: int, shots: int) -> None:
    if shots > there:
        what = f"{name}, {subject}," if subject else name
        raise InputError(
            f"{what} has {there} examples to show, got shots={shots}: take at most {there}"
        )


def _with_shots(tasks: dict[str, Any], name: str, shots: int) -> dict[str, Any]:
    for subject, task in tasks.items():
        _check_shots(name, subject, len(task.fewshot_docs()) if shots else 0, shots)
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return tasks
