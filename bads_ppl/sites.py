"""The kinds of latent site that a stochastic-gradient kernel holds in place between its steps.

Parameters of a network stay in the module itself, other global latents are tensors of their own,
and local latents of a subsampled plate live in a table with one row per point. Beside them stand
the running statistics that a program's statements ask for. `bads_ppl.latents` brings them together.

Everything here is on the unconstrained scale unless it says otherwise.
"""

from __future__ import annotations

import copy
import errno
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from pyro.distributions import Independent, Normal
from torch import Tensor, nn
from torch.distributions import SigmoidTransform

from bads_ppl.atomic import write_error
from bads_ppl.data import Batch
from bads_ppl.errors import InputError
from bads_ppl.primitives import Restart, Revert
from bads_ppl.shards import own, shards_of

PIECE = 2**18
"""Rows of a table that are looked at in one go: whole tables may be larger than memory."""


def pieces(size: int) -> Iterator[slice]:
    """Rows 0 to size - 1 in order, `PIECE` at a time."""
    return (slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE))


def total_dtype(device: torch.device) -> torch.dtype:
    """In which sums over whole sets are kept."""
    return torch.float32 if device.type == "mps" else torch.float64


class NetworkSite:
    """The trainable parameters of one module, all in one group, with their priors.

    Where the module is sharded (`bads_ppl.shards`), `parameters` are this process's parts of them.
    """

    def __init__(
        self, name: str, module: nn.Module, prior: Any, companion: Restart | Revert | None
    ) -> None:
        self.name = name
        self.module = module
        self.companion = companion
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise InputError(
                f"network {name!r} has no parameter with requires_grad=True, so nothing to "
                "sample: unfreeze some of its parameters"
            )
        self.names = [n for n, _ in named]
        self.leaves: list[Tensor] = [p for _, p in named]
        self.shards = shards_of(module, self.leaves)
        self.parameters = self.leaves if self.shards is None else [own(p) for p in self.leaves]
        self.priors = [prior(n, p) for n, p in zip(self.names, self.parameters, strict=True)]
        # The score of a zero-mean Gaussian with one scale is theta / scale^2: no autograd needed.
        scales = [zero_mean_scale(prior) for prior in self.priors]
        self.decay = None if None in scales else [1 / s**2 for s in scales if s is not None]
        if self.decay is None and self.shards is not None:
            raise InputError(
                f"network {name!r} is sharded, so its prior must be Normal(0, scale) with one "
                "scale per parameter tensor: take such a prior, or parallel=data"
            )
        self.decays_alike = self.decay is not None and len(set(self.decay)) == 1
        self.moves: list[Tensor] | None = None  # of a Revert companion: m, theta' = theta + m
        self.part: list[Tensor] = []  # of a Revert companion: the plate's share of the gradient
        self.call: Callable[..., Any] = module
        if isinstance(companion, Revert):
            self.moves = [torch.zeros_like(p) for p in self.parameters]
            # It has no backward pass of its own.
            self.call = torch.no_grad()(lambda *args, **kwargs: module(*args, **kwargs))

    def copied_after(self, step: int) -> bool:
        """Whether it is made from its network again after `step` (from 1)."""
        if isinstance(self.companion, Restart):
            return self.companion.every is not None and step % self.companion.every == 0
        return self.companion is not None

    def log_prior(self) -> Tensor:
        """Log p(theta), () with its graph."""
        if self.decay is None:
            terms = [q.log_prob(p) for q, p in zip(self.priors, self.parameters, strict=True)]
            total = torch.stack([term.sum() for term in terms]).sum()
        else:  # the same of all parameters at once
            kind = reduce(torch.promote_types, (p.dtype for p in self.parameters), torch.float32)
            norms = torch.stack(torch._foreach_norm(self.parameters, dtype=kind))
            pairs = list(zip(self.parameters, self.decay, strict=True))
            constant = sum(0.5 * p.numel() * math.log(d / (2 * math.pi)) for p, d in pairs)
            if self.decays_alike:
                total = constant - 0.5 * self.decay[0] * norms.square().sum()
            else:
                squares = torch._foreach_mul(list(norms.square()), self.decay)
                total = constant - 0.5 * torch.stack(squares).sum()
        return total if self.shards is None else self.shards.total(total)

    def slopes(self) -> list[Tensor]:
        """What the backward passes left in each parameter, zeros where that is nothing."""
        grads = [
            torch.zeros_like(p) if leaf.grad is None else leaf.grad
            for leaf, p in zip(self.leaves, self.parameters, strict=True)
        ]
        return grads if self.shards is None else [own(grad) for grad in grads]

    def statistics(self) -> list[Tensor]:
        """Running statistics of the module's normalisation layers; the live ones."""
        layers = [
            one for one in self.module.modules() if isinstance(one, nn.modules.batchnorm._NormBase)
        ]
        pairs = [(layer.running_mean, layer.running_var) for layer in layers]
        return [value for pair in pairs for value in pair if value is not None]

    def gradients(self) -> list[Tensor]:
        """Gradient of the potential in each parameter, the closed-form prior included."""
        grads = self.slopes()
        if self.decay is not None:
            with torch.no_grad():
                if self.decays_alike:
                    torch._foreach_add_(grads, self.parameters, alpha=self.decay[0])
                else:
                    for grad, value, decay in zip(grads, self.parameters, self.decay, strict=True):
                        grad.add_(value, alpha=decay)
        return grads


def zero_mean_scale(prior: Any) -> float | None:
    """The scale of a Normal(0, scale) that is the same for all elements, else None."""
    while isinstance(prior, Independent):
        prior = prior.base_dist
    if not isinstance(prior, Normal):
        return None
    loc, scale = prior.loc, prior.scale
    if bool((loc != 0).any()) or bool((scale != scale.flatten()[0]).any()):
        return None
    return float(scale.flatten()[0])


class Logit(SigmoidTransform):
    """The sigmoid as it is: whoever moves a logit keeps it where that is neither 0 nor 1.

    torch bounds the sigmoid's value, which costs a step six operations.
    """

    LIMITS = (-87.0, 15.9)  # sigmoid: 1.6e-38 and 1 - 1.2e-7, next to 0 and 1 in float32

    def _call(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def inside(self, x: Tensor) -> Tensor:
        """The logits, brought inside of the limits."""
        return x.clamp(*self.LIMITS)


@dataclass
class GlobalSite:
    """A latent outside of subsampled plates that is not a network's parameter."""

    value: Tensor  # leaf, unconstrained
    transform: Any  # unconstrained to constrained


@dataclass
class Table:
    """A local latent of a plate: one row per point, of which a step moves the batch's."""

    plate: str
    value: Tensor  # (N, ...), unconstrained
    transform: Any
    damage: Tensor  # () 0 while all values that rows moved to were finite, NaN ever after
    rows: Tensor | None = None  # leaf (B, ...): the rows of the batch in hand
    constrained: Tensor | None = None  # the same rows as the program saw them
    index: Tensor | None = None  # (B,)

    def share_moves(self, *batches: Batch) -> None:
        """Put the rows of the whole batch in the place of this process's share, with gradients.

        Gradients are those of the mean over the processes. Plates that are there as a whole are so
        in every process.

        Raises:
            InputError: if the rows are those of no batch and not all rows.
        """
        assert self.rows is not None and self.rows.grad is not None and self.index is not None
        grad, ranks = self.rows.grad, batches[0].ranks
        batch = next((one for one in batches if one.index is self.index), None)
        if batch is not None:
            grad, self.index = ranks.gather(grad) / ranks.size, batch.whole.index
        elif len(self.index) == len(self.value):
            ranks.mean_([grad])
        else:
            raise InputError(
                f"plate {self.plate!r} has {len(self.index)} of {len(self.value)} rows, which are "
                "those of neither batch: several processes cannot share them; run in one process"
            )
        self.rows = self.value[self.index]
        self.rows.grad, self.constrained = grad, self.transform(self.rows)

    def values(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Some rows (M, ...), default all, on the constrained scale."""
        value = self.value[rows]
        if len(value) <= PIECE:
            result: Tensor = self.transform(value)
            return result
        result = value.new_empty(self.transform.forward_shape(value.shape))
        for part in pieces(len(value)):  # a transform makes copies of what it is given
            result[part] = self.transform(value[part])
        return result

    def total(self) -> Tensor:
        """Sum () over all rows on the constrained scale."""
        dtype = total_dtype(self.value.device)
        parts = [self.values(rows).sum(dtype=dtype) for rows in pieces(len(self.value))]
        return torch.stack(parts).sum()


def new_table(size: int, row: Tensor, folder: Path | None) -> Tensor:
    """A table (size, ...) of rows that are all `row`.

    Args:
        size: N.
        row: (...) what each row starts as.
        folder: folder for a file that holds the table, of which memory holds what was looked at
            last. It has no name and lives as long as the table does. None: in memory.

    Raises:
        InputError: if there is a folder, and the row is on an accelerator or not float32.
        OSError: if the disk has no room for it.
    """
    shape = (size, *row.shape)
    if folder is None:
        return row.expand(shape).clone()
    if row.device.type != "cpu" or row.dtype != torch.float32:
        raise InputError(
            f"a table on disk must be of float32 values on the CPU, got {row.dtype} on "
            f"{row.device.type}: use table=memory, or device=cpu"
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:  # written, not through the map: where the disk is full, that would kill the process
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".table-") as file:
            for part in pieces(size):
                rows = row.expand(part.stop - part.start, *row.shape)
                file.write(rows.contiguous().numpy().data)
            file.flush()
            return torch.from_file(file.name, shared=True, size=math.prod(shape)).view(shape)
    except OSError as failure:
        raise write_error(failure.errno or errno.EIO, folder) from failure


@dataclass
class PlateSum:
    """State of a `plate_sum`: the total, and for a computed value what each row had last."""

    total: Tensor  # (), float64 where the device has it
    table: str | None  # the local site whose values are summed
    memory: Tensor | None = None  # (N,) for computed values
    pending: tuple[Tensor, Tensor] | None = None  # index (B,) and value (B,) of this step

    def add(self, change: Tensor, share: Tensor | None) -> None:
        """Add the rows' changes (B,); `share` (B,) splits those of rows that occur repeatedly."""
        if share is not None:
            change = change * share
        self.total += change.sum(dtype=self.total.dtype)


@dataclass
class RunningMean:
    """State of a `running_mean`: the last values, or one decayed average.

    The share of the next value is in a tensor: it changes while a recorded step stays as it is.
    """

    kind: str
    window: int
    values: Tensor  # (window,) for "simple", (1,) for "exponential"
    count: int = 0
    pending: Tensor | None = None
    share: Tensor = field(init=False)  # () of the next value in a decayed average
    _filled: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.share = self.values.new_zeros(())

    def mean(self) -> Tensor:
        if self.kind == "exponential":
            return self.values[0]
        return self.values[: self.kept].mean()

    def prepare(self) -> None:
        """Before a step: what it depends on beside its constants."""
        share = max(1 / self.window, 1 / (self.count + 1))  # a plain average at first
        if share != self._filled:
            self.share.fill_(share)
            self._filled = share

    @property
    def kept(self) -> int:
        """How many of the values count, on which alone `mean` depends beside tensors."""
        return min(self.count, len(self.values))

    @property
    def place(self) -> int:
        """Of the next value among the last ones."""
        return self.count % self.window

    @property
    def constants(self) -> tuple[float, ...]:
        """What `mean` and `commit` depend on beside tensors."""
        return (self.kept,) if self.kind == "exponential" else (self.kept, self.place)

    def commit(self) -> bool:
        """Put what is pending among the values, if anything is; the caller counts it."""
        if self.pending is None:
            return False
        if self.kind == "exponential":
            self.values.lerp_(self.pending.reshape(1), self.share)
        else:
            self.values[self.place] = self.pending
        self.pending = None
        return True


Repeats = tuple[Tensor, Tensor]
"""Of rows that may occur repeatedly: see `first_occurrence`."""


def first_occurrence(index: Tensor) -> Repeats:
    """Of each entry, the position (B,) of the first equal one, and 1 / how often it occurs (B,)."""
    same = index[:, None] == index[None, :]
    return same.to(torch.uint8).argmax(dim=1), 1 / same.sum(dim=1)


def drops(module: nn.Module) -> bool:
    """Whether a pass of the module leaves out units at random."""
    layers = (one for one in module.modules() if isinstance(one, nn.modules.dropout._DropoutNd))
    return any(one.training and one.p > 0 for one in layers)


def frozen(module: nn.Module) -> dict[str, Tensor]:
    """The parameters with requires_grad=False, which nothing writes to, by each of their names."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if not parameter.requires_grad}


def copied(module: nn.Module) -> nn.Module:
    """A copy of a module with the same frozen parameters, which it shares."""
    return copy.deepcopy(
        module, {id(parameter): parameter for parameter in frozen(module).values()}
    )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, as it was afterwards."""
    was = [(part, part.training) for part in module.modules()]  # parts may differ
    module.eval()
    try:
        yield
    finally:
        for part, training in was:
            part.training = training
