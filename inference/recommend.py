"""Recommend a model and method from the meta set: `python -m inference.recommend task=mnist10`.

Cross-validation: every candidate runs, shortly, once per fold of the meta set, with the other folds
as its meta set, and is scored by the probabilities that it gives the labels of the points held
out. The test set takes no part. Exit codes as of `inference.run`; 1 if every candidate fails.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from bads_ppl import plots
from bads_ppl.atomic import atomic_path
from bads_ppl.errors import Diverged, InputError, Unstable
from inference.evaluation import measures
from inference.experiment import Experiment, check_settings, load_task, prepare, sample
from inference.folder import Choices
from inference.folds import held_out, meta_folds
from inference.outcome import versions
from inference.recommendation import Recommendation, Scores
from inference.run import compose_run, exit_codes
from inference.scoring import accuracy, predictive
from inference.tasks import Task

CANDIDATES = {
    "normalised": "method=bads model=normalised",
    "joint": "method=bads model=joint impact.weight=20",
    "blo": "method=blo",
    "dup_meta": "method=dup_meta",
    "mixing": "method=mixing",
}
"""The candidates unless others are named: options of `inference.run` by name."""

DEFAULTS = ("steps=1000", "chains=1", "evaluate_every=20", "snapshots=0", "resume=true")
"""Options of all candidates' runs where they differ from `inference.run`; given ones come after."""

OWN = (
    *(option.partition("=")[0] for option in DEFAULTS),
    "burn_in",
    "thinning",
    "run_dir",
    "overwrite",
)
"""Options that are for the comparison, not for the run that is recommended."""

SHARED = ("task", "seed", "split", "data", "fold", "run_dir", "resume", "overwrite")
"""Options that no candidate may have of its own, or their scores could not be compared."""

JSON, CSV, PNG = "recommendation.json", "recommendation.csv", "recommendation.png"


@dataclass(frozen=True)
class Candidate:
    """A candidate's settings for a run on the whole meta set."""

    name: str
    config: DictConfig
    choices: Choices

    def on_fold(self, fold: str, task: Task, root: Path) -> Experiment:
        """Its run on one fold, in a folder of its own below `root`."""
        config = deepcopy(self.config)
        config.fold = fold
        config.run_dir = str(root / self.name / f"fold{fold.replace('/', 'of')}")
        return prepare(config, self.choices, held_out(task, fold, config.seed))


def named_candidates(chosen: Sequence[str], added: Sequence[str]) -> dict[str, str]:
    """Candidates by name: those chosen, or else all of `CANDIDATES`, and those added.

    Args:
        chosen: each a name in `CANDIDATES`, or "name: options".
        added: likewise.

    Raises:
        InputError: for an unknown or repeated name, or fewer than two candidates.
    """
    found: dict[str, str] = {}
    for text in [*(chosen or CANDIDATES), *added]:
        name, colon, options = (part.strip() for part in text.partition(":"))
        if not colon and name not in CANDIDATES:
            close = difflib.get_close_matches(name, CANDIDATES, 1)
            remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(CANDIDATES)}"
            raise InputError(
                f"there is no candidate {name!r}: {remedy} (one of your own is given as 'name: "
                "options', such as 'strict: model=joint impact.weight=60')"
            )
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(
                f"a candidate's name must be of letters, digits, _ and -, got {name!r}: it names a "
                "folder"
            )
        if name in found:
            raise InputError(f"candidates must have names of their own, got {name!r} twice")
        found[name] = options if colon else CANDIDATES[name]
    if len(found) < 2:
        raise InputError(f"a comparison needs at least 2 candidates, got {', '.join(found)}")
    return found


def make_candidates(overrides: Mapping[str, str], options: Sequence[str]) -> list[Candidate]:
    """The candidates' settings: options for all, then their own.

    Raises:
        InputError: for options that there are not, or that a candidate may not have of its own.
    """
    base, _ = compose_run(options, "all candidates")
    found = []
    for name, text in overrides.items():
        config, choices = compose_run(
            [*options, *shlex.split(text)], f"candidate {name!r} ({text})"
        )
        for option in SHARED:
            if _plain(config, option) != _plain(base, option):
                raise InputError(
                    f"candidate {name!r} ({text}) sets {option}, which all candidates must share: "
                    "give it outside of the candidate"
                )
        found.append(Candidate(name, config, choices))
    return found


def _plain(config: DictConfig, option: str) -> Any:
    value = config[option]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def recommend(
    overrides: Mapping[str, str],
    options: Sequence[str] = (),
    *,
    folds: int = 2,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Recommendation, Path]:
    """Compare candidates on the folds of a task's meta set, and write what comes out.

    Args:
        overrides: by candidate, the options of `inference.run` that make it.
        options: options of `inference.run` for all candidates.
        folds: K.
        tell: gets a line for every run that ends.

    Returns:
        The recommendation and the folder with its files, of which the runs are below.

    Raises:
        InputError: for wrong options or data, or folders that hold other runs; before any run.
        Stopped: after SIGINT or SIGTERM, with a checkpoint.
    """
    base, _ = compose_run([*DEFAULTS, *options], "all candidates")
    if base.fold is not None:
        raise InputError(f"fold is what is compared over, got {base.fold}: give folds with --folds")
    check_settings(base)
    task = load_task(base)
    rows = meta_folds(task, folds, base.seed)
    label = base.task.label + ("" if base.split == "test" else f"-{base.split}")
    root = Path(base.run_dir or f"runs/{label}-recommend/seed{base.seed}")
    experiments: dict[str, list[Experiment]] = {}
    failed: dict[str, str] = {}
    for candidate in make_candidates(overrides, [*DEFAULTS, *options]):
        try:
            experiments[candidate.name] = [
                candidate.on_fold(f"{k + 1}/{folds}", task, root) for k in range(folds)
            ]
        except Unstable as error:
            failed[candidate.name] = str(error)
    for name in (JSON, CSV, PNG):  # of other candidates, perhaps
        (root / name).unlink(missing_ok=True)
    scores: dict[str, Scores] = {}
    for name, on_folds in experiments.items():
        try:
            scores[name] = _score(name, on_folds, rows, task.meta.target, tell)
        except (Diverged, Unstable) as error:
            failed[name] = str(error)
    found = Recommendation(scores, failed, dict(overrides))
    _write(found, root, task, rows, base, options)
    return found, root


def _score(
    name: str,
    experiments: Sequence[Experiment],
    rows: Sequence[Tensor],
    target: Tensor,
    tell: Callable[[str], None],
) -> Scores:
    """Run a candidate on every fold; its scores over all points."""
    probability = torch.zeros(len(target), experiments[0].task.classes)
    for k, (experiment, held) in enumerate(zip(experiments, rows, strict=True)):
        chains = sample(experiment.prepared())
        probability[held] = predictive(measures(chains))
        right = accuracy(probability[held], target[held])
        seconds = sum(chain.seconds for chain in chains)
        tell(f"{name}, fold {k + 1} of {len(rows)}: accuracy {right:.4f}, {seconds:.0f} s")
    return Scores.of(probability, target, rows)


def _write(
    found: Recommendation,
    root: Path,
    task: Task,
    rows: Sequence[Tensor],
    base: DictConfig,
    options: Sequence[str],
) -> None:
    fold = torch.zeros(len(task.meta), dtype=torch.int64)
    for k, held in enumerate(rows):
        fold[held] = k + 1
    about = {
        "recommended": found.best,
        "sentence": found.sentence,
        "limits": found.limits,
        "dataset": task.dataset,
        "seed": base.seed,
        "folds": len(rows),
        "options": list(options),
        "candidates": json.loads(found.to_frame().to_json(orient="records", double_precision=15)),
        "points": {
            "id": task.meta.ids.tolist(),
            "label": task.meta.target.tolist(),
            "fold": fold.tolist(),
            "log_loss": {name: one.log_loss.tolist() for name, one in found.scores.items()},
            "unscaled": {name: one.unscaled.tolist() for name, one in found.scores.items()},
            "right": {name: one.right.tolist() for name, one in found.scores.items()},
        },
        "versions": versions(),
        "warnings": list(task.warnings),
    }
    root.mkdir(parents=True, exist_ok=True)  # no run has made it where all were refused
    with atomic_path(root / JSON) as path:
        path.write_text(json.dumps(about, indent=2) + "\n")
    with atomic_path(root / CSV) as path:
        found.to_frame().to_csv(path, index=False)
    if found.scores:
        plots.save(found.figure(), root / PNG)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.recommend",
        description="Recommend a model and method from the meta set alone, by cross-validation.",
        epilog="Folders: runs/<task>-recommend/seed<k>, or run_dir=...; what is there already is "
        "used again (overwrite=true: replaced).",
    )
    parser.add_argument(
        "options", nargs="*", help=f"of inference.run, for all; before them: {' '.join(DEFAULTS)}"
    )
    parser.add_argument("--folds", type=int, default=2, help="of the meta set, default 2")
    listed = "; ".join(f"{name}: {text}" for name, text in CANDIDATES.items())
    parser.add_argument(
        "--candidate",
        action="append",
        default=[],
        metavar="NAME[: OPTIONS]",
        help=f"compare these only, once for each; default: {listed}",
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="NAME: OPTIONS",
        help="a further candidate, such as 'strict: model=joint impact.weight=60'",
    )
    given = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with exit_codes():
        candidates = named_candidates(given.candidate, given.add)
        found, root = recommend(
            candidates, given.options, folds=given.folds, tell=lambda line: print(line, flush=True)
        )
    print(f"\n{found.table()}\n\n{found.sentence}")
    if found.best is None:
        sys.exit(1)
    print(found.limits)
    kept = [option for option in given.options if option.partition("=")[0] not in OWN]
    print(
        f"Run it: python -m inference.run {shlex.join(kept)} {candidates[found.best]}\n"
        f"Files in {root}: {JSON}, {CSV}, {PNG}"
    )


if __name__ == "__main__":
    main()
