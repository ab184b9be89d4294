"""What is computed along a chain: functions of theta at each draw, metrics at each evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from bads_ppl.acceptance import acceptance
from bads_ppl.data import Data
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.latents import Latents
from bads_ppl.losses import Loss
from bads_ppl.shards import together
from bads_ppl.sites import evaluation_mode, total_dtype


class Monitor(Protocol):
    """What is computed along a chain. One per chain; its state is saved with the chain."""

    def on_draw(self, kernel: MinibatchKernel) -> dict[str, float]:
        """Functions of theta for a draw: the same names every time."""
        ...

    def on_evaluate(self, kernel: MinibatchKernel, *, burnt_in: bool) -> dict[str, float]:
        """Metrics of one row of metrics.jsonl."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class ThetaMonitor:
    """The default monitor: losses on fixed probes, norms per parameter tensor, the potential.

    Raw theta is no use for diagnosis (symmetries); these functions of it are (trap 4). The
    potential is that of the probes, scaled by their plates: the full sum where the sets are no
    larger than `probe`. Evaluations add the acceptance rate of every group (`bads_ppl.acceptance`).

    Args:
        network: the chain's network.
        loss: per-example loss.
        train: train set.
        meta: meta set.
        others: further sets whose mean loss is a function of theta to record, by name.
        probe: largest number of points per set to look at, evenly spaced.
        density: whether the program has one (impact constants that differ leave none).
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        train: Data,
        meta: Data,
        others: Mapping[str, Data] | None = None,
        probe: int = 512,
        density: bool = True,
    ) -> None:
        self.network = network
        self.loss = loss
        self.density = density
        sets = {"train": train, "meta": meta, **(others or {})}
        self.probes = {name: data.evenly(probe) for name, data in sets.items()}

    def on_draw(self, kernel: MinibatchKernel) -> dict[str, float]:
        names, values = kernel.look(self._functions)
        return dict(zip(names, values.tolist(), strict=True))

    @torch.no_grad()
    def _functions(self, latents: Latents) -> tuple[list[str], Tensor]:
        """The names of all functions, and their values in one tensor, which is read once."""
        with evaluation_mode(self.network):
            train, meta = self.probes["train"], self.probes["meta"]
            named = {"potential": latents.joint_potential(train, meta)}
            for name, batch in self.probes.items():
                named[f"{name}_loss"] = self.loss(self.network(batch.input), batch.target).mean()
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                named[f"norm.{name}"] = together(torch.linalg.vector_norm(parameter))
        device = self.probes["train"].target.device
        kind = total_dtype(device)
        return list(named), torch.stack([value.to(device, kind) for value in named.values()])

    def on_evaluate(self, kernel: MinibatchKernel, *, burnt_in: bool) -> dict[str, float]:
        if not self.density:
            return {}
        train = kernel.train.evenly(kernel.train_rows.batch_size)
        meta = kernel.meta.evenly(kernel.meta_rows.batch_size)
        seed = kernel.generator.initial_seed() ^ kernel.steps  # the chain's own stays untouched
        generator = torch.Generator(device=kernel.train.device).manual_seed(seed)
        found = acceptance(kernel, train, meta, generator)
        return {f"acceptance.{group}": probability for group, probability in found.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass
