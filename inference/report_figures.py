"""Figures of a task for the report: its methods side by side, and over steps."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from inference.arms import Arm, bounds
from inference.runs import Run, data_uri


def score_by_arm(arms: Sequence[Arm], metric: str) -> Figure:
    """A point per seed, with mean and 95 % interval, one line per arm, the best on top."""
    figure, axes = _figure(1.2 + 0.48 * len(arms))
    for row, arm in enumerate(arms):
        score = arm.score
        if score.has_interval:
            axes.plot(
                [score.low, score.high],
                [row, row],
                color=arm.colour,
                linewidth=10,
                alpha=0.25,
                solid_capstyle="butt",
            )
        values = [run.number(f"test.{metric}") for run in arm.runs]
        axes.plot(values, [row] * len(values), "o", color=arm.colour, markersize=5, alpha=0.75)
        axes.plot([score.mean] * 2, [row - 0.3, row + 0.3], color=arm.colour, linewidth=2.2)
    axes.set_yticks(range(len(arms)), [_broken_label(arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    _finish(axes, metric, axes.xaxis)
    axes.set_xlabel(f"test {metric}")
    axes.tick_params(axis="y", length=0)
    return figure


def score_over_steps(arms: Sequence[Arm], metric: str) -> Figure:
    """Mean over seeds (of means over chains) by step, and the band from lowest to highest seed."""
    figure, axes = _figure(3.6 + 0.2 * len(arms))
    draw_scores(axes, arms, metric)
    _finish(axes, metric, axes.yaxis)
    axes.set_xlabel("step")
    axes.set_ylabel(f"test {metric}")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    legend_below(figure, axes)
    return figure


def draw_scores(axes: Axes, arms: Sequence[Arm], metric: str) -> None:
    """The lines and bands of `score_over_steps`, on axes of the caller's; the first arm on top."""
    for arm in reversed(arms):
        curves = [curve for run in arm.runs if (curve := over_steps(run, f"test.{metric}"))]
        if not curves:
            continue
        steps = sorted({step for curve in curves for step in curve})
        found = [[c[step] for c in curves if step in c] for step in steps]
        axes.fill_between(
            steps,
            [min(v) for v in found],
            [max(v) for v in found],
            color=arm.colour,
            alpha=0.15,
            linewidth=0,
        )
        axes.plot(
            steps,
            [float(np.mean(v)) for v in found],
            color=arm.colour,
            linestyle=arm.style,
            label=arm.label,
            linewidth=2.4 if arm.best else 1.5,
            marker="o" if len(steps) == 1 else "",
        )
    axes.set_xlim(left=0)
    _show_share(axes.yaxis, metric)


def legend_below(figure: Figure, *drawn: Axes, columns: int = 1, last_first: bool = True) -> None:
    """One legend, below the figure, of all that was drawn on these axes."""
    found: dict[str, Any] = {}
    for axes in drawn:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    entries = list(found.items())[:: -1 if last_first else 1]
    figure.legend(
        [handle for _, handle in entries],
        [label for label, _ in entries],
        frameon=False,
        loc="outside lower center",
        ncols=columns,
    )


def _figure(height: float) -> tuple[Figure, Axes]:
    """An empty figure, of a width (inches) that is legible on a phone."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(5.6, height), layout=layout)
    return figure, figure.subplots()


def _broken_label(arm: Arm) -> str:
    """The arm's label, broken where a figure would have no room for it."""
    variant = [f"{name} {value}" for name, value in arm.variant.items()]
    return "\n".join([" · ".join([arm.text("method"), *arm.kind]), *variant])


def _finish(axes: Axes, metric: str, values: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=values.axis_name, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    _show_share(values, metric)


def _show_share(values: Any, metric: str) -> None:
    """Percent on the axis of a metric that is a share, none where no share can be."""
    limits = bounds(metric)
    if limits is not None:
        low, high = (end * (1 + 1e-9) for end in limits)
        values.set_major_formatter(
            FuncFormatter(lambda share, _: f"{100 * share:g} %" if low <= share <= high else "")
        )


def over_steps(run: Run, name: str) -> dict[int, float]:
    """An entry of the run's metrics by step: its mean over chains; empty if it has none."""
    found: dict[int, list[float]] = {}
    for row in run.metrics:
        value = row.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            found.setdefault(row["step"], []).append(float(value))
    return {step: float(np.mean(values)) for step, values in found.items()}


def figure_uri(figure: Figure) -> str:
    """The figure as an SVG in a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")
