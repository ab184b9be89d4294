"""Train, meta and test texts: from the user's files, from Dolly, or sentences made on the spot.

The first that is there is taken, and its name travels with the texts, so that results can say what
they were measured on. Files that are there but damaged stop the search.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bads_ppl.errors import InputError
from inference.sentences import sentences
from inference.text_files import Empty, Texts, read_texts

DOLLY = "dolly_15k.jsonl.gz"
TEST = {"dolly": 2000, "sentences": 400}
"""Texts at the end of an example that are never trained on."""

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Rows of a collection of texts, which an encoder sees as a whole.

    Attributes:
        pool: the collection.
        rows: those of its texts that are meant.
        first_id: id of the first row of its file: collections have ids of their own.
    """

    pool: Texts
    rows: Rows
    first_id: int = 0

    @property
    def ids(self) -> Tensor:
        return torch.tensor([self.first_id + self.pool.ids[row] for row in self.rows])

    @property
    def texts(self) -> list[str]:
        return [self.pool.texts[row] for row in self.rows]

    @property
    def labels(self) -> list[str]:
        return [self.pool.labels[row] for row in self.rows]

    def keep(self, mask: NDArray[np.bool_]) -> Part:
        """The rows where the mask is true."""
        return replace(self, rows=self.rows[mask])

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Sets:
    """Train, meta and test texts.

    Attributes:
        name: where they come from, as recorded in the results.
        train: texts to weight.
        meta: checked texts.
        test: texts to report accuracy on.
        example: whether they are an example, and no user's.
        warnings: what a reader of the results must know.
    """

    name: str
    train: Part
    meta: Part
    test: Part
    example: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Files:
    """A user's files, and how to read them.

    Attributes:
        train: file of noisy texts.
        meta: file of checked texts.
        test: file of test texts; None: a share of the meta set is set aside.
        text: column of the texts.
        label: column of the labels.
        empty: what becomes of rows whose text or label is empty.
        test_share: the share of each class of the meta set that is set aside, in (0, 1).
    """

    train: str | None
    meta: str | None
    test: str | None
    text: str
    label: str
    empty: Empty
    test_share: float

    def __bool__(self) -> bool:
        return any(path is not None for path in (self.train, self.meta, self.test))

    def read(self, split: str, seed: int) -> Sets:
        """The texts of the files; the seed draws which are set aside.

        Raises:
            InputError: if train or meta file is missing, or one cannot be used.
        """
        if self.train is None or self.meta is None:
            lacking = "data.train" if self.train is None else "data.meta"
            raise InputError(
                f"{lacking} is missing: name a file of noisy texts (data.train) and one of "
                "checked texts (data.meta); a file of test texts (data.test) is optional"
            )
        train, meta = self._read(self.train), self._read(self.meta)
        test = None if self.test is None or split == "validation" else self._read(self.test)
        notes = [
            f"{pool.empty} rows of the {name} file have no text or no label and were left out"
            for name, pool in (("train", train), ("meta", meta), ("test", test))
            if pool is not None and pool.empty
        ]
        after_train = max(train.ids) + 1
        whole = Part(meta, np.arange(len(meta)), after_train)
        if test is None:
            kept, aside = _set_aside(whole, set(train.labels), self.test_share, seed)
            known = 196 * (0.16 / max(len(aside), 1)) ** 0.5  # none: refused with the labels
            notes.append(
                f"no test file: {len(aside)} of the {len(whole)} meta texts were set aside to test "
                f"on, so an accuracy of 80 % is known to {known:.0f} points (95 %)"
                if split == "test"
                else f"validation: {len(aside)} of the {len(whole)} meta texts stand in for the "
                "test set"
            )
        else:
            kept = whole
            aside = Part(test, np.arange(len(test)), after_train + max(meta.ids) + 1)
        sets = Sets(Path(self.train).name, Part(train, np.arange(len(train))), kept, aside)
        return replace(sets, warnings=(*notes, *_shared(sets)))

    def _read(self, path: str) -> Texts:
        return read_texts(Path(path), text=self.text, label=self.label, empty=self.empty)


def _set_aside(meta: Part, classes: Collection[str], share: float, seed: int) -> tuple[Part, Part]:
    """The meta set without a share of each of the classes, drawn by the seed, and that share."""
    if not 0 < share < 1:
        raise InputError(f"task.data.test_share must be in (0, 1), got {share}")
    labels = np.array(meta.labels)
    aside, draw = np.zeros(len(meta), bool), generator(seed, "aside")
    for name in sorted(set(meta.labels) & set(classes)):  # others are strays, refused or dropped
        rows = draw.permutation(np.flatnonzero(labels == name))
        if len(rows) < 2:
            raise InputError(
                f"without a test file (data.test) a share of the meta set is tested on, but "
                f"it has one text of class {name!r}: give two at least, or a test file"
            )
        aside[rows[: min(max(round(share * len(rows)), 1), len(rows) - 1)]] = True
    return meta.keep(~aside), meta.keep(aside)


def _shared(sets: Sets) -> list[str]:
    """What to say of texts that stand in two of the sets."""
    train, meta, test = (set(part.texts) for part in (sets.train, sets.meta, sets.test))
    notes = []
    if train & meta:
        notes.append(
            f"{len(train & meta)} texts of the meta set stand in the train set too: the weights "
            "of those were learned with their checked labels at hand"
        )
    if test & (train | meta):
        notes.append(
            f"{len(test & (train | meta))} test texts stand in the train or meta set too: the test "
            "accuracy is too high for texts that were never seen"
        )
    return notes


# -------------------------------------------------------------------------------------- examples


def example(
    root: Path,
    source: str,
    split: str,
    seed: int,
    *,
    meta_per_class: int,
    per_class: int | None,
) -> Sets:
    """Dolly's prompts with their categories, or made sentences in their place.

    The last texts are the test set; with split "validation" a tenth of the others is. The seed
    draws which of the rest are meta and train points.

    Raises:
        InputError: if Dolly is missing where nothing may stand in, it is damaged, or a class has
            too few texts.
    """
    path = root / DOLLY
    notes: tuple[str, ...] = ()
    if source != "generated" and path.is_file():
        name, pool = "dolly", _unique(read_texts(path, text="prompt", label="category"))
    else:
        absent = f"there is no {DOLLY} in {root.absolute()}, and data.train names no file"
        if source == "files":
            raise InputError(
                f"data.source=files, but {absent}: name your own files with data.train and "
                "data.meta, put Dolly there, or use data.source=auto"
            )
        name, pool = "sentences", sentences()
        if source == "auto":
            warnings.warn(
                f"{len(pool)} sentences made on the spot stand in for texts: {absent}. Name your "
                "own with data.train and data.meta; results are recorded under the name "
                "'sentences'.",
                stacklevel=2,
            )
        notes = (
            "dataset is 'sentences', made on the spot from a few patterns: it shows that things "
            "run, and its numbers say nothing about real texts",
        )
    rest = np.arange(len(pool) - TEST[name])
    test = np.arange(len(pool) - TEST[name], len(pool))
    if split == "validation":
        rest, test = rest[: len(rest) * 9 // 10], rest[len(rest) * 9 // 10 :]
    train, meta = _drawn(pool, rest, meta_per_class, per_class, seed, name)
    return Sets(
        name, Part(pool, train), Part(pool, meta), Part(pool, test), example=True, warnings=notes
    )


def _unique(pool: Texts) -> Texts:
    """The collection without texts that stood in it before: none is in two sets."""
    seen: dict[str, int] = {}
    for row, words in enumerate(pool.texts):
        seen.setdefault(words, row)
    rows = list(seen.values())
    return Texts(list(seen), [pool.labels[row] for row in rows], [pool.ids[row] for row in rows])


def _drawn(
    pool: Texts, rest: Rows, meta_per_class: int, per_class: int | None, seed: int, name: str
) -> tuple[Rows, Rows]:
    """Disjoint train and meta rows of `rest`, in order."""
    for knob, value in (
        ("task.meta_per_class", meta_per_class),
        ("task.data.per_class", per_class),
    ):
        if value is not None and value < 1:
            raise InputError(f"{knob} must be at least 1, got {value}")
    labels = np.array(pool.labels)[rest]
    count = Counter(labels.tolist())
    scarce = min(count, key=lambda one: count[one])
    if count[scarce] <= meta_per_class:
        raise InputError(
            f"{name} has {count[scarce]} texts of class {scarce!r} to choose from, got "
            f"task.meta_per_class={meta_per_class}: lower it, so that some are left to train on"
        )
    train, meta = [], []
    draw = generator(seed, "meta")
    for one in sorted(count):
        rows = draw.permutation(rest[labels == one])
        end = None if per_class is None else meta_per_class + per_class
        meta.append(rows[:meta_per_class])
        train.append(rows[meta_per_class:end])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(meta))


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A source of randomness for one purpose, so that what one draws does not move the others."""
    return np.random.default_rng(np.random.SeedSequence([seed, *purpose.encode()]))
