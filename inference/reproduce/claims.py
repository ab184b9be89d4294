"""What the paper says came out, and whether our numbers agree.

A claim is a sentence and a predicate. Predicates look at intervals over seeds: a sentence about a
number in a range *agrees* if the whole 95 % t interval of the number lies in the range, and
*disagrees* if none of it does; with parts on both sides, or fewer than three seeds, one *cannot
tell*. A sentence with several parts agrees if all of them do, and disagrees if one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from inference.arms import Estimate
from inference.reproduce.cases import Key
from inference.reproduce.results import Results

LEAST_SEEDS = 3


@dataclass(frozen=True)
class Verdict:
    """What the numbers say of a sentence, and these numbers."""

    outcome: Literal["agrees", "disagrees", "cannot tell"]
    numbers: str


Predicate = Callable[[Results], Verdict]


@dataclass(frozen=True)
class Claim:
    """What the paper says.

    Attributes:
        sentence: in our words.
        predicate: what decides.
        note: what the reader must know of the comparison.
    """

    sentence: str
    predicate: Predicate
    note: str = ""

    def judge(self, results: Results) -> Verdict:
        """The verdict, which nobody can tell from a trial, or data that are not the paper's."""
        found = self.predicate(results)
        if results.size == "trial":
            return Verdict("cannot tell", f"a trial; {found.numbers}")
        if results.stand_ins:
            data = ", ".join(sorted(results.stand_ins))
            return Verdict("cannot tell", f"measured on {data}, not on the paper's data")
        return found


def within(
    what: str, estimate: Estimate, low: float, high: float, show: Callable[[float], str]
) -> Verdict:
    """Whether an estimate's interval lies in [low, high]; `show` writes a number."""
    if estimate.count == 0:
        return Verdict("cannot tell", f"{what}: no runs")
    numbers = f"{what} {show(estimate.mean)}"
    if estimate.has_interval:
        numbers += f" [{show(estimate.low)}, {show(estimate.high)}]"
    if estimate.count < LEAST_SEEDS:
        few = "1 seed" if estimate.count == 1 else f"{estimate.count} seeds"
        return Verdict("cannot tell", f"{numbers}, {few} of the {LEAST_SEEDS} that it takes")
    if low <= estimate.low and estimate.high <= high:
        return Verdict("agrees", numbers)
    if estimate.high < low or high < estimate.low:
        return Verdict("disagrees", numbers)
    return Verdict("cannot tell", numbers)


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """A sentence's parts as one: it takes all of them to agree, and one to disagree."""
    parts = list(verdicts)
    outcomes = {part.outcome for part in parts}
    numbers = "; ".join(part.numbers for part in parts)
    if "disagrees" in outcomes:
        return Verdict("disagrees", numbers)
    return Verdict("agrees" if outcomes == {"agrees"} else "cannot tell", numbers)


def all_of(*predicates: Predicate) -> Predicate:
    """Several predicates as one."""
    return lambda results: together(predicate(results) for predicate in predicates)


def plain(value: float) -> str:
    """A number as it is."""
    return f"{value:.2f}".replace("-", "−")


def name(key: Key) -> str:
    """A case in a sentence about its setting."""
    return " ".join(part for part in (key.method, key.variant) if part)


def score(key: Key, low: float = 0.0, high: float = math.inf) -> Predicate:
    """The last iterate's test score (accuracy in [0, 1], BLEU in [0, 100]) is in [low, high]."""

    def judge(results: Results) -> Verdict:
        setting = results.settings.get(key.setting)
        show = setting.score.value if setting else plain
        return within(name(key), results.score(key), low, high, show)

    return judge


def ahead(key: Key, others: Sequence[Key], low: float = 0.0, high: float = math.inf) -> Predicate:
    """The score of `key` less that of each of the others is from `low` to `high`."""

    def one(other: Key, results: Results) -> Verdict:
        estimate = results.difference(key, other)
        setting = results.settings.get(key.setting)
        show = setting.score.points if setting else plain
        return within(f"{name(key)} − {name(other)}", estimate, low, high, show)

    return lambda results: together(one(other, results) for other in others)


def ahead_in_weight(key: Key, group: str, other: str) -> Predicate:
    """The mean weight of one group of train points is higher than that of another."""
    what = f"mean w of {name(key)}, {group} − {other}"
    return lambda results: within(what, results.weight(key, group, other), 0.0, math.inf, plain)


def part(key: Key, low: float = -1.0, high: float = 1.0) -> Predicate:
    """(high - low) / (high + low) of the mean weights by group is from `low` to `high`.

    1 where only points that should weigh more have weight, 0 where all weigh the same, -1 where
    only the others have any.
    """
    return lambda results: within(
        f"contrast of {name(key)}", results.contrast(key), low, high, plain
    )


FLAT = 0.1
"""Contrasts up to this are called flat."""


def right_way(key: Key) -> Predicate:
    """Points that should weigh more do."""
    return part(key, low=FLAT)


def flat(key: Key) -> Predicate:
    """All points weigh about the same."""
    return part(key, -FLAT, FLAT)


def inverted(key: Key) -> Predicate:
    """Points that should weigh less weigh more."""
    return part(key, high=-FLAT)


def level(setting: str, predicate: Predicate) -> Predicate:
    """A predicate about a level, which only the paper's data and network can decide."""

    def judge(results: Results) -> Verdict:
        found = predicate(results)
        there = results.settings.get(setting)
        if there is not None and results.size in there.paper_data:
            return found
        return Verdict("cannot tell", f"takes the paper's data (size=paper); here {found.numbers}")

    return judge


def time_ratio(setting: str, method: str, low: float, high: float = math.inf) -> Predicate:
    """A step takes from `low` to `high` times as long as one of plain training, in every round."""

    def judge(results: Results) -> Verdict:
        costs = results.costs.get(setting)
        ratios = sorted(costs.time_ratios(method)) if costs else []
        if not ratios:
            return Verdict("cannot tell", f"{method}: not measured")
        least, most = ratios[0], ratios[-1]
        middle = ratios[len(ratios) // 2]
        numbers = f"{method} {middle:.2f} ({least:.2f} to {most:.2f})"
        if low <= least and most <= high:
            return Verdict("agrees", numbers)
        apart = most < low or high < least
        return Verdict("disagrees" if apart else "cannot tell", numbers)

    return judge


def memory_ratio(setting: str, method: str, low: float, high: float = math.inf) -> Predicate:
    """A step's peak memory is from `low` to `high` times that of plain training."""

    def judge(results: Results) -> Verdict:
        costs = results.costs.get(setting)
        ratio = costs.memory_ratio(method) if costs else math.nan
        if math.isnan(ratio):
            return Verdict("cannot tell", f"{method}: not measured")
        numbers = f"{method} {ratio:.2f}"
        return Verdict("agrees" if low <= ratio <= high else "disagrees", numbers)

    return judge
