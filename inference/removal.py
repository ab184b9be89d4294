"""What removing low-weighted points does: `python -m inference.removal RUN_DIR`.

The network of a finished run is trained anew, plainly (`method=mixing`: every point that is left
once, and the meta set), without the share of the train set that has the lowest weights. If the
weights are right, removing the worst points helps or does no harm for longer than removing points
at random does. Where it is known which labels are wrong, removing those first is the best that
weights could do. Writes removal.csv and removal.png into the run's folder; each network is kept
below it, so that an interrupted curve continues.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from bads_ppl import plots
from bads_ppl.atomic import atomic_path
from bads_ppl.errors import InputError
from bads_ppl.selection import Selection
from inference.evaluation import on_test_set
from inference.experiment import load_task, prepare, sample
from inference.folder import Choices, settings
from inference.run import compose_run, exit_codes
from inference.scores import content_key
from inference.tasks import Task

log = logging.getLogger(__name__)

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CSV, PNG, FOLDER = "removal.csv", "removal.png", "removal"
COLOURS = {
    "lowest weights": plots.HIGH[0],
    "random": plots.INK,
    "wrong labels, then random": plots.LOW[0],
}


@dataclass(frozen=True)
class Removal:
    """A finished run, and how networks are trained without some of its points.

    Attributes:
        folder: the run's.
        config: settings of the trainings.
        choices: what they were chosen by.
        task: the run's data.
        orders: name to rows (N_t,) in the order in which they are removed.
    """

    folder: Path
    config: DictConfig
    choices: Choices
    task: Task
    orders: dict[str, NDArray[np.int64]]

    def accuracies(self, order: str, share: float) -> list[float]:
        """Test accuracies, one per network trained without the first `share` of an order."""
        count = round(share * len(self.task.train))
        kept = torch.from_numpy(np.sort(self.orders[order][count:]))
        config = deepcopy(self.config)
        name = "all" if count == 0 else f"{order.replace(', ', '-').replace(' ', '-')}-{count}"
        # Other points or settings have another folder.
        what = {"kept": kept.tolist(), "steps": config.steps, "settings": settings(config)}
        config.run_dir = str(self.folder / FOLDER / f"{name}-{content_key(what)}")
        for batch, size in (("train_batch", len(kept)), ("meta_batch", len(self.task.meta))):
            if config.sampler[batch] is not None:
                config.sampler[batch] = min(config.sampler[batch], size)
        chains = sample(prepare(config, self.choices, _subset(self.task, kept)))
        return [on_test_set(self.task, [chain]).numbers["accuracy"] for chain in chains]


def _subset(task: Task, rows: torch.Tensor) -> Task:
    """The task with these train points alone."""
    return replace(
        task,
        train=task.train.subset(rows),
        groups={name: mask[rows] for name, mask in task.groups.items()},
        right=None if task.right is None else task.right[rows],
        texts=None if task.texts is None else [task.texts[row] for row in rows.tolist()],
    )


def read_removal(folder: Path, *, steps: int | None = None, networks: int = 2) -> Removal:
    """What is needed to remove points of a finished run.

    Args:
        folder: the run's.
        steps: of each training; None: as many as the run's chains have.
        networks: trained for each point of the curve.

    Raises:
        InputError: if there is no finished run, its weights are those of other points or all the
            same, or the data have changed.
    """
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        config = OmegaConf.load(folder / "config.yaml")
        names = {name: str(results[name]) for name in ("task", "preset", "sampler")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} holds no finished run ({error}): give the folder with its results.json, or "
            "finish the run with resume=true"
        ) from error
    plain, choices = compose_run([f"task={names['task']}", "method=mixing"], "the trainings")
    try:
        with open_dict(
            plain
        ):  # options that there were not yet when the run was made have defaults
            config = OmegaConf.merge(plain, config)
    except OmegaConfBaseException as error:
        raise InputError(
            f"{folder / 'config.yaml'} does not fit the options that there are now "
            f"({' '.join(str(error).split())}): run it again with overwrite=true"
        ) from error
    assert isinstance(config, DictConfig)
    config.method, config.chains, config.workers = plain.method, networks, None
    config.resume, config.overwrite, config.snapshots = True, False, 0
    if steps is not None:
        config.steps, config.burn_in, config.evaluate_every = steps, None, None
        config.thinning = max(1, min(config.thinning, steps // 2))
    task = load_task(config)
    if not task.classes:
        raise InputError(
            f"points are removed for tasks with classes, and task {task.name} writes texts: "
            "compare runs with method=random_select and others at several values of sparsity"
        )
    selection = Selection.from_parquet(folder / "weights.parquet")
    if not np.array_equal(selection.ids, task.train.ids.numpy()):
        raise InputError(
            f"the weights in {folder} are those of {len(selection.ids)} other points than the "
            f"{len(task.train)} that its settings give now: data.root holds other data than then; "
            "point it (BADS_DATA) to those of the run"
        )
    value = selection.columns.get("score", selection.mean)
    if float(np.ptp(value)) == 0:
        raise InputError(
            f"all weights in {folder} are {value[0]:g}, so there is no order to remove points in: "
            "give a run whose method finds weights, such as method=bads"
        )
    draw = np.random.default_rng(np.random.SeedSequence([config.seed, 0x7265]))
    chance = draw.permutation(len(value))
    orders = {"lowest weights": chance[np.argsort(value[chance], kind="stable")], "random": chance}
    if task.right is not None and not bool(task.right.all()):
        right = task.right.numpy()[chance]
        orders["wrong labels, then random"] = chance[np.argsort(right, kind="stable")]
    return Removal(folder, config, replace(choices, **names), task, orders)


def curve(removal: Removal, shares: Sequence[float]) -> pd.DataFrame:
    """Accuracy over the share removed: one row per order, share and network.

    Raises:
        InputError: for a share outside of [0, 1), or one that leaves fewer than 2 points.
    """
    size = len(removal.task.train)
    for share in shares:
        if not 0 <= share < 1 or size - round(share * size) < 2:
            raise InputError(
                f"shares must be in [0, 1) and leave 2 points at least, got {share} of {size} "
                "points: 0.5 removes half of them"
            )
    right = removal.task.right
    wrong = np.zeros(size, bool) if right is None else ~right.numpy()
    rows = []
    for share in sorted(set(shares)):
        for order, points in removal.orders.items():
            left = points[round(share * size) :]
            for network, accuracy in enumerate(removal.accuracies(order, share)):
                row = {"order": order, "share": share, "network": network, "accuracy": accuracy}
                rows.append(row | {"points": len(left), "wrong": int(wrong[left].sum())})
        log.info("without %.0f %%: %s", 100 * share, _summary(rows, share))
    return pd.DataFrame(rows)


def _summary(rows: Sequence[dict[str, object]], share: float) -> str:
    table = pd.DataFrame(rows)
    means = table[table.share == share].groupby("order", sort=False).accuracy.mean()
    return ", ".join(f"{order} {mean:.4f}" for order, mean in means.items())


def draw(table: pd.DataFrame) -> Figure:
    """Mean accuracy over the share removed, with the band from lowest to highest network."""
    figure, axes = plots.empty_figure("Retrained without some train points", "test accuracy")
    for order, one in table.groupby("order", sort=False):
        found = one.groupby("share").accuracy
        colour = COLOURS[str(order)]
        axes.fill_between(
            found.mean().index, found.min(), found.max(), color=colour, alpha=0.18, linewidth=0
        )
        axes.plot(found.mean(), color=colour, marker="o", markersize=4, label=order)
    axes.set_xlabel("share of the train set removed")
    axes.xaxis.set_major_formatter(plots.PERCENT)
    axes.yaxis.set_major_formatter(plots.PERCENT)
    count = table.network.nunique()
    note = "one network each" if count == 1 else f"{count} networks; band: all of them"
    axes.set_title(note, loc="right", size=8)
    axes.legend(frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit codes as of `inference.run`."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.removal",
        description="Accuracy of a run's network, trained anew without the lowest-weighted points.",
    )
    parser.add_argument("run", type=Path, help="a finished run's folder")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="in [0, 1)")
    parser.add_argument("--networks", type=int, default=2, help="per point of the curve")
    parser.add_argument("--steps", type=int, help="of each training; default as the run's")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_codes():
        removal = read_removal(options.run, steps=options.steps, networks=options.networks)
        table = curve(removal, options.shares)
        with atomic_path(options.run / CSV) as temporary:
            table.to_csv(temporary, index=False)
        plots.save(draw(table), options.run / PNG)
        print(f"{options.run / CSV} and {PNG}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
