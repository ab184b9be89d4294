"""The command line of `python -m benchmarks.step_cost`; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bads_ppl.atomic import atomic_path
from bads_ppl.device import resolve_device
from benchmarks.arguments import positive_integer
from benchmarks.step_cost.problems import PROBLEMS
from benchmarks.step_cost.worker import METHODS
from inference.reproduce.cost import StepProcess, WorkerError

BASE = METHODS[0]
WARM_UP = 3
"""Blocks that are taken before the first round."""


@dataclass
class Found:
    """What was measured, by method.

    Attributes:
        blocks: answers, one a round.
        held: the most MiB of tensors that a step holds at once.
        failed: why a method has none of these.
    """

    blocks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(problem: str, methods: Sequence[str], rounds: int, device: str) -> Found:
    """Blocks of all methods, in turns, after a warm-up."""
    processes: dict[str, StepProcess] = {}
    found = Found()
    steps = PROBLEMS[problem].steps
    try:
        for number in range(-WARM_UP, rounds):
            for method in methods:
                if method in found.failed:
                    continue
                try:
                    if method not in processes:
                        module = "benchmarks.step_cost.worker"
                        processes[method] = StepProcess(method, module, method, problem, device)
                    answer = processes[method].block(steps)
                except WorkerError as error:
                    found.failed[method] = str(error)
                    found.blocks.pop(method, None)
                    continue
                if number >= 0:
                    found.blocks.setdefault(method, []).append(answer)
        for method in found.blocks:
            found.held[method] = processes[method].block(0)["held_mib"]
    finally:
        for process in processes.values():
            process.close()
    return found


def ratios(blocks: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """Least, median and largest ratio of a round."""
    found = [a[key] / b[key] for a, b in zip(blocks, base, strict=True)]
    return [min(found), statistics.median(found), max(found)]


def summary(found: Found, steps: int, clock: str) -> dict[str, dict[str, Any]]:
    """By method: ms per step, ratios to `base`, MiB at the peak of a block and over `base`'s."""
    base = found.blocks[BASE]
    peaks = {name: [a["peak_mib"] for a in answers] for name, answers in found.blocks.items()}
    peak = {name: statistics.median(of_blocks) for name, of_blocks in peaks.items()}
    return {
        name: {
            "ms": 1000 * statistics.median(answer[clock] for answer in answers) / steps,
            "time": ratios(answers, base, clock),
            "wall_time": ratios(answers, base, "seconds"),
            "peak_mib": peak[name],
            "memory": peak[name] / peak[BASE],
            "held": found.held[name] / found.held[BASE],
        }
        for name, answers in found.blocks.items()
    }


def table(found: dict[str, dict[str, Any]], failed: dict[str, str]) -> str:
    lines = [
        "| step | ms | time over base's: min | median | max "
        "| peak MiB | over base's | tensors over base's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        low, middle, high = row["time"]
        lines.append(
            f"| {name} | {row['ms']:.2f} | {low:.2f} | {middle:.2f} | {high:.2f} "
            f"| {row['peak_mib']:.1f} | {row['memory']:.2f} | {row['held']:.2f} |"
        )
    lines += [f"| {name} | {reason} | | | | | | |" for name, reason in failed.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost", description=__doc__)
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rounds", type=positive_integer, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all blocks and what is made of them here")
    options = parser.parse_args()
    device = resolve_device(options.device)
    clock = "processor_s" if device.type == "cpu" else "seconds"
    methods = [BASE, *(method for method in options.method if method != BASE)]
    content: dict[str, Any] = {"arguments": sys.argv[1:], "device": str(device), "clock": clock}
    for problem in options.problem:
        found = measure(problem, methods, options.rounds, str(device))
        steps = PROBLEMS[problem].steps
        rows = summary(found, steps, clock)
        content[problem] = {"steps": steps, "summary": rows, **asdict(found)}
        print(f"{problem}, {options.rounds} rounds of {steps} steps on {device}\n")
        print(table(rows, found.failed) + "\n", flush=True)
    if options.json is not None:
        with atomic_path(options.json) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
