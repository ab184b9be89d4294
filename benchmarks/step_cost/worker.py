"""Steps of one method on one problem, on demand: the process that `benchmarks.step_cost` starts.

    python -m benchmarks.step_cost.worker METHOD PROBLEM DEVICE

Answers are as `inference.reproduce.steps` gives them. Asked for 0 steps it says how many MiB the
tensors of a step hold at once, as torch counts them: last, since a profiler takes memory itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from bads_ppl.errors import InputError
from benchmarks.step_cost import by_hand, ours, peers
from benchmarks.step_cost.problems import PROBLEMS
from inference.reproduce.steps import Memory, Step, timed

METHODS = [*by_hand.BY_HAND, *ours.OURS, *peers.PEERS]


def build(method: str, name: str, device: torch.device) -> Callable[[], tuple[Step, Memory]]:
    """The data and the network now; when called the rest, with memory counted from there on.

    Raises:
        ImportError: if a peer is not installed.
    """
    if method in peers.PEERS:
        peers.load(method)
    problem = PROBLEMS[name]
    train, meta = problem.sets(device)
    network = problem.build(device)

    def start() -> tuple[Step, Memory]:
        memory = Memory(device, [])
        given = (method, problem, network, train, meta)
        if method in ours.OURS:
            return ours.kernel(*given).step, memory
        return (by_hand if method in by_hand.BY_HAND else peers).build(*given), memory

    return start


def held(step: Step) -> float:
    """The most MiB, above those before it, that tensors of a step hold at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = run.profiler.kineto_results.events()  # type: ignore[union-attr]
    most = now = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    method, problem, device_name = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(1)
    device = torch.device(device_name)
    try:
        step, memory = build(method, problem, device)()
    except ImportError as error:
        print(json.dumps({"error": f"not installed: {error}"}), flush=True)
        return
    print(json.dumps({"method": method}), flush=True)
    for line in sys.stdin:
        count = int(line)
        try:
            answer = timed(step, count, memory, device) if count else {"held_mib": held(step)}
        except InputError as error:  # a step size, say
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
