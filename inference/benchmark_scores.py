"""Scores of a causal language model on benchmarks: lm-eval asks, and what it finds is put together.

The answer is the choice whose tokens are the likeliest after the prompt (Gao et al., 2021).
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bads_ppl.errors import InputError
from inference.benchmark_files import BENCHMARKS
from inference.benchmark_tasks import BenchmarkTasks, file_tasks, hub_tasks
from models.causal import read_causal


@dataclass(frozen=True)
class Score:
    """Share of questions that are answered right.

    Attributes:
        accuracy: in [0, 1].
        stderr: of the accuracy, as lm-eval has it; None for one question a subject, or fewer than
            two on average: it is of what differs within a subject.
        count: questions that were asked.
    """

    accuracy: float
    stderr: float | None
    count: int


@dataclass(frozen=True)
class Scores(Score):
    """A benchmark's scores.

    Attributes:
        of: test questions there are; with a lower count that many of them were asked, evenly
            spaced.
        source: where they are from, "files" or "hub".
        cut: questions too long for the model, which was not shown their beginning.
        normalised: accuracy with log-likelihoods divided by the choices' characters, lm-eval's
            acc_norm; None where lm-eval has none.
        normalised_stderr: of that.
        subjects: of MMLU.
    """

    of: int
    source: str
    cut: int
    normalised: float | None
    normalised_stderr: float | None
    subjects: dict[str, Score]


Source = Literal["auto", "files", "hub"]
"""Where questions come from; "auto": the file in the data folder, or else the hub."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's remarks, and where standard error is no terminal without its bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def evaluate(
    model: str | Path | tuple[nn.Module, Any],
    benchmarks: Sequence[str] = tuple(BENCHMARKS),
    *,
    root: Path,
    source: Source = "auto",
    limit: int | None = None,
    batch: int = 8,
    device: torch.device | None = None,
    adapter: Path | None = None,
    shots: int = 0,
    chat: bool = False,
) -> dict[str, Scores]:
    """Scores of a model by benchmark.

    Args:
        model: id or folder of a causal language model, or folder of an adapter (as a run of
            task=llm leaves either in its folder `model`), or a model of `transformers` with its
            tokenizer; that one is moved to the device.
        benchmarks: some of `BENCHMARKS`.
        root: the data folder.
        source: where questions come from.
        limit: most questions of each benchmark, evenly spaced; None: all.
        batch: prompts with a choice that go through the model together.
        device: where to compute; None: the CPU, or where a model that is given is.
        adapter: folder of an adapter to put on the model in a folder.
        shots: right answers to show before each question.
        chat: lay questions out by the tokenizer's chat template, as lm-eval's apply_chat_template
            does, shots as turns of their own.

    Raises:
        InputError: if lm-eval is missing, a benchmark unknown or not to be had, a number out of
            range, or the model cannot be had.
    """
    check(benchmarks, source, limit=limit, batch=batch, shots=shots)
    tasks = {
        name: _tasks(name, Path(root), source, limit, shots) for name in dict.fromkeys(benchmarks)
    }
    if isinstance(model, tuple):
        if adapter is not None:
            raise InputError(
                f"adapter={adapter} goes with the folder of a model: put it on the given one "
                "before, or give its folder"
            )
        network, tokenizer = model
        device = device or next(network.parameters()).device
    else:
        network, tokenizer = read_causal(model, adapter)
    if chat and tokenizer.chat_template is None:
        raise InputError("the model's tokenizer has no chat template: leave out chat=true")
    training = network.training
    try:
        return ask(network.to(device or "cpu"), tokenizer, tasks, batch, chat)
    finally:
        network.train(training)


def check(benchmarks: Sequence[str], source: str = "auto", **numbers: int | None) -> None:
    """Refuse what `evaluate` would.

    Raises:
        InputError: if lm-eval is missing, a benchmark unknown, or a number out of range.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("benchmarks need the package lm-eval: pip install bads-ppl[llm]")
    unknown = [name for name in benchmarks if name not in BENCHMARKS]
    if unknown or not benchmarks:
        got = ", ".join(map(repr, unknown)) or "none"
        raise InputError(f"benchmarks are {', '.join(BENCHMARKS)}, got {got}: name some of these")
    if source not in ("auto", "files", "hub"):
        raise InputError(f"source must be one of auto, files, hub, got {source!r}")
    for name, value in numbers.items():
        least = 0 if name == "shots" else 1
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")


def _tasks(name: str, root: Path, source: str, limit: int | None, shots: int) -> BenchmarkTasks:
    there = (root / BENCHMARKS[name].file).is_file()
    with quiet():
        if source == "files" or (source == "auto" and there):
            return file_tasks(root, name, limit=limit, shots=shots)
        return hub_tasks(name, limit=limit, shots=shots)


def ask(
    network: nn.Module, tokenizer: Any, tasks: Mapping[str, BenchmarkTasks], batch: int, chat: bool
) -> dict[str, Scores]:
    """Scores of a model by benchmark.

    Args:
        network: a causal model of `transformers`; it is left in evaluation mode.
        tokenizer: its own.
        tasks: by benchmark.
        batch: prompts with a choice that go through the model together.
        chat: lay questions out by the chat template, shots as turns of their own.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    named = {task.config.task: task for one in tasks.values() for task in one.tasks.values()}
    with quiet():
        asked = HFLM(network, backend="causal", tokenizer=tokenizer, batch_size=batch)
        results = evaluate(
            asked, named, log_samples=False, apply_chat_template=chat, fewshot_as_multiturn=chat
        )["results"]
        return {name: _of_benchmark(one, results, asked) for name, one in tasks.items()}


def _of_benchmark(one: BenchmarkTasks, results: Mapping[str, Any], asked: Any) -> Scores:
    rows = {subject: results[task.config.task] for subject, task in one.tasks.items()}
    counts = {subject: len(task.eval_docs) for subject, task in one.tasks.items()}
    by_subject = {
        subject: Score(row["acc,none"], _number(row["acc_stderr,none"]), counts[subject])
        for subject, row in rows.items()
    }
    whole = _pooled(list(by_subject.values()))
    single = rows.get("", {})
    return Scores(
        **asdict(whole),
        of=one.of,
        source=one.source,
        cut=sum(_cut(task, asked) for task in one.tasks.values()),
        normalised=single.get("acc_norm,none"),
        normalised_stderr=_number(single.get("acc_norm_stderr,none")),
        subjects={} if single else by_subject,
    )


def _number(value: Any) -> float | None:
    """A standard error; lm-eval says "N/A" where there is none."""
    return value if isinstance(value, float) else None


def _pooled(scores: Sequence[Score]) -> Score:
    """Scores of subjects as one, as lm-eval puts those of a group together, weighted by size."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr

    if len(scores) == 1:
        return scores[0]
    counts = [one.count for one in scores]
    stderr = None
    if sum(counts) >= 2 * len(counts):  # fewer a subject: a single question says nothing of it
        stderr = float(pooled_sample_stderr([one.stderr or 0.0 for one in scores], counts))
    accuracy = aggregate_subtask_metrics([one.accuracy for one in scores], counts)
    return Score(float(accuracy), stderr, sum(counts))


def _cut(task: Any, asked: Any) -> int:
    """Questions that are longer than what the model can be shown."""
    most = asked.max_length + 1  # the last token is not shown
    found = set()
    for instance in task.instances:
        text = "".join(instance.args)
        # A token has one byte at least, but for those that begin a text.
        if len(text.encode()) + 2 > most and len(asked.tok_encode(text)) > most:
            found.add(instance.doc_id)
    return len(found)
