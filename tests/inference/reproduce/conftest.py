"""Made-up runs of the cases that targets declare."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from inference.arms import Arm
from inference.reproduce.cases import Case, Key
from inference.reproduce.jobs import Place, RunJob
from inference.reproduce.results import Results
from inference.reproduce.settings import cifar10, mnist
from inference.run import compose_run
from inference.runs import Run


def found(
    seed: int, accuracy: float, high: float = 0.8, low: float = 0.2, **more: Any
) -> dict[str, Any]:
    """What stands in the results of a run."""
    return {
        "task": "mnist",
        "dataset": "mnist",
        "method": "bads",
        "model": "joint",
        "weights": "instance",
        "seed": seed,
        "steps": 1500,
        "settings": {"meta_per_class": 25},
        "test": {
            "accuracy": accuracy + 0.01,
            "accuracy_last": accuracy,
            "bleu": 100 * accuracy + 1,
            "bleu_last": 100 * accuracy,
            "benchmark": accuracy / 2,
        },
        "groups": {
            "rare": {"mean_weight": high, "count": 25, "high": True},
            "frequent": {"mean_weight": low, "count": 75, "high": False},
        },
        **more,
    }


@cache
def composed(*options: str) -> DictConfig:
    """Settings but for the seed, made once."""
    return compose_run(options, "a test")[0]


@pytest.fixture
def results() -> Callable[..., Results]:
    """Results from accuracies by seed, or from (accuracy, high, low), by key."""

    def make(size: str = "small", **given: Any) -> Results:
        made = Results(size, settings={one.name: one for one in (mnist(25), cifar10(0.5))})
        for name, values in given.items():
            method, _, variant = name.partition("__")
            runs = []
            for seed, value in enumerate(values):
                numbers = value if isinstance(value, Sequence) else (value,)
                runs.append(Run(name, found(seed, *numbers), {}, "", [], [], []))
            made.arms[Key("mnist-25", method, variant)] = Arm(runs, "accuracy")
        return made

    return make


@pytest.fixture
def write_run() -> Callable[..., RunJob]:
    """Writes the folder of a run of a case, as `inference.run` leaves it, or a part of it."""

    def write(
        case: Case,
        seed: int,
        place: Place,
        accuracy: float = 0.9,
        *,
        finished: bool = True,
        changed: Sequence[str] = (),
        **more: Any,
    ) -> RunJob:
        job = RunJob(case, seed, place)
        job.folder.mkdir(parents=True)
        config = deepcopy(composed(*job.options()[:-1], *changed))
        config.seed, config.sparsity = seed, 0.005  # as a run fills in what is null
        OmegaConf.save(config, job.folder / "config.yaml", resolve=True)
        if not finished:
            return job
        content = found(seed, accuracy, **{"method": case.method.name, **more})
        (job.folder / "results.json").write_text(json.dumps(content))
        rows = [
            {
                "chain": 0,
                "step": step,
                "test.accuracy": accuracy - 1 / step,
                "groups.rare.mean_weight": 0.8,
                "groups.frequent.mean_weight": 0.2,
            }
            for step in (100, 200)
        ]
        (job.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return job

    return write


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "out" / "runs", "small")
