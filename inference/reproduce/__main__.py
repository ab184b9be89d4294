"""The command line of `python -m inference.reproduce`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bads_ppl.errors import InputError
from bads_ppl.workers import available_cores
from inference.named_values import read_options
from inference.reproduce.cases import METHODS
from inference.reproduce.jobs import Job, Place, State
from inference.reproduce.page import OUTCOMES, Missing, folder_of, write_index, write_target
from inference.reproduce.queue import Interrupted, duration, last_words, run_jobs
from inference.reproduce.settings import SIZES
from inference.reproduce.target import Target
from inference.reproduce.targets import TARGETS
from inference.run import compose_run

DOS = ("run", "list", "draw")
SOURCES = ("torchvision", "files", "stand-in")

OPTIONS = """options (name=value):
  target     one or several of the targets below, separated by commas, or all
  size       trial | small (default) | paper
  seeds      0,1,2 and so on; default: those of the size
  methods    a part of the methods, for a look at it; default: all
  do         run (default) what is missing and draw | list what there is to run | draw what is there
  source     torchvision (default: files, or else downloaded) | files | stand-in (needs neither)
  device     auto (default) | cpu | cuda | mps
  language_model  id or folder of the one that table2 and table4 fine-tune at size=paper
  jobs       runs at a time; default: one per core on a CPU, one on an accelerator
  overwrite  true replaces runs that were made with other settings; default false
  out        folder for everything; default runs/reproduce
"""


@dataclass
class Options:
    """The command's options, as text."""

    target: str = ""
    size: str = "small"
    seeds: str = ""
    methods: str = ""
    do: str = "run"
    source: str = "torchvision"
    device: str = "auto"
    language_model: str = ""
    jobs: str = ""
    overwrite: str = "false"
    out: str = "runs/reproduce"


@dataclass(frozen=True)
class Request:
    """What the options ask for."""

    targets: list[Target]
    place: Place
    seeds: list[int]
    methods: list[str]
    do: str
    parallel: int
    overwrite: bool


def check(options: Options) -> Request:
    """What the options ask for.

    Raises:
        InputError: for values that there are not.
    """
    for name, value, known in (
        ("size", options.size, list(SIZES)),
        ("do", options.do, list(DOS)),
        ("source", options.source, list(SOURCES)),
        ("overwrite", options.overwrite, ["true", "false"]),
    ):
        _one_of(name, value, known)
    names = list(TARGETS) if options.target == "all" else options.target.split(",")
    for name in names:
        if name not in TARGETS:
            raise InputError(f"there is no target {name!r}\n\n{listing(options.size)}")
    methods = options.methods.split(",") if options.methods else list(METHODS)
    for method in methods:
        _one_of("methods", method, list(METHODS))
    seeds = _numbers("seeds", options.seeds, 0) or list(SIZES[options.size].seeds)
    jobs = _numbers("jobs", options.jobs, 1)
    if options.language_model and options.size != "paper":
        raise InputError(
            f"language_model={options.language_model} goes with size=paper, got {options.size}: "
            "the other sizes build theirs"
        )
    place = Place(
        Path(options.out) / "runs",
        options.size,
        options.source,
        options.device,
        options.language_model,
    )
    return Request(
        [TARGETS[name] for name in dict.fromkeys(names)],
        place,
        seeds,
        methods,
        options.do,
        jobs[0] if jobs else _parallel(options.device),
        options.overwrite == "true",
    )


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _numbers(name: str, text: str, least: int) -> list[int]:
    try:
        numbers = list(dict.fromkeys(int(part) for part in text.split(","))) if text else []
    except ValueError as error:
        raise InputError(f"{name} must be whole numbers such as 0,1,2, got {text!r}") from error
    if any(number < least for number in numbers):
        raise InputError(f"{name} must be at least {least}, got {text!r}")
    return numbers


def _parallel(device: str) -> int:
    accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    return 1 if accelerator and device != "cpu" else available_cores()


def listing(size: str) -> str:
    """The targets, with how many runs each has at a size and about how long they take."""
    place, rows = Place(Path(), size), []
    parallel = 1 if size == "paper" else available_cores()
    where = "one accelerator (a guess)" if size == "paper" else f"{parallel} cores"
    for target in TARGETS.values():
        jobs = target.jobs(place, SIZES[size].seeds, list(METHODS))
        rows.append((target.name, f"{len(jobs)} runs", _about(jobs, parallel), target.title))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
    return "\n".join(
        [f"targets at size={size}, with about how long each takes alone on {where}:", *lines]
    )


def _about(jobs: Sequence[Job], parallel: int) -> str:
    shared = sum(job.seconds for job in jobs if not job.alone) / parallel
    return duration(shared + sum(job.seconds for job in jobs if job.alone))


def reproduce(request: Request) -> int:
    """Run, list or draw what is asked for; returns the exit code.

    Raises:
        Interrupted: if a signal stopped the runs.
        OSError: if a page cannot be written.
    """
    place = request.place
    by_target = {
        target.name: target.jobs(place, request.seeds, request.methods)
        for target in request.targets
    }
    jobs = {job.name: job for found in by_target.values() for job in found}
    states = {name: job.state() for name, job in jobs.items()}
    if request.do == "list":
        _show(jobs, states, request.parallel)
        return 0
    failed: dict[str, str] = {}
    if request.do == "run":
        failed = _run(request, jobs, states)
    for target in request.targets:
        found = by_target[target.name]
        done = [job for job in found if states[job.name].name == "done"]
        missing = [
            Missing(job.name, failed.get(job.name) or _why(states[job.name]))
            for job in found
            if states[job.name].name != "done"
        ]
        verdicts = write_target(target, place, done, missing)
        outcomes: list[str] = [verdict.outcome for _, verdict in verdicts]
        counts = ", ".join(f"{outcome} {outcomes.count(outcome)}" for outcome in OUTCOMES)
        print(f"{target.name}: {counts}; {folder_of(target, place) / 'index.html'}")
    print(f"all: {write_index(place.root.parent)}")
    for name, reason in failed.items():
        print(f"error: {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def _run(request: Request, jobs: Mapping[str, Job], states: dict[str, State]) -> dict[str, str]:
    """Run what is not done; brings the states up to date and returns what failed, and why."""
    changed = [name for name, state in states.items() if state.name == "other settings"]
    refused = [] if request.overwrite else changed
    todo = [
        job for name, job in jobs.items() if states[name].name != "done" and name not in refused
    ]
    print(
        f"{len(jobs) - len(todo) - len(refused)} of {len(jobs)} runs are done, {len(todo)} to go: "
        f"about {_about(todo, request.parallel)}, {request.parallel} at a time",
        flush=True,
    )
    lacking = _find_data(todo)
    able = [job for job in todo if job.name not in lacking]
    outcome = run_jobs(able, parallel=request.parallel, tell=_tell, replaced=changed)
    states |= {name: State("done") for name in outcome.done}
    remedy = "overwrite=true replaces it"
    return {name: f"{_why(states[name])}; {remedy}" for name in refused} | lacking | outcome.failed


def _find_data(jobs: Sequence[Job]) -> dict[str, str]:
    """Find, or download, the data of these jobs once, before several ask for them at a time.

    Returns jobs whose data cannot be had, by name, and why.

    Raises:
        InputError: if none can be had.
    """
    lacking: dict[str, str] = {}
    real = [job for job in jobs if job.place.source != "stand-in"]
    for find in {job.setting.find: None for job in real}:
        alike = [job for job in real if job.setting.find is find]
        config, _ = compose_run(alike[0].options(), alike[0].name)
        try:
            find(Path(config.data.root), config.data.source)
        except InputError as error:
            if len(alike) == len(jobs):
                raise
            lacking |= dict.fromkeys((job.name for job in alike), str(error))
    return lacking


def _tell(line: str) -> None:
    print(line, flush=True)


def _why(state: State) -> str:
    return f"{state.name}: {state.detail}" if state.detail else state.name


def _show(jobs: Mapping[str, Job], states: Mapping[str, State], parallel: int) -> None:
    for name, job in jobs.items():
        state = states[name]
        last = last_words(job) if state.name == "interrupted" else ""
        print(f"{_why(state):12}  {name}" + (f"  (last: {last})" if last else ""))
    todo = [job for name, job in jobs.items() if states[name].name != "done"]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are done; {len(todo)} to go: ", end="")
    print(f"about {_about(todo, parallel)}, {parallel} at a time")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when done, 1 if runs failed, 2 for wrong input, 130 or 143."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.reproduce",
        usage="%(prog)s target=NAME [name=value ...]",
        description="The paper's figures and tables, run by our own program.",
        epilog=f"{OPTIONS}\n{listing('small')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("options", nargs="*", metavar="name=value", help="see below")
    given: list[Any] = parser.parse_args(arguments).options
    try:
        options = read_options(Options, given)
        if not options.target:
            _one_of("size", options.size, list(SIZES))
            print(f"{parser.format_usage()}\n{OPTIONS}\n{listing(options.size)}")
            return 0
        return reproduce(check(options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(f"error: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
