"""The folder of a run: where it is, what may be written into it, and the settings that it keeps."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bads_ppl.atomic import atomic_path, make_folder
from bads_ppl.errors import InputError
from inference.setups import Setup

RESULTS, CONFIG, METRICS = "results.json", "config.yaml", "metrics.jsonl"
TEXTS, SAMPLES = "texts.csv", "written.csv"
WEIGHTED, SELECTED, MODEL = "weighted.jsonl", "selected.jsonl", "model"
SCORES = "benchmarks.json"

NOT_SETTINGS = (
    "run_dir",
    "resume",
    "overwrite",
    "steps",
    "chains",
    "device",
    "data",
    "cache",
    "checkpoint_seconds",
    "workers",
    "table",
    "parallel",
    "cuda_graph",
)
"""Top-level options that a resumed run may change: longer or more chains, or another machine."""

WRITTEN = (
    "chain-[0-9]*",
    "plots",
    METRICS,
    "weights.parquet",
    "posterior.nc",
    TEXTS,
    SAMPLES,
    WEIGHTED,
    SELECTED,
    MODEL,
    SCORES,
    "removal*",
    RESULTS,
    CONFIG,
)
"""What a run writes into its folder, and all that overwrite=true removes."""


@dataclass(frozen=True)
class Choices:
    """Names of the configuration groups' members in use."""

    task: str
    method: str
    model: str
    weights: str
    sampler: str
    backbone: str
    preset: str


def run_dir(config: DictConfig, choices: Choices, setup: Setup) -> str:
    """The run's folder: as given, or runs/<task>/<method>/<model>-<weights>/seed<k>.

    Runs for tuning are kept apart, in runs/<task>-validation.
    """
    if config.run_dir is not None:
        return str(config.run_dir)
    model, weights = setup.names
    task = config.task.label + ("" if config.split == "test" else f"-{config.split}")
    if config.fold is not None:
        task += f"-fold{config.fold.replace('/', 'of')}"
    name = f"runs/{task}/{choices.method}/{model}-{weights}/seed{config.seed}"
    return name if choices.preset == "default" else name.replace("/seed", f"-{choices.preset}/seed")


def check_folder(folder: Path, config: DictConfig) -> None:
    """Refuse a folder that this run must not write into; changes nothing.

    Raises:
        InputError: if it holds another run and neither resume nor overwrite is set, or resume is
            set with other settings, or if it holds something else.
    """
    path = folder / CONFIG
    if folder.is_dir() and any(folder.iterdir()):
        if not path.exists():
            raise InputError(
                f"run_dir {folder} is not empty and holds no run: choose an empty folder"
            )
        if config.overwrite:
            return
        if not config.resume:
            raise InputError(
                f"run_dir {folder} already holds a run: use resume=true to continue it, "
                "overwrite=true to replace it, or another run_dir"
            )
        _check_same_settings(path, config)
    elif folder.exists() and not folder.is_dir():
        raise InputError(f"run_dir {folder} is a file: choose a folder")


def prepare_folder(folder: Path, config: DictConfig) -> None:
    """Make the run's folder, remove the run that overwrite=true replaces, and write the settings.

    Raises:
        OSError: if it cannot be written.
    """
    make_folder(folder, "run_dir")
    if config.overwrite:
        for path in [path for pattern in WRITTEN for path in folder.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not (folder / CONFIG).exists():
        save_config(folder, config)


def save_config(folder: Path, config: DictConfig) -> None:
    """Write the settings; on resuming only once the chains are as long as these say."""
    with atomic_path(folder / CONFIG) as temporary:
        OmegaConf.save(config, temporary, resolve=True)


def settings(config: DictConfig) -> dict[str, Any]:
    """What must stay the same when a run is resumed."""
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items() if k not in NOT_SETTINGS}


def changed_settings(path: Path, config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of a stored config.yaml that differ from those of `config`: before and now.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        before = _flat(settings(OmegaConf.load(path)))  # type: ignore[arg-type]
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}): the run cannot be resumed") from error
    now = _flat(settings(config))
    return {
        name: (before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }


def _check_same_settings(path: Path, config: DictConfig) -> None:
    changed = changed_settings(path, config)
    differ = [f"{name} was {before}, now {now}" for name, (before, now) in changed.items()]
    if differ:
        raise InputError(
            f"run_dir {path.parent} holds a run with other settings: {'; '.join(differ)}. Resume "
            "with the same settings, or use another run_dir"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by their dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, dict)
        leaves |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return leaves
