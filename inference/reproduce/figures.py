"""The figures of the targets: each a function from results to a matplotlib `Figure`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bads_ppl import plots
from inference.arms import Arm, Estimate, bounds
from inference.report_figures import draw_scores, legend_below, over_steps
from inference.reproduce.cases import METHODS
from inference.reproduce.cost import PLAIN
from inference.reproduce.results import Costs, Results, groups
from inference.reproduce.settings import ACCURACY

NOTHING = "nothing has been run yet"


def curves(results: Results) -> Figure:
    """Test score over steps, one pair of axes per setting; the first arm on top."""
    settings = _settings(results)
    figure, panels = plots.panels(
        [results.settings[setting].title for setting in settings] or [NOTHING],
        "",
        columns=max(1, len(settings)),
        size=(5.6, 4.0),
    )
    for axes, setting in zip(panels, settings, strict=False):
        score = results.settings[setting].score
        draw_scores(axes, list(results.of(setting).values()), score.name)
        axes.set_ylabel(score.title)
    legend_below(figure, *panels, columns=2)
    return figure


def weights(results: Results, columns: int = 3) -> Figure:
    """Mean weight by group over steps, one pair of axes per arm, `columns` in a row."""
    arms = results.arms
    figure, panels = plots.panels(
        _titles(results) or [NOTHING],
        "mean weight",
        columns=min(columns, max(1, len(arms))),
        size=(3.6, 2.9),
    )
    for axes, arm in zip(panels, arms.values(), strict=False):
        _draw_weights(axes, arm)
    legend_below(figure, *panels, columns=2, last_first=False)
    return figure


def _titles(results: Results) -> list[str]:
    """Of a panel per arm: the method, and below it what tells apart the panels of a method."""
    several, turned = len(_settings(results)) > 1, any(key.variant for key in results.arms)
    titles = []
    for key, arm in results.arms.items():
        variant = ", ".join(f"{name} {value}" for name, value in arm.variant.items())
        below = [results.settings[key.setting].data] if several else []
        below += [variant or "as it is"] if turned else []
        named = [arm.text("method"), *arm.kind]
        titles.append("\n".join(" · ".join(line) for line in (named, below) if line))
    return titles


def _draw_weights(axes: Axes, arm: Arm) -> None:
    """The mean over seeds, of means over chains, and the band from lowest to highest seed."""
    wanted = {name: bool(high) for name, high in groups(arm).items()}
    rows: list[dict[str, Any]] = []
    for run in arm.runs:
        by_step: dict[int, dict[str, Any]] = {}
        for group in wanted:
            name = f"groups.{group}.mean_weight"
            for step, value in over_steps(run, name).items():
                by_step.setdefault(step, {})[name] = value
        seed = run.value("seed")
        rows += [{"chain": seed, "step": step, **values} for step, values in by_step.items()]
    if rows:
        plots.draw_weights_by_group(axes, rows, wanted)


def over_meta_sizes(results: Results) -> Figure:
    """Accuracy of the last iterate over the curated points per class; band over seeds."""
    by_method: dict[str, dict[int, Arm]] = {}
    for key, arm in results.arms.items():
        size = int(arm.runs[0].number("settings.meta_per_class"))
        by_method.setdefault(key.method, {})[size] = arm
    figure, (axes,) = plots.panels(["MNIST, 4 against 9"], "test accuracy", size=(6.4, 5.2))
    sizes = sorted({size for arms in by_method.values() for size in arms})
    for arms in reversed(by_method.values()):  # the first on top
        one = next(iter(arms.values()))
        found = {
            size: [run.number(ACCURACY.final) for run in arms[size].runs] for size in sorted(arms)
        }
        low, high = ([end(values) for values in found.values()] for end in (min, max))
        mean = [sum(values) / len(values) for values in found.values()]
        axes.fill_between(list(found), low, high, color=one.colour, alpha=0.15, linewidth=0)
        axes.plot(
            list(found), mean, color=one.colour, linestyle=one.style, marker="o", label=one.label
        )
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(plots.PERCENT)
    axes.set_xlabel("curated points per class")
    legend_below(figure, axes, columns=2)
    return figure


def ends(results: Results) -> Figure:
    """Scores of the final models, a row of axes per score; dot: mean, bar: interval over seeds."""
    settings = [results.settings[name] for name in _settings(results)]
    scores = list(dict.fromkeys(score for one in settings for score in (one.score, *one.also)))
    drawn = [(score, one) for score in scores for one in settings]
    figure, panels = plots.panels(
        [f"{one.title}\n{score.title}" for score, one in drawn] or [NOTHING],
        "",
        columns=max(1, len(settings)),
        size=(3.6, 3.4),
    )
    names = [name for name in METHODS if name in {key.method for key in results.arms}]
    for axes, (score, setting) in zip(panels, drawn, strict=False):
        arms = results.of(setting.name)
        limits = bounds(score.name)
        found = {key.method: arm.estimate(score.final, limits) for key, arm in arms.items()}
        _dots(axes, names, found, score.scale)
        axes.set_xlabel(score.unit.strip() or score.title)
    return figure


def sources(results: Results) -> Figure:
    """Mean weights of groups, one pair of axes per arm; dot: mean, bar: interval over seeds."""
    arms = results.arms
    figure, panels = plots.panels(
        _titles(results) or [NOTHING], "", columns=max(1, len(arms)), size=(3.6, 2.6)
    )
    names = list(dict.fromkeys(name for arm in arms.values() for name in groups(arm)))
    for axes, arm in zip(panels, arms.values(), strict=False):
        found = {name: arm.estimate(f"groups.{name}.mean_weight", (0, 1)) for name in groups(arm)}
        _dots(axes, names, found)
        axes.set_xlabel("mean weight")
        axes.set_xlim(
            0, 1.1 * max(one.high if one.has_interval else one.mean for one in found.values())
        )
    return figure


def _dots(
    axes: Axes, names: Sequence[str], found: Mapping[str, Estimate], scale: float = 1.0
) -> None:
    """A line per name: mean and, where there are any, interval; nothing where nothing was found.

    Axes side by side share their lines, so they must have the same `names`.
    """
    for name, one in found.items():
        row = names.index(name)
        if one.has_interval:
            ends = [scale * one.low, scale * one.high]
            axes.plot(ends, [row, row], color=plots.HIGH[1], linewidth=5)
        axes.plot([scale * one.mean], [row], "o", color=plots.HIGH[0])
    _rows(axes, names)
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter("{x:g}")


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """A line per name, the first on top."""
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)


def costs(results: Results) -> Figure:
    """Time and memory of a step over those of plain training; bar: lowest to highest round."""
    measured = results.costs
    titles = [
        f"{results.settings[setting].title}\n{what} of a step"
        for setting in measured
        for what in ("time", "peak memory")
    ]
    figure, panels = plots.panels(titles or [NOTHING], "", columns=2, size=(5.2, 3.6))
    names = list(dict.fromkeys(name for found in measured.values() for name in _time(found)))
    for k, (axes, found) in enumerate(
        zip(panels, [one for one in measured.values() for _ in range(2)], strict=False)
    ):
        values = _memory(found) if k % 2 else _time(found)
        for name, ratios in values.items():
            row = names.index(name)
            middle = sorted(ratios)[len(ratios) // 2]
            axes.plot([min(ratios), max(ratios)], [row, row], color=plots.HIGH[1], linewidth=5)
            axes.plot([middle], [row], "o", color=plots.HIGH[0])
            axes.annotate(
                f"{middle:.2f}",
                (max(ratios), row),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
            )
        axes.axvline(1.0, color=plots.LOW[0], linewidth=1)
        _rows(axes, names)
        axes.set_xlim(0, 1.2 * max([1.0, *(max(ratios) for ratios in values.values())]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("times plain training")
    return figure


def _time(found: Costs) -> Mapping[str, Sequence[float]]:
    return {name: found.time_ratios(name) for name in found.seconds if name != PLAIN}


def _memory(found: Costs) -> Mapping[str, Sequence[float]]:
    ratios = {name: found.memory_ratio(name) for name in found.seconds if name != PLAIN}
    return {name: [ratio] for name, ratio in ratios.items() if math.isfinite(ratio)}


def _settings(results: Results) -> list[str]:
    return list(dict.fromkeys(key.setting for key in results.arms))
