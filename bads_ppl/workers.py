"""Chains side by side: one process per chain, as many at a time as there are workers.

A small network does not keep several cores busy, several chains do. Each chain's process writes its
folder as it would alone and ends with a checkpoint, from which the parent takes the chain up.
Processes are forked, so that nothing needs to be pickled; that needs Linux, and a machine without
an accelerator.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from bads_ppl.errors import Diverged, InputError

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent dies."""

Report = Callable[[int, int, dict[str, float]], None]
"""Called with a chain's number, the steps it has made, and what to show."""

Task = Callable[[int, Report], None]
"""Runs one chain to its end."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(workers: int | None, chains: int, device: torch.device) -> int:
    """How many chains run at a time: on CUDA in turns in this process, else in processes.

    Args:
        workers: as asked for; None: on CUDA all, else one per core, but 1 where that would leave
            cores idle that a single chain can use (fewer chains than half the cores), or forking is
            not safe.
        chains: number of chains.
        device: where the chains run.

    Raises:
        InputError: if several workers are asked for where processes cannot be forked.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    if device.type == "cuda":
        return chains if workers is None else min(workers, chains)
    accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    safe = sys.platform == "linux" and device.type == "cpu" and not accelerator
    if workers is None:
        cores = available_cores()
        return min(chains, cores) if safe and 2 * chains > cores else 1
    if workers > 1 and not safe:
        raise InputError(
            f"workers must be 1 on device {device.type} of this machine, got {workers}: chains "
            "side by side need Linux and a machine without an accelerator"
        )
    return min(workers, chains)


def run_side_by_side(
    task: Task, chains: list[int], workers: int, report: Report, stop: list[int]
) -> None:
    """Run chains in forked processes, `workers` at a time, until all have ended.

    When one fails the others stop with a checkpoint, and its error is raised here. When `stop` gets
    a signal's number, all stop with a checkpoint; the caller goes on from there.

    Args:
        task: runs one chain; it must end by itself on SIGTERM.
        chains: the chains' numbers.
        workers: processes at a time, at least 2.
        report: gets what the chains report.
        stop: as filled by the caller's signal handler.

    Raises:
        InputError: or Diverged, or OSError: as a chain raised it.
        RuntimeError: if a process died, or a chain raised something else.
    """
    context = multiprocessing.get_context("fork")
    messages: Any = context.Queue()
    waiting = list(chains)
    running: dict[int, BaseProcess] = {}
    failure: BaseException | None = None
    while waiting or running:
        while waiting and len(running) < workers and not stop and failure is None:
            chain = waiting.pop(0)
            process: BaseProcess = context.Process(target=_work, args=(task, chain, messages))
            process.start()
            running[chain] = process
        if stop or failure is not None:
            waiting.clear()
            for process in running.values():
                process.terminate()
        ended = [chain for chain, process in running.items() if not process.is_alive()]
        while True:  # after the look at who has ended, so that no last word is missed
            try:
                kind, *content = messages.get(timeout=0.0 if ended else 0.1)
            except queue.Empty:
                break
            if kind == "report":
                report(*content)
            else:
                failure = failure or content[0]
        for chain in ended:
            code = running.pop(chain).exitcode
            if code and failure is None and not stop:
                failure = RuntimeError(
                    f"the process of chain {chain} died ({_ending(code)}): "
                    "resume=true continues from the last checkpoint; if memory was short, take "
                    "workers=1"
                )
    if failure is not None and not stop:
        raise failure


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(task: Task, chain: int, messages: Any) -> None:
    """A chain's process. Errors travel as plain text in one of the types a caller knows."""
    torch.set_num_threads(1)
    # A killed parent takes its chains along, or they would go on writing beside a resumed run.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    last = [0.0]

    def report(chain: int, steps: int, shown: dict[str, float]) -> None:
        if time.monotonic() - last[0] > 0.2:
            last[0] = time.monotonic()
            messages.put(("report", chain, steps, shown))

    try:
        task(chain, report)
    except (InputError, Diverged) as error:
        messages.put(("failure", type(error)(str(error))))
    except OSError as error:
        messages.put(("failure", OSError(error.errno, error.strerror or str(error))))
    except Exception as error:
        messages.put(("failure", RuntimeError(f"{type(error).__name__}: {error}")))
        raise
