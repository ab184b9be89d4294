"""Baselines that select train points by a score: in every step, or once, ahead.

Scores come from proxies, networks of their own that are trained before the first step, or from a
language model. Each method gives a setup in which all scores are equal, and which costs nothing;
`Setup.prepared` trains the proxies and gives the one to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.program import Impact
from bads_ppl.weights import FixedWeights
from inference import askllm as language
from inference.proxies import On, Proxy, embeddings, losses
from inference.scores import Points, load_scores
from inference.setups import Given, Setup, always, chosen
from inference.similarity import Embedded, likeness
from inference.tasks import Task
from models.selective import Membership, Share, choose, selective

MOST = 500
"""Rows of a super-batch, unless the user asks for more."""


def cds(
    task: Task,
    given: Given,
    *,
    super_batch: int | None = None,
    half_life: float = 100.0,
    tuning_steps: int = 100,
    tuning_rate: float = 0.01,
) -> Setup:
    """Contrastive data selection (Moore and Lewis, 2010; Wang et al., 2018).

    A point's score is log p(y | x) under a proxy that was trained on D_t and then on D_m, minus
    that under the one trained on D_t alone. Each step trains on the share of its super-batch that
    scores highest; the share halves every `half_life` steps, down to beta.

    Args:
        task: the task.
        given: what every method is given.
        super_batch: train rows that a step chooses from; None: as many as make
            `given.train_batch` the share beta of them, `MOST` at most.
        half_life: steps in which the share that is kept halves from 1.
        tuning_steps: steps of the second proxy on D_m.
        tuning_rate: its learning rate, on the mean loss.
    """

    def scores() -> Tensor:
        before = given.proxies.trained("train")
        after = given.proxies.tuned(before, steps=tuning_steps, learning_rate=tuning_rate)

        def gain(data: Data, rows: Tensor) -> Tensor:
            return losses(before, data, rows) - losses(after, data, rows)

        return given.proxies.table("cds", gain, before, after)

    share = Share(given.sparsity.sparsity, half_life)
    build = partial(_selective, task, given, share, super_batch)
    return _scored(task, given, "cds", scores, build)


def rho_loss(task: Task, given: Given, *, super_batch: int | None = None) -> Setup:
    """Reducible loss (Mindermann et al., 2022): theta's loss minus that of a proxy trained on D_m.

    Each step trains on the share beta of its super-batch whose reducible loss is largest.
    """

    def scores() -> Tensor:
        proxy = given.proxies.trained("meta")
        return given.proxies.table("rho_loss", partial(_without, proxy), proxy)

    share = Share(given.sparsity.sparsity)
    build = partial(_selective, task, given, share, super_batch, loss_of="theta")
    return _scored(task, given, "rho_loss", scores, build)


def classact(
    task: Task, given: Given, *, super_batch: int | None = None, temperature: float = 1.0
) -> Setup:
    """Learnability under small networks (ClassAct; Evans et al., 2023).

    A point's score is the loss of a small learner, which is trained along on the points that theta
    is trained on, minus that of a reference of the same shape trained on D_m. The share beta of
    each super-batch is drawn without replacement in proportion to softmax(score / temperature).
    """

    def scores() -> Tensor:
        reference = given.proxies.trained("meta")
        return given.proxies.table("classact", partial(_without, reference), reference)

    share = Share(given.sparsity.sparsity)
    build = partial(_selective, task, given, share, super_batch, "learner", temperature)
    return _scored(task, given, "classact", scores, build)


def rds(
    task: Task,
    given: Given,
    *,
    trained_on: On | Literal["none"] = "both",
    combine: Literal["max", "round_robin"] = "round_robin",
    label: bool = True,
) -> Setup:
    """Representation similarity (RDS; with round_robin RDS+, Ivison et al., 2025).

    Trains on D_m and the share beta of D_t whose embeddings are most like those of D_m.

    Args:
        task: the task.
        given: what every method is given.
        trained_on: what the network that embeds is trained on; "none": there is no such network,
            and the inputs themselves, such as the states of a frozen encoder, are compared.
        combine: "max" takes points by their largest cosine similarity to a meta point;
            "round_robin" lets the meta points choose in turns, each the point most like it of those
            left.
        label: similarities to meta points of a point's own label count less the largest to another
            label; without it, and where texts are written, labels play no part.

    Raises:
        InputError: if inputs are to be compared and are no vectors.
    """
    inputs = task.train.input, task.meta.input
    if trained_on == "none" and not all(_are_vectors(one) for one in inputs):
        raise InputError(
            "method.rule.trained_on=none compares inputs that are vectors (N, D) of numbers, such "
            f"as the states of task=text with task/tune=frozen, and those of task {task.name} are "
            "not: take train, meta or both"
        )

    def scores() -> Tensor:
        proxies: list[Proxy] = []
        vectors = inputs
        if trained_on != "none":
            proxy = given.proxies.trained(trained_on)
            proxies = [proxy]
            train = given.proxies.table("embeddings", partial(embeddings, proxy), proxy)
            meta = task.meta.to(given.proxies.device)
            parts = [embeddings(proxy, meta, batch.index).cpu() for batch in meta.batches()]
            vectors = train, torch.cat(parts)
        classed = label and task.classes > 0
        labels = (task.train.target, task.meta.target) if classed else (None, None)
        ours, theirs = map(Embedded, vectors, labels)
        found = likeness(ours, theirs, combine=combine)
        rule = {"combine": combine, "label": label}
        return given.proxies.table("rds", lambda data, rows: found[rows.cpu()], *proxies, rule=rule)

    return _scored(task, given, "rds", scores, partial(_top, task, given))


def askllm(
    task: Task,
    given: Given,
    *,
    model: str = "google/flan-t5-base",
    job: str = "the job that the curated examples are from",
    batch: int = 8,
    max_tokens: int = 512,
) -> Setup:
    """Ask a language model (Ask-LLM; Sachdeva et al., 2024), for tasks of texts.

    Trains on D_m and the share beta of D_t with the highest P("yes") of a language model that is
    asked whether the text, with its label where it has one, is informative for the job.

    Args:
        task: the task.
        given: what every method is given.
        model: id or local folder of a causal or sequence-to-sequence model, safetensors only.
        job: what the points are to be informative for, in words.
        batch: texts per forward pass.
        max_tokens: tokens of a text that the model is shown.

    Raises:
        InputError: if the task's points are no texts.
    """
    texts = task.examples
    if texts is None:
        raise InputError(
            f"method=askllm is for tasks whose points are texts, and those of task {task.name} are "
            "not: on images take cds, rho_loss, classact or rds"
        )

    question = language.Question(model, job, batch, max_tokens)
    proxies, points = given.proxies, Points.of_texts(texts)

    def scores() -> Tensor:
        return language.ask(texts, question, cache=proxies.cache, device=proxies.device)

    return _scored(task, given, "askllm", scores, partial(_top, task, given), points)


def _are_vectors(input: Any) -> bool:
    return isinstance(input, Tensor) and input.is_floating_point() and input.ndim == 2


def _without(proxy: Proxy, data: Data, rows: Tensor) -> Tensor:
    """Minus the losses (B,) that a proxy has left on rows."""
    return -losses(proxy, data, rows)


def _selective(
    task: Task,
    given: Given,
    share: Share,
    super_batch: int | None,
    loss_of: Literal["theta", "learner"] | None = None,
    temperature: float | None = None,
    *,
    scores: Tensor,
) -> Setup:
    """Theta trains on the part of each super-batch that scores highest."""
    # More than there are, or none, is refused by the kernel, by the name of the user's option.
    kept = 100 if given.train_batch is None else given.train_batch
    least = 0 if given.train_batch is None else kept
    if super_batch is None:
        super_batch = max(least, min(round(kept / share.floor), MOST))
    elif super_batch < 1:
        raise InputError(f"method.rule.super_batch must be at least 1 row, got {super_batch}")
    model = partial(
        selective,
        scores=scores.to(given.proxies.device),
        share=share,
        loss_of=loss_of,
        temperature=temperature,
    )
    return Setup(
        model,
        always(FixedWeights(torch.zeros(0))),
        None,
        Impact(),
        share.floor * len(task.train) + len(task.meta),
        task.train,
        names=("selective", "scores"),
        membership=Membership(share),
        scores=scores,
        train_batch=max(least, min(super_batch, len(task.train))),
        learner=given.proxies.network if loss_of == "learner" else None,
    )


def _top(task: Task, given: Given, *, scores: Tensor) -> Setup:
    """The share beta of the train points that scores highest, and D_m."""
    count = given.sparsity.target(len(task.train))
    return replace(chosen(task, choose(scores, count)), scores=scores)


def _scored(
    task: Task,
    given: Given,
    name: str,
    scores: Callable[[], Tensor],
    build: Callable[..., Setup],
    points: Points | None = None,
) -> Setup:
    """The setup with equal scores, which knows how to make the one with its scores.

    They are those of the table that the user named, or else the method's own.
    """

    def prepare() -> Setup:
        path = given.proxies.scores
        if path is None:
            return build(scores=scores())
        return build(scores=load_scores(path, name, points or Points.of(task.train)))

    return replace(build(scores=torch.zeros(len(task.train))), prepare=prepare)
