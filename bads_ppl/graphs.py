"""A kernel's steps as CUDA graphs: recorded once, then replayed for the price of their kernels.

A step of a small network is hundreds of kernels of some microseconds each, and the host takes
longer to launch them than the device to run them. A graph launches them all at once. What it does
is what was recorded: the addresses of tensors, and every number that was no tensor, such as step
sizes. `Graphs` therefore keeps a graph for each set of such constants that comes back, and runs
the steps in between as they are. Replayed steps draw the numbers that they would have drawn.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bads_ppl.errors import InputError
from bads_ppl.latents import Latents
from bads_ppl.minibatches import Rows
from bads_ppl.ranks import Ranks
from bads_ppl.sites import RunningMean

log = logging.getLogger(__name__)

MOST = 32
"""Graphs that a kernel keeps."""

REMEMBERED = 4096
"""Sets of constants that are remembered, to tell which come back."""


@dataclass(frozen=True)
class Outcome:
    """What a step leaves for the host to see; a graph writes to the same tensors every time.

    Attributes:
        potential: () on the step's batch.
        terms: log-probabilities by site, not scaled.
        means: running means that the step added a value to.
    """

    potential: Tensor
    terms: dict[str, Tensor]
    means: list[RunningMean]


Body = Callable[[Rows, Tensor], Outcome]
"""All that a step does on the device, given the rows of train and meta set; no more than that."""

Replay = Callable[[], None]


def obstacle(device: torch.device, ranks: Ranks, latents: Latents) -> str | None:
    """What a kernel would need for its steps to be recorded; None: nothing."""
    needs = {
        f"device=cuda, got {device.type}": device.type == "cuda",
        f"one process, got {ranks.size}": ranks.alone,
        "a program that does not change with the steps": not latents.changes,
    }
    return next((what for what, met in needs.items() if not met), None)


class Graphs:
    """Runs the steps of one kernel, from graphs where it has one.

    Args:
        body: the step. It must keep all state in tensors that it changes in place, and may depend
            on nothing but those, the rows, the generators and the constants given to `run`.
        generator: which the step draws from, beside torch's global one.
        state: the tensors of the state, by name.
        record: records a function's work; returns what replays it, and the function's result.
        syncs: whether the host waits for the device in what is done inside of the context; said
            by a list that is empty or not once the context is left.
    """

    def __init__(
        self,
        body: Body,
        generator: torch.Generator,
        state: Callable[[], dict[str, Tensor]],
        record: Callable[..., tuple[Replay, Outcome]] | None = None,
        syncs: Callable[[], AbstractContextManager[list[str]]] | None = None,
    ) -> None:
        self.body = body
        self.generator = generator
        self.state = state
        self.record = record or Recorder(generator)
        self.syncs = syncs or waits
        self.rows: tuple[Rows, Tensor] | None = None  # what graphs read; they stay where they are
        self.graphs: dict[Hashable, tuple[Replay, Outcome]] = {}
        self.seen: set[Hashable] = set()
        self.checked = False
        self.works = True

    def run(self, constants: Hashable, rows: Rows, meta: Tensor) -> Outcome:
        """One step. `constants` are all numbers in it; None: they are not known.

        Raises:
            InputError: if a step that did not wait for the device cannot be recorded all the same.
        """
        if not self.works or constants is None:
            return self.body(rows, meta)
        if constants in self.graphs:
            replay, outcome = self.graphs[constants]
            self._fill(rows, meta)
            replay()
            return outcome
        if constants not in self.seen or len(self.graphs) == MOST:
            if len(self.seen) == REMEMBERED:
                self.seen.clear()
            self.seen.add(constants)
            return self.body(rows, meta)
        if not self.checked:
            with self.syncs() as found:
                outcome = self.body(rows, meta)
            self.checked, self.works = True, not found
            if found:
                log.info("steps are not recorded as CUDA graphs: the host waits in them")
            return outcome
        self._fill(rows, meta)
        assert self.rows is not None
        own, where = self.rows, self._places()
        try:
            replay, outcome = self.record(lambda: self.body(*own))
        except RuntimeError as error:
            raise InputError(
                f"a step cannot be recorded as a CUDA graph ({error}): take cuda_graph=false"
            ) from error
        moved = [name for name, place in self._places().items() if where.get(name) != place]
        if moved:
            raise InputError(
                f"a step puts new tensors in the place of its state, of {moved[:3]}, and cannot be "
                "recorded as a CUDA graph: take cuda_graph=false"
            )
        self.graphs[constants] = replay, outcome
        replay()  # recording alone does nothing
        return outcome

    def _fill(self, rows: Rows, meta: Tensor) -> None:
        if self.rows is None:
            importance = None if rows.importance is None else rows.importance.clone()
            own = replace(rows, index=rows.index.clone(), importance=importance)
            self.rows = own, meta.clone()
            return
        own, own_meta = self.rows
        own.index.copy_(rows.index)
        if own.importance is not None and rows.importance is not None:
            own.importance.copy_(rows.importance)
        own_meta.copy_(meta)

    def _places(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self.state().items()}


class Recorder:
    """Records work on the current CUDA device; all graphs of a recorder share their memory.

    What a graph leaves is therefore good until the next graph runs.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], Outcome]) -> tuple[Replay, Outcome]:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph, pool=self.pool):
            outcome = body()
        return graph.replay, outcome


@contextmanager
def waits() -> Iterator[list[str]]:
    """Collects where the host waits for the CUDA device; the list is filled at the end."""
    before = torch.cuda.get_sync_debug_mode()
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [str(one.message) for one in caught if "called a synchronizing" in str(one.message)]
