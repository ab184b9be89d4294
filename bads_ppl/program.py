"""What a BADS program is made of.

A *model* is any callable `model(train, meta, parts) -> None` that makes Pyro statements: sites of
the network's parameters, the weights at site "w", the weighted train term in a plate "train", the
meta data observed in a plate "meta". `train` and `meta` are batches (or the full sets), `parts`
holds everything a model is given. `models/joint.py` is the smallest example. A *program* is a model
with its parts bound, `program(train, meta)`: what kernels run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bads_ppl.data import Batch
from bads_ppl.errors import InputError
from bads_ppl.joining import join
from bads_ppl.losses import Loss, cross_entropy, observe
from bads_ppl.primitives import NetworkPrior, sample_network, wanted_site
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.sites import copied
from bads_ppl.weights import SITE, Weights

Program = Callable[[Batch, Batch], None]
"""A model with its parts bound: what a kernel traces."""


class Model(Protocol):
    """The signature that a model must have. It may keep no state between calls."""

    def __call__(self, train: Batch, meta: Batch, parts: Parts) -> None: ...


@dataclass
class Forward:
    """What the network says of a train batch and a meta batch.

    Attributes:
        features: (B_t, D) embeddings, detached; None unless the weights need them.
        outputs: gives train_loss, meta_output and meta_loss.
    """

    features: Tensor | None
    outputs: Callable[[], tuple[Tensor, Any, Tensor | None]]

    @property
    def train_loss(self) -> Tensor:
        """Losses (B_t,) of the train batch."""
        return self._outputs[0]

    @property
    def meta_output(self) -> Any:
        """Outputs (B_m, ...) for the meta batch."""
        return self._outputs[1]

    @property
    def meta_loss(self) -> Tensor | None:
        """Losses (B_m,) of the meta batch, where they came along with those of the train batch."""
        return self._outputs[2]

    @cached_property
    def _outputs(self) -> tuple[Tensor, Any, Tensor | None]:
        return self.outputs()


@dataclass(frozen=True)
class Impact:
    """The impact constants rho of (24) and (25), all >= 0, that of the meta term > 0.

    Attributes:
        train: rho_theta^t, on the train term in the update of theta.
        meta: rho_theta^m, on the meta term in the update of theta.
        weight: rho_w^t, on the train term in the update of w (more: more contrast, trap 10).

    With `weight` different from `train` the updates follow no joint density, and samples of
    (theta, w) are not those of a posterior.
    """

    train: float = 1.0
    meta: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("train", "meta", "weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}_impact must be >= 0, got {getattr(self, name)}")
        if self.meta == 0:
            raise InputError(
                "meta_impact must be positive, got 0: without the meta set there is nothing to "
                "select for"
            )


@dataclass
class Parts:
    """Everything a model is given beside the data. See `models/joint.py` for their use.

    Attributes:
        network: module from inputs (B, ...) to outputs (B, ...).
        weights: source of the train weights.
        sparsity: prior (8) on their total; None for weights that are fixed.
        loss: per-example loss, (outputs, targets) to (B,).
        prior: prior of the network's parameters.
        impact: impact constants (24), (25).
        head: the module whose input is the embedding h_i; default `embedding_layer(network)`.
        learner: a second, smaller network that a model may train along.
    """

    network: nn.Module
    weights: Weights
    sparsity: SparsityPrior | None = None
    loss: Loss = cross_entropy
    prior: NetworkPrior = field(default_factory=NormalPrior)
    impact: Impact = field(default_factory=Impact)
    head: nn.Module | None = None
    learner: nn.Module | None = None

    @cached_property
    def auxiliary(self) -> nn.Module:
        """A second network of the same shape and values, for models that run a companion chain.

        Parameters that are frozen are the network's own.
        """
        return copied(self.network)

    @cached_property
    def normalises_batches(self) -> bool:
        """Whether the network's outputs for a row depend on the other rows of a pass."""
        layers = (
            m for m in self.network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        )
        return any(m.training or not m.track_running_stats for m in layers)

    def sample_network(self) -> Callable[..., Any]:
        """Theta ~ p(theta), at sites "theta.<parameter>"; returns the network as a callable."""
        return sample_network("theta", self.network, self.prior)

    def forward(
        self, network: Callable[..., Any], train: Batch, meta: Batch, *, apart: bool = False
    ) -> Forward:
        """Losses of the train batch and outputs for the meta batch.

        In one pass over both; `apart` makes two, where their gradients are needed apart. Where
        weights alone are wanted, and a network of ours gives its embedding without the rest
        (`embeds_alone`), it is asked for the rest when something wants it.
        """
        if self._embedding_will_do():
            with capture_features(self.network) as kept:
                network(train.input, embedding_only=True)
            return Forward(kept[0], lambda: self._pass(network, train, meta, apart)[0])
        found, features = self._pass(network, train, meta, apart)
        return Forward(features, lambda: found)

    def _embedding_will_do(self) -> bool:
        alone = self.head is None and getattr(self.network, "embeds_alone", False)
        return alone and self.weights.needs_features and wanted_site() == SITE

    def _pass(
        self, network: Callable[..., Any], train: Batch, meta: Batch, apart: bool
    ) -> tuple[tuple[Tensor, Any, Tensor | None], Tensor | None]:
        """Losses of the train batch, what the network says of the meta batch, and features."""
        count = len(train)
        wanted: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self.weights.needs_features:
            wanted = capture_features(self.network, self.head)
        meta_loss = None
        with wanted as kept:
            if apart:
                train_output, meta_output = network(train.input), network(meta.input)
                train_loss = self.loss(train_output, train.target)
            else:
                output = network(join(train.input, meta.input))
                train_output, meta_output = split(output, count)
                if self.loss is cross_entropy and train.target.ndim == meta.target.ndim:
                    # One call for both.
                    losses = self.loss(output, join(train.target, meta.target))
                    train_loss, meta_loss = split(losses, count)
                else:
                    train_loss = self.loss(train_output, train.target)
        return (train_loss, meta_output, meta_loss), kept[0][:count] if kept else None

    def weigh(self, w: Tensor, loss: Tensor) -> Tensor:
        """Log of the train term, -rho w l per point (B,), with the impact constants (24), (25).

        Its derivative is -rho_theta^t w dl/dtheta for theta and -rho_w^t l for w.
        """
        if self.impact.train == self.impact.weight:
            return (w * loss) * -self.impact.train
        for_theta = w.detach() * loss
        for_w = (w - w.detach()) * loss.detach()
        return -self.impact.train * for_theta - self.impact.weight * for_w

    def observe_meta(self, output: Any, meta: Batch, loss: Tensor | None = None) -> None:
        """The meta targets observed, in plate "meta" (3).

        Args:
            output: the network's outputs (B_m, ...) for the meta batch.
            meta: the meta batch.
            loss: the losses (B_m,) of this very output, if they are known: `Forward.meta_loss`.
        """
        impact = self.impact.meta
        known = None if loss is None else (meta.target, loss)
        scaled: Any = nullcontext() if impact == 1 else poutine.scale(scale=impact)
        with scaled, meta.plate("meta"):
            seen = observe(self.loss, output, len(meta), known)
            pyro.sample("meta_target", seen, obs=meta.target)


def bind(model: Model, parts: Parts) -> Program:
    """The program of a model with these parts."""
    return partial(model, parts=parts)


def split(tree: Any, count: int) -> tuple[Any, Any]:
    """The first `count` rows of every tensor of a tree, and the others: undoes `join`."""
    if isinstance(tree, Tensor):  # backward it is one copy, and both parts may be changed in place
        first, rest = torch.unsafe_split_with_sizes(tree, [count, len(tree) - count])
        return first, rest
    return tree_map(lambda x: x[:count], tree), tree_map(lambda x: x[count:], tree)


@contextmanager
def capture_features(network: nn.Module, head: nn.Module | None = None) -> Iterator[list[Tensor]]:
    """A list that gets the embedding (B, D), detached, of every forward pass of the network.

    Args:
        network: the network.
        head: the layer whose input is the embedding; default `embedding_layer(network)`.
    """
    kept: list[Tensor] = []
    layer = head if head is not None else embedding_layer(network)
    hook = layer.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    try:
        yield kept
    finally:
        hook.remove()


def embedding_layer(network: nn.Module) -> Any:
    """The layer whose input (B, D) is taken as the top-layer embedding; its `in_features` is D.

    It is the module that the network calls `embedding_layer`, if that has `in_features`, or else
    its last nn.Linear.

    Raises:
        InputError: if there is neither.
    """
    own = getattr(network, "embedding_layer", None)
    if isinstance(own, nn.Module) and isinstance(getattr(own, "in_features", None), int):
        return own
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError(
            f"the weight network needs an embedding, but {type(network).__name__} has no "
            "nn.Linear: name the layer whose input it is, head=..., or call it embedding_layer"
        )
    return layers[-1]
