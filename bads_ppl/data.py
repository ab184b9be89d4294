"""Point sets and minibatches: the one way in which data reach a program.

A `Data` holds one set of points (train, meta or test) as tensors on a device, with a stable id
per point. A `Batch` is what a Pyro program receives: some rows of a `Data`, and enough about the
whole set for a plate to scale the minibatch's terms to the sum over all points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.plate_messenger import PlateMessenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset, Subset

from bads_ppl.errors import InputError
from bads_ppl.ranks import ALONE, Ranks

Input = Any
"""One tensor, or a dict, list or tuple of tensors that share their first dimension."""

Augment = Callable[[Input, torch.Generator], Input]
"""Random views of a minibatch's inputs, of the same form, from a generator on their device."""


class ScaledPlate(PlateMessenger):
    """A plate over a whole set, subsampled to a batch's rows; a context that may be entered again.

    Log-probabilities inside are scaled by size / B, and by the batch's importance correction
    where rows were not drawn uniformly, so that their sum estimates the sum over the set without
    bias.
    """

    def __init__(self, name: str, batch: Batch) -> None:
        where = str(batch.index.device)  # Pyro would make a tensor to find out
        super().__init__(name, batch.size, subsample=batch.index, dim=-1, device=where)
        self._correction: Tensor | None = None
        if batch.importance is not None:
            self._correction = batch.importance * (batch.size / len(batch))

    def _process_message(self, msg: Any) -> None:
        before = msg["scale"]
        self._enter(msg)
        if self._correction is not None:
            plain = isinstance(before, float) and before == 1  # these share one tensor
            msg["scale"] = self._correction if plain else self._correction * before

    def _enter(self, msg: Any) -> None:
        shape = getattr(msg["fn"], "batch_shape", None)
        if shape == (self.subsample_size,) and not msg["cond_indep_stack"]:
            SubsampleMessenger._process_message(self, msg)  # it has the plate's shape already
        else:
            super()._process_message(msg)


def take(tree: Any, rows: Tensor) -> Any:
    """The rows (B,) of every tensor of a tree."""
    if isinstance(tree, Tensor):
        return tree.index_select(0, rows)
    return tree_map(lambda x: x.index_select(0, rows), tree)


def spaced(size: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices (min(count, size),) evenly spaced from 0 to size - 1."""
    count = min(count, size)
    return torch.arange(count, device=device) * (size - 1) // max(count - 1, 1)


@dataclass(frozen=True)
class Batch:
    """Rows of a point set, as a Pyro program receives them.

    Attributes:
        index: (B,) int64, the rows' positions in the set, 0 to size - 1.
        input: the rows' inputs, a tensor (B, ...) or a tree of such tensors.
        target: (B, ...) the rows' targets.
        size: number of points in the whole set.
        importance: (B,) correction 1 / (size * q_i) where row i was drawn with probability q_i,
            or None where all rows were equally likely.
        ranks: the processes that have the other rows of the step's batch.
        parent: the step's batch, where these rows are this process's share of it.
    """

    index: Tensor
    input: Input
    target: Tensor
    size: int
    importance: Tensor | None = None
    ranks: Ranks = ALONE
    parent: Batch | None = None

    def __len__(self) -> int:
        return self.index.numel()

    def plate(self, name: str) -> ScaledPlate:
        """The plate over the whole set, of which these rows are the subsample."""
        return ScaledPlate(name, self)

    @property
    def whole(self) -> Batch:
        """The step's batch, of which other processes may have a share."""
        return self if self.parent is None else self.parent

    def shared(self, ranks: Ranks) -> Batch:
        """This process's share of the batch."""
        if ranks.alone:
            return self
        importance = None if self.importance is None else ranks.share(self.importance)
        input = tree_map(ranks.share, self.input)
        index, target = ranks.share(self.index), ranks.share(self.target)
        return Batch(index, input, target, self.size, importance, ranks, self)

    def keep(self, places: Tensor) -> Batch:
        """The rows at `places` (k,) of this batch, each of which counts as it does here.

        The plate scales k rows by size / k; the correction k / B makes that size / B again, so that
        log-probabilities are those of this batch with weight 1 for these rows and 0 for the others.

        Raises:
            InputError: if other processes have a share of the batch: nobody sees all rows.
        """
        if not self.ranks.alone:
            raise InputError(
                f"rows are chosen within a batch, and {self.ranks.size} processes have a share of "
                "it each: run this program in one process"
            )
        share = torch.full((len(places),), len(places) / len(self), device=self.index.device)
        if self.importance is not None:
            share = share * self.importance[places]
        input = tree_map(lambda x: x[places], self.input)
        return Batch(self.index[places], input, self.target[places], self.size, share)

    def total(self, value: Tensor) -> Tensor:
        """Unbiased estimate () of the sum of a per-point value (B,) over the whole set.

        Where other processes have a share of the batch, it is that of the batch as a whole, with
        the derivative of this share alone: the mean over the processes is the batch's.
        """
        if self.importance is not None:
            value = value * self.importance
        return self.ranks.whole(value.sum() * (self.size / len(self)))


class Data:
    """A set of points held as tensors, with one stable id per point.

    Args:
        input: tensor (N, ...), or a dict, list or tuple of tensors that share dimension N.
        target: (N, ...) tensor of targets.
        ids: (N,) integers by which results are keyed; default 0 to N - 1. Must be unique.
        name: how error messages call this set.
        augment: makes random views of inputs. Kernels step on views
            (`bads_ppl.joining.step_batches`); whatever looks at points otherwise sees them as
            they are.
        lengths: (N,) how much of each input counts, where inputs are padded to one length.

    Raises:
        InputError: if the set is empty, lengths differ, ids repeat, or a value is NaN or infinite.
    """

    def __init__(
        self,
        input: Input,
        target: Tensor,
        ids: Tensor | None = None,
        *,
        name: str = "train",
        augment: Augment | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        if len(target) == 0:
            raise InputError(
                f"the {name} set must have at least one point, got 0: add points to it"
            )
        for leaf in tree_leaves(input):
            if len(leaf) != len(target):
                raise InputError(
                    f"{name} inputs and targets must have the same length, got {len(leaf)} inputs "
                    f"and {len(target)} targets: give one target per input"
                )
        self.ids = torch.arange(len(target)) if ids is None else torch.as_tensor(ids).cpu()
        self.input = input
        self.target = target
        self.name = name
        self.augment = augment
        self.lengths = lengths
        if lengths is not None and lengths.shape != (len(target),):
            raise InputError(
                f"{name} lengths must be one per point, got shape {tuple(lengths.shape)} for "
                f"{len(target)} points"
            )
        self.namespace: object = self if ids is None else None  # sets share ids within one
        self._check_ids(given=ids is not None)
        for what, leaf in [("input", x) for x in tree_leaves(input)] + [("target", target)]:
            self._check_finite(leaf, what)

    def _check_ids(self, *, given: bool) -> None:
        if not given:
            return
        if len(self.ids) != len(self.target):
            raise InputError(
                f"{self.name} ids must be one per point, got {len(self.ids)} ids for "
                f"{len(self.target)} points"
            )
        if len(torch.unique(self.ids)) < len(self.ids):
            values, counts = torch.unique(self.ids, return_counts=True)
            repeated = values[counts > 1][:5].tolist()
            raise InputError(
                f"{self.name} ids must be unique, got repeated ids {repeated}: "
                "give every point an id of its own"
            )

    def _check_finite(self, tensor: Tensor, what: str) -> None:
        if not tensor.is_floating_point():
            return
        for start in range(0, len(tensor), 8192):  # in blocks: no boolean copy of the whole set
            block = tensor[start : start + 8192]
            finite = torch.isfinite(block).flatten(1).all(1) if block.ndim > 1 else block.isfinite()
            if not bool(finite.all()):
                row = start + int((~finite).nonzero()[0])
                raise InputError(
                    f"{self.name} {what}s must be finite, got NaN or infinity at index "
                    f"{int(self.ids[row])}: mend or drop that point"
                )

    def __len__(self) -> int:
        return self.target.size(0)

    @property
    def device(self) -> torch.device:
        return self.target.device

    def to(self, device: torch.device | str) -> Data:
        """The same points on another device (self if they are there already)."""
        if torch.device(device) == self.device:
            return self
        return self._with(
            tree_map(lambda x: x.to(device), self.input),
            self.target.to(device),
            self.ids,
            None if self.lengths is None else self.lengths.to(device),
        )

    def subset(self, rows: Tensor, *, name: str | None = None) -> Data:
        """The points at `rows` (M,), which keep their ids."""
        rows = rows.to(self.device)
        chosen = tree_map(lambda x: x[rows], self.input)
        lengths = None if self.lengths is None else self.lengths[rows]
        return self._with(chosen, self.target[rows], self.ids[rows.cpu()], lengths, name)

    def _with(
        self,
        input: Input,
        target: Tensor,
        ids: Tensor,
        lengths: Tensor | None,
        name: str | None = None,
    ) -> Data:
        """These checked points again, without checking them again."""
        data = object.__new__(Data)
        data.input, data.target, data.ids, data.lengths = input, target, ids, lengths
        data.augment = self.augment
        data.name, data.namespace = name or self.name, self.namespace
        return data

    def batch(self, rows: Tensor, importance: Tensor | None = None) -> Batch:
        """The batch of `rows` (B,), on the device of the data."""
        return Batch(
            rows, take(self.input, rows), self.target.index_select(0, rows), len(self), importance
        )

    def evenly(self, count: int) -> Batch:
        """A batch of `count` points evenly spaced from first to last, or of all if fewer."""
        return self.batch(spaced(len(self), count, self.device))

    def batches(self, size: int = 2048) -> Iterator[Batch]:
        """All points in order, `size` at a time."""
        for rows in torch.arange(len(self), device=self.device).split(size):
            yield self.batch(rows)

    def full(self) -> Batch:
        """All points as one batch, for kernels that take no minibatches (HMC, NUTS)."""
        rows = torch.arange(len(self), device=self.device)
        return Batch(rows, self.input, self.target, len(self))

    @classmethod
    def from_dataset(cls, dataset: Dataset[Any] | Data, *, name: str) -> Data:
        """Read a map-style dataset of (input, target) or (index, input, target) into memory.

        `index` is the point's stable id; without it the position in the dataset is the id, in a
        `Subset` that in the underlying dataset.

        Raises:
            InputError: if the dataset is empty, an item has another form, or items do not stack.
        """
        if isinstance(dataset, Data):
            return dataset._with(dataset.input, dataset.target, dataset.ids, dataset.lengths, name)
        if not hasattr(dataset, "__len__"):
            raise InputError(
                f"the {name} set must be a map-style dataset with a length, got "
                f"{type(dataset).__name__}: an iterable dataset has no fixed points to weight"
            )
        if len(dataset) == 0:
            raise InputError(
                f"the {name} set must have at least one point, got 0: add points to it"
            )
        form = dataset[0]
        if not isinstance(form, tuple | list) or len(form) not in (2, 3):
            raise InputError(
                f"items of the {name} set must be (input, target) or (index, input, target), got "
                f"{type(form).__name__}"
                + (f" of length {len(form)}" if isinstance(form, tuple | list) else "")
            )
        own = torch.Generator()  # a loader without one would draw from torch's global generator
        try:
            blocks = list(DataLoader(dataset, batch_size=512, shuffle=False, generator=own))
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"items of the {name} set must be tensors or numbers, of one shape, got: {error}. "
                "Convert them to tensors, padded or cropped to one shape"
            ) from error
        parts = [tuple(block) for block in blocks]
        input = tree_map(lambda *xs: torch.cat(xs), *[p[-2] for p in parts])
        target = torch.cat([torch.as_tensor(p[-1]) for p in parts])
        if len(form) == 3:
            ids = torch.cat([torch.as_tensor(p[0]) for p in parts])
            return cls(input, target, ids, name=name)
        whole, rows = _underlying(dataset)
        data = cls(input, target, rows, name=name)
        data.namespace = whole
        return data


def _underlying(dataset: Any) -> tuple[object, Tensor]:
    """The dataset that a `Subset` (of a `Subset` ...) was taken from, and its rows there (N,)."""
    rows = torch.arange(len(dataset))
    while isinstance(dataset, Subset):
        rows = torch.as_tensor(list(dataset.indices))[rows]
        dataset = dataset.dataset
    return dataset, rows


def check_disjoint(train: Data, meta: Data) -> None:
    """Refuse train and meta sets that share points, as far as their ids can tell.

    Ids can tell where both sets give their own, or both were taken from one dataset.

    Raises:
        InputError: with the first shared ids.
    """
    if train.namespace is not meta.namespace:
        return
    shared = train.ids[torch.isin(train.ids, meta.ids)]
    if len(shared):
        raise InputError(
            f"train and meta must not share points, got {len(shared)} shared ids, the first "
            f"{shared[:5].tolist()}: remove them from one of the two sets"
        )
