"""RMSprop-preconditioned SGLD (Li et al., 2016), the preconditioner frozen while draws are made.

    V <- decay V + (1 - decay) (grad U)^2                      during warm-up
    G  = (1 + floor) m / (floor m + sqrt(V)),   m = mean sqrt(V)
    x <- x - eta / 2 * G grad U(x) + sqrt(eta T) G^(1/2) xi,   xi ~ Normal(0, 1)

While G changes with x the exact dynamics have a further drift, the divergence of G. It is left out
during warm-up, when nothing is drawn; afterwards G is constant and its divergence is 0, so that the
draws need no correction and have p^(1/T) as their target like SGLD's. m makes the mean element move
as it would under SGLD with the same eta, and the floor bounds G by (1 + floor) / floor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bads_ppl.errors import InputError
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.moves import State


class PreconditionedSGLD(MinibatchKernel):
    """SGLD with a diagonal preconditioner; see `MinibatchKernel` for the other arguments.

    Args:
        decay: share of V that a step keeps, in [0, 1). At first V is a plain average.
        floor: > 0; bounds how far elements with small gradients are sped up.

    Raises:
        InputError: for values outside of the ranges, and at `setup` without a warm-up.
    """

    def __init__(self, *args: Any, decay: float = 0.99, floor: float = 0.1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not 0 <= decay < 1:
            raise InputError(f"decay must be in [0, 1), got {decay}")
        if not floor > 0:
            raise InputError(f"floor must be positive, got {floor}: 0.1, say")
        self.decay = decay
        self.floor = floor

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        if warmup_steps < 1:
            raise InputError(
                "PreconditionedSGLD learns its preconditioner in burn-in, got a burn-in of 0 "
                "steps: give some, or use SGLD"
            )
        super().setup(warmup_steps, *args, **kwargs)

    def init(self, group: str, values: list[Tensor]) -> State:
        return {
            "square": [torch.zeros_like(value) for value in values],  # V
            "visits": [torch.zeros_like(value) for value in values],
            "root": [torch.ones_like(value) for value in values],  # G^(1/2)
        }

    def precondition(
        self, group: str, grads: list[Tensor], state: State, speed: Tensor | None
    ) -> list[Tensor]:
        if self.steps < self.warmup_steps:
            for grad, square, visits in zip(grads, state["square"], state["visits"], strict=True):
                if speed is not None:  # G is about the row's own gradient, not how it was drawn
                    grad = grad / speed.view(-1, *[1] * (grad.ndim - 1))
                share = (1 / (visits + 1)).clamp_(min=1 - self.decay)
                square.add_((grad**2 - square) * share)
                visits.add_(1)
            for kept, new in zip(state["root"], self._roots(group, state["square"]), strict=True):
                kept.copy_(new)
        root = state["root"]
        for grad, part in zip(grads, root, strict=True):
            grad.mul_(part**2)
        return root

    def _roots(self, group: str, squares: list[Tensor]) -> list[Tensor]:
        sizes = [square.sqrt() for square in squares]
        count = sum(size.numel() for size in sizes)
        total = torch.stack([size.sum() for size in sizes]).sum()
        shards = self.shards(group)
        if shards is not None:
            total, count = shards.total(total), sum(shape.numel() for shape in shards.shapes)
        mean = total / count + 1e-30
        return [((1 + self.floor) * mean / (self.floor * mean + size)).sqrt() for size in sizes]

    def end_warmup(self) -> None:
        for group, state in self.states.items():
            squares = state["square"]
            if group in self.latents.tables:  # rows that no batch had move like the mean row
                ((square,), (visits,)) = squares, state["visits"]
                mean = square.sum() / (visits > 0).sum().clamp(min=1)
                squares = [torch.where(visits > 0, square, mean)]
            for root, new in zip(state["root"], self._roots(group, squares), strict=True):
                root.copy_(new)
