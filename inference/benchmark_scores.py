"""Scores of a causal language model on benchmarks: lm-eval asks, and what it finds is put together.

The answer is the choice whose tokens are the likeliest after the prompt (Gao et al., 2021).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

from torch import nn

from inference.benchmark_tasks import BenchmarkTasks


@dataclass(frozen=True)
class Score:
    """Share of questions that are answered right.

    Attributes:
        accuracy: in [0, 1].
        stderr: of the accuracy, as lm-eval has it; None where a single question says nothing of it.
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
    if sum(counts) > len(counts):  # a subject with one question counts nothing in it
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
