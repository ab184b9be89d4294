"""What is measured along a chain of a task, and what is reported at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bads_ppl.chains import ChainResult
from bads_ppl.data import Data
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.losses import Loss
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.sites import evaluation_mode


class TaskMonitor(ThetaMonitor):
    """Adds test functions of theta, accuracy over steps, and the posterior predictive.

    The predictive is the mean, over the evaluations after burn-in, of the class probabilities
    (M, C) of the test points.

    Args:
        network: the chain's network, from inputs to logits (B, C).
        loss: per-example loss.
        train: train set.
        meta: meta set.
        test: test set.
        groups: name to (N_t,) mask.
        weights: the current weights (N_t,) of a kernel.
        classes: C.
        density: whether the program has one.
        scores: the current scores (N_t,) of a kernel, where there are any: their mean over draws is
            kept.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        train: Data,
        meta: Data,
        test: Data,
        groups: dict[str, Tensor],
        weights: Callable[[MinibatchKernel], Tensor],
        classes: int,
        density: bool = True,
        scores: Callable[[MinibatchKernel], Tensor] | None = None,
    ) -> None:
        super().__init__(network, loss, train, meta, {"test": test}, density=density)
        self.test = test
        self.groups = {name: mask.to(test.device) for name, mask in groups.items()}
        self.weights = weights
        self.sum = torch.zeros(len(test), classes, device=test.device)
        self.count = torch.zeros((), dtype=torch.int64)
        self.scores = scores
        self.score_sum = torch.zeros(len(train) if scores else 0, dtype=torch.float64)
        self.score_count = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def on_draw(self, kernel: MinibatchKernel) -> dict[str, float]:
        """Adds the mean predictive probability of the right class, for each class of the test."""
        values = super().on_draw(kernel)
        if self.scores is not None:
            self.score_sum += self.scores(kernel).cpu()
            self.score_count += 1
        probe = self.probes["test"]
        with evaluation_mode(self.network):
            right = self.network(probe.input).softmax(dim=1).gather(1, probe.target[:, None])[:, 0]
        target, right = probe.target.cpu(), right.cpu().double()
        count, total = torch.bincount(target), torch.bincount(target, right)
        return values | {
            f"test_probability.{k}": float(total[k] / count[k])
            for k in count.nonzero()[:, 0].tolist()
        }

    def on_evaluate(self, kernel: MinibatchKernel, *, burnt_in: bool) -> dict[str, float]:
        with torch.no_grad(), evaluation_mode(self.network):
            logits = torch.cat([self.network(batch.input) for batch in self.test.batches()])
        if burnt_in:
            self.sum += logits.softmax(dim=1)
            self.count += 1
        row = super().on_evaluate(kernel, burnt_in=burnt_in) | {
            "test.accuracy": accuracy(logits, self.test.target),
            "test.loss": float(self.loss(logits, self.test.target).mean()),
        }
        w = self.weights(kernel)
        for name, mask in self.groups.items():
            row[f"groups.{name}.mean_weight"] = float(w[mask].mean())
        return row

    def state_dict(self) -> dict[str, Tensor]:
        state = {"sum": self.sum, "count": self.count}
        if self.scores is not None:
            state |= {"score_sum": self.score_sum, "score_count": self.score_count}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def accuracy(scores: Tensor, target: Tensor) -> float:
    """Share of rows whose largest score (B, C) is the target's (B,)."""
    return float((scores.argmax(dim=1) == target).double().mean())


def predictive(results: Sequence[ChainResult]) -> Tensor:
    """Class probabilities (M, C) of the test points: the mean over evaluations of all chains."""
    total, count = torch.zeros(()), 0
    for result in results:
        assert isinstance(result.monitor, TaskMonitor)
        total = total + result.monitor.sum.cpu()
        count += int(result.monitor.count)
    return total / count


def predictive_accuracy(results: Sequence[ChainResult], target: Tensor) -> float:
    """Accuracy of the class probabilities averaged over the evaluations of all chains."""
    return accuracy(predictive(results), target.cpu())


def mean_scores(results: Sequence[ChainResult]) -> Tensor | None:
    """Scores (N_t,) of the train points: the mean over the draws of all chains; None without."""
    total, count = torch.zeros(()), 0
    for result in results:
        assert isinstance(result.monitor, TaskMonitor)
        if result.monitor.scores is None:
            return None
        total = total + result.monitor.score_sum
        count += int(result.monitor.score_count)
    return total / count
