"""Diagnostics of a run: convergence of every weight, of functions of theta, and a verdict.

Raw theta of a deep network is never diagnosed: by its symmetries chains may differ there and agree
in all that matters (trap 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bads_ppl.convergence import Array, Estimates, estimate
from bads_ppl.draws import Draws, check_chains
from bads_ppl.errors import InputError
from bads_ppl.verdict import EVIDENCE, RHAT_LIMIT, SHARE, Facts, collapsed

Row = dict[str, float | None]
"""Numbers of one function of theta by name; None where a number cannot be known."""

FUNCTION_COLUMNS = ("mean", "sd", "rhat", "ess_bulk", "ess_tail", "mcse_mean", "mcse_sd")


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnostics(Facts):
    """Diagnostics of a run: single numbers (`Facts`), and these.

    Attributes:
        rhat: (N,) R-hat per weight; NaN where it cannot be known.
        ess_bulk: (N,) bulk effective draws.
        ess_tail: (N,) tail effective draws.
        mcse_mean: (N,) standard error of the posterior mean.
        mcse_sd: (N,) standard error of the posterior standard deviation.
        functions: name to numbers (`FUNCTION_COLUMNS`) of a function of theta, and "potential".
    """

    rhat: Array
    ess_bulk: Array
    ess_tail: Array
    mcse_mean: Array
    mcse_sd: Array
    functions: Mapping[str, Row]

    def to_dict(self) -> dict[str, Any]:
        """What stands in results.json: numbers, the verdict, and the table of functions."""
        names = (
            *("verdict", "sentence", "evidence", "chains", "draws", "rhat_max", "rhat_99pct"),
            *("agreeing", "ess_bulk_min", "ess_bulk_median", "ess_tail_min", "constant"),
        )
        return {
            **{name: getattr(self, name) for name in names},
            "collapsed": self.end is not None,
            "total_weight": self.total,
            "functions": {name: dict(row) for name, row in self.functions.items()},
        }

    def columns(self) -> dict[str, Array]:
        """Columns per point for a `Selection`."""
        names = ("rhat", "ess_bulk", "ess_tail", "mcse_mean", "mcse_sd")
        return {name: getattr(self, name) for name in names}


def diagnose(
    chains: Sequence[Draws],
    *,
    evidence: str,
    target: float | None = None,
    ids: ArrayLike | None = None,
) -> Diagnostics:
    """Diagnostics of the draws of all chains, which may be memory-mapped and larger than memory.

    Args:
        chains: the draws, one entry per chain; one chain, or fewer than four draws, leave unknown
            what they cannot tell, and the sentence says so.
        evidence: what the draws are by their settings, see `bads_ppl.chains.evidence`: "calibrated"
            | "approximate" | "optimisation path" | "fixed".
        target: beta, the share of the train set to select; None: unknown.
        ids: (N,) the points' ids, for messages; default 0 to N - 1.

    Raises:
        InputError: if chains do not belong together (draws, points or functions differ), a weight
            is not finite, or `evidence` is none of the above.
    """
    if evidence not in EVIDENCE:
        raise InputError(
            f"evidence must be one of {', '.join(map(repr, EVIDENCE))}, got {evidence!r}: give "
            "what bads_ppl.chains.evidence says of the chains"
        )
    check_chains(chains)
    draws, points = chains[0].w.shape
    if evidence == "fixed":
        unknown = np.full(points, math.nan)
        given = np.asarray(chains[0].w[0], np.float64)
        weights = Estimates(given, 0 * given, np.zeros(points, bool), *[unknown] * 5)
    else:
        weights = estimate([chain.w for chain in chains])
    _check_finite(chains, weights.mean, ids)
    functions = _functions(chains)
    steps, thinning = _plan(chains[0].values.get("step"))
    return Diagnostics(
        evidence=evidence,
        chains=len(chains),
        draws=draws,
        points=points,
        **_over_weights(weights, agreement=len(chains) > 1),
        constant=int(weights.still.sum()),
        potential_rhat=functions.get("potential", {}).get("rhat"),
        total=float(weights.mean.sum()),
        target=target,
        end=None if evidence == "fixed" else collapsed(weights.mean, target),
        not_finite=tuple(name for name, row in functions.items() if row["mean"] is None),
        steps=steps,
        thinning=thinning,
        rhat=weights.rhat,
        ess_bulk=weights.ess_bulk,
        ess_tail=weights.ess_tail,
        mcse_mean=weights.mcse_mean,
        mcse_sd=weights.mcse_sd,
        functions=functions,
    )


def _check_finite(chains: Sequence[Draws], mean: Array, ids: ArrayLike | None) -> None:
    wrong = np.flatnonzero(~np.isfinite(mean))
    if len(wrong) == 0:
        return
    point = int(wrong[0])
    column = [np.asarray(chain.w[:, point]) for chain in chains]
    chain, draw = np.argwhere(~np.isfinite(column))[0]
    name = point if ids is None else np.asarray(ids)[point]
    raise InputError(
        f"weights must be finite, got {column[chain][draw]} for point {name} in draw {draw} of "
        f"chain {chain} ({len(wrong)} points are concerned): the chain diverged; run it with "
        "smaller steps"
    )


def _over_weights(weights: Estimates, *, agreement: bool) -> dict[str, float | None]:
    """Extremes and quantiles over weights; R-hat only if there are chains to agree."""
    moved = ~weights.still
    found: dict[str, float | None] = {
        "ess_bulk_min": _least(weights.ess_bulk),
        "ess_tail_min": _least(weights.ess_tail),
    }
    if found["ess_bulk_min"] is None:  # too few draws, or no weight moved
        return found
    # A weight that never moved agrees with nothing and has no effective draw.
    effective = np.where(moved, weights.ess_bulk, 0.0)
    median = float(np.quantile(effective, 0.5, method="inverted_cdf"))
    found["ess_bulk_median"] = median if median > 0 else None
    if agreement:
        rhat = np.where(moved, weights.rhat, np.inf)
        found["rhat_max"] = _number(rhat[moved].max())
        found["rhat_99pct"] = _number(np.quantile(rhat, SHARE, method="inverted_cdf"))
        found["agreeing"] = float((rhat <= RHAT_LIMIT).mean())
    return found


def _functions(chains: Sequence[Draws]) -> dict[str, Row]:
    """Numbers of each function of theta and the potential; None throughout if not finite."""
    names = sorted(name for name in chains[0].values if name != "step")
    if not names:
        return {}
    table = [np.stack([chain.values[name] for name in names], axis=1) for chain in chains]
    found = estimate(table)
    return {
        name: {column: _number(getattr(found, column)[k]) for column in FUNCTION_COLUMNS}
        for k, name in enumerate(names)
    }


def _plan(step: NDArray[np.float64] | None) -> tuple[int | None, int | None]:
    """Steps of a chain and between its draws, from the steps at which it drew."""
    if step is None:
        return None, None
    return int(step[-1]), int(step[1] - step[0]) if len(step) > 1 else None


def _least(values: Array) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.min()) if len(known) else None


def _number(value: Any) -> float | None:
    """A number that JSON can hold."""
    return float(value) if math.isfinite(value) else None
