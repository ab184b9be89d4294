"""Which rows a step sees: uniform minibatches, or half of them drawn in proportion to w.

Both draw from a generator that is passed in, ahead for a block of steps, so that the cost per step
is O(B). Their state is small: the rows of a block are drawn again from the generator's state at
the block's start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bads_ppl.errors import InputError
from bads_ppl.sites import pieces, total_dtype

LARGE = 2**16
"""Points above which the rows of a whole pass are too many to draw ahead."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one step.

    Attributes:
        index: (B,) int64.
        importance: (B,) corrections 1 / (N q_i), or None for uniform rows, all distinct.
    """

    index: Tensor
    importance: Tensor | None = None


def check_batch_size(batch_size: int, size: int, name: str) -> None:
    """Refuse batch sizes outside 1 to the set's size.

    Raises:
        InputError: naming both.
    """
    if not 1 <= batch_size <= size:
        raise InputError(
            f"{name}_batch must be from 1 to the size of the {name} set, {size}, got "
            f"{batch_size}: use a smaller batch"
        )


class UniformMinibatches:
    """Passes over the set in random order, B rows at a time; a remainder below B is left out.

    Every row is equally likely in every step, and no row occurs twice within a batch.

    With `lengths`, rows of like length come together, so that little of a batch is padding: every
    `bucket` batches of a pass are cut from their rows in the order of length, and the batches of
    the pass are shuffled. A row is as likely in every step as before, so that gradients stay
    unbiased; rows of a batch are no longer independent of each other.

    Args:
        size: N.
        batch_size: B.
        generator: source of randomness.
        lengths: (N,) by which rows are alike; None: they are not looked at.
        bucket: batches that are cut together, at least 1; 1: as without lengths.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        generator: torch.Generator,
        lengths: Tensor | None = None,
        bucket: int = 1,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.generator = generator
        self.lengths = lengths if bucket > 1 else None
        self.bucket = bucket
        self.position = 0
        self.block_start = generator.get_state()
        self.order: Tensor | None = None

    def _shuffle(self) -> None:
        self.block_start = self.generator.get_state()
        self.order = None  # makes room for the next
        kind = torch.int32 if self.size < 2**31 else torch.int64  # 4 bytes a point
        self.order = torch.randperm(
            self.size, generator=self.generator, device=self.generator.device, dtype=kind
        )
        if self.lengths is not None:
            self.order = self._bucketed(self.order, self.lengths)

    def _bucketed(self, order: Tensor, lengths: Tensor) -> Tensor:
        """The order (N,) of a pass with rows of like length in the same batch."""
        count = self.size // self.batch_size
        rows = order[: count * self.batch_size].split(self.bucket * self.batch_size)
        alike = torch.cat([part[lengths[part.long()].argsort(stable=True)] for part in rows])
        batches = torch.randperm(count, generator=self.generator, device=self.generator.device)
        return alike.view(count, self.batch_size)[batches].flatten()

    def next(self) -> Rows:
        if self.batch_size == self.size:
            return Rows(torch.arange(self.size, device=self.generator.device))
        if self.order is None or self.position + self.batch_size > self.size:
            self._shuffle()
            self.position = 0
        assert self.order is not None
        rows = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return Rows(rows.long())

    def state_dict(self) -> dict[str, Tensor]:
        started = self.order is not None
        return {
            "position": torch.tensor(self.position if started else -1),
            "block_start": self.block_start,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state` was taken; the generator's own state is restored by its owner."""
        position = int(state["position"])
        self.block_start = state["block_start"]
        if position < 0:
            self.order = None
            return
        now = self.generator.get_state()
        self.generator.set_state(self.block_start)
        self._shuffle()
        self.generator.set_state(now)
        self.position = position


class ImportanceMinibatches:
    """Half of each batch uniform, half drawn in proportion to w, with the unbiased correction.

    Row i has probability q_i = 0.5 / N + 0.5 w_i / sum(w), and its terms are multiplied by
    1 / (N q_i) <= 2 (the balance heuristic of multiple importance sampling, Veach 1995). The
    probabilities are those of w at the start of a block of steps, so that drawing costs O(B) a
    step; the correction uses the same ones and stays exact. The rows of a block take 12 bytes each.

    Args:
        size: N.
        batch_size: B, at least 2.
        generator: source of randomness, on the device of the weights.
        weights: returns the current weights (M,) of some rows, non-negative.
        block: steps between looks at the weights; default one pass, N / B, but 50 at least, and of
            sets above `LARGE` a sixteenth of a pass, but the rows of that many points at least.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        generator: torch.Generator,
        weights: Callable[[slice], Tensor],
        block: int | None = None,
    ) -> None:
        if batch_size < 2:
            raise InputError(
                f"importance minibatches need a train_batch of 2 or more, got {batch_size}"
            )
        self.size = size
        self.batch_size = batch_size
        self.generator = generator
        self.weights = weights
        rows = size if size <= LARGE else max(LARGE, size // 16)
        self.block = block if block is not None else max(50, rows // batch_size)
        self.position = 0
        self.index: Tensor | None = None
        self.importance: Tensor | None = None

    def _draw(self) -> None:
        self.index = self.importance = None  # makes room for the next
        half, device = self.batch_size // 2, self.generator.device
        dtype = total_dtype(device)
        sums = [torch.zeros(1, dtype=dtype, device=device)]  # of w before each piece
        for piece in pieces(self.size):
            sums.append(self._cumulative(piece, sums[-1])[1][-1:].clone())
        total = sums[-1]
        height = torch.rand(
            (self.block, half), generator=self.generator, device=device, dtype=dtype
        )
        uniform = torch.randint(
            self.size, (self.block, self.batch_size - half), generator=self.generator, device=device
        )
        # In order, so that each piece of w has its part of them.
        height, to_drawn = height.mul_(total).flatten().sort()
        uniform, to_uniform = uniform.flatten().sort()
        drawn = torch.empty_like(to_drawn)
        of_drawn, of_uniform = (
            torch.empty_like(height),
            torch.empty_like(uniform, dtype=total.dtype),
        )
        first = [0, 0]
        for piece, before, upto in zip(pieces(self.size), sums, sums[1:], strict=False):
            weights, cumulative = self._cumulative(piece, before)
            ends = [len(height), len(uniform)]
            if piece.stop < self.size:
                ends[0] = int(torch.searchsorted(height, upto, right=True))
                ends[1] = int(torch.searchsorted(uniform, piece.stop))
            part, other = (slice(*bounds) for bounds in zip(first, ends, strict=True))
            found = torch.searchsorted(cumulative, height[part]).clamp_(max=len(weights) - 1)
            drawn[part], of_drawn[part] = found + piece.start, weights[found]
            of_uniform[other] = weights[uniform[other] - piece.start]
            first = ends

        def joined(of_uniform: Tensor, of_drawn: Tensor) -> Tensor:
            """What is known of the rows (block, B), as they were before they were sorted."""
            parts = [(of_uniform, to_uniform), (of_drawn, to_drawn)]
            each = [torch.empty_like(x).scatter_(0, order, x) for x, order in parts]
            return torch.cat([x.view(self.block, -1) for x in each], dim=1)

        index, chance = joined(uniform, drawn), joined(of_uniform, of_drawn)
        share = half / self.batch_size
        chance.mul_(share * self.size).div_(total).add_(1 - share)  # N q_i
        self.index, self.importance = index, chance.reciprocal_().float()

    def _cumulative(self, piece: slice, before: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (M,) of a piece, and the sum (M,) up to each; `before` (1,) is that before it."""
        weights = self.weights(piece).to(before.dtype)
        return weights, torch.cat([before, weights]).cumsum(0)[1:]

    def next(self) -> Rows:
        if self.index is None or self.position == len(self.index):
            self._draw()
            self.position = 0
        assert self.index is not None and self.importance is not None
        index, importance = self.index[self.position], self.importance[self.position]
        self.position += 1
        return Rows(index, importance)

    def state_dict(self) -> dict[str, Tensor]:
        if self.index is None or self.importance is None:
            return {"position": torch.tensor(-1)}
        return {
            "position": torch.tensor(self.position),
            "index": self.index[self.position :].contiguous(),
            "importance": self.importance[self.position :].contiguous(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state` was taken; the generator's own state is restored by its owner."""
        position = int(state["position"])
        self.index = self.importance = None
        if position < 0:
            return

        # Steps that were taken already are never looked at again: fill their places with zeros.
        def padded(rest: Tensor) -> Tensor:
            start = rest.new_zeros((position, self.batch_size))
            return torch.cat([start, rest]).to(self.generator.device)

        self.index, self.importance = padded(state["index"]), padded(state["importance"])
        self.position = position
