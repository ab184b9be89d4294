"""Runs that differ by seed only, and what their numbers say together.

Within a task runs are grouped by method and settings; what is left differs by seed only, and is
summarised by a mean, a 95 % t interval and a median over seeds.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from inference.folder import NOT_SETTINGS
from inference.runs import Run

CONFIDENCE = 0.95

_NO_SETTING = {*NOT_SETTINGS, "hydra"} - {"steps", "chains"}
"""Options by which runs of one experiment may differ: where and how, not what."""
_NO_TASK_SETTING = {"label", "sparsity", "seed", "_target_"}
"""Options of a task's configuration that do not make it another task."""
# Okabe and Ito's colours, which all readers can tell apart, without the yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
_STYLES = ("solid", "dashed", "dotted", "dashdot")


@dataclass(frozen=True)
class Estimate:
    """Mean, t interval and median of one value per seed.

    Attributes:
        mean: mean over seeds; NaN without values.
        low: lower end of the 95 % t interval; NaN for fewer than two values.
        high: its upper end.
        median: median over seeds.
        count: number of seeds with a value.
    """

    mean: float
    low: float
    high: float
    median: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float], bounds: tuple[float, float] | None = None) -> Estimate:
        """The estimate from values, of which NaN are left out; the interval is cut at `bounds`."""
        x = np.array([value for value in values if math.isfinite(value)])
        if len(x) == 0:
            return cls(math.nan, math.nan, math.nan, math.nan, 0)
        mean, low, high = float(x.mean()), math.nan, math.nan
        if len(x) > 1:
            quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(x) - 1))
            half = quantile * float(x.std(ddof=1)) / math.sqrt(len(x))
            low, high = mean - half, mean + half
            if bounds is not None:
                low, high = max(low, bounds[0]), min(high, bounds[1])
        return cls(mean, low, high, float(np.median(x)), len(x))

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low)


@dataclass
class Arm:
    """The runs of a task that differ by seed only.

    Attributes:
        runs: the runs, by seed.
        variant: settings by which this arm differs from others of its method, model and weights.
        best: whether its mean is the highest of the task.
        difference: to the best arm, paired by seed; None for the best itself and without pairs.
    """

    runs: list[Run]
    metric: str
    colour: str = _COLOURS[0]
    style: str = _STYLES[0]
    variant: dict[str, Any] = field(default_factory=dict)
    best: bool = False
    difference: Estimate | None = None

    def text(self, name: str) -> str:
        """An entry of the results that all runs share."""
        value = self.runs[0].value(name)
        return "" if value is None else str(value)

    def estimate(self, name: str, bounds: tuple[float, float] | None = None) -> Estimate:
        """Mean and interval over seeds of an entry of the results."""
        return Estimate.of([run.number(name) for run in self.runs], bounds)

    @property
    def score(self) -> Estimate:
        """What the arm is ranked by."""
        return self.estimate(f"test.{self.metric}", bounds(self.metric))

    @property
    def label(self) -> str:
        """A name for the arm that is unique within its task."""
        parts = [self.text("method"), *self.kind]
        return " · ".join(parts + [f"{name} {value}" for name, value in self.variant.items()])

    @property
    def kind(self) -> list[str]:
        """Model and weights, where the method has any."""
        named = [self.text("model"), self.text("weights")]
        return [name for name in named if name not in ("", "none", "fixed")]

    @property
    def verdicts(self) -> dict[str, int]:
        """Number of runs by what their diagnostics say, the most frequent first."""
        found = [run.value("diagnostics.verdict") for run in self.runs]
        return dict(Counter(str(verdict) for verdict in found if verdict).most_common())

    @property
    def seeds(self) -> dict[Any, Run]:
        return {run.value("seed"): run for run in self.runs}


def task_settings(run: Run) -> dict[str, Any]:
    """Settings that make this task another one, by their last name."""
    tree = run.value("settings") or run.config.get("task")
    flat = flatten(tree) if isinstance(tree, Mapping) else {}
    named = {name.rpartition(".")[2]: value for name, value in flat.items()}
    return {name: value for name, value in named.items() if name not in _NO_TASK_SETTING}


def method_settings(run: Run) -> dict[str, Any]:
    """Settings that make this method another one: all but the task's, seeds, and places."""
    flat = flatten({k: v for k, v in run.config.items() if str(k) not in _NO_SETTING})
    return {
        name: value
        for name, value in flat.items()
        if name.rpartition(".")[2] != "seed"
        and (not name.startswith("task.") or name == "task.sparsity")
    } | {name: run.value(name) for name in ("sampler", "preset") if run.value(name) is not None}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def grouped(runs: Sequence[Run], *keys: Any) -> Iterator[list[Run]]:
    """Runs whose keys are equal, in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([key(run) for key in keys], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    yield from groups.values()


def _one_per_seed(runs: list[Run]) -> list[Run]:
    """Runs by seed; of several with one seed the first, with a note on the others."""
    kept: dict[Any, Run] = {}
    for run in runs:
        first = kept.setdefault(run.value("seed"), run)
        if first is not run:
            run.problems.append(
                f"it repeats seed {run.value('seed')} of {first.name} with the same settings: "
                "left out of the numbers"
            )
    return sorted(kept.values(), key=lambda run: str(run.value("seed")).zfill(12))


def _short_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the last part of their names, where that tells them apart."""
    short = [name.rpartition(".")[2] for name in settings]
    if len(set(short)) < len(short):
        return dict(settings)
    return dict(zip(short, settings.values(), strict=True))


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all."""
    names = sorted({name for one in settings for name in one})
    return [n for n in names if len({json.dumps(one.get(n), default=str) for one in settings}) > 1]


def paired_difference(arm: Arm, other: Arm, name: str | None = None) -> Estimate | None:
    """An entry of the results, by default the score, of `arm` minus that of `other`.

    Over the seeds of both; None if they share none.
    """
    name = name or f"test.{arm.metric}"
    shared = arm.seeds.keys() & other.seeds.keys()
    estimate = Estimate.of(
        [arm.seeds[seed].number(name) - other.seeds[seed].number(name) for seed in shared]
    )
    return estimate if estimate.count else None


def look(k: int) -> tuple[str, str]:
    """Colour and line style of the k-th line of a figure."""
    return _COLOURS[k % len(_COLOURS)], _STYLES[k // len(_COLOURS) % len(_STYLES)]


def make_arms(runs: Sequence[Run], metric: str) -> list[Arm]:
    """The arms of one task, best first, told apart by colour, style and name."""

    def kind(run: Run) -> list[Any]:
        return [run.value(name) for name in ("method", "model", "weights")]

    arms: list[Arm] = []
    for alike in grouped(runs, kind):
        variants = [Arm(_one_per_seed(same), metric) for same in grouped(alike, method_settings)]
        names = differing([method_settings(arm.runs[0]) for arm in variants])
        for arm in variants:
            own = method_settings(arm.runs[0])
            arm.variant = _short_names({name: own.get(name) for name in names})
        arms += variants
    arms.sort(key=lambda arm: -arm.score.mean if arm.score.count else math.inf)
    for k, arm in enumerate(arms):
        arm.colour, arm.style = look(k)
    arms[0].best = arms[0].score.count > 0
    for arm in arms[1:]:
        arm.difference = paired_difference(arm, arms[0])
    return arms


def bounds(metric: str) -> tuple[float, float] | None:
    """The range of a metric that is a share."""
    return (0.0, 1.0) if metric in ("accuracy", "benchmark") else None
