"""The train texts with the lowest and the highest weights, as a file to read through.

A row of the file is a text with its label, the mean and sd of its weight, and its id: for a user's
file the row that it comes from, counted from 0. The lowest stand first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bads_ppl.atomic import atomic_path
from bads_ppl.selection import Selection
from inference.folder import TEXTS
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
    rows = np.concatenate([order[:most], order[len(order) - most :]])
    names = np.array(task.class_names)
    table = pd.DataFrame(
        {
            "end": np.repeat(["lowest", "highest"], most),
            "id": selection.ids[rows],
            "label": names[task.train.target.numpy()[rows]],
            "mean": selection.mean[rows],
            "sd": selection.sd[rows],
            "group": selection.columns["group"][rows],
            "text": [task.texts[row] for row in rows],
        }
    )
    if not task.groups:
        table = table.drop(columns="group")
    with atomic_path(folder / TEXTS) as path:
        table.to_csv(path, index=False)
