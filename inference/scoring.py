"""How a task's test points are scored: along a chain, and from all chains at their end.

A task has one `Scoring`: `Classes`, where points are classified, or what another module brings
(`inference.writing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bads_ppl import plots
from bads_ppl.checks import check_classes
from bads_ppl.data import Batch, Data
from bads_ppl.losses import Loss, cross_entropy
from bads_ppl.plots import Metrics
from bads_ppl.sites import copied, evaluation_mode


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


@dataclass(frozen=True)
class Ended:
    """A chain at its end: its measure, its network, and its last row of metrics."""

    measure: Any
    network: nn.Module
    last: dict[str, Any]


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


class Scoring(Protocol):
    """How the test points of a task are scored."""

    def check(self, test: Data, meta: Data) -> None:
        """Refuse sets that cannot be scored so.

        Raises:
            InputError: saying what is wrong with them.
        """
        ...

    def measure(self, test: Data, probe: Batch, loss: Loss, network: nn.Module) -> Measure:
        """What a chain measures.

        Args:
            test: test set, on the network's device.
            probe: points of it to look at for each draw.
            loss: per-example loss.
            network: the chain's.
        """
        ...

    def scored(self, test: Data, ended: Sequence[Ended]) -> Scored:
        """The test set's numbers, from all chains."""
        ...

    def figures(self, metrics: Metrics) -> dict[str, Figure]:
        """Curves over steps, by the name of their file."""
        ...


# ------------------------------------------------------------------------------------- classes


class Classes:
    """Points are classified: accuracy, of the class probabilities averaged over all chains."""

    def check(self, test: Data, meta: Data) -> None:
        check_classes(test, meta)

    def measure(self, test: Data, probe: Batch, loss: Loss, network: nn.Module) -> Measure:
        with torch.no_grad(), evaluation_mode(network):
            classes = network(probe.input).shape[1]
        return ClassMeasure(test, probe, classes)

    def scored(self, test: Data, ended: Sequence[Ended]) -> Scored:
        measures = [one.measure for one in ended]
        return Scored(
            {
                "accuracy": accuracy(predictive(measures), test.target.cpu()),
                "accuracy_last": float(np.mean([one.last["test.accuracy"] for one in ended])),
                "count": len(test),
            }
        )

    def figures(self, metrics: Metrics) -> dict[str, Figure]:
        return {"test_accuracy": plots.accuracy_over_steps(metrics)}


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


def accuracy(scores: Tensor, target: Tensor) -> float:
    """Share of rows whose largest score (B, C) is the target's (B,)."""
    return float((scores.argmax(dim=1) == target).double().mean())


def predictive(measures: Sequence[ClassMeasure]) -> Tensor:
    """Class probabilities (M, C) of the test points: the mean over evaluations of all chains."""
    total = torch.stack([measure.sum.cpu() for measure in measures]).sum(0)
    return total / sum(int(measure.count) for measure in measures)


# -------------------------------------------------------------------------------- mean of theta


class MeanOfTheta:
    """The mean of a network's trained parameters over evaluations.

    A network with it stands for the draws where outputs of several cannot be averaged (Izmailov et
    al., 2018, for SGD).

    Args:
        network: for the shapes of its parameters.
    """

    def __init__(self, network: nn.Module) -> None:
        self.mean = {
            name: torch.zeros_like(parameter.detach())
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        self.count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def add(self, network: nn.Module) -> None:
        """Count the network's parameters in."""
        self.count += 1
        for name, parameter in network.named_parameters():
            if name in self.mean:
                self.mean[name] += (parameter - self.mean[name]) / self.count.item()

    @torch.no_grad()
    def set(self, network: nn.Module) -> None:
        """Forget what was counted, and count the network's parameters in."""
        self.count.fill_(1)
        for name, parameter in network.named_parameters():
            if name in self.mean:
                self.mean[name].copy_(parameter)

    @torch.no_grad()
    def put(self, network: nn.Module) -> nn.Module:
        """A copy of the network with the mean; what is frozen they share."""
        own = copied(network)
        for name, parameter in own.named_parameters():
            if name in self.mean:
                parameter.copy_(self.mean[name])
        return own

    def state_dict(self) -> dict[str, Tensor]:
        """The live tensors of the state, by name."""
        return {"count": self.count, **{f"mean.{name}": x for name, x in self.mean.items()}}


def mean_over_chains(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over chains."""
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}
