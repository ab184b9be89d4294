"""Jobs run in order and side by side, a failure stops nobody else, and a signal stops all."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from inference.reproduce.jobs import State
from inference.reproduce.queue import Interrupted, duration, last_words, log_path, run_jobs


@dataclass
class Stub:
    """A job that takes `looks` looks of the queue and ends with `code`."""

    name: str
    root: Path
    code: int = 0
    looks: int = 1
    alone: bool = False
    seconds: float = 60.0
    after: str = "done"
    signals: list[int] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.root / self.name

    def state(self) -> State:
        return State(self.after)

    def poll(self) -> int | None:
        self.looks -= 1
        return None if self.looks >= 0 and not self.signals else self.code

    def wait(self) -> int:
        return self.code

    def send_signal(self, signum: int) -> None:
        self.signals.append(signum)


@pytest.fixture
def run(tmp_path):
    """Runs stubs; what was started, with what beside it, and the lines that were told."""
    started, told = [], []

    def go(*jobs, parallel=1, replaced=(), before=lambda job: None):
        def start(job, overwrite, shares):
            started.append((job.name, overwrite, shares))
            before(job)
            return job

        return run_jobs(
            jobs, parallel=parallel, tell=told.append, start=start, replaced=replaced, pause=0
        )

    go.started, go.told = started, told
    return go


def test_a_failure_stops_nobody_else_and_its_reason_is_the_last_error_of_its_log(run, tmp_path):
    bad = Stub("bad", tmp_path, code=2)
    log_path(bad).write_text("warning: x\nerror: steps must be at least 1, got 0\nmore\n")
    outcome = run(Stub("a", tmp_path), bad, Stub("b", tmp_path))
    assert outcome.done == ["a", "b"]
    assert outcome.failed == {"bad": "steps must be at least 1, got 0"}
    assert run.told[1] == "[2/3] bad: FAILED: steps must be at least 1, got 0; about 0 s left"


def test_a_job_without_a_log_or_results_says_how_it_ended(run, tmp_path):
    outcome = run(
        Stub("killed", tmp_path, code=-9),
        Stub("code", tmp_path, code=3),
        Stub("empty", tmp_path, after="interrupted"),
    )
    assert outcome.failed == {
        "killed": "it was killed by signal 9",
        "code": "exit 3",
        "empty": "it ended without results (interrupted)",
    }


def test_jobs_share_the_machine_but_for_one_that_is_to_be_alone(run, tmp_path):
    beside = {}
    jobs = [
        Stub(name, tmp_path, looks=3, alone=name == "timed") for name in ("a", "b", "timed", "c")
    ]

    def note(job):
        beside[job.name] = {one.name for one in jobs if 0 < one.looks < 3}

    outcome = run(*jobs, parallel=2, before=note)
    assert sorted(outcome.done) == ["a", "b", "c", "timed"]
    assert beside["timed"] == set() and "timed" not in beside["c"]
    assert [shares for _, _, shares in run.started] == [True, True, False, True]


def test_only_what_is_named_is_replaced(run, tmp_path):
    run(Stub("a", tmp_path), Stub("b", tmp_path), replaced=["b"])
    assert [(name, overwrite) for name, overwrite, _ in run.started] == [("a", False), ("b", True)]


def test_a_signal_stops_all_with_a_checkpoint_and_starts_nothing_more(run, tmp_path):
    jobs = [Stub(name, tmp_path, looks=5) for name in "abc"]
    with pytest.raises(Interrupted, match="the same command continues") as stopped:
        run(*jobs, parallel=2, before=lambda job: job.name == "b" and interrupt())
    assert stopped.value.signum == signal.SIGTERM
    assert [job.signals for job in jobs] == [[signal.SIGTERM], [signal.SIGTERM], []]


def interrupt():
    os.kill(os.getpid(), signal.SIGTERM)


def test_progress_tells_how_many_of_how_many_and_the_time_left(run, tmp_path, monkeypatch):
    clock = iter([0.0, 120.0, 120.0, 200.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    run(Stub("a", tmp_path), Stub("b", tmp_path))
    # Twice as slow as expected so far: so will be the rest.
    assert run.told == ["[1/2] a: 120 s; about 2 min left", "[2/2] b: 80 s"]


def test_a_log_without_an_error_ends_with_its_last_words(tmp_path):
    job = Stub("a", tmp_path)
    assert last_words(job) == ""
    log_path(job).write_text("Traceback\n  ...\nKeyError: 'x'\n")
    assert last_words(job) == "KeyError: 'x'"


def test_durations_are_in_units_that_fit():
    assert [duration(s) for s in (5, 600, 7200)] == ["5 s", "10 min", "2.0 h"]
