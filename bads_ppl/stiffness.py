"""A look at the start of a chain: are the step sizes stable for the curvature that they meet?

A Langevin step of size eta on a potential of curvature c multiplies distances by 1 - eta c / 2, and
runs away where eta > 4 / c. The prior (8) on the total weight has a curvature of about
sum_B (dw/du)^2 / sigma^2 in the batch's rows u, so that a small sigma makes a usual step hopeless
(with sigma = 1e-5, eta must be below some 1e-8). The largest curvature of each group comes from a
few power iterations with differences of gradients.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from bads_ppl.conditional import Conditional
from bads_ppl.errors import Unstable

if TYPE_CHECKING:
    from bads_ppl.kernel import MinibatchKernel

log = logging.getLogger(__name__)

ITERATIONS = 8
MARGIN = 3.0
"""Networks leave a start that is this much too steep for flatter places; more is refused."""

CLIPPED_MARGIN = 10.0
"""A clip bounds what an unstable step of a local site does, up to a step this much too large."""


def check_stiffness(kernel: MinibatchKernel) -> None:
    """Refuse step sizes that are too large for the curvature at the start.

    Local and other global latents are refused beyond the stable step, or ten times of it where a
    clip bounds them; networks without a clip beyond three times of it (they find flatter places).
    Networks that are sharded between processes are not looked at.

    Raises:
        Unstable: with the curvature, the step size and the largest that works.
    """
    for group in kernel.schedules:
        network = kernel.latents.networks.get(group)
        skipped = kernel.clips[group] is not None or kernel.shards(group) is not None
        if network is not None and (skipped or network.companion):
            continue
        found = curvature(kernel, group)
        eta = kernel.rate(group)
        largest = 4 / max(found, 1e-30) * eta / kernel.langevin_rate(group)
        clipped = kernel.clips[group] is not None
        margin = MARGIN if network is not None else CLIPPED_MARGIN if clipped else 1.0
        if eta > margin * largest:
            raise Unstable(
                f"step_size of group {group!r} is {eta:.3g}, but with the curvature at the start "
                f"({found:.3g}) steps above {largest:.3g} run away: take step_size "
                f"{largest / 2:.2g} or less. If the prior on the total weight is very strict, a "
                "larger sparsity_scale (sigma of (8)) allows larger steps"
            )


def curvature(kernel: MinibatchKernel, group: str) -> float:
    """Largest curvature of the potential in a group's values, on one batch at the present state.

    Found by power iteration, so from below; the chain stays where it is.
    """
    train = kernel.train.evenly(kernel.train_rows.batch_size)
    meta = kernel.meta.evenly(kernel.meta_rows.batch_size)
    conditional = Conditional(kernel.latents, group, train, meta)
    generator = torch.Generator(device=kernel.train.device).manual_seed(0)
    norm = torch.zeros(())
    with conditional.kept():
        start = conditional.values()
        v = [torch.randn(x.shape, generator=generator, device=x.device) for x in start]
        conditional.evaluate()
        for _ in range(ITERATIONS):
            length = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(v)))
            v = [part / (length + 1e-30) for part in v]
            h = 1e-2
            gradients = []
            for sign in (h, -h):
                conditional.move([x + sign * part for x, part in zip(start, v, strict=True)])
                gradients.append(conditional.evaluate()[1])
            v = [(a - b) / (2 * h) for a, b in zip(*gradients, strict=True)]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(v)))
    return float(norm)
