"""How often a Metropolis test would accept a chain's own proposals: a health check of step sizes.

SGLD accepts every step; the price is a bias that grows with the step size. On a fixed batch the
step x -> x' is the proposal of the Metropolis-adjusted Langevin algorithm (Roberts and Tweedie,
1996), so that its acceptance probability

    min(1, exp(-(U(x') - U(x)) / T) q(x | x') / q(x' | x))

can be computed, without acting on it. Near 1 the discretisation is harmless; near 0 the step is too
large for its draws to be called a posterior. The noise of minibatches is not part of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bads_ppl.conditional import Conditional
from bads_ppl.data import Batch
from bads_ppl.sites import total_dtype

if TYPE_CHECKING:
    from bads_ppl.kernel import MinibatchKernel


def acceptance(
    kernel: MinibatchKernel, train: Batch, meta: Batch, generator: torch.Generator
) -> dict[str, float]:
    """Acceptance probability in [0, 1] of one proposal per group, all else held.

    Groups at temperature 0 and sharded networks are left out, and all groups in mode "paper" and of
    programs without a density (companions), where there is nothing to accept with. The chain stays
    where it is, and its own generator untouched.

    Args:
        kernel: a kernel after `setup`.
        train: batch of distinct train rows.
        meta: meta batch.
        generator: source of the proposals' noise, on the device of the data.
    """
    if kernel.mode == "paper" or not kernel.latents.has_density:
        return {}
    return {
        group: _probability(kernel, group, train, meta, generator)
        for group in kernel.schedules
        if kernel.heat(group) > 0 and kernel.shards(group) is None
    }


def _probability(
    kernel: MinibatchKernel, group: str, train: Batch, meta: Batch, generator: torch.Generator
) -> float:
    eta, temperature = kernel.langevin_rate(group), kernel.heat(group)
    conditional = Conditional(kernel.latents, group, train, meta)
    root = kernel.states[group].get("root")
    if root is not None and conditional.table is not None:
        root = [whole[conditional.table.index] for whole in root]
    with conditional.kept():
        start = conditional.values()
        scales = [torch.ones_like(x) for x in start] if root is None else root
        before, gradient = conditional.evaluate()
        noise = [
            torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype) for x in start
        ]
        spread = math.sqrt(eta * temperature)
        proposal = [
            x - 0.5 * eta * s**2 * g + spread * s * xi
            for x, g, s, xi in zip(start, gradient, scales, noise, strict=True)
        ]
        conditional.move(proposal)
        after, back = conditional.evaluate()
        forward = sum(_square(xi) for xi in noise) / 2
        reverse = sum(
            _square((x - y + 0.5 * eta * s**2 * g) / s)
            for x, y, g, s in zip(start, proposal, back, scales, strict=True)
        ) / (2 * eta * temperature)
        log_ratio = -(_double(after) - _double(before)) / temperature - (reverse - forward)
    return math.exp(min(0.0, float(log_ratio))) if bool(torch.isfinite(log_ratio)) else 0.0


def _square(x: Tensor) -> Tensor:
    return (_double(x) ** 2).sum()


def _double(x: Tensor) -> Tensor:
    return x.to(total_dtype(x.device))
