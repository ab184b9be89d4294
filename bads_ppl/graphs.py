"""A kernel's steps and draws as CUDA graphs: recorded once, replayed at the price of their kernels.

A step of a small network is hundreds of kernels of some microseconds each, and the host takes
longer to launch them than the device to run them. A graph launches them all at once. What it does
is what was recorded: the addresses of tensors, and every number that was no tensor, such as step
sizes. `Graphs` therefore keeps a graph for each set of such constants that comes back, and runs
the steps in between as they are. Replayed steps draw the numbers that they would have drawn.
"""

from __future__ import annotations

import gc
import logging
import random
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from bads_ppl.errors import InputError
from bads_ppl.latents import Latents
from bads_ppl.ranks import Ranks
from bads_ppl.sites import RunningMean
from bads_ppl.tracing import Told

log = logging.getLogger(__name__)

T = TypeVar("T")

MOST = 32
"""Graphs that a `Graphs` keeps."""

REMEMBERED = 4096
"""Sets of constants that are remembered, to tell which come back."""


@dataclass(frozen=True)
class Outcome:
    """What a step leaves for the host to see; a graph writes to the same tensors every time.

    Attributes:
        told: what the step found on its batch.
        means: running means that the step added a value to.
    """

    told: Told
    means: list[RunningMean]


Replay = Callable[[], None]
Record = Callable[[Callable[[], T]], tuple[Replay, T]]


def obstacle(device: torch.device, ranks: Ranks, latents: Latents | None = None) -> str | None:
    """What a kernel would need for its steps to be recorded; None: nothing, as far as is known."""
    if device.type != "cuda":
        return f"device=cuda, got {device.type}"
    if not ranks.alone:
        return f"one process, got {ranks.size}"
    changes = latents is not None and latents.changes
    return "a program that does not change with the steps" if changes else None


class Graphs(Generic[T]):
    """Runs the steps of one kernel, or its draws, from graphs where it has one.

    Before the first is recorded, one step is watched: what waits for the device, draws random
    numbers on the host, or puts new tensors in the place of its state is never recorded.

    Args:
        body: all that the step does on the device, given the inputs of `run`, and no more. It must
            keep all state in tensors that it changes in place, and may depend on nothing but those,
            the inputs, the generators and the constants given to `run`.
        generator: which the step draws from, beside torch's global one of the device.
        state: the tensors of the state, by name.
        device: where they are.
        what: what messages call it, in the singular.
        needed: whether steps that cannot be recorded are an error.
        record: records a function's work; returns what replays it, and the function's result.
        watch: a context in which waiting for the device is noticed; its list says where, once the
            context is left.
    """

    def __init__(
        self,
        body: Callable[..., T],
        generator: torch.Generator,
        state: Callable[[], dict[str, Tensor]],
        device: torch.device,
        *,
        what: str = "step",
        needed: bool = False,
        record: Record[T] | None = None,
        watch: Callable[[], AbstractContextManager[list[str]]] | None = None,
    ) -> None:
        self.body = body
        self.state = state
        self.what = what
        self.needed = needed
        self.recorder: Callable[[], Record[T]] = (
            (lambda: record) if record else (lambda: Recorder(generator, device))
        )
        self.record = self.recorder()
        self.watch = watch or waits
        self.inputs: tuple[Tensor | None, ...] = ()  # what graphs read; they stay where they are
        self.graphs: dict[Hashable, tuple[Replay, T]] = {}
        self.seen: set[Hashable] = set()
        self.works: bool | None = None  # not known before a step was watched

    def run(self, constants: Hashable, *inputs: Tensor | None) -> T:
        """One step; what it returns is good until the next one.

        Args:
            constants: all numbers in it; None: they are not known.
            inputs: what `body` gets: each time as many, of the same shapes.

        Raises:
            InputError: if a step that should be cannot be recorded.
        """
        if self.works is False or constants is None:
            return self.body(*inputs)
        if constants in self.graphs:
            replay, outcome = self.graphs[constants]
            self._fill(inputs)
            replay()
            return outcome
        if constants not in self.seen or len(self.graphs) == MOST:
            if len(self.seen) == REMEMBERED:
                self.seen.clear()
            self.seen.add(constants)
            return self.body(*inputs)
        if self.works is None:
            return self._watched(inputs)
        self._fill(inputs)
        try:
            replay, outcome = self.record(lambda: self.body(*self.inputs))
        except RuntimeError as error:
            raise InputError(
                f"a {self.what} cannot be recorded as a CUDA graph ({error}): take "
                "cuda_graph=false, in a new process; resume=true continues from the last checkpoint"
            ) from error
        self.graphs[constants] = replay, outcome
        replay()  # recording alone does nothing
        return outcome

    def forget(self) -> None:
        """Drop all graphs: their constants will not come back.

        What is recorded afterwards has memory of its own: torch does not take back a pool that has
        lost its last graph.
        """
        self.graphs.clear()
        self.seen.clear()
        self.record = self.recorder()

    def _watched(self, inputs: tuple[Tensor | None, ...]) -> T:
        """A step as it is, after which it is known whether such steps can be recorded."""
        before, drawn = self._places(), _host_generators()
        with self.watch() as waited:
            outcome = self.body(*inputs)
        after = self._places()
        moved = [name for name, place in after.items() if before.get(name) != place]
        found = None
        if waited:
            found = f"the host waits for the device in it, at {waited[0]}"
        elif moved:
            found = f"it puts a new tensor in the place of {moved[0]}"
        elif drawn != _host_generators():
            found = "it draws random numbers on the host"
        self.works = found is None
        if found is not None and self.needed:
            raise InputError(
                f"a {self.what} cannot be recorded as a CUDA graph: {found}. Leave "
                "cuda_graph=true out"
            )
        if found is not None:
            about = self.what, self.what, found
            log.info("%ss are not recorded as CUDA graphs: of a %s, %s", *about)
        return outcome

    def _fill(self, inputs: tuple[Tensor | None, ...]) -> None:
        if not self.inputs:
            self.inputs = tuple(None if one is None else one.clone() for one in inputs)
            return
        own, new = ([one for one in each if one is not None] for each in (self.inputs, inputs))
        torch._foreach_copy_(own, new)

    def _places(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self.state().items()}


def _host_generators() -> tuple[object, ...]:
    """States of the global generators of torch, numpy and Python on the host."""
    state: Any = np.random.get_state()
    numpy = (state[1].tobytes(), state[2:])
    return torch.get_rng_state().numpy().tobytes(), numpy, random.getstate()


class Recorder:
    """Records work on a CUDA device; all graphs of a recorder share their memory.

    What a graph leaves is therefore good until the next graph runs. Work is recorded on the stream
    it will run on, if that is not the device's default: libraries have a workspace for each stream,
    which chains that run at the same time may not share. Meanwhile no garbage is collected: a graph
    of a kernel that is gone would be destroyed, which ends a recording.
    """

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator = generator
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        now = torch.cuda.current_stream(device)
        default = now == torch.cuda.default_stream(device)
        self.stream = torch.cuda.Stream(device) if default else now

    def __call__(self, body: Callable[[], T]) -> tuple[Replay, T]:
        with torch.cuda.device(self.device), garbage_kept():
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                outcome = body()
        return graph.replay, outcome


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Python collects no cycles of objects that nothing refers to any more."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def waits() -> Iterator[list[str]]:
    """Notices where the host waits for the CUDA device: file and line, once the context is left.

    Warnings of other kinds are shown afterwards.
    """
    before = torch.cuda.get_sync_debug_mode()
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for one in caught:
        if "called a synchronizing" in str(one.message):
            found.append(f"{one.filename}:{one.lineno}")
        elif "Synchronization debug mode" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
