"""How long a chain runs and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bads_ppl.errors import InputError


@dataclass(frozen=True)
class Plan:
    """How long a chain runs and what it keeps, all in steps.

    Attributes:
        steps: length of the chain.
        burn_in: steps before the first draw; default half of `steps`.
        thinning: steps between draws.
        snapshots: networks to keep per chain, at draws evenly spaced, without what is frozen; 0
            keeps none.
        evaluate_every: steps between evaluations (rows of metrics.jsonl); default steps / 10.
        check_every: steps between looks at the state: finite values, progress bar, signals apart.
        checkpoint_seconds: seconds between checkpoints.
    """

    steps: int = 3000
    burn_in: int | None = None
    thinning: int = 10
    snapshots: int = 5
    evaluate_every: int | None = None
    check_every: int = 50
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("steps", "thinning", "evaluate_every", "check_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.snapshots < 0:
            raise InputError(f"snapshots must be 0 or more, got {self.snapshots}")
        if not 0 <= self.first < self.steps:
            raise InputError(
                f"burn_in must be from 0 to steps - 1 = {self.steps - 1}, got {self.burn_in}: "
                "a chain needs steps left for its draws"
            )
        if self.draws < 1:
            raise InputError(
                f"thinning must be at most steps - burn_in = {self.steps - self.first}, got "
                f"{self.thinning}: the chain would make no draw"
            )

    @property
    def first(self) -> int:
        """Steps of burn-in."""
        return self.steps // 2 if self.burn_in is None else self.burn_in

    @property
    def draws(self) -> int:
        """Draws that a chain makes."""
        return (self.steps - self.first) // self.thinning

    def draw_steps(self, allowed: Callable[[int], bool]) -> list[int]:
        """Steps, from 1, after which draws are made, of those that the sampler allows.

        Raises:
            InputError: if there are none.
        """
        last = self.first + self.draws * self.thinning
        steps = range(self.first + self.thinning, last + 1, self.thinning)
        found = [step for step in steps if allowed(step)]
        if not found:
            raise InputError(
                f"the sampler allows no draw from step {self.first} to {self.steps}: run more "
                "steps, thin less, or let a cycle explore for less of its length"
            )
        return found

    def snapshot_draws(self, draws: int) -> set[int]:
        """Numbers, from 1, of the draws at which networks are kept, of as many draws."""
        count = min(self.snapshots, draws)
        return {draws * (k + 1) // count for k in range(count)}

    @property
    def evaluation_steps(self) -> int:
        return max(1, self.steps // 10) if self.evaluate_every is None else self.evaluate_every
