"""What a run's draws may be believed to say: one word, and a few sentences with what to do.

Two facts combine. Whether chains agree is measured: R-hat and effective sample sizes. What the
draws are, if they agree, follows from the settings (`bads_ppl.chains.evidence`). The verdict names
the weakest fact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from bads_ppl.convergence import MIN_DRAWS

Verdict = Literal[
    "fixed",
    "optimisation path",
    "collapsed",
    "unknown",
    "not converged",
    "approximate",
    "converged",
]

EVIDENCE = ("calibrated", "approximate", "optimisation path", "fixed")
"""What draws may be by their settings."""

RHAT_LIMIT, SHARE = 1.05, 0.99
"""R-hat that this share of the weights must not exceed, and that the potential must not."""

ESS_PER_CHAIN = 100
"""Bulk effective draws per chain that the median weight must have."""

COLLAPSE = 0.01
"""Share of beta that no weight exceeds, or of 1 - beta that no weight is further from 1."""

_MARGIN = 1.1
"""Factor on the steps that are advised, as short chains think too well of themselves."""

_TOO_LONG = 10
"""Factor on the steps from which on more steps are no advice."""


def collapsed(w: Any, target: float | None) -> Literal["low", "high"] | None:
    """The end at which all weights are, if they are all at one (trap 3: they seldom return).

    Args:
        w: (N,) weights or posterior means of weights in [0, 1], a tensor or an array.
        target: beta, the mean weight that is wanted; None: unknown, so nothing is collapsed.
    """
    if target is None or len(w) == 0:
        return None
    if float(w.max()) < COLLAPSE * target:
        return "low"
    if float(w.min()) > 1 - COLLAPSE * (1 - target):
        return "high"
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """A run's diagnostics in single numbers; None where a number cannot be known.

    Attributes:
        evidence: what the draws are by their settings, one of `EVIDENCE`.
        chains: number of chains.
        draws: draws per chain.
        points: N, number of weights.
        rhat_max: largest R-hat of a weight.
        rhat_99pct: smallest value that R-hat of 99 % of the weights does not exceed.
        agreeing: share of the weights whose R-hat is at most 1.05.
        ess_bulk_min: smallest bulk ESS of a weight.
        ess_bulk_median: bulk ESS of the median weight.
        ess_tail_min: smallest tail ESS of a weight.
        constant: weights that did not move within any half of any chain. They count as disagreeing
            in `agreeing` and `rhat_99pct`, as without an effective draw in `ess_bulk_median`, and
            are left out of the extremes.
        potential_rhat: R-hat of the potential.
        total: posterior mean of the sum of the weights.
        target: beta, the share of the train set to select; None: unknown.
        end: end at which all posterior means are, if they are all at one.
        not_finite: functions of theta that are not finite in some draw.
        steps: steps per chain, if they were recorded.
        thinning: steps between draws, if they were recorded.
    """

    evidence: str
    chains: int
    draws: int
    points: int
    rhat_max: float | None = None
    rhat_99pct: float | None = None
    agreeing: float | None = None
    ess_bulk_min: float | None = None
    ess_bulk_median: float | None = None
    ess_tail_min: float | None = None
    constant: int = 0
    potential_rhat: float | None = None
    total: float
    target: float | None = None
    end: Literal["low", "high"] | None = None
    not_finite: tuple[str, ...] = ()
    steps: int | None = None
    thinning: int | None = None

    @property
    def ess_wanted(self) -> int:
        """Bulk ESS that the median weight must have."""
        return ESS_PER_CHAIN * self.chains

    @property
    def agree(self) -> bool:
        """Whether chains agree, in the weights and the potential, on enough effective draws."""
        return (
            self.rhat_99pct is not None
            and self.rhat_99pct <= RHAT_LIMIT
            and (self.ess_bulk_median or 0) >= self.ess_wanted
            and (self.potential_rhat is None or self.potential_rhat <= RHAT_LIMIT)
            and "potential" not in self.not_finite
        )

    @property
    def verdict(self) -> Verdict:
        """The weakest fact, in the order of `Verdict`."""
        if self.evidence == "fixed":
            return "fixed"
        if self.evidence == "optimisation path":
            return "optimisation path"
        if self.end is not None:
            return "collapsed"
        if self.chains < 2 or self.draws < MIN_DRAWS:
            return "unknown"
        if not self.agree:
            return "not converged"
        return "approximate" if self.evidence == "approximate" else "converged"

    @property
    def sentence(self) -> str:
        """What the numbers mean and what to do, in plain words."""
        if self.evidence == "fixed":
            return "The weights were given, not sampled: there is no posterior of them to diagnose."
        parts = [self._standing(), self._agreement(), self._collapse(), self._total()]
        if self.not_finite:
            parts.append(
                f"Not finite in some draw: {', '.join(self.not_finite)}. A chain may have diverged:"
                " run it with smaller steps."
            )
        return " ".join(part for part in [*parts, self._advice()] if part)

    def _standing(self) -> str:
        """What the draws may be called."""
        return {
            "converged": "The draws may be called posterior draws, up to the bias of the step "
            "size.",
            "approximate": "The chains agree, and the draws are approximate by their settings: "
            "their spread is a guide to stability, not a calibrated posterior.",
            "optimisation path": "This is an optimisation path and no posterior, whatever R-hat "
            "is: spreads and probabilities are no evidence.",
            "not converged": (
                "The chains agree so far, on too few effective draws to rely on it."
                if self.rhat_99pct is not None and self._rhat_factor() <= 1
                else "The chains have not converged: no posterior claim holds yet."
            )
            + self._even_then(),
            "unknown": "Whether the chains converged cannot be known." + self._even_then(),
            "collapsed": "The weights have collapsed: they say nothing about the points.",
        }[self.verdict]

    def _even_then(self) -> str:
        if self.evidence != "approximate":
            return ""
        return " By their settings the draws would be approximate even if they had."

    def _agreement(self) -> str:
        """R-hat and ESS, each with what is asked for."""
        if self.draws < MIN_DRAWS:
            return f"There are {self.draws} draws per chain; at least {MIN_DRAWS} are needed."
        if self.chains < 2:
            text = "One chain cannot tell whether chains that start elsewhere would agree."
        elif self.agreeing is None:
            return "No weight moved, so that R-hat and ESS cannot be computed."
        else:
            text = (
                f"R-hat is at most {RHAT_LIMIT} for {_percent(self.agreeing)} of the weights "
                f"({_percent(SHARE)} are asked for)."
            )
        if self.ess_bulk_median is not None:
            text += (
                f" The median weight has {self.ess_bulk_median:,.0f} effective draws of "
                f"{self.chains * self.draws:,} ({self.ess_wanted:,} are asked for)."
            )
        if self.potential_rhat is not None and self.potential_rhat > RHAT_LIMIT:
            text += f" The potential's R-hat is {self.potential_rhat:.2f}."
        if self.constant:
            text += f" {self.constant:,} of {self.points:,} weights never moved."
        return text

    def _collapse(self) -> str:
        if self.end is None or self.target is None:
            return ""
        end = "0" if self.end == "low" else "1"
        return (
            f"All weights are close to {end} (their mean is {self.total / self.points:.1e}, the "
            f"target {self.target:g}): start anew with smaller steps of the weights (a quarter of "
            "weights.step_size), the weights' start and prior mean at the target, or "
            "weights=instance in place of a network."
        )

    def _total(self) -> str:
        """A remark on a total far from the target."""
        if self.end is not None or self.target is None:
            return ""
        wanted = math.floor(self.points * self.target)
        if wanted / 2 <= self.total <= 2 * wanted:
            return ""
        side = "below half" if self.total < wanted else "above twice"
        return (
            f"The weights sum to {self.total:,.3g}, {side} the target of {wanted:,}: compare points"
            " with each other, or tighten prior.sparsity_scale."
        )

    def _advice(self) -> str:
        """What to do so that chains agree."""
        if self.end is not None:
            return ""
        if self.verdict == "optimisation path":
            return "For posterior draws take method=bads and sampler.mode=calibrated."
        advice = []
        if self.draws < MIN_DRAWS:
            advice.append("run more steps, or thin less")
        elif not self.agree and (factor := self._factor()) is not None:
            advice.append(self._lengthen(factor))
        elif self.chains > 1 and self.rhat_99pct is None:
            advice.append("run more steps, or take larger train batches")
        if self.chains < 2:
            advice.append("run with chains=4")
        text = "; ".join(advice)
        return text[:1].upper() + text[1:] + "." if text else ""

    def _factor(self) -> float | None:
        """Times as many steps that should do, if all goes on as it did; None: cannot be known.

        ESS grows with the number of steps n, and R-hat^2 - 1 falls as 1 / n, as the variance of the
        chains' means does.
        """
        if self.ess_bulk_median is None or (self.chains > 1 and self.rhat_99pct is None):
            return None
        factor = max(self._rhat_factor(), self.ess_wanted / self.ess_bulk_median)
        return _MARGIN * factor if factor > 1 else None

    def _rhat_factor(self) -> float:
        known = [rhat for rhat in (self.rhat_99pct, self.potential_rhat) if rhat is not None]
        return max((rhat**2 - 1) / (RHAT_LIMIT**2 - 1) for rhat in [1.0, *known])

    def _lengthen(self, factor: float) -> str:
        if factor > _TOO_LONG:
            return (
                f"the chains mix too slowly: they would need at least {_about(factor)} times as "
                "many steps. Take larger steps of the weights (weights.step_size), or another "
                "model, and look again"
            )
        steps = "" if self.steps is None else f": steps={_round_up(factor * self.steps)}"
        text = f"run about {_about(factor)} times as many steps{steps}"
        thinning = self._less_thinning()
        return text + (f", or thin less: thinning={thinning}" if thinning else "")

    def _less_thinning(self) -> int | None:
        """Largest thinning that gives enough draws from the same steps; None if none does.

        As if the weight were autoregressive of order one, of which draws that are further apart
        than their memory leave room for more, and others do not.
        """
        if self.thinning is None or self.ess_bulk_median is None or self._rhat_factor() > 1:
            return None
        draws = self.chains * self.draws
        share = min(self.ess_bulk_median / draws, 0.99)
        memory = ((1 - share) / (1 + share)) ** (1 / self.thinning)  # correlation after a step
        for thinning in range(self.thinning - 1, 0, -1):
            correlation = memory**thinning
            more = draws * self.thinning / thinning
            if more * (1 - correlation) / (1 + correlation) >= self.ess_wanted:
                return thinning
        return None


def _percent(share: float) -> str:
    """A share as percent that is never rounded up: 98.99 % are not 99 %."""
    return f"{math.floor(1000 * share + 1e-9) / 10:g} %"


def _about(factor: float) -> str:
    """A factor above 1 in two digits, not below it."""
    return f"{math.ceil(10 * factor - 1e-9) / 10:g}" if factor < 10 else f"{_round_up(factor):,}"


def _round_up(value: float) -> int:
    """A whole number of two significant digits, not below the value."""
    unit = int(10 ** max(0, math.floor(math.log10(value)) - 1))
    return math.ceil(value / unit - 1e-9) * unit
