"""Run an experiment: `python -m inference.run task=mnist method=bads seed=0`.

Hydra reads `inference/configs`: `--help` explains each knob, `--cfg job` prints all settings, `-m`
runs several (`-m seed=0,1,2 method=bads,mixing`). Exit codes: 0 done, 2 (or Hydra's own 1) wrong
input, 1 anything else, 130 or 143 stopped by a signal with a checkpoint.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from bads_ppl.errors import Diverged, InputError, RanksError, Stopped
from bads_ppl.ranks import ALONE, Ranks
from inference.experiment import prepare, sample
from inference.folder import Choices
from inference.options import Schema
from inference.outcome import report
from inference.processes import joined

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"


def task_label(name: str, value: Any, default: Any) -> str:
    """Folder of a task below runs/: its name, with the meta points per class unless default."""
    return name if value == default else f"{name}-{value}"


def file_label(name: str, path: str | None) -> str:
    """Folder of a task of the user's files: its name, with that of the train file."""
    return name if path is None else f"{name}-{Path(path).name.partition('.')[0]}"


def share(of: int, part: float) -> int:
    """A part of a number of steps, at least 1."""
    return max(1, round(of * part))


ConfigStore.instance().store("schema", Schema)
OmegaConf.register_new_resolver("task_label", task_label, replace=True)
OmegaConf.register_new_resolver("file_label", file_label, replace=True)
OmegaConf.register_new_resolver("share", share, replace=True)


def compose_run(options: Sequence[str], who: str) -> tuple[DictConfig, Choices]:
    """The settings that `inference.run` would have with these options.

    Raises:
        InputError: if they do not parse, or there are no such options.
    """
    try:
        with initialize_config_dir(str(CONFIGS.absolute()), version_base="1.3"):
            config = compose("config", list(options), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise InputError(f"the options of {who} do not fit: {reason}") from error
    choices = _choices(config.hydra.runtime.choices)
    with open_dict(config):
        del config.hydra
    return config, choices


def run(config: DictConfig, choices: Choices, ranks: Ranks = ALONE) -> dict[str, Any] | None:
    """Run one experiment and write its folder; returns what stands in results.json.

    Args:
        config: all settings.
        choices: what they were chosen by.
        ranks: the processes that run it together. The first makes what is kept in the cache,
            before the others read it, and writes the folder; the others return None.

    Raises:
        InputError: for wrong settings or data, or a folder that holds another run.
        Diverged: if a chain diverges.
        Stopped: after SIGINT or SIGTERM, with a checkpoint.
        RanksError: if another of the processes ends.
    """
    experiment = ranks.in_turn(lambda: prepare(config, choices, ranks=ranks).prepared())
    for note in experiment.task.warnings:
        log.warning("%s", note)
    chains = sample(experiment)
    results = report(experiment, chains) if ranks.first else None
    ranks.wait()
    return results


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns the errors of a run into a message and an exit code, and warnings into one line."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        yield
    except InputError as error:
        _exit(error, 2)
    except Stopped as stopped:
        _exit(stopped, 128 + stopped.signum)
    except (Diverged, RanksError, OSError) as error:
        _exit(error, 1)
    except KeyboardInterrupt:  # while data are read or results written
        _exit("stopped by SIGINT: run again with resume=true to continue", 130)


@hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    """Run one experiment and print its main numbers."""
    with exit_codes():
        ranks = joined(config)
        try:
            results = run(config, _choices(HydraConfig.get().runtime.choices), ranks)
        except Stopped:  # in all processes alike; where one fails, the others may hang in leaving
            ranks.leave()
            raise
        ranks.leave()
    if results is None:
        return
    groups = ", ".join(f"{n} {g['mean_weight']:.4f}" for n, g in results["groups"].items())
    name, value = next(iter(results["test"].items()))
    print(
        f"{results['task']} ({results['dataset']}) {results['method']}: "
        f"test {name} {value:.4f}; mean weight {groups}; "
        f"{results['cost']['seconds']:.0f} s; results in {results['run_dir']}"
    )


def _choices(chosen: Mapping[str, str]) -> Choices:
    return Choices(**{name: chosen[name] for name in Choices.__dataclass_fields__})


def _exit(error: BaseException | str, code: int) -> None:
    rank = os.environ.get("RANK", "0")
    who = "error" if rank == "0" else f"error (process {rank})"
    print(f"{who}: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
