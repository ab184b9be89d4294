"""Step sizes: a number, or any function of the step number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bads_ppl.errors import InputError

Schedule = Callable[[int], float]
"""Maps a step number (from 0) to a step size eta > 0."""


@dataclass(frozen=True)
class Constant:
    """The same step size throughout."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Warmdown:
    """From `start` to `end` along half a cosine over `steps` steps, then constant at `end`.

    Choose `steps` no longer than the burn-in, so that draws are made at one step size.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"a warmdown takes at least 1 step, got {self.steps}")
        if not self.end > 0:
            raise InputError(f"a warmdown must end at a positive step size, got {self.end}")

    def __call__(self, step: int) -> float:
        share = min(step / self.steps, 1.0)
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Polynomial:
    """scale * (offset + step)^(-power): power in (0.5, 1] makes SGLD exact in the limit.

    Welling and Teh (2011), section 3.
    """

    scale: float
    offset: float = 1.0
    power: float = 0.55

    def __call__(self, step: int) -> float:
        return float(self.scale * (self.offset + step) ** -self.power)


@dataclass(frozen=True)
class Rescaled:
    """A schedule times a factor that changes with the step, as the number of points that count."""

    schedule: Schedule
    factor: Callable[[int], float]

    def __call__(self, step: int) -> float:
        return self.schedule(step) * self.factor(step)


def named(name: str, eta: float, burn_in: int) -> Schedule:
    """The schedule that options call `name`, starting at `eta`.

    "constant"; "warmdown" to a tenth over the burn-in; "polynomial": eta (1 + step / burn_in)^-.55,
    which goes on shrinking, so that the bias vanishes with the length of the chain.

    Raises:
        InputError: if there is no such schedule.
    """
    length = max(burn_in, 1)
    schedules: dict[str, Callable[[], Schedule]] = {
        "constant": lambda: Constant(eta),
        "warmdown": lambda: Warmdown(eta, eta / 10, length),
        "polynomial": lambda: Polynomial(eta * length**0.55, float(length), 0.55),
    }
    if name not in schedules:
        raise InputError(f"schedule must be one of {sorted(schedules)}, got {name!r}")
    return schedules[name]()


def as_schedule(value: float | Schedule, group: str) -> Schedule:
    """A schedule from a number or a schedule.

    Raises:
        InputError: if a number, or the schedule's first value, is not positive and finite.
    """
    schedule = value if callable(value) else Constant(float(value))
    first = schedule(0)
    if not (math.isfinite(first) and first > 0):
        raise InputError(
            f"step_size of group {group!r} must be a positive number, got {first}: it is eta in "
            "x <- x - eta / 2 * grad U + sqrt(eta T) xi, with U a sum over the data"
        )
    return schedule


def by_group(
    step_size: float | Schedule | Mapping[str, float | Schedule], groups: Mapping[str, str | None]
) -> dict[str, Schedule]:
    """One schedule per group of sites.

    Args:
        step_size: one for all groups, or one per group.
        groups: the groups that need one; the value names the group that one falls back on.

    Raises:
        InputError: if a group has none, or a name is not that of a group.
    """
    if not isinstance(step_size, Mapping):
        return {group: as_schedule(step_size, group) for group in groups}
    unknown = sorted(set(step_size) - set(groups))
    if unknown:
        raise InputError(
            f"step_size names groups {unknown} that the program does not have: its groups are "
            f"{sorted(groups)}"
        )
    found: dict[str, Schedule] = {}
    for group, other in groups.items():
        value = step_size.get(group, step_size.get(other) if other else None)
        if value is None:
            raise InputError(
                f"step_size has no entry for group {group!r}: give one, as in "
                f"step_size={{'{group}': 1e-3, ...}}"
            )
        found[group] = as_schedule(value, group)
    return found
