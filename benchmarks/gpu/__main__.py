"""The command line of `python -m benchmarks.gpu`; see the package's docstring."""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bads_ppl.atomic import atomic_path
from bads_ppl.graphs import waits
from benchmarks.arguments import positive_integer
from benchmarks.gpu import floors
from benchmarks.gpu.floors import milliseconds
from benchmarks.gpu.problems import PROBLEMS, Problem
from inference.reproduce.steps import Step

WARM_UP = 150
"""Steps before the first block at most, and seconds of them: running means settle in 100."""

WARM_UP_MS = 15_000.0
BLOCK_MS = 60.0


@dataclass
class Found:
    """What was measured of a step.

    Attributes:
        ms: of a step, by block.
        steps: of a block.
        mib: the most that was reserved for it, the libraries' buffers at its first step included.
        kernels: that a step has the device run.
        busy_ms: how long they take, one by one.
        waits: how often the host waits for the device in a step.
    """

    ms: list[float]
    steps: int
    mib: float
    kernels: float
    busy_ms: float
    waits: int


def warm_up(step: Step) -> int:
    """Steps until it is as it stays; returns how many make a block."""
    spent, taken = 0.0, 0
    while taken < WARM_UP and spent < WARM_UP_MS:
        spent += 5 * milliseconds(step, 5)
        taken += 5
    return max(5, math.ceil(BLOCK_MS / milliseconds(step, 5)))


def kernels(step: Step, count: int = 4) -> tuple[float, float]:
    """How many a step has, and how long they take."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as run:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    events = [event for event in run.events() if event.device_type.name == "CUDA"]
    return len(events) / count, sum(e.device_time for e in events) / count / 1000


def measure(problem: Problem, rounds: int) -> dict[str, Found]:
    """All steps of a problem, in turns."""
    steps: dict[str, Step] = {}
    found: dict[str, Found] = {}
    for name, build in problem.arms.items():
        print(f"warming up: {name}", file=sys.stderr, flush=True)
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()  # graphs hold memory that nothing is allocated in
        steps[name] = build()
        count = warm_up(steps[name])
        peak = torch.cuda.max_memory_reserved() - before
        with waits() as waited:
            steps[name]()
        found[name] = Found([], count, peak / 2**20, *kernels(steps[name]), len(waited))
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].ms.append(milliseconds(step, found[name].steps))
    return found


def table(problem: Problem, found: dict[str, Found]) -> str:
    lines = [
        "| step | ms | time over base's: min | median | max "
        "| MiB | kernels | their ms | host waits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = found[problem.base].ms
    for name, one in found.items():
        ratios = [a / b for a, b in zip(one.ms, base, strict=True)]
        mark = " (base)" if name == problem.base else ""
        lines.append(
            f"| {name}{mark} | {statistics.median(one.ms):.3f} | {min(ratios):.2f} "
            f"| {statistics.median(ratios):.2f} | {max(ratios):.2f} | {one.mib:.0f} "
            f"| {one.kernels:.0f} | {one.busy_ms:.3f} | {one.waits} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--rounds", type=positive_integer, default=9)
    parser.add_argument("--json", type=Path, help="write all blocks and rates here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and there is none: nothing was measured")
        return
    rates = floors.measure()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {platform.machine()}"
    reached = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in rates.matrix.items())
    print(f"{machine}: {reached} TFLOP/s; copy {rates.copy / 1e12:.2f} TB/s\n")
    content: dict[str, Any] = {"arguments": sys.argv[1:], "machine": machine, **asdict(rates)}
    for name in options.problem:
        problem = PROBLEMS[name]()
        work = floors.work(problem.loss, problem.network)
        found = measure(problem, options.rounds)
        least = (
            1000 * work.operations / rates.matrix[problem.precision],
            1000 * work.bytes / rates.copy,
        )
        content[name] = {
            "base": problem.base,
            "floor_ms": {"arithmetic": least[0], "bytes": least[1]},
            "steps": {arm: asdict(one) for arm, one in found.items()},
        }
        print(
            f"{name}: {work.operations / 1e9:.2f} GFLOP at {problem.precision}'s rate take "
            f"{least[0]:.3f} ms, {work.bytes / 2**20:.0f} MiB {least[1]:.3f} ms\n"
        )
        print(table(problem, found) + "\n", flush=True)
        if options.json is not None:
            with atomic_path(options.json) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        del problem, found
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
