"""Folds of the meta set: what a user has for choosing a model who has no labelled test set.

A fold of a task holds some meta points back as the points to score on, and leaves the others as
the meta set. The test set does not take part.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bads_ppl.errors import InputError
from inference.tasks import Task


def fold_rows(target: Tensor, folds: int, seed: int) -> list[Tensor]:
    """Rows of the meta set by fold: disjoint, together all of them, every class in every fold.

    Args:
        target: (N_m,) class labels.
        folds: K, from 2 to the number of points of the smallest class.
        seed: draws the folds.

    Returns:
        K tensors of ascending rows; the counts of a class differ by at most one between folds.

    Raises:
        InputError: if a class has fewer than 2 points, or K does not fit.
    """
    from sklearn.model_selection import StratifiedKFold

    classes, counts = target.unique(return_counts=True)
    smallest, label = int(counts.min()), int(classes[counts.argmin()])
    if smallest < 2:
        raise InputError(
            f"the meta set has 1 point of class {label}, folds need at least 2 of every class: "
            "add points of that class (task.meta_per_class)"
        )
    if not 2 <= folds <= smallest:
        raise InputError(
            f"folds must be from 2 to {smallest}, the number of meta points of class {label}, got "
            f"{folds}: every fold needs a point of every class"
        )
    draw = int(np.random.SeedSequence([seed, 0x666F]).generate_state(1)[0])
    split = StratifiedKFold(folds, shuffle=True, random_state=draw)
    labels = target.numpy()
    return [torch.from_numpy(rows) for _, rows in split.split(labels, labels)]


def meta_folds(task: Task, folds: int, seed: int) -> list[Tensor]:
    """`fold_rows` of a task's meta set.

    Raises:
        InputError: likewise, and for tasks that write texts.
    """
    if not task.classes:
        raise InputError(
            f"folds of the meta set are for tasks with classes, and task {task.name} writes texts: "
            "compare runs on split=validation"
        )
    return fold_rows(task.meta.target, folds, seed)


def held_out(task: Task, fold: str, seed: int) -> Task:
    """The task with one fold of its meta points to score on, in place of the test set.

    Args:
        task: the whole task.
        fold: "k/K", the k-th of K folds, counted from 1.
        seed: draws the folds.

    Raises:
        InputError: if `fold` is not of that form, or the meta set cannot be split so.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", fold)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"fold must be k/K with k from 1 to K, such as 1/2, got {fold!r}")
    number, folds = int(match[1]), int(match[2])
    rows = meta_folds(task, folds, seed)[number - 1]
    rest = torch.ones(len(task.meta), dtype=torch.bool)
    rest[rows] = False
    return replace(
        task,
        dataset=f"{task.dataset}, meta fold {fold}",
        meta=task.meta.subset(rest.nonzero()[:, 0]),
        test=task.meta.subset(rows, name="test"),
    )
