"""Runs jobs, each in a process of its own, some at a time, and goes on when one of them fails.

A job that is stopped by a signal writes a checkpoint, from which the next call takes it up.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bads_ppl.chains import catch_signals
from bads_ppl.workers import PR_SET_PDEATHSIG
from inference.reproduce.jobs import Job


class Process(Protocol):
    """What the queue asks of a process; `subprocess.Popen` has it."""

    def poll(self) -> int | None: ...

    def send_signal(self, signum: int, /) -> None: ...

    def wait(self) -> int: ...


Start = Callable[[Job, bool, bool], Process]
"""Starts a job, given whether it replaces what is there and whether it shares the machine."""


@dataclass
class Outcome:
    """What became of the jobs: their names, and for those that failed the reason."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Interrupted(Exception):
    """A signal ended the jobs, with checkpoints. `signum` is its number."""

    def __init__(self, signum: int) -> None:
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name}: the same command continues where it stopped")
        self.signum = signum


def run_jobs(
    jobs: Sequence[Job],
    *,
    parallel: int,
    tell: Callable[[str], None],
    start: Start | None = None,
    replaced: Collection[str] = (),
    pause: float = 0.2,
) -> Outcome:
    """Run jobs in order, `parallel` at a time; one that must be alone waits for the others.

    Args:
        jobs: what to run.
        parallel: processes at a time, at least 1.
        tell: gets a line for each job that ends.
        start: starts a job's process.
        replaced: names of jobs that replace what is in their folders.
        pause: seconds between looks at the processes.

    Raises:
        Interrupted: after SIGINT or SIGTERM, once all processes have ended.
    """
    start = start or start_process
    waiting, outcome = list(jobs), Outcome()
    running: list[tuple[Job, Process, float]] = []
    progress = _Progress(jobs, parallel, tell)
    with catch_signals() as caught:
        while waiting or running:
            while waiting and not caught and _fits(waiting[0], running, parallel):
                job = waiting.pop(0)
                process = start(job, job.name in replaced, parallel > 1 and not job.alone)
                running.append((job, process, time.monotonic()))
            if caught:
                _stop([process for _, process, _ in running])
                raise Interrupted(caught[0])
            ended = [entry for entry in running if entry[1].poll() is not None]
            for entry in ended:
                running.remove(entry)
                job, process, since = entry
                reason = _reason(job, process.wait())
                if reason is None:
                    outcome.done.append(job.name)
                else:
                    outcome.failed[job.name] = reason
                progress(job, time.monotonic() - since, reason)
            if not ended:
                time.sleep(pause)
    return outcome


def _fits(job: Job, running: Sequence[tuple[Job, Process, float]], parallel: int) -> bool:
    if not running:
        return True
    return len(running) < parallel and not job.alone and not running[0][0].alone


def _reason(job: Job, code: int) -> str | None:
    """Why a job that has ended is not done; None if it is."""
    if code == 0:
        state = job.state()
        return None if state.name == "done" else f"it ended without results ({state.name})"
    return last_words(job) or (f"it was killed by signal {-code}" if code < 0 else f"exit {code}")


def last_words(job: Job) -> str:
    """The last error in a job's log, or else its last line; empty without a log."""
    try:
        lines = log_path(job).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


def log_path(job: Job) -> Path:
    """Where the output of a job goes: beside its folder, which is the job's own."""
    return job.folder.with_name(f"{job.folder.name}.log")


def start_process(job: Job, overwrite: bool, shares: bool) -> Process:
    """Start a job's process, in a session of its own: Ctrl-C reaches it once, through the queue.

    Where jobs share the machine each has one thread.
    """
    log = log_path(job)
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1"} if shares else {}
    with log.open("wb") as stream:
        return subprocess.Popen(
            job.command(overwrite=overwrite),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **threads},
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def _end_with_parent() -> None:
    """A killed parent takes its jobs along, or they would write beside those of the next call."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(processes: Sequence[Process]) -> None:
    """End processes with a checkpoint; a second signal to this one kills them."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    try:
        for process in processes:
            process.wait()
    except BaseException:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        raise


class _Progress:
    """Lines such as "[3/18] mnist-25/bads/seed0: 41 s; about 9 min left"."""

    def __init__(self, jobs: Sequence[Job], parallel: int, tell: Callable[[str], None]) -> None:
        self.left = {job.name: job.seconds for job in jobs}
        self.total = len(jobs)
        self.parallel = parallel
        self.tell = tell
        self.expected = self.taken = 0.0

    def __call__(self, job: Job, seconds: float, reason: str | None) -> None:
        self.left.pop(job.name)
        if reason is None:
            self.expected += job.seconds
            self.taken += seconds
        factor = self.taken / self.expected if self.expected else 1.0
        rest = sum(self.left.values()) * factor / self.parallel
        number = self.total - len(self.left)
        ending = f"{seconds:.0f} s" if reason is None else f"FAILED: {reason}"
        after = f"; about {duration(rest)} left" if self.left else ""
        self.tell(f"[{number}/{self.total}] {job.name}: {ending}{after}")


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
