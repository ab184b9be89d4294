"""How a stochastic-gradient kernel moves its groups of latents, once it has their gradients.

    drift <- -eta / 2 * G grad U + sqrt(eta T) G^(1/2) xi,    xi ~ Normal(0, 1)

A sampler says what G is (`precondition`) and how the values follow the drift (`advance`), and
nothing else: `bads_ppl.sgld` is the smallest. Its state is in tensors that it changes in place, and
numbers that change with the steps are in `constants`.

Local latents of a subsampled plate move when their row is in the batch: each visited row takes a
step of its own exact conditional, so a step costs O(B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from bads_ppl.adaptation import Adaptation
from bads_ppl.data import Batch
from bads_ppl.latents import Latents
from bads_ppl.primitives import Revert
from bads_ppl.shards import Shards
from bads_ppl.sites import Repeats

PAPER_NOISE = 1e-5
"""Standard deviation of the noise in mode "paper", whatever the step size."""

State = dict[str, list[Tensor]]
"""What a sampler keeps for a group, by name: lists of tensors shaped like the group's values."""


class Moves(MCMCKernel):
    """What a sampler says of its moves, and the moves. `bads_ppl.kernel` has the rest.

    Attributes:
        latents: the values, and their gradients.
        generator: of the noise.
        mode: "calibrated" or "paper", see `PAPER_NOISE`.
        schedules: eta by group and step.
        temperatures: T by group.
        clips: longest drift by group; None: none.
        clipped: by group, in how many steps after warm-up it acted.
        adaptation: of eta in warm-up.
        states: what the sampler keeps, by group.
        steps: taken so far.
        warmup_steps: steps of warm-up.
    """

    latents: Latents
    generator: torch.Generator
    mode: str
    schedules: Mapping[str, Callable[[int], float]]
    temperatures: dict[str, Any]
    clips: dict[str, Any]
    clipped: dict[str, Tensor]
    adaptation: Adaptation
    states: dict[str, State]
    steps: int
    warmup_steps: int

    # what a sampler adds

    def init(self, group: str, values: list[Tensor]) -> State:
        """State to keep for a group of these values; rows of a table keep theirs."""
        return {}

    def precondition(
        self, group: str, grads: list[Tensor], state: State, speed: Tensor | None
    ) -> list[Tensor] | None:
        """Multiply `grads` by G in place; returns G^(1/2) for the noise, None where G is 1.

        `speed` (B,) is the factor that rows' gradients carry: importance correction and repeats.
        """
        return None

    def advance(self, group: str, values: list[Tensor], drift: list[Tensor], state: State) -> None:
        """Move `values` in place along a drift that has its noise already."""
        torch._foreach_add_(values, drift)

    def end_warmup(self) -> None:
        """Called once, after the last step of warm-up: what was adapted is frozen."""

    def rate(self, group: str) -> float:
        """Eta of this step."""
        return self.schedules[group](self.steps) * self.adaptation.factor(group)

    def langevin_rate(self, group: str) -> float:
        """The step of SGLD that has the bias and the limit of stability of this step's eta."""
        return self.rate(group)

    def heat(self, group: str) -> float:
        """T of this step."""
        temperature: float = self.temperatures[group]
        return temperature

    def constants(self) -> tuple[Any, ...]:
        """All numbers that change with the steps and that this step's moves depend on.

        A step that is recorded as a CUDA graph is replayed where these are the same. A sampler with
        further ones, say a friction that anneals with `steps`, adds them:
        `return (*super().constants(), self.friction_now())`.
        """
        rates = tuple((self.rate(group), self.heat(group)) for group in self.schedules)
        return (*rates, self.steps < self.warmup_steps)

    # the moves

    def _move_networks(self) -> None:
        """Move every network that is no Revert companion, and the moves that those take back."""
        networks = self.latents.networks
        scales = {
            name: self._move(name, network.parameters, network.gradients(), self.states[name])
            for name, network in networks.items()
            if network.moves is None
        }
        for network in networks.values():
            if isinstance(network.companion, Revert) and network.moves is not None:
                other = network.companion.network
                shortened, root = scales[other]
                torch._foreach_mul_(network.moves, 1 - 1 / network.companion.window)
                torch._foreach_mul_(network.part, shortened)
                if root is not None:
                    torch._foreach_mul_(network.part, [part**2 for part in root])
                torch._foreach_add_(network.moves, network.part, alpha=0.5 * self.rate(other))

    def _move_tables(self, train: Batch, repeats: Repeats | None) -> None:
        """Move the batch's rows of every table, each once.

        A train row drawn with probability q_i occurs B q_i times in a batch on average, and each
        occurrence has the correction c_i = 1 / (N q_i). A row that occurs k times makes one step of
        size k c_i eta, so that its mean speed, eta B / N, does not depend on q_i, nor by way of
        q_i on w, even where rows occur more than once.
        """
        for name, table in self.latents.tables.items():
            assert table.rows is not None and table.rows.grad is not None
            assert table.index is not None
            # The plate scaled the row's own terms to the whole set; the row is one point.
            grad = table.rows.grad.mul_(len(table.index) / len(table.value))
            new = table.rows.detach()
            ours = table.index is train.index  # else a local latent of the meta plate
            found = repeats if ours else None
            speed = train.importance if ours else None
            if found is not None and speed is not None:
                times = 1 / found[1]
                speed = speed * times
                grad = grad * times.view(-1, *[1] * (grad.ndim - 1))
            state = {
                key: [whole[table.index] for whole in kept]
                for key, kept in self.states[name].items()
            }
            self._move(name, [new], [grad], state, speed)
            table.damage.add_(new.sum(), alpha=0)  # 0 times what is not finite is NaN
            for key, kept in self.states[name].items():  # of a row that occurs twice the first
                for whole, part in zip(kept, state[key], strict=True):
                    whole.index_copy_(0, table.index, part if found is None else part[found[0]])
            self.latents.move_rows(name, new, found)

    def _move(
        self,
        group: str,
        values: list[Tensor],
        grads: list[Tensor],
        state: State,
        speed: Tensor | None = None,
    ) -> tuple[Tensor | float, list[Tensor] | None]:
        """One group's move, in place; `speed` (B,) multiplies eta row by row.

        Gradients of rows carry that factor already.
        Returns the factor by which a clip shortened the drift of a network, at most 1, and G^(1/2).
        """
        root = self.precondition(group, grads, state, speed)
        eta = self.rate(group)
        bound = self.clips[group]
        shortened: Tensor | float = 1.0
        if bound is not None:
            shortened = self._clip(
                group, grads, 2 * bound / eta, by_row=group in self.latents.tables
            )
        scale = PAPER_NOISE if self.mode == "paper" else math.sqrt(eta * self.heat(group))
        if scale > 0:
            drift = self._noise(group, values, scale)
            if self.mode == "calibrated":
                if root is not None:
                    torch._foreach_mul_(drift, root)
                if speed is not None:
                    rows = speed.sqrt()
                    drift = [part * rows.view(-1, *[1] * (part.ndim - 1)) for part in drift]
            torch._foreach_add_(drift, grads, alpha=-0.5 * eta)
        else:
            drift = grads
            torch._foreach_mul_(drift, -0.5 * eta)
        self.advance(group, values, drift, state)
        return shortened, root

    @property
    def sharded(self) -> bool:
        """Whether processes have parts of networks, and must all ask for `state_dict`."""
        return any(network.shards is not None for network in self.latents.networks.values())

    def shards(self, group: str) -> Shards | None:
        """How a group's values are shared out between processes; None if they are not."""
        network = self.latents.networks.get(group)
        return None if network is None else network.shards

    def _noise(self, group: str, values: list[Tensor], scale: float) -> list[Tensor]:
        """Numbers from Normal(0, scale) shaped like the values, in one draw.

        They lie in memory as the values do: on CUDA one kernel then moves many values.
        Of values that are shared out each process draws the whole, one after the other.
        """
        shards = self.shards(group)
        if shards is not None:
            own = []
            for number, shape in enumerate(shards.shapes):
                whole = torch.empty(shape, device=values[0].device)
                whole.normal_(0, scale, generator=self.generator)
                own.append(shards.part(number, whole).clone())
            return own
        sizes = [value.numel() for value in values]
        flat = torch.empty(sum(sizes), device=values[0].device)
        flat.normal_(0, scale, generator=self.generator)
        if any(value.dtype == torch.float64 for value in values):
            flat = flat.double()  # what the drift is added to
        parts = flat.split_with_sizes(sizes)
        return [_laid_out(part, value) for part, value in zip(parts, values, strict=True)]

    def _clip(
        self, group: str, grads: list[Tensor], bound: float, *, by_row: bool
    ) -> Tensor | float:
        """Bound the gradients in place; see `_move`. Counts how often, after warm-up."""
        shortened: Tensor | float = 1.0
        if by_row:
            (grad,) = grads
            acted = (grad.abs() > bound).to(grad.dtype).mean()
            grad.clamp_(-bound, bound)
        else:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            shards = self.shards(group)
            norm = norm if shards is None else shards.total(norm**2).sqrt()
            acted = norm > bound
            shortened = (bound / (norm + 1e-12)).clamp(max=1.0)
            torch._foreach_mul_(grads, shortened)
        if self.steps >= self.warmup_steps:
            self.clipped[group] += acted
        return shortened


def _laid_out(flat: Tensor, like: Tensor) -> Tensor:
    """Numbers (M,) like a tensor, laid out alike if that is contiguous or in channels_last."""
    if like.is_contiguous() or like.is_contiguous(memory_format=torch.channels_last):
        return flat.as_strided(like.shape, like.stride())
    return flat.view_as(like)
