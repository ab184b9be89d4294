"""What the runs of a target found, by case: the numbers that claims and figures are about."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from inference.arms import Arm, Estimate, bounds, look, paired_difference
from inference.reproduce.cases import METHODS, Case, Key
from inference.reproduce.cost import PLAIN
from inference.reproduce.jobs import CostJob, Job, RunJob
from inference.reproduce.settings import Setting
from inference.runs import Run, read_run


@dataclass(frozen=True)
class Costs:
    """Time and memory of steps on one setting.

    Attributes:
        seconds: of a block of steps by method and round; "plain" is plain training.
        peak_mib: by method, above what was in use before there was a network; None: unknown.
        steps: of a block.
        preparation_s: seconds until the first step, data included, by method.
        device: where.
    """

    seconds: dict[str, list[float]]
    peak_mib: dict[str, float | None]
    steps: int
    preparation_s: dict[str, float]
    device: str

    def time_ratios(self, method: str) -> list[float]:
        """Time of the method over that of plain training, by round; empty if not measured."""
        own, plain = self.seconds.get(method, []), self.seconds.get(PLAIN, [])
        return [a / b for a, b in zip(own, plain, strict=False)]

    def memory_ratio(self, method: str) -> float:
        """Peak memory over that of plain training; NaN if not measured."""
        own, plain = self.peak_mib.get(method), self.peak_mib.get(PLAIN)
        return own / plain if own is not None and plain else math.nan


@dataclass
class Results:
    """All that is there of a target's jobs.

    Attributes:
        size: a name in `cases.SIZES`.
        arms: finished runs by case, in the order of the target.
        costs: by setting.
        settings: those that there is anything of, by name.
        stand_ins: names of data that are not the paper's.
    """

    size: str
    arms: dict[Key, Arm] = field(default_factory=dict)
    costs: dict[str, Costs] = field(default_factory=dict)
    settings: dict[str, Setting] = field(default_factory=dict)
    stand_ins: set[str] = field(default_factory=set)

    def of(self, setting: str) -> dict[Key, Arm]:
        """The arms of one setting."""
        return {key: arm for key, arm in self.arms.items() if key.setting == setting}

    def score(self, key: Key) -> Estimate:
        """Of the last iterate, as the setting scores; count 0 without runs."""
        arm = self.arms.get(key)
        if arm is None:
            return Estimate.of([])
        score = self.settings[key.setting].score
        return arm.estimate(score.final, bounds(score.name))

    def difference(self, key: Key, other: Key) -> Estimate:
        """Score of `key` minus that of `other`, paired by seed; count 0 without shared seeds."""
        arm, against = self.arms.get(key), self.arms.get(other)
        if arm is None or against is None:
            return Estimate.of([])
        score = self.settings[key.setting].score
        return paired_difference(arm, against, score.final) or Estimate.of([])

    def weight(self, key: Key, group: str, other: str) -> Estimate:
        """Mean weight of a group less that of another; count 0 without runs."""
        arm = self.arms.get(key)
        names = [f"groups.{name}.mean_weight" for name in (group, other)]
        found = [[run.number(name) for name in names] for run in arm.runs] if arm else []
        return Estimate.of([one - two for one, two in found], (-1.0, 1.0))

    def contrast(self, key: Key) -> Estimate:
        """(high - low) / (high + low) of the mean weights by group; count 0 without runs."""
        arm = self.arms.get(key)
        return Estimate.of([contrast(run) for run in arm.runs] if arm else [], (-1.0, 1.0))


def contrast(run: Run) -> float:
    """(high - low) / (high + low), in [-1, 1], of the mean weights of a run's groups.

    High are the groups that should weigh more. NaN where a run has no such groups.
    """
    mean = {wanted: _mean_weight(run, wanted) for wanted in (True, False)}
    total = mean[True] + mean[False]
    return (mean[True] - mean[False]) / total if total > 0 else math.nan


def _mean_weight(run: Run, high: bool) -> float:
    found = [
        (group["mean_weight"], group["count"])
        for group in (run.value("groups") or {}).values()
        if group.get("high") is high and group["count"]
    ]
    values, counts = [value for value, _ in found], [count for _, count in found]
    return float(np.average(values, weights=counts)) if found else math.nan


def groups(arm: Arm) -> dict[str, bool | None]:
    """The groups of an arm's train points, and whether their weights should be high, if known."""
    found = arm.runs[0].value("groups") or {}
    return {name: group.get("high") for name, group in found.items()}


def collect(jobs: Sequence[Job], size: str) -> Results:
    """Read the results of these jobs, which are done; what is damaged is left out."""
    results = Results(size)
    by_case: dict[Key, tuple[Case, list[Run]]] = {}
    for job in jobs:
        if isinstance(job, CostJob):
            results.costs[job.setting.name] = _read_costs(job)
            results.settings[job.setting.name] = job.setting
            if job.place.source == "stand-in":
                results.stand_ins |= {option.partition("=")[2] for option in job.setting.stand_in}
        elif isinstance(job, RunJob):
            run = read_run(job.folder, job.place.root, plots=False)
            if run.results is not None:
                by_case.setdefault(job.case.key, (job.case, []))[1].append(run)
    looks = _looks(by_case)
    for key, (case, runs) in by_case.items():
        colour, style = look(looks[key.method, key.variant])
        name = case.setting.score.name
        results.arms[key] = Arm(runs, name, colour, style, dict(case.variant.label))
        results.settings[key.setting] = case.setting
        found = {str(run.value("dataset")) for run in runs}
        results.stand_ins |= found - set(case.setting.datasets)
    return results


def _looks(keys: Collection[Key]) -> dict[tuple[str, str], int]:
    """Numbers of looks: a method's is the same on all figures, a further variant gets another."""
    order, found = list(METHODS), dict[tuple[str, str], int]()
    lines = dict.fromkeys((key.method, key.variant) for key in keys)
    first = {method: (method, variant) for method, variant in reversed(lines)}
    for method, line in first.items():
        found[line] = order.index(method)
    for line in lines:
        if line not in found:
            found[line] = next(k for k in count() if k not in found.values())
    return found


def _read_costs(job: CostJob) -> Costs:
    stored: dict[str, Any] = json.loads(job.path.read_text(encoding="utf-8"))
    about = stored["about"]
    return Costs(
        stored["seconds"],
        stored["peak_mib"],
        stored["steps"],
        {name: one["preparation_s"] for name, one in about.items()},
        ", ".join(sorted({str(one["device"]) for one in about.values()})),
    )
