"""What a step costs around the network's passes: `python -m benchmarks.step_cost.overhead`.

One layer of 170 parameters takes the place of LeNet5, with its 100 train and 50 meta examples: what
is left of a step's time is the work that it makes beside the passes. Steps take turns at blocks in
one process with one thread; times are its processor time. Beside them stand torch's operations in a
step that compute (no views), and its calls of functions in Python, the passes' own included.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arguments import positive_integer
from benchmarks.step_cost import by_hand, ours
from benchmarks.step_cost.problems import Problem
from inference.reproduce.steps import Step

METHODS = (
    "base",
    "joint, instance",
    "by hand: joint, instance",
    "joint, network",
    "by hand: joint, network",
    "normalised reverted, instance",
    "normalised restarted, instance",
    "by hand: normalised restarted, instance",
)
MAKES_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
VIEWS = {"_unsafe_view", "unsafe_split_with_sizes"}
"""Views that torch does not declare as such."""


class OneLayer(nn.Module):
    """Logits (B, 10) of images (B, 1, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits


PROBLEM = Problem(OneLayer, (1, 4, 4), 5000, 100, (100, 50), 100)


class Operations(TorchDispatchMode):
    """Counts operations that compute, of the passes forward and backward alike."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        results = [one.alias_info for one in operation._schema.returns]
        views = any(alias is not None and not alias.is_write for alias in results)
        self.count += not views and operation.overloadpacket.__name__ not in MAKES_NOTHING | VIEWS
        return operation(*args, **(kwargs or {}))


def operations(step: Step) -> int:
    """Torch's operations in a step that compute."""
    with Operations() as counted:
        step()
    return counted.count


def calls(step: Step, count: int = 50) -> float:
    """Calls of functions, Python's and built-in ones, in a step."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(count):
        step()
    profile.disable()
    return pstats.Stats(profile).total_calls / count  # type: ignore[attr-defined,no-any-return]


def build(method: str) -> Step:
    device = torch.device("cpu")
    network, sets = PROBLEM.build(device), PROBLEM.sets(device)
    if method in ours.OURS:
        step: Step = ours.kernel(method, PROBLEM, network, *sets).step
        return step
    return by_hand.build(method, PROBLEM, network, *sets)


def measure(rounds: int) -> dict[str, tuple[list[float], int, float]]:
    """Milliseconds of a step by round, operations and calls of each method."""
    steps = {method: build(method) for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(-2, rounds):  # two to warm up
        for method, step in steps.items():
            start = time.process_time()
            for _ in range(PROBLEM.steps):
                step()
            if number >= 0:
                times[method].append(1000 * (time.process_time() - start) / PROBLEM.steps)
    return {
        method: (times[method], operations(step), calls(step)) for method, step in steps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_cost.overhead", description=__doc__
    )
    parser.add_argument("--rounds", type=positive_integer, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| step | ms: min | median | max | operations | calls |\n|---|---|---|---|---|---|")
    for method, (times, count, called) in measure(options.rounds).items():
        print(
            f"| {method} | {min(times):.3f} | {statistics.median(times):.3f} | {max(times):.3f} "
            f"| {count} | {called:.0f} |"
        )


if __name__ == "__main__":
    main()
