"""Texts of a run to read through: the train texts with extreme weights, and those it wrote.

A row of the file is a text with its label, the mean and sd of its weight, and its id: for a user's
file the row that it comes from, counted from 0. The lowest stand first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bads_ppl.atomic import atomic_path
from bads_ppl.selection import Selection
from inference.folder import SAMPLES, TEXTS
from inference.tasks import Task

MOST = 100
"""Texts at either end."""


def write_extremes(
    folder: Path, task: Task, selection: Selection, order_by: NDArray[np.floating]
) -> None:
    """Write the texts at both ends of the order into the run's folder.

    Args:
        folder: the run's folder.
        task: a task of texts.
        selection: its N_t points, in order.
        order_by: (N_t,) what decides which are lowest and highest: the mean weights, or scores.
    """
    assert task.texts is not None
    order = np.argsort(order_by, kind="stable")
    most = min(MOST, len(order) // 2)
    labels = task.labels
    rows = np.concatenate([order[:most], order[len(order) - most :]])
    table = pd.DataFrame(
        {
            "end": np.repeat(["lowest", "highest"], most),
            "id": selection.ids[rows],
            "label": ["" if labels is None else labels[row] for row in rows],
            "mean": selection.mean[rows],
            "sd": selection.sd[rows],
            "group": selection.columns["group"][rows],
            "text": [task.texts[row] for row in rows],
        }
    )
    table = table.drop(columns=[] if task.groups else "group")
    table = table.drop(columns=[] if labels is not None else "label")
    with atomic_path(folder / TEXTS) as path:
        table.to_csv(path, index=False)


def write_samples(folder: Path, samples: Sequence[dict[str, str]]) -> None:
    """Write texts that a network wrote into the run's folder, each beside its source."""
    with atomic_path(folder / SAMPLES) as path:
        pd.DataFrame(samples).to_csv(path, index=False)
