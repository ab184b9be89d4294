"""What is measured along a chain of a task, and what is reported at its end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bads_ppl.chains import ChainResult
from bads_ppl.data import Batch, Data
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.losses import Loss, cross_entropy
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.sites import evaluation_mode
from inference.tasks import Task
from inference.writing import SHOWN, Writing


class Measure(Protocol):
    """What is measured of a network on the test set. One per chain; its state is saved with it."""

    def on_draw(self, network: nn.Module) -> dict[str, float]:
        """Functions of theta for a draw: the same names every time."""
        ...

    def on_evaluate(self, network: nn.Module, *, burnt_in: bool) -> dict[str, float]:
        """Metrics of one row of metrics.jsonl, "test.<name>" among them."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors of the state, by name."""
        ...


class ClassMeasure:
    """Accuracy over steps, and the posterior predictive.

    The predictive is the mean, over the evaluations after burn-in, of the class probabilities
    (M, C) of the test points.

    Args:
        test: test set.
        probe: points of it to look at for each draw.
        classes: C.
    """

    def __init__(self, test: Data, probe: Batch, classes: int) -> None:
        self.test = test
        self.probe = probe
        self.sum = torch.zeros(len(test), classes, device=test.device)
        self.count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def on_draw(self, network: nn.Module) -> dict[str, float]:
        """The mean predictive probability of the right class, for each class of the test."""
        probe = self.probe
        with evaluation_mode(network):
            right = network(probe.input).softmax(dim=1).gather(1, probe.target[:, None])[:, 0]
        target, right = probe.target.cpu(), right.cpu().double()
        count, total = torch.bincount(target), torch.bincount(target, right)
        return {
            f"test_probability.{k}": float(total[k] / count[k])
            for k in count.nonzero()[:, 0].tolist()
        }

    @torch.no_grad()
    def on_evaluate(self, network: nn.Module, *, burnt_in: bool) -> dict[str, float]:
        with evaluation_mode(network):
            logits = torch.cat([network(batch.input) for batch in self.test.batches()])
        if burnt_in:
            self.sum += logits.softmax(dim=1)
            self.count += 1
        return {
            "test.accuracy": accuracy(logits, self.test.target),
            "test.loss": float(cross_entropy(logits, self.test.target).mean()),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {"sum": self.sum, "count": self.count}


class TextMeasure:
    """Loss over steps, BLEU over steps on some test entries, and the mean of theta.

    The mean is over the evaluations after burn-in; a network with it is what stands for the draws
    when texts are written (Izmailov et al., 2018, for SGD).

    Args:
        test: test set.
        writing: how texts are written and scored.
        loss: per-example loss.
        network: the chain's, for the shapes of its parameters.
    """

    def __init__(self, test: Data, writing: Writing, loss: Loss, network: nn.Module) -> None:
        self.test = test
        self.writing = writing
        self.loss = loss
        self.mean = {
            name: torch.zeros_like(parameter.detach())
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        self.count = torch.zeros((), dtype=torch.int64)

    def on_draw(self, network: nn.Module) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def on_evaluate(self, network: nn.Module, *, burnt_in: bool) -> dict[str, float]:
        if burnt_in:
            self.count += 1
            for name, parameter in network.named_parameters():
                if name in self.mean:
                    self.mean[name] += (parameter - self.mean[name]) / self.count.item()
        with evaluation_mode(network):
            losses = [
                self.loss(network(batch.input), batch.target)
                for batch in self.test.batches(self.writing.batch)
            ]
        rows = self.writing.some()
        found = self.writing.score(self.writing.write(network, self.test, rows), rows)
        return {
            "test.loss": float(torch.cat(losses).mean()),
            **{f"test.{name}": value for name, value in found.items()},
        }

    def averaged(self, network: nn.Module) -> nn.Module:
        """A copy of the network with the mean of theta."""
        own = copy.deepcopy(network)
        with torch.no_grad():
            for name, parameter in own.named_parameters():
                if name in self.mean:
                    parameter.copy_(self.mean[name])
        return own

    def state_dict(self) -> dict[str, Tensor]:
        return {"count": self.count, **{f"mean.{name}": x for name, x in self.mean.items()}}


class TaskMonitor(ThetaMonitor):
    """Adds what a task measures on its test set, and the mean weights of its groups.

    Args:
        network: the chain's network.
        task: the task, on the network's device.
        train: the train points that the kernel sees, on the device.
        weights: the current weights (N_t,) of a kernel.
        density: whether the program has one.
        scores: the current scores (N_t,) of a kernel, where there are any: their mean over draws is
            kept.
    """

    def __init__(
        self,
        network: nn.Module,
        task: Task,
        train: Data,
        weights: Callable[[MinibatchKernel], Tensor],
        density: bool = True,
        scores: Callable[[MinibatchKernel], Tensor] | None = None,
    ) -> None:
        test = task.test
        super().__init__(network, task.loss, train, task.meta, {"test": test}, density=density)
        self.groups = {name: mask.to(test.device) for name, mask in task.groups.items()}
        self.weights = weights
        self.measure: Measure
        if task.writing is None:
            self.measure = ClassMeasure(test, self.probes["test"], task.classes)
        else:
            self.measure = TextMeasure(test, task.writing, task.loss, network)
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
        w = self.weights(kernel)
        for name, mask in self.groups.items():
            row[f"groups.{name}.mean_weight"] = float(w[mask].mean())
        return row

    def state_dict(self) -> dict[str, Tensor]:
        state = self.measure.state_dict()
        if self.scores is not None:
            state |= {"score_sum": self.score_sum, "score_count": self.score_count}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def accuracy(scores: Tensor, target: Tensor) -> float:
    """Share of rows whose largest score (B, C) is the target's (B,)."""
    return float((scores.argmax(dim=1) == target).double().mean())


def _measures(results: Sequence[ChainResult]) -> list[Any]:
    return [_monitor(result).measure for result in results]


def _monitor(result: ChainResult) -> TaskMonitor:
    assert isinstance(result.monitor, TaskMonitor)
    return result.monitor


def predictive(results: Sequence[ChainResult]) -> Tensor:
    """Class probabilities (M, C) of the test points: the mean over evaluations of all chains."""
    measures = _measures(results)
    total = torch.stack([measure.sum.cpu() for measure in measures]).sum(0)
    return total / sum(int(measure.count) for measure in measures)


def predictive_accuracy(results: Sequence[ChainResult], target: Tensor) -> float:
    """Accuracy of the class probabilities averaged over the evaluations of all chains."""
    return accuracy(predictive(results), target.cpu())


@dataclass(frozen=True)
class Scored:
    """What came out on the test set.

    Attributes:
        numbers: by name, JSON-able; the first is what the task is judged by, averaged over the
            evaluations after burn-in of all chains; "<name>_last" is that of the last iterates.
        samples: rows of texts that were written, where the task is to write.
    """

    numbers: dict[str, float]
    samples: Sequence[dict[str, str]] = ()


def on_test_set(task: Task, results: Sequence[ChainResult]) -> Scored:
    """The test set's numbers, from all chains of a task.

    Texts are written by one network per chain with the mean of its theta, and scores are means over
    chains.
    """
    if task.writing is None:
        last = [chain.metrics[-1]["test.accuracy"] for chain in results]
        return Scored(
            {
                "accuracy": predictive_accuracy(results, task.test.target),
                "accuracy_last": float(np.mean(last)),
                "count": len(task.test),
            }
        )
    rows, found, written = task.writing.every(), [], []
    for result in results:
        monitor = _monitor(result)
        measure: Any = monitor.measure
        both = {"": measure.averaged(monitor.network), "_last": monitor.network}
        texts = {
            end: task.writing.write(network, measure.test, rows) for end, network in both.items()
        }
        written.append(texts[""])
        found.append(
            {
                f"{name}{end}": value
                for end, several in texts.items()
                for name, value in task.writing.score(several, rows).items()
            }
        )
    numbers = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    shown = torch.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).long().tolist()
    samples = [
        {
            "source": task.writing.sources[row],
            "written": written[0][row],
            "reference": task.writing.references[row][0],
        }
        for row in shown
    ]
    return Scored({**numbers, "count": len(task.test)}, samples)


def mean_scores(results: Sequence[ChainResult]) -> Tensor | None:
    """Scores (N_t,) of the train points: the mean over the draws of all chains; None without."""
    monitors = [_monitor(result) for result in results]
    if any(monitor.scores is None for monitor in monitors):
        return None
    total = torch.stack([monitor.score_sum for monitor in monitors]).sum(0)
    return total / sum(int(monitor.score_count) for monitor in monitors)
