"""Time and memory of a step of each method beside a step of plain training.

Each method has a process of its own, which waits until it is asked for steps. After a warm-up they
take turns: a round is a block of steps of plain training and then one of each method, so that what
else the machine does meets all of them alike. Ratios are those within a round.

    python -m inference.reproduce.cost SIZE DEVICE PATH '{"plain": ["task=mnist", ...], ...}'
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bads_ppl.atomic import atomic_path

PLAIN = "plain"
WARM_UP = 20
STEPS = {"trial": 2, "small": 100, "paper": 100}
"""Steps of a block, by size."""
ROUNDS = {"trial": 3, "small": 5, "paper": 5}


class WorkerError(Exception):
    """A method's process cannot go on."""


class StepProcess:
    """A process that takes steps when asked to, as `steps.take_steps` does.

    Args:
        name: of what it takes steps of.
        module: the process is `python -m module arguments`.
        arguments: likewise.
    """

    def __init__(self, name: str, module: str, *arguments: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self._answer()

    def block(self, steps: int) -> dict[str, Any]:
        """Take steps; what they took (`steps.take_steps`)."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"{self.name}: its process has ended") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name}: its process ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Worker(StepProcess):
    """A process that takes steps of one method."""

    def __init__(self, name: str, options: Sequence[str]) -> None:
        kind = PLAIN if name == PLAIN else "method"
        super().__init__(name, "inference.reproduce.cost_worker", kind, json.dumps(list(options)))


def measure(
    methods: Mapping[str, Sequence[str]], device: str, steps: int, rounds: int
) -> dict[str, Any]:
    """Seconds by method and round, peak memory, and what failed.

    Args:
        methods: name to options of `inference.run`; "plain" is plain training.
        device: as `inference.run` takes it.
        steps: of a block.
        rounds: blocks of each method.
    """
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, list[float | None]] = {}
    try:
        for name, options in methods.items():
            try:
                workers[name] = Worker(name, [*options, f"device={device}"])
                workers[name].block(WARM_UP)
            except WorkerError as error:
                failed[name] = str(error)
        for _ in range(rounds):
            for name, worker in workers.items():
                if name in failed:
                    continue
                try:
                    found = worker.block(steps)
                except WorkerError as error:
                    failed[name] = str(error)
                    continue
                seconds.setdefault(name, []).append(found["seconds"])
                peaks.setdefault(name, []).append(found["peak_mib"])
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "steps": steps,
        "seconds": {name: values for name, values in seconds.items() if name not in failed},
        "peak_mib": {
            name: None if None in values else max(v for v in values if v is not None)
            for name, values in peaks.items()
            if name not in failed
        },
        "about": {name: worker.ready for name, worker in workers.items() if name not in failed},
        "failed": failed,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when all methods were measured, else 1."""
    size, device, path, methods = sys.argv[1:] if arguments is None else arguments
    specification = json.loads(methods)
    found = measure(specification, device, STEPS[size], ROUNDS[size])
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        content = {"methods": specification, **found}
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for reason in found["failed"].values():
        print(f"error: {reason}", file=sys.stderr)
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
