"""The conditional density of one group of latents on a fixed batch, as an explicit function.

Health checks need what a step does not: the potential and its gradient at several values of a
group, all else held. `Conditional` moves a chain's latents there and puts them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bads_ppl.data import Batch
from bads_ppl.latents import Latents


class Conditional:
    """A group's potential given all other latents, on one train batch and one meta batch.

    For networks and other global latents the batch's terms are scaled to the whole sets. For rows
    of a table each row has its own terms once, as in a step: give a batch of distinct rows.

    Args:
        latents: the chain's latents; as they were after `with conditional.kept()`.
        group: name of a network, a global latent or a table.
        train: train batch.
        meta: meta batch.
    """

    def __init__(self, latents: Latents, group: str, train: Batch, meta: Batch) -> None:
        self.latents = latents
        self.group = group
        self.train, self.meta = train, meta
        self.table = latents.tables.get(group)
        if self.table is not None:
            self.evaluate()  # finds the plate's batch
            if self.table.index is train.index:
                self.train = _once(train)
            else:
                self.meta = _once(meta)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Everything as it was on leaving, the totals to the last bit."""
        sums = self.latents.sums.values()
        totals = [one.total.clone() for one in sums]
        before = self.values()
        try:
            yield
        finally:
            with torch.no_grad():
                if self.table is not None:
                    self.table.value[self.table.index] = before[0]
                else:
                    torch._foreach_copy_(self._all(), before)
                for one, total in zip(sums, totals, strict=True):
                    one.total.copy_(total)
            self.latents.zero_grad()

    def _all(self) -> list[Tensor]:
        network = self.latents.networks.get(self.group)
        return network.parameters if network else [self.latents.globals[self.group].value]

    def values(self) -> list[Tensor]:
        """The group's present values, of a table the batch's rows; copies."""
        if self.table is not None:
            return [self.table.value[self.table.index]]
        return [value.detach().clone() for value in self._all()]

    def move(self, values: list[Tensor]) -> None:
        """Set the group's values; `evaluate` must have been called at the present ones."""
        if self.table is not None:
            self.latents.move_rows(self.group, values[0])
            return
        with torch.no_grad():
            torch._foreach_copy_(self._all(), values)

    def evaluate(self) -> tuple[Tensor, list[Tensor]]:
        """The potential () up to a constant and its gradient, at the present values.

        Networks are in eval mode. At temperature T the density is exp(-potential / T).
        """
        latents, told = self.latents, self.latents.told
        with torch.enable_grad(), latents.still():
            latents.zero_grad()
            potential = latents.potential(self.train, self.meta)
            potential.backward()
            latents.drop_pending()
            latents.told = told  # of the last step
            found = potential.detach()
            network = latents.networks.get(self.group)
            if network is not None:
                if network.decay is not None:
                    with torch.no_grad():
                        found = found - network.log_prior()
                return found, [grad.clone() for grad in network.gradients()]
        if self.table is not None:
            assert self.table.rows is not None and self.table.rows.grad is not None
            return found, [self.table.rows.grad.clone()]
        value = latents.globals[self.group].value
        return found, [torch.zeros_like(value) if value.grad is None else value.grad.clone()]


def _once(batch: Batch) -> Batch:
    """The batch with every row's own terms once, in place of scaled to the whole set."""
    size = len(batch)
    share = torch.full((size,), size / batch.size, device=batch.target.device)
    return Batch(batch.index, batch.input, batch.target, batch.size, share)
