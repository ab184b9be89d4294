"""Figures of whether chains agree: R-hat, effective draws, traces and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bads_ppl.convergence import MIN_DRAWS, Array, estimate
from bads_ppl.diagnostics import Diagnostics
from bads_ppl.draws import Draws
from bads_ppl.plots import FAINT, HIGH, INK, LOW, STYLES, empty_figure
from bads_ppl.verdict import ESS_PER_CHAIN, RHAT_LIMIT

_CHAINS = (HIGH[0], LOW[0], HIGH[2], LOW[2], HIGH[1], LOW[1])
_WEIGHTS = 1000
"""Weights of which ESS is followed along the draws, evenly spaced."""


def diagnostic_figures(chains: Sequence[Draws], diagnostics: Diagnostics) -> dict[str, Figure]:
    """The figures that these draws can fill, by name.

    Fixed weights have no R-hat or ESS to show, one chain no R-hat, and ranks compare chains.
    """
    values = {
        name: np.stack([chain.values[name] for chain in chains])
        for name in diagnostics.functions
        if name not in diagnostics.not_finite
    }
    figures: dict[str, Figure] = {}
    if np.isfinite(diagnostics.rhat).any():
        figures["rhat"] = rhat_histogram(diagnostics.rhat)
    if np.isfinite(diagnostics.ess_bulk).any():
        figures["ess"] = ess_over_draws([chain.w for chain in chains])
    traced = {name: value for name, value in values.items() if "." not in name}  # one of a kind
    if traced:
        figures["traces"] = traces(traced)
    if "potential" in values and len(chains) > 1:
        figures["ranks"] = rank_histogram(values["potential"], "potential")
    return figures


def rhat_histogram(rhat: Array, bins: int = 40) -> Figure:
    """Histogram of the weights' R-hat (N,), with the limit; what is not finite is counted."""
    known = rhat[np.isfinite(rhat)]
    figure, axes = empty_figure("R-hat of the weights", "weights")
    edges = np.linspace(min(1.0, known.min()), max(1.1, known.max()), bins + 1)
    axes.stairs(*np.histogram(known, edges), fill=True, color=HIGH[1])
    axes.axvline(RHAT_LIMIT, color=LOW[0], linestyle="dashed", label=f"limit {RHAT_LIMIT}")
    note = f"{np.mean(rhat <= RHAT_LIMIT):.1%} within the limit"
    if len(known) < len(rhat):
        note += f"; {len(rhat) - len(known):,} unknown"
    axes.set_title(note, loc="right", fontsize="small", color=INK)
    axes.set_xlabel("R-hat")
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def ess_over_draws(weights: Sequence[NDArray[np.floating]], steps: int = 10) -> Figure:
    """Bulk ESS of the weights along the draws: the median and the band of the central 90 %.

    It should grow in a straight line; where it levels off, further draws tell nothing new.

    Args:
        weights: one array (D, N) per chain.
        steps: numbers of draws at which ESS is computed.
    """
    draws, size = weights[0].shape
    columns = np.unique(np.linspace(0, size - 1, min(size, _WEIGHTS)).astype(int))
    some = [np.asarray(chain[:, columns]) for chain in weights]
    counts = np.unique(np.linspace(0, draws, steps + 1).astype(int))
    counts = counts[counts >= MIN_DRAWS]
    found = [estimate([chain[:count] for chain in some]).ess_bulk for count in counts]
    low, median, high = np.transpose(
        [np.quantile(np.nan_to_num(ess), [0.05, 0.5, 0.95]) for ess in found]
    )
    figure, axes = empty_figure("Effective draws of the weights", "bulk ESS, all chains")
    total = counts * len(weights)
    mark = "o" if len(counts) == 1 else ""
    axes.fill_between(total, low, high, color=HIGH[1], alpha=0.2, linewidth=0)
    axes.plot(total, median, color=HIGH[0], linewidth=2, marker=mark, label="median weight")
    wanted = ESS_PER_CHAIN * len(weights)
    axes.axhline(wanted, color=LOW[0], linestyle="dashed", label=f"asked for: {wanted}")
    axes.set_xlabel("draws, all chains")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title("band: 5 % to 95 % of the weights", loc="right", fontsize="small", color=INK)
    axes.legend(frameon=False)
    return figure


def traces(values: dict[str, Array]) -> Figure:
    """One row per function (C, D) of theta, one line per chain; lines should mix."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06)
    figure = Figure(figsize=(6.4, 0.8 + 1.2 * len(values)), layout=layout, facecolor="white")
    rows = figure.subplots(len(values), sharex=True, squeeze=False)[:, 0]
    for axes, (name, value) in zip(rows, values.items(), strict=True):
        for chain, draws in enumerate(value):
            axes.plot(
                np.arange(1, len(draws) + 1),
                draws,
                color=_CHAINS[chain % len(_CHAINS)],
                linestyle=STYLES[chain // len(_CHAINS) % len(STYLES)],
                linewidth=0.9,
                marker="o" if len(draws) == 1 else "",
            )
        axes.set_title(name.replace("_", " "), loc="left", fontsize="small", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
    rows[-1].set_xlabel("draw")
    rows[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    count = len(next(iter(values.values())))
    figure.suptitle(
        f"Traces ({count} chain{'s' * (count != 1)})", x=0.02, ha="left", fontweight="bold"
    )
    return figure


def rank_histogram(values: Array, name: str, bins: int = 20) -> Figure:
    """Ranks among all draws of each chain's draws (C, D): flat lines where chains agree."""
    from scipy.stats import rankdata  # a second, for this alone

    chains, draws = values.shape
    ranks = rankdata(values).reshape(chains, draws)
    bins = max(2, min(bins, draws // 5))  # five draws in a bin, or more
    edges = np.linspace(0.5, chains * draws + 0.5, bins + 1)
    figure, axes = empty_figure(f"Ranks of the {name} by chain", "draws of the chain")
    for chain, row in enumerate(ranks):
        counts, _ = np.histogram(row, edges)
        axes.stairs(
            counts,
            edges,
            color=_CHAINS[chain % len(_CHAINS)],
            linestyle=STYLES[chain // len(_CHAINS) % len(STYLES)],
            linewidth=1.4,
            label=f"chain {chain}",
        )
    axes.axhline(draws / bins, color=INK, linestyle="dotted")
    axes.set_xlabel("rank among the draws of all chains")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=2 if chains > 3 else 1)
    return figure
