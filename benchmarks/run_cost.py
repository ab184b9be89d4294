"""Where the time of a run's chain goes: `python -m benchmarks.run_cost task=llm steps=600`.

Takes the options of `inference.run`, and does no more than it measures: steps of the first chain,
the weights of a draw, functions of theta at a draw, an evaluation, and a draw's weights where the
whole network is asked although its embedding alone would do. They take turns; times are CPU time of
this process. Reading the data, and what is written at a run's end, are left out.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from bads_ppl.errors import InputError
from inference.experiment import Experiment, first_chain, prepare
from inference.run import compose_run

ROUNDS, STEPS = 5, 20


def parts(experiment: Experiment) -> dict[str, tuple[float, Callable[[], Any]]]:
    """By name, how often a run of one chain does something, and that."""
    kernel, monitor = first_chain(experiment)
    plan, network = experiment.plan, monitor.network

    def whole_network() -> None:
        network.embeds_alone = False
        experiment.weights(kernel)
        network.embeds_alone = True

    found = {
        f"{STEPS} steps": (plan.steps / STEPS, lambda: [kernel.step() for _ in range(STEPS)]),
        "weights of a draw": (plan.draws, lambda: experiment.weights(kernel)),
        "functions of theta at a draw": (plan.draws, lambda: monitor.on_draw(kernel)),
        "evaluation": (
            -(-plan.steps // plan.evaluation_steps),
            lambda: monitor.on_evaluate(kernel, burnt_in=True),
        ),
    }
    if getattr(network, "embeds_alone", False):
        found["weights of a draw, by the whole network"] = (0, whole_network)
    return found


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main(options: list[str]) -> None:
    config, choices = compose_run(options, "benchmarks.run_cost")
    experiment = prepare(config, choices).prepared()
    found = parts(experiment)
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in tqdm(range(ROUNDS + 1), unit="round"):
        for name, (_, work) in found.items():
            if turn:  # the first is a warm-up
                times[name].append(seconds(work))
            else:
                work()
    spent = {name: often * statistics.median(times[name]) for name, (often, _) in found.items()}
    total = sum(spent.values())
    size, steps = len(experiment.task.train), experiment.plan.steps
    print(f"{size:,} train points, {steps} steps, device {experiment.device}\n")
    print("| part | times in a run | s each: min | median | max | share |")
    print("|---|---|---|---|---|---|")
    for name, (often, _) in found.items():
        low, middle, high = (f(times[name]) for f in (min, statistics.median, max))
        print(
            f"| {name} | {often:g} | {low:.3f} | {middle:.3f} | {high:.3f} "
            f"| {spent[name] / total:.0%} |"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
