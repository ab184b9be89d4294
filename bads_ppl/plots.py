"""Figures of a run, as matplotlib `Figure` objects that touch no global state.

Groups whose weights should be high are blue and those that should be low are red, as in the
paper's Figs. 2 and 13; several groups of a kind get shades and line styles of their own, so that
colour is never the only sign.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray

from bads_ppl.atomic import atomic_path
from bads_ppl.errors import InputError

Metrics = Sequence[Mapping[str, Any]]
"""Rows of metrics.jsonl: "chain", "step" and values by name, at the same steps in all chains."""

# From dark to light, told apart by people with any colour vision.
HIGH = ("#0b559f", "#4a90c9", "#89bedc")
LOW = ("#b11218", "#e2604a", "#f4a582")
STYLES = ("solid", "dashed", "dotted", "dashdot")
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g} %")
INK, FAINT = "#333333", "#d9d9d9"


def weights_by_group_over_steps(metrics: Metrics, groups: Mapping[str, bool]) -> Figure:
    """Mean weight of each group over steps: mean over chains, and the band from lowest to highest.

    Args:
        metrics: rows with "groups.<name>.mean_weight" in [0, 1].
        groups: name to whether the group's weights should be high.

    Raises:
        InputError: if no row has a group's weights.
    """
    figure, axes = empty_figure("Mean weight by group", "mean weight")
    draw_weights_by_group(axes, metrics, groups)
    _note_chains(axes, metrics, "band: lowest to highest")
    _legend(axes, len(groups))
    return figure


def draw_weights_by_group(axes: Axes, metrics: Metrics, groups: Mapping[str, bool]) -> None:
    """The lines and bands of `weights_by_group_over_steps`, on axes of the caller's."""
    for name, (colour, style) in _styles(groups).items():
        steps, values = _by_chain(metrics, f"groups.{name}.mean_weight")
        mean, low, high = _over_chains(values)
        wanted = "high" if groups[name] else "low"
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            steps,
            mean,
            color=colour,
            linestyle=style,
            label=f"{name} (should be {wanted})",
            marker="o" if len(steps) == 1 else None,
        )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(left=0)


def weight_histogram(
    mean_w: ArrayLike, members: Mapping[str, ArrayLike], groups: Mapping[str, bool], bins: int = 40
) -> Figure:
    """Histogram of the points' mean weights, one line per group.

    Each line gives the share of its own group, so that rare groups show; the legend has the
    counts.

    Args:
        mean_w: (N,) mean weight per point.
        members: name to (N,) bool mask of the group's points.
        groups: name to whether the group's weights should be high.
        bins: number of bins.

    Raises:
        InputError: if a group of `groups` has no mask, or a mask has another length.
    """
    w = np.asarray(mean_w, dtype=np.float64)
    figure, axes = empty_figure("Weights of the train points", "share of the group's points")
    edges = np.linspace(0, max(1.0, float(w.max(initial=0))), bins + 1)
    for name, (colour, style) in _styles(groups).items():
        if name not in members:
            raise InputError(f"every group needs its points, got none for {name!r}")
        mask = np.asarray(members[name], dtype=bool)
        if mask.shape != w.shape:
            raise InputError(
                f"a group's mask must have one value per point, got shape {mask.shape} for "
                f"{name!r} and {len(w)} points"
            )
        counts, _ = np.histogram(w[mask], edges)
        share = counts / max(1, counts.sum())
        label = f"{name} ({int(mask.sum()):,} points)"
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.25)
        axes.stairs(share, edges, color=colour, linestyle=style, linewidth=1.6, label=label)
    axes.set_xlabel("posterior mean of the weight")
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PERCENT)
    _legend(axes, len(groups))
    return figure


def accuracy_over_steps(metrics: Metrics, name: str = "test.accuracy") -> Figure:
    """Accuracy on the test set over steps: one thin line per chain, and their mean.

    Args:
        metrics: rows with `name`, in [0, 1].
        name: which accuracy.

    Raises:
        InputError: if no row has it.
    """
    figure, axes, last, end = _over_steps(metrics, name, "accuracy")
    axes.yaxis.set_major_formatter(PERCENT)
    last.set_text(f"{100 * end:.1f} %")
    return figure


def score_over_steps(metrics: Metrics, name: str, called: str) -> Figure:
    """A score on the test set over steps, drawn as `accuracy_over_steps` draws accuracy.

    Args:
        metrics: rows with `name`.
        name: which score.
        called: what the figure calls it.

    Raises:
        InputError: if no row has it.
    """
    figure, _, _, _ = _over_steps(metrics, name, called)
    return figure


def _over_steps(metrics: Metrics, name: str, called: str) -> tuple[Figure, Axes, Annotation, float]:
    """The curve of a test score, with the text at its end, which is the score there."""
    figure, axes = empty_figure(f"Test {called}", f"test {called}")
    steps, values = _by_chain(metrics, name)
    mean, _, _ = _over_chains(values)
    single = len(steps) == 1
    if len(values) > 1:
        for chain in values:
            axes.plot(
                steps, chain, color=HIGH[1], linewidth=0.8, alpha=0.6, marker="." if single else ""
            )
    axes.plot(steps, mean, color=HIGH[0], linewidth=2, marker="o" if single else "")
    axes.set_xlim(left=0)
    last = axes.annotate(
        f"{mean[-1]:.3g}",
        (steps[-1], mean[-1]),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=HIGH[0],
        annotation_clip=False,
    )
    _note_chains(axes, metrics, "thick: their mean; thin: each")
    return figure, axes, last, float(mean[-1])


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png", bbox_inches="tight")  # wide legends


def empty_figure(title: str, y_label: str) -> tuple[Figure, Axes]:
    """A figure of the house's look with one pair of axes; "step" is what x means, unless set."""
    figure, (axes,) = panels([title], y_label)
    return figure, axes


def panels(
    titles: Sequence[str], y_label: str, columns: int = 1, size: tuple[float, float] = (6.4, 4.0)
) -> tuple[Figure, list[Axes]]:
    """A figure of the house's look with one pair of axes per title, row by row.

    Args:
        titles: of the axes.
        y_label: what y means, at the left of each row.
        columns: axes in a row; all share the range of y.
        size: of one pair of axes, in inches.
    """
    rows = -(-len(titles) // columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
    width, height = size
    figure = Figure(figsize=(width * columns, height * rows), layout=layout, facecolor="white")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten().tolist()
    for k, (axes, title) in enumerate(zip(grid, titles, strict=False)):
        _dress(axes, title, y_label if k % columns == 0 else "")
    for axes in grid[len(titles) :]:
        axes.remove()
    return figure, grid[: len(titles)]


def _dress(axes: Axes, title: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", color=INK)
    axes.set_xlabel("step")
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _styles(groups: Mapping[str, bool]) -> dict[str, tuple[str, str]]:
    """Colour and line style by group: blues for high, reds for low."""
    found: dict[str, tuple[str, str]] = {}
    for wanted, colours in ((True, HIGH), (False, LOW)):
        names = [name for name, high in groups.items() if bool(high) is wanted]
        for k, name in enumerate(names):
            found[name] = (colours[k % len(colours)], STYLES[k % len(STYLES)])
    return {name: found[name] for name in groups}


def _by_chain(metrics: Metrics, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps (S,) and values (C, S) of one metric; NaN where a chain has none at a step."""
    rows = [row for row in metrics if row.get(name) is not None]
    if not rows:
        raise InputError(
            f"metrics must have {name!r}, got rows with {sorted({k for r in metrics for k in r})}"
        )
    steps = sorted({int(row["step"]) for row in rows})
    chains = sorted({int(row["chain"]) for row in rows})
    values = np.full((len(chains), len(steps)), np.nan)
    for row in rows:
        values[chains.index(int(row["chain"])), steps.index(int(row["step"]))] = row[name]
    return np.array(steps, dtype=np.float64), values


def _over_chains(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Mean, lowest and highest (S,) over the chains that have the step."""
    return np.nanmean(values, axis=0), np.nanmin(values, axis=0), np.nanmax(values, axis=0)


def _note_chains(axes: Axes, metrics: Metrics, how: str) -> None:
    count = len({row["chain"] for row in metrics})
    note = "1 chain" if count == 1 else f"{count} chains; {how}"
    axes.set_title(note, loc="right", fontsize="small", color=INK)


def _legend(axes: Axes, count: int) -> None:
    if count:
        axes.legend(frameon=False, ncols=1 if count <= 3 else 2, loc="best")
