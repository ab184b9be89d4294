"""What is measured along a chain of a task, and what is reported at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bads_ppl.chains import ChainResult, LookAtWeights
from bads_ppl.data import Data, spaced
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.shards import put
from inference.scoring import Ended, Scored
from inference.tasks import Task

LOOK = 1024
"""Largest number of points whose weights are looked at in an evaluation."""


class TaskMonitor(ThetaMonitor):
    """Adds what a task measures on its test set, and the mean weights of its groups.

    These are of all points of a group, or of evenly spaced ones: a look at the weights of all
    points may cost many steps. Draws have all.

    Args:
        network: the chain's network.
        task: the task, on the network's device.
        train: the train points that the kernel sees, on the device.
        weights: gives the weights (N_t,) of all points of the task.
        density: whether the program has one.
        scores: the current scores (N_t,) of a kernel, where there are any: their mean over draws is
            kept.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        train: Data,
        weights: LookAtWeights,
        density: bool = True,
        scores: Callable[[MinibatchKernel], Tensor] | None = None,
    ) -> None:
        test = task.test
        others = {"test": test}
        super().__init__(network, task.loss, train, task.meta, others, task.probe, density)
        members = {name: mask.to(test.device).nonzero()[:, 0] for name, mask in task.groups.items()}
        count = LOOK // max(1, len(members))
        self.groups = {
            name: rows[spaced(len(rows), count, rows.device)] for name, rows in members.items()
        }
        self.weights = weights
        self.test = test
        self.measure = task.scoring.measure(test, self.probes["test"], task.loss, network)
        self.scores = scores
        self.score_sum = torch.zeros(len(train) if scores else 0, dtype=torch.float64)
        self.score_count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def on_draw(self, kernel: MinibatchKernel) -> dict[str, float]:
        """Adds the functions of theta that the task measures."""
        if self.scores is not None:
            self.score_sum += self.scores(kernel).cpu()
            self.score_count += 1
        return super().on_draw(kernel) | self.measure.on_draw(self.network)

    def on_evaluate(self, kernel: MinibatchKernel, *, burnt_in: bool) -> dict[str, float]:
        row = super().on_evaluate(kernel, burnt_in=burnt_in)
        row |= self.measure.on_evaluate(self.network, burnt_in=burnt_in)
        if self.groups:
            w = self.weights(kernel, rows=torch.cat(list(self.groups.values())))
            parts = w.split([len(rows) for rows in self.groups.values()])
            for name, part in zip(self.groups, parts, strict=True):
                row[f"groups.{name}.mean_weight"] = float(part.mean())
        return row

    def state_dict(self) -> dict[str, Tensor]:
        state = self.measure.state_dict()
        if self.scores is not None:
            state |= {"score_sum": self.score_sum, "score_count": self.score_count}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            put(value, state[name])


def measures(results: Sequence[ChainResult]) -> list[Any]:
    """What the chains measured."""
    return [_monitor(result).measure for result in results]


def _monitor(result: ChainResult) -> TaskMonitor:
    assert isinstance(result.monitor, TaskMonitor)
    return result.monitor


def ends(results: Sequence[ChainResult]) -> list[Ended]:
    """The chains at their ends."""
    monitors = [_monitor(result) for result in results]
    return [
        Ended(monitor.measure, monitor.network, result.metrics[-1])
        for monitor, result in zip(monitors, results, strict=True)
    ]


def on_test_set(task: Task, results: Sequence[ChainResult]) -> Scored:
    """The test set's numbers, from all chains of a task."""
    return task.scoring.scored(_monitor(results[0]).test, ends(results))


def mean_scores(results: Sequence[ChainResult]) -> Tensor | None:
    """Scores (N_t,) of the train points: the mean over the draws of all chains; None without."""
    monitors = [_monitor(result) for result in results]
    if any(monitor.scores is None for monitor in monitors):
        return None
    total = torch.stack([monitor.score_sum for monitor in monitors]).sum(0)
    return total / sum(int(monitor.score_count) for monitor in monitors)
