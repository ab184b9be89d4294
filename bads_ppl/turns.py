"""Chains in turns: several in one process, each on a stream of its own of one accelerator.

A step of a small network leaves most of a GPU idle, and steps that are recorded as CUDA graphs
leave most of the host idle: launched on streams of their own, the steps of several chains run at
the same time. A turn is some steps of one chain, up to where the host would wait for the device: it
waits in the next turn, when the others have steps to go on with. Chains that are not recorded gain
nothing and run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

import torch

from bads_ppl.errors import Stopped

T = TypeVar("T")


class After(Enum):
    """What comes after a step of a chain."""

    ALONE = "steps that are not recorded: another chain beside it gains nothing"
    MORE = "steps that are launched without waiting for the device"
    WAIT = "the host waits for the device"


Steps = Generator[After, None, T]
"""A chain: yields after each step, and returns a result."""

TURN = 16
"""Steps of a turn at most: some that a device runs while the host sees to another chain's draw."""


class Globals:
    """What is global in torch and each chain has its own of: generators, and a CUDA stream.

    Args:
        device: where the chain runs.
        beside: whether other chains run at the same time: on CUDA they need streams of their own.
    """

    def __init__(self, device: torch.device, *, beside: bool) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.state = torch.get_rng_state()
        self.stream: Any = None
        if not self.cuda:
            return
        with torch.cuda.device(device):
            self.default = torch.cuda.default_generators[torch.cuda.current_device()]
            # Not its numbers alone: graphs keep to the state object they were recorded with.
            self.drawn = self.default.clone_state()
            if beside:
                torch.cuda.synchronize()  # what other streams made, this one may read from now on
                self.stream = torch.cuda.Stream()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """These in the place of torch's, which are as they were afterwards."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.state)
        outside = self.default.graphsafe_get_state() if self.cuda else None
        if outside is not None:
            self.default.graphsafe_set_state(self.drawn)
        try:
            with torch.cuda.stream(self.stream):  # None: as it is
                yield
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(before)
            if outside is not None:
                self.default.graphsafe_set_state(outside)

    def join(self) -> None:
        """What runs on torch's own stream from here on runs after all that ran on this one."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


@dataclass
class _Running(Generic[T]):
    number: int
    steps: Steps[T]
    own: Globals
    after: After = After.ALONE


def in_turns(
    chains: Sequence[Callable[[], Steps[T]]],
    most: int,
    device: torch.device,
    stop: Callable[[], None],
) -> list[T]:
    """Run chains to their ends and return their results, in order.

    The next one starts when those that run are recorded, and the device has room for two like
    them: at a draw a chain may take more memory than it has taken so far. When one fails, `stop` is
    called, after which the others must raise something themselves.

    Args:
        chains: each makes a chain.
        most: chains at a time.
        device: where they run.
        stop: asks all chains to stop.

    Raises:
        Exception: what a chain raised first, `Stopped` last of all.
    """
    waiting = list(enumerate(chains))
    running: list[_Running[T]] = []
    results: dict[int, T] = {}
    failures: list[Exception] = []
    try:
        while running or (waiting and not failures):
            if waiting and not failures and _next_may_start(running, most, device):
                number, make = waiting.pop(0)
                running.append(_Running(number, make(), Globals(device, beside=most > 1)))
            for one in list(running):
                try:
                    with one.own.in_place():
                        for _ in range(TURN):
                            one.after = next(one.steps)
                            if one.after is After.WAIT:
                                break
                except StopIteration as end:  # a chain's own would be a RuntimeError by now
                    results[one.number] = end.value
                    one.own.join()
                except Exception as error:  # noqa: BLE001 - raised when the others have stopped
                    if not failures:
                        stop()
                    failures.append(error)
                else:
                    continue
                running.remove(one)
    finally:
        for one in running:  # after an interrupt
            one.steps.close()
    if not failures:
        return [results[number] for number in range(len(chains))]
    try:
        raise _worst(failures)
    finally:
        del failures  # a traceback leads to this frame, and to a chain's memory


def _worst(failures: list[Exception]) -> Exception:
    """The first that is more than a chain that was stopped, or else the first."""
    return next((one for one in failures if not isinstance(one, Stopped)), failures[0])


def _next_may_start(running: Sequence[_Running[Any]], most: int, device: torch.device) -> bool:
    if not running:
        return True
    if len(running) >= most or any(one.after is After.ALONE for one in running):
        return False
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return free > 2 * torch.cuda.memory_reserved(device) / len(running)
