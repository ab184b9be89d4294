"""How like the meta points each train point is, by the embeddings of a network.

Both ways to combine the similarities to many meta points are those of RDS (Ivison et al., 2025):
the largest one, or turns, in which every meta point has as many train points as the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as functional
from numpy.typing import NDArray
from torch import Tensor

from bads_ppl.errors import InputError

APART = -3.0
"""Likeness of points with different labels: below all others, which are in [-2, 2]."""


@dataclass(frozen=True)
class Embedded:
    """Points as a network sees them.

    Attributes:
        vectors: (N, D) embeddings.
        labels: (N,) classes, or None where labels are to play no part.
    """

    vectors: Tensor
    labels: Tensor | None = None


def likeness(
    train: Embedded, meta: Embedded, *, combine: Literal["max", "round_robin"] = "round_robin"
) -> Tensor:
    """A score (N_t,) per train point; more: more like the meta points.

    The likeness of train point i and meta point j is their cosine similarity. With labels it is
    that less i's largest similarity to a meta point of another label, and counts only where the
    labels of i and j are the same.

    Args:
        train: the points to score.
        meta: the points to be like.
        combine: "max": the largest likeness to a meta point. "round_robin": the meta points take
            train points in turns, each the one most like it of those left. The score is the place
            in which a point is taken, from 1 down to 1 / N_t.

    Raises:
        InputError: if embeddings differ in width.
    """
    if train.vectors.ndim != 2 or train.vectors.shape[1:] != meta.vectors.shape[1:]:
        raise InputError(
            "embeddings must be (N, D) with one D for train and meta points, got shapes "
            f"{tuple(train.vectors.shape)} and {tuple(meta.vectors.shape)}"
        )
    size = len(train.vectors)
    best = torch.full((size,), APART)
    if combine == "max":
        for column in _columns(train, meta):
            best = torch.maximum(best, column)
        return best
    lists = []
    for column in _columns(train, meta):
        best = torch.maximum(best, column)
        order = column.argsort(descending=True, stable=True)
        lists.append(order[: int((column > APART).sum())].numpy())
    scores = torch.empty(size)
    scores[_in_turns(lists, best.numpy())] = 1 - torch.arange(size) / size
    return scores


def _in_turns(lists: list[NDArray[np.int64]], best: NDArray[np.float32]) -> NDArray[np.int64]:
    """Places (N,) in the order in which lists take them: each in turn its first that is left.

    Places that are in no list come last, by `best`.
    """
    taken = np.zeros(len(best), bool)
    chosen: list[int] = []
    left = [iter(one.tolist()) for one in lists]
    while left:
        still = []
        for one in left:
            place = next((place for place in one if not taken[place]), None)
            if place is not None:
                taken[place] = True
                chosen.append(place)
                still.append(one)
        left = still
    rest = np.flatnonzero(~taken)
    return np.concatenate([np.array(chosen, int), rest[np.argsort(-best[rest], kind="stable")]])


def _columns(train: Embedded, meta: Embedded) -> Iterator[Tensor]:
    """The likeness (N_t,) of all train points to one meta point after the other."""
    ours, theirs = (functional.normalize(one.vectors.float(), dim=1) for one in (train, meta))
    if train.labels is None or meta.labels is None:
        for vector in theirs:
            yield ours @ vector
        return
    other = torch.full((len(ours),), -1.0)
    for vector, label in zip(theirs, meta.labels, strict=True):
        other = torch.where(train.labels == label, other, other.maximum(ours @ vector))
    for vector, label in zip(theirs, meta.labels, strict=True):
        yield torch.where(train.labels == label, ours @ vector - other, APART)
