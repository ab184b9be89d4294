"""Methods: BADS and the baselines, as programs that one kernel runs.

Every method gives the same `Setup`; from there on the data, the number of steps, the kernel, the
chains and the averaging over draws are the same for all. Bi-level optimisation is a program of its
own at temperature 0. Baselines that select by a score do so in every step (`models.selective`) or
once, ahead; every other baseline is the joint program with fixed weights: what it does with the
train set is what its weights say.

Methods that need proxies give a setup in which all scores are equal, and which costs nothing;
`Setup.prepared` trains the proxies and gives the one to run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Impact, Model, last_linear
from bads_ppl.weights import FixedWeights, InstanceWeights, WeightNetwork, Weights
from inference import askllm as language
from inference.options import check_arguments
from inference.proxies import On, Proxies, Proxy, embeddings, losses
from inference.scores import Points, load_scores
from inference.similarity import Embedded, likeness
from inference.tasks import Task
from models.joint import joint
from models.selective import Membership, Share, choose, selective


@dataclass(frozen=True)
class Setup:
    """What a method does with a task.

    Attributes:
        model: the Pyro program.
        weights: builds a chain's weights from its network.
        sparsity: prior on the total weight, None for fixed weights.
        impact: impact constants.
        points: how many points count in the potential, (sum of weights) + (meta points): a
            learning rate on the mean loss is eta = 2 learning_rate / points.
        train: the train points that the kernel sees.
        fixed: (N_t,) the weights where they are fixed, for all points of the task.
        optimises: the weights are optimised, their temperature is 0.
        names: model and weights, as recorded in the results.
        membership: the weights of a draw, where theta trains on the part of each batch that scores
            highest.
        scores: (N_t,) scores that were known ahead, on the CPU; more: selected first. Where theta
            trains on a part of each batch they are what stays the same of the scores.
        train_batch: rows of the train set per step, where the method has a number of its own.
        learner: builds a chain's second network, which takes theta's step size.
        prepare: makes the setup with scores from the one where all are equal: trains proxies.
    """

    model: Model
    weights: Callable[[nn.Module], Weights]
    sparsity: SparsityPrior | None
    impact: Impact
    points: float
    train: Data
    fixed: Tensor | None = None
    optimises: bool = False
    names: tuple[str, str] = ("joint", "fixed")
    membership: Membership | None = None
    scores: Tensor | None = None
    train_batch: int | None = None
    learner: Callable[[], nn.Module] | None = None
    prepare: Callable[[], Setup] | None = None

    @property
    def latent(self) -> bool:
        """Whether the weights are latent (or optimised) values of the program."""
        return self.fixed is None and self.membership is None

    @property
    def digest(self) -> str | None:
        """A hash of the scores, so that a run is not resumed with others; None without."""
        if self.scores is None:
            return None
        return hashlib.blake2b(self.scores.cpu().numpy().tobytes(), digest_size=8).hexdigest()

    def prepared(self) -> Setup:
        """The setup to run: its scores are known."""
        return self if self.prepare is None else self.prepare()

    def step_factor(self, step: int) -> float:
        """What a step size for `points` points is multiplied by where a step counts others."""
        if self.membership is None:
            return 1.0
        share, size = self.membership.share, len(self.train)
        rest = self.points - share.floor * size
        return self.points / (share(step) * size + rest)


@dataclass(frozen=True)
class Given:
    """What every method is given beside the task, and its own options.

    Attributes:
        model: the Pyro program of BADS, or of the method where it has one of its own.
        weights: builds the latent weights of a chain from its network.
        sparsity: prior on their total; its beta is the share that every method selects.
        impact: impact constants of BADS.
        names: model and weights, as the configuration calls them.
        seed: source of a method's own randomness.
        proxies: trains proxies and scores the train points with them.
    """

    model: Model
    weights: Callable[[nn.Module], Weights]
    sparsity: SparsityPrior
    impact: Impact
    names: tuple[str, str]
    seed: int
    proxies: Proxies


def bads(task: Task, given: Given) -> Setup:
    """Bayesian data point selection: weights are latent."""
    points = given.sparsity.target(len(task.train)) + len(task.meta)
    return Setup(
        given.model,
        given.weights,
        given.sparsity,
        given.impact,
        points,
        task.train,
        names=given.names,
    )


def blo(task: Task, given: Given) -> Setup:
    """One-step bi-level optimisation: weights are optimised, with the method's own model.

    Instance weights have a flat prior and start at 0.5; the prior on their total is a penalty.
    """

    def flat(network: nn.Module) -> Weights:
        built = given.weights(network)
        return InstanceWeights() if isinstance(built, InstanceWeights) else built

    names = ("bilevel", given.names[1])
    return replace(bads(task, replace(given, weights=flat, names=names)), optimises=True)


def mixing(task: Task, given: Given) -> Setup:
    """Train on D_t and D_m together, every point once."""
    return _fixed(task, torch.ones(len(task.train)))


def meta_only(task: Task, given: Given) -> Setup:
    """Train on D_m alone: one train point with weight 0 stands for all, since none counts."""
    return Setup(
        joint,
        _always(FixedWeights(torch.zeros(1))),
        None,
        Impact(),
        len(task.meta),
        task.train.subset(torch.tensor([0])),
        torch.zeros(len(task.train)),
    )


def random_select(task: Task, given: Given) -> Setup:
    """Train on D_m and a random share beta of D_t."""
    count = given.sparsity.target(len(task.train))
    generator = torch.Generator().manual_seed(given.seed)
    return _chosen(task, torch.randperm(len(task.train), generator=generator)[:count])


def dup_meta(task: Task, given: Given) -> Setup:
    """Train on D_t and D_m, the latter repeated to the size of D_t."""
    repeats = len(task.train) / len(task.meta)
    return _fixed(task, torch.ones(len(task.train)), Impact(meta=repeats))


def cds(
    task: Task,
    given: Given,
    *,
    super_batch: int = 500,
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
        super_batch: train rows that a step chooses from.
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


def rho_loss(task: Task, given: Given, *, super_batch: int = 500) -> Setup:
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
    task: Task, given: Given, *, super_batch: int = 500, temperature: float = 1.0
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
    trained_on: On = "both",
    combine: Literal["max", "round_robin"] = "round_robin",
    label: bool = True,
) -> Setup:
    """Representation similarity (RDS; with round_robin RDS+, Ivison et al., 2025).

    Trains on D_m and the share beta of D_t whose embeddings are most like those of D_m.

    Args:
        task: the task.
        given: what every method is given.
        trained_on: what the network that embeds is trained on.
        combine: "max" takes points by their largest cosine similarity to a meta point;
            "round_robin" lets the meta points choose in turns, each the point most like it of those
            left.
        label: similarities to meta points of a point's own label count less the largest to another
            label; without it labels play no part.
    """

    def scores() -> Tensor:
        proxy = given.proxies.trained(trained_on)
        train = given.proxies.table("embeddings", partial(embeddings, proxy), proxy)
        meta = task.meta.to(given.proxies.device)
        parts = [embeddings(proxy, meta, batch.index).cpu() for batch in meta.batches()]
        labels = (task.train.target, task.meta.target) if label else (None, None)
        ours, theirs = Embedded(train, labels[0]), Embedded(torch.cat(parts), labels[1])
        found = likeness(ours, theirs, combine=combine)
        rule = {"combine": combine, "label": label}
        return given.proxies.table("rds", lambda data, rows: found[rows.cpu()], proxy, rule=rule)

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


def _without(proxy: Proxy, data: Data, rows: Tensor) -> Tensor:
    """Minus the losses (B,) that a proxy has left on rows."""
    return -losses(proxy, data, rows)


def _selective(
    task: Task,
    given: Given,
    share: Share,
    super_batch: int,
    loss_of: Literal["theta", "learner"] | None = None,
    temperature: float | None = None,
    *,
    scores: Tensor,
) -> Setup:
    """Theta trains on the part of each super-batch that scores highest."""
    if super_batch < 1:
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
        _always(FixedWeights(torch.zeros(0))),
        None,
        Impact(),
        share.floor * len(task.train) + len(task.meta),
        task.train,
        names=("selective", "scores"),
        membership=Membership(share),
        scores=scores,
        train_batch=min(super_batch, len(task.train)),
        learner=given.proxies.network if loss_of == "learner" else None,
    )


def _top(task: Task, given: Given, *, scores: Tensor) -> Setup:
    """The share beta of the train points that scores highest, and D_m."""
    count = given.sparsity.target(len(task.train))
    return replace(_chosen(task, choose(scores, count)), scores=scores)


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


def _chosen(task: Task, rows: Tensor) -> Setup:
    """Weight 1 for these rows and 0 for the others, which the kernel does not see."""
    chosen = rows.sort().values
    weights = torch.zeros(len(task.train))
    weights[chosen] = 1.0
    return Setup(
        joint,
        _always(FixedWeights(torch.ones(len(chosen)))),
        None,
        Impact(),
        len(chosen) + len(task.meta),
        task.train.subset(chosen),
        weights,
    )


def _fixed(task: Task, weights: Tensor, impact: Impact | None = None) -> Setup:
    impact = impact or Impact()
    points = float(weights.sum()) + impact.meta * len(task.meta)
    return Setup(joint, _always(FixedWeights(weights)), None, impact, points, task.train, weights)


def _always(weights: FixedWeights) -> Callable[[nn.Module], Weights]:
    def build(network: nn.Module) -> Weights:
        device = next(network.parameters()).device
        return FixedWeights(weights.values.to(device))

    return build


METHODS: dict[str, Callable[..., Setup]] = {
    "bads": bads,
    "blo": blo,
    "mixing": mixing,
    "meta_only": meta_only,
    "random_select": random_select,
    "dup_meta": dup_meta,
    "cds": cds,
    "rho_loss": rho_loss,
    "classact": classact,
    "rds": rds,
    "askllm": askllm,
}


def method(name: str, rule: Mapping[str, Any] | None = None) -> Callable[[Task, Given], Setup]:
    """The method called `name`, with its own options.

    Raises:
        InputError: listing the methods there are, or naming an option that it does not have.
    """
    if name not in METHODS:
        raise InputError(f"method must be one of {sorted(METHODS)}, got {name!r}")
    bound = partial(METHODS[name], **(rule or {}))
    check_arguments(bound, "method.rule")
    return bound


def instance_weights(
    network: nn.Module, *, classes: int, mean: float = 0.5, concentration: float = 1.0
) -> Weights:
    """One latent weight per point (`weights=instance`)."""
    return InstanceWeights(mean, concentration)


def network_weights(
    network: nn.Module,
    *,
    classes: int,
    label: bool = False,
    initial: float = 0.5,
    prior_scale: float = 3.0,
) -> Weights:
    """A linear layer on the network's embedding (`weights=network`), on the network's device."""
    head = last_linear(network)
    weights = WeightNetwork(
        head.in_features, classes if label else 0, initial=initial, prior=NormalPrior(prior_scale)
    )
    return weights.to(head.weight.device)
