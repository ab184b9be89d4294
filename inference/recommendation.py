"""Which candidate predicts held-out meta points best, and how sure that is.

Every candidate predicts the same points, so candidates are compared point by point: the standard
error of a mean difference is that of the paired differences, which is much smaller than that of
either mean where some points are hard for all. Methods differ in how sure of themselves they are
(wrong labels make some of them cautious) without being right more often, so the probabilities are
brought to the same sharpness first: temperature scaling (Guo et al., 2017) with a temperature that
other points than those scored have set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import Tensor

from bads_ppl.plots import HIGH, INK, empty_figure
from inference.arms import CONFIDENCE

SMALLEST = float(np.finfo(np.float32).eps)
"""Probabilities are raised to this, as scikit-learn's `log_loss` does for single precision."""


@dataclass(frozen=True)
class Scores:
    """How well one candidate predicts points that it has not seen.

    Attributes:
        log_loss: (N,) minus the log of the rescaled probability of the label, in nats.
        unscaled: (N,) the same of the probability as it was predicted.
        right: (N,) bool, whether the label is the most probable class.
    """

    log_loss: NDArray[np.float64]
    unscaled: NDArray[np.float64]
    right: NDArray[np.bool_]

    @classmethod
    def of(cls, probability: Tensor, target: Tensor, folds: Sequence[Tensor]) -> Scores:
        """The scores of predictions, rescaled fold by fold by what the other folds say.

        Args:
            probability: (N, C) predictive class probabilities.
            target: (N,) labels.
            folds: rows of each fold, which part the points.
        """
        log_p = probability.double().clamp_min(SMALLEST).log().numpy()
        label = target.numpy()
        scaled = np.empty(len(label))
        for fold in folds:
            held = np.isin(np.arange(len(label)), fold.numpy())
            power = fitted_power(log_p[~held], label[~held])
            scaled[held] = log_loss(power * log_p[held], label[held])
        return cls(scaled, log_loss(log_p, label), log_p.argmax(axis=1) == label)


def log_loss(logits: NDArray[np.float64], label: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cross-entropy (N,) in nats of logits (N, C)."""
    own: NDArray[np.float64] = logits[np.arange(len(label)), label]
    return np.asarray(logsumexp(logits, axis=1) - own)


def fitted_power(log_p: NDArray[np.float64], label: NDArray[np.int64]) -> float:
    """The power a (1 / temperature) at which probabilities p^a / sum p^a fit labels best.

    The maximum a posteriori with log a ~ Normal(0, 1), which keeps few points, or points that are
    all predicted right, from asking for certainty.

    Args:
        log_p: (N, C) log probabilities.
        label: (N,) labels.
    """

    def energy(log_a: float) -> float:
        return float(log_loss(math.exp(log_a) * log_p, label).sum() + log_a**2 / 2)

    return math.exp(minimize_scalar(energy, bounds=(-4.0, 4.0), method="bounded").x)


@dataclass(frozen=True)
class Rank:
    """A candidate's place.

    Attributes:
        name: the candidate.
        log_loss: mean over points, of rescaled probabilities, in nats.
        unscaled: mean over points, of probabilities as they were predicted.
        accuracy: share of points whose label is the most probable class.
        difference: mean log loss minus that of the best, at least 0.
        error: standard error of that difference over points (paired); 0 for the best itself.
        low: lower end of its 95 % t interval.
        high: its upper end.
    """

    name: str
    log_loss: float
    unscaled: float
    accuracy: float
    difference: float
    error: float
    low: float
    high: float

    @property
    def near(self) -> bool:
        """Whether the points do not tell it from the best: within one standard error."""
        return self.difference <= self.error


def rank(scores: Mapping[str, Scores]) -> list[Rank]:
    """The candidates by mean log loss, the lowest first; of equals the one that is named first."""
    order = sorted(scores, key=lambda name: float(scores[name].log_loss.mean()))
    best = scores[order[0]].log_loss
    count = len(best)
    quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1))
    ranks = []
    for name in order:
        own = scores[name]
        paired = own.log_loss - best
        mean, error = float(paired.mean()), float(paired.std(ddof=1)) / math.sqrt(count)
        low, high = mean - quantile * error, mean + quantile * error
        loss, unscaled = float(own.log_loss.mean()), float(own.unscaled.mean())
        accuracy = float(own.right.mean())
        ranks.append(Rank(name, loss, unscaled, accuracy, mean, error, low, high))
    return ranks


@dataclass(frozen=True)
class Recommendation:
    """What the comparison of candidates says.

    Attributes:
        scores: by candidate, for all that ran; over the same N points in the same order.
        failed: by candidate, why it has no scores.
        overrides: by candidate, the options that make it.
    """

    scores: dict[str, Scores]
    failed: dict[str, str]
    overrides: dict[str, str]

    @property
    def ranks(self) -> list[Rank]:
        return rank(self.scores) if self.scores else []

    @property
    def best(self) -> str | None:
        """The recommended candidate; None if all failed."""
        return self.ranks[0].name if self.scores else None

    @property
    def sentence(self) -> str:
        """The recommendation in words."""
        if not self.scores:
            return "No recommendation: every candidate failed."
        best, *others = self.ranks
        count = len(self.scores[best.name].right)
        near = [one.name for one in others if one.near]
        if near:
            rest = f"within one standard error, so not told apart by {count} points: "
            rest += ", ".join(near)
        else:
            rest = "every other is more than one standard error behind" if others else "alone"
        return (
            f"Recommended: {best.name}, with the lowest log loss on {count} held-out meta points "
            f"({rest})."
        )

    @property
    def limits(self) -> str:
        """What as many points as these can tell and cannot, in words."""
        if len(self.scores) < 2:
            return ""
        best, second = self.ranks[:2]
        ours, theirs = self.scores[best.name].right, self.scores[second.name].right
        count, first, other = len(ours), int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        return (
            f"What {count} points can tell: one point is {100 / count:.2g} % of accuracy; of "
            f"{best.name} and {second.name} only the first is right on {first} points, only the "
            f"second on {other}; their log losses differ by {second.difference:.3f}, 95 % interval "
            f"{second.low:.3f} to {second.high:.3f}."
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per candidate, best first, those that failed last."""
        rows = [
            {
                "candidate": one.name,
                "overrides": self.overrides[one.name],
                "log_loss": one.log_loss,
                "unscaled": one.unscaled,
                "accuracy": one.accuracy,
                "difference": one.difference,
                "standard_error": one.error,
                "low": one.low,
                "high": one.high,
                "near": one.near,
            }
            for one in self.ranks
        ]
        rows += [
            {"candidate": name, "overrides": self.overrides[name], "failed": message}
            for name, message in self.failed.items()
        ]
        columns = ["candidate", "overrides", "log_loss", "unscaled", "accuracy", "difference"]
        columns += ["standard_error", "low", "high", "near", "failed"]
        return pd.DataFrame(rows, columns=columns)

    def table(self) -> str:
        """The ranks as text."""
        width = max(len(name) for name in (*self.overrides, "candidate"))
        lines = [
            f"{'candidate':{width}}  log loss  accuracy  difference (95 % interval)  standard error"
        ]
        for k, one in enumerate(self.ranks):
            line = (
                f"{one.name:{width}}  {one.log_loss:8.4f}  {one.unscaled:8.4f}  {one.accuracy:8.4f}"
            )
            if k:
                interval = f"{one.difference:+.4f} ({one.low:+.4f} to {one.high:+.4f})"
                line += f"  {interval:>28}  {one.error:.4f}{'  near' * one.near}"
            lines.append(line)
        lines += [f"{name:{width}}  failed: {why}" for name, why in self.failed.items()]
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Mean log loss by candidate, with the interval of the paired difference to the best."""
        figure, axes = empty_figure("Log loss on held-out meta points", "")
        ranks = self.ranks
        best = ranks[0].log_loss
        for row, one in enumerate(ranks):
            colour = HIGH[0] if one.near else INK
            axes.plot([best + one.low, best + one.high], [row, row], color=colour, linewidth=1.6)
            axes.plot(one.log_loss, row, "o" if one.near else "s", color=colour, markersize=7)
        axes.axvline(best, color=HIGH[0], linewidth=0.8, linestyle="dashed")
        labels = [f"{one.name}\n{100 * one.accuracy:.1f} % right" for one in ranks]
        axes.set_yticks(range(len(ranks)), labels)
        axes.set_ylim(len(ranks) - 0.5, -0.5)
        axes.set_xlabel(
            "mean log loss (nats); bar: 95 % interval of the paired difference to the best;\n"
            "blue, round: within one standard error of the best"
        )
        axes.xaxis.set_major_formatter("{x:.3g}")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        return figure
