"""What there is to run for a figure or a table, and how far each of it has come."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from omegaconf import OmegaConf

from bads_ppl.errors import InputError
from inference.folder import CONFIG, RESULTS, changed_settings
from inference.reproduce.cases import METHODS, Case
from inference.reproduce.cost import PLAIN, ROUNDS, STEPS, WARM_UP
from inference.reproduce.settings import Setting
from inference.run import compose_run

READY_S = 30.0
"""Seconds until a process of a cost job is ready, at most: it evaluates nothing."""


class State(NamedTuple):
    """How far a job has come; `detail` says what differs, or what cannot be read."""

    name: Literal["done", "interrupted", "missing", "other settings"]
    detail: str = ""


@dataclass(frozen=True)
class Place:
    """Where and how jobs run, which is the same for all.

    Attributes:
        root: folder of all runs.
        size: a name in `cases.SIZES`.
        source: torchvision | files | stand-in.
        device: as `inference.run` takes it.
        language_model: in place of the paper's (`Setting.model`); "": none.
    """

    root: Path
    size: str
    source: str = "torchvision"
    device: str = "auto"
    language_model: str = ""

    @property
    def folder(self) -> Path:
        """Of the runs of this size. Stand-ins are kept apart from the real data."""
        return self.root / (self.size if self.source != "stand-in" else f"{self.size}-stand-in")

    def data(self, setting: Setting) -> tuple[str, ...]:
        """The options that choose the source of the data, and the language model."""
        if self.source == "stand-in":
            return setting.stand_in
        source = f"data.source={'files' if setting.files_only else self.source}"
        if not self.language_model or setting.model is None:
            return (source,)
        return (source, f"{setting.model}={quoted(self.language_model)}")


class Job(Protocol):
    """Something to run in a process of its own, and to find done afterwards."""

    @property
    def name(self) -> str: ...

    @property
    def setting(self) -> Setting: ...

    @property
    def place(self) -> Place: ...

    @property
    def folder(self) -> Path: ...

    @property
    def seconds(self) -> float:
        """About how long it takes, of one core."""
        ...

    @property
    def alone(self) -> bool:
        """Whether nothing else may run beside it."""
        ...

    def options(self) -> list[str]:
        """Of `inference.run`."""
        ...

    def command(self, *, overwrite: bool) -> list[str]: ...

    def state(self) -> State: ...


@dataclass(frozen=True)
class RunJob:
    """One run of `inference.run`: a case and a seed."""

    case: Case
    seed: int
    place: Place

    alone = False

    @property
    def setting(self) -> Setting:
        return self.case.setting

    @property
    def name(self) -> str:
        return f"{self.case.folder}/seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.place.folder / self.name

    @property
    def seconds(self) -> float:
        return self.case.seconds(self.place.size)

    def options(self) -> list[str]:
        return [
            *self.case.options(self.place.size),
            *self.place.data(self.setting),
            f"seed={self.seed}",
        ]

    def command(self, *, overwrite: bool) -> list[str]:
        where = [f"device={self.place.device}", f"run_dir={quoted(self.folder)}"]
        how = "overwrite=true" if overwrite else "resume=true"
        return [sys.executable, "-m", "inference.run", *self.options(), *where, how]

    def state(self) -> State:
        """Done only if the stored settings are those that this run would have now."""
        if not (self.folder / CONFIG).exists():
            return State("missing")
        try:
            differ = self._differences()
        except InputError as error:
            return State("other settings", " ".join(str(error).split()))
        if differ:
            return State("other settings", "; ".join(differ))
        try:
            results = json.loads((self.folder / RESULTS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return State("interrupted")
        return State("done" if isinstance(results, dict) else "interrupted")

    def _differences(self) -> list[str]:
        config, _ = compose_run(self.options(), self.name)
        changed = changed_settings(self.folder / CONFIG, config)
        stored: Any = OmegaConf.load(self.folder / CONFIG)
        for name in ("steps", "chains"):  # which a resumed run may change; these runs may not
            if stored.get(name) != config[name]:
                changed[name] = (stored.get(name), config[name])
        # What is null now is filled in by the run from its data.
        return [f"{n} was {old}, now {new}" for n, (old, new) in changed.items() if new is not None]


@dataclass(frozen=True)
class CostJob:
    """Time and memory of all methods on one setting (`inference.reproduce.cost`)."""

    setting: Setting
    cases: Sequence[Case]
    place: Place

    alone = True

    @property
    def name(self) -> str:
        return f"{self.setting.name}/cost"

    @property
    def folder(self) -> Path:
        return self.place.folder / self.name

    @property
    def path(self) -> Path:
        return self.folder / "cost.json"

    @property
    def seconds(self) -> float:
        size = self.place.size
        steps = WARM_UP + STEPS[size] * ROUNDS[size]
        each = steps * self.setting.step_ms[size] / 1000
        methods = [METHODS["mixing"], *(case.method for case in self.cases)]
        ahead = sum(case.proxy_steps(size) for case in self.cases)
        started = min(self.setting.start_s[size], READY_S) * len(methods)
        return (
            started
            + each * sum(method.cost for method in methods)
            + ahead * self.setting.step_ms[size] / 1000
        )

    def options(self) -> list[str]:
        """Those of plain training: what the baseline without a choice sees, but no kernel."""
        return self._options(Case(self.setting, METHODS["mixing"]))

    def specification(self) -> dict[str, Any]:
        """What is measured: the options of each method."""
        methods = {case.method.name: self._options(case) for case in self.cases}
        return {PLAIN: self.options()} | methods

    def _options(self, case: Case) -> list[str]:
        setting = self.setting
        return [
            *case.options(self.place.size),
            *setting.for_cost,
            *self.place.data(setting),
            "seed=0",
        ]

    def command(self, *, overwrite: bool) -> list[str]:
        arguments = [self.place.size, self.place.device, str(self.path)]
        module = "inference.reproduce.cost"
        return [sys.executable, "-m", module, *arguments, json.dumps(self.specification())]

    def state(self) -> State:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return State("missing")
        except (OSError, ValueError):
            return State("interrupted")
        if stored.get("methods") != self.specification():
            return State("other settings", "other methods or options of theirs were measured")
        if stored.get("failed"):
            return State("interrupted")
        return State("done")


def quoted(path: Path | str) -> str:
    """A path as a value that Hydra takes as it stands."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
