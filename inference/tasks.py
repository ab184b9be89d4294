"""Tasks: a train set with trouble in it, a small meta set that is right, and a test set.

`mnist` and `mnist10` plant rare classes into the train set, `mnist10_noise` and `cifar10` wrong
labels, and `mnist10_noisy` both. With the digits that scikit-learn carries in place of MNIST, or
drawn shapes in place of CIFAR-10, they are the same experiments at the size those allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bads_ppl.data import Data, check_disjoint
from bads_ppl.errors import InputError
from bads_ppl.losses import Loss, cross_entropy
from bads_ppl.selection import Selection
from inference.augmentation import crop_and_flip
from inference.cifar import load_cifar10
from inference.scoring import Classes, Ended, Scoring
from inference.sources import ImageSplits, load_mnist


class Deliver(Protocol):
    """Writes files into a run's folder; returns what a reader of the results must know.

    It is given the run's weights, its chains, its results so far and its settings.
    """

    def __call__(
        self,
        folder: Path,
        selection: Selection,
        ended: Sequence[Ended],
        about: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> Sequence[str]: ...


@dataclass(frozen=True)
class Task:
    """Data of an experiment, on the CPU.

    Attributes:
        name: as on the command line.
        dataset: where the points come from, as recorded in the results.
        train: points to weight.
        meta: curated points.
        test: points to report on; never used otherwise.
        classes: number of classes; 0 where points are not classified.
        groups: name to (N_t,) bool mask; disjoint groups of train points.
        high: names of the groups whose weights should be high; those of the others, low.
        sparsity: the share of train points to select unless the user says otherwise.
        right: (N_t,) bool, whether a point is what should be selected, such as one whose label is
            right; None where nothing is known or all are.
        right_means: what `right` says of a point, in words.
        warnings: what a reader of the results must know.
        texts: the N_t train points in words; None where they are no texts.
        class_names: what the classes are called; empty where nothing is known.
        facts: what else the results tell of the data, JSON-able.
        loss: per-example loss.
        network: what a backbone must know beside the number of classes.
        scoring: how the test points are scored.
        columns: further columns of the table of weights, each with N_t values.
        delivery: writes into the run's folder what else its user takes away.
        depends: JSON-able: what networks depend on beside the points and the options of their
            backbone, such as a pretrained model's files; part of the key of proxies.
        probe: largest number of points of each set that a draw's functions of theta are taken at.
    """

    name: str
    dataset: str
    train: Data
    meta: Data
    test: Data
    classes: int
    groups: dict[str, Tensor]
    high: tuple[str, ...]
    sparsity: float
    right: Tensor | None = None
    right_means: str = "label is right"
    warnings: tuple[str, ...] = ()
    texts: Sequence[str] | None = None
    class_names: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    loss: Loss = cross_entropy
    network: Mapping[str, Any] = field(default_factory=dict)
    scoring: Scoring = field(default_factory=Classes)
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    delivery: Deliver | None = None
    depends: Mapping[str, Any] = field(default_factory=dict)
    probe: int = 512

    def __post_init__(self) -> None:
        check_disjoint(self.train, self.meta)
        self.scoring.check(self.test, self.meta)
        if self.texts is not None and len(self.texts) != len(self.train):
            raise InputError(
                f"a task must have one text per train point, got {len(self.texts)} texts for "
                f"{len(self.train)} points"
            )
        for name, values in self.columns.items():
            if len(values) != len(self.train):
                raise InputError(
                    f"column {name!r} must have one value per train point, got {len(values)} for "
                    f"{len(self.train)} points"
                )

    @property
    def shape(self) -> Mapping[str, Any]:
        """What a backbone is built with."""
        return {"classes": self.classes, **self.network} if self.classes else self.network

    def to(self, device: torch.device) -> Task:
        """The task with its sets on a device."""
        sets = {name: getattr(self, name).to(device) for name in ("train", "meta", "test")}
        return replace(self, **sets)

    @property
    def labels(self) -> list[str] | None:
        """What the label of each train point is called; None where that is unknown."""
        if not self.class_names:
            return None
        return [self.class_names[k] for k in self.train.target.tolist()]

    @property
    def examples(self) -> Sequence[str] | None:
        """The train points in words, each with its label first: what one would train on."""
        if self.texts is None or self.labels is None:
            return self.texts
        pairs = zip(self.labels, self.texts, strict=True)
        return [f"Label: {name}\n{text}" for name, text in pairs]


def mnist(
    *,
    root: str,
    source: str,
    seed: int,
    split: str = "test",
    meta_per_class: int = 25,
    frequent: int = 4975,
    rare: int = 25,
) -> Task:
    """Four against nine: `frequent` nines and `rare` fours to train on (the paper's balancing).

    Labels are 0 for four and 1 for nine. The seed draws which images are used.
    """
    splits = load_mnist(Path(root), source).scored_on(split)
    return _balancing(
        "mnist",
        splits,
        {4: rare, 9: frequent},
        rare_classes=(4,),
        meta_per_class=meta_per_class,
        seed=seed,
        select=1,
    )


def mnist10(
    *,
    root: str,
    source: str,
    seed: int,
    split: str = "test",
    meta_per_class: int = 10,
    frequent: int = 2000,
    rare: int = 20,
) -> Task:
    """Ten classes, of which the even digits have `rare` train points and the odd `frequent`."""
    splits = load_mnist(Path(root), source).scored_on(split)
    counts = {digit: rare if digit % 2 == 0 else frequent for digit in range(10)}
    return _balancing(
        "mnist10",
        splits,
        counts,
        rare_classes=(0, 2, 4, 6, 8),
        meta_per_class=meta_per_class,
        seed=seed,
        select=2,
    )


def mnist10_noise(
    *,
    root: str,
    source: str,
    seed: int,
    split: str = "test",
    meta_per_class: int = 10,
    per_class: int = 1000,
    noise: float = 0.6,
) -> Task:
    """Ten classes of `per_class` train points, a share `noise` of whose labels is wrong."""
    splits = load_mnist(Path(root), source).scored_on(split)
    counts = dict.fromkeys(range(10), per_class)
    task = _balancing(
        "mnist10_noise",
        splits,
        counts,
        rare_classes=(),
        meta_per_class=meta_per_class,
        seed=seed,
        select=1,
        knobs="task.per_class",
    )
    task = mislabelled(task, noise, seed)
    assert task.right is not None
    groups = {"right": task.right, "wrong": ~task.right}
    return replace(task, groups=groups, high=("right",), sparsity=1 - noise)


def mnist10_noisy(
    *,
    root: str,
    source: str,
    seed: int,
    split: str = "test",
    meta_per_class: int = 10,
    frequent: int = 2000,
    rare: int = 100,
    noise: float = 0.4,
) -> Task:
    """Ten classes, the even digits rare, and a share `noise` of all train labels wrong.

    A point is of a rare class if its image is, whatever its label.
    """
    splits = load_mnist(Path(root), source).scored_on(split)
    counts = {digit: rare if digit % 2 == 0 else frequent for digit in range(10)}
    task = _balancing(
        "mnist10_noisy",
        splits,
        counts,
        rare_classes=(0, 2, 4, 6, 8),
        meta_per_class=meta_per_class,
        seed=seed,
        select=2,
    )
    task = mislabelled(task, noise, seed)
    assert task.right is not None
    groups = {f"{name}_right": mask & task.right for name, mask in task.groups.items()}
    groups["wrong"] = ~task.right
    return replace(task, groups=groups, high=("rare_right", "frequent_right"))


def cifar10(
    *,
    root: str,
    source: str,
    seed: int,
    split: str = "test",
    meta_per_class: int = 100,
    per_class: int = 1000,
    noise: float = 0.5,
    kind: Literal["symmetric", "asymmetric"] = "symmetric",
    augment: bool = True,
) -> Task:
    """Ten classes of colour images, a share `noise` of whose train labels is wrong.

    The share to select is half of that of the right labels: fewer are surer, and weights part more.
    Steps are made on random crops and mirror images of train and meta points, unless `augment`
    is false.

    "asymmetric" noise makes truck automobile, bird airplane, deer horse, and cat and dog each
    other, a share `noise` of each of these classes (Patrini et al., 2017).
    """
    splits = load_cifar10(Path(root), source).scored_on(split)
    _check_sizes(meta_per_class, {0: per_class}, "task.per_class")
    warnings: tuple[str, ...] = ()
    if splits.name != "cifar10":
        warnings = (
            f"dataset is {splits.name!r}, not CIFAR-10: its numbers cannot be compared with "
            "CIFAR-10's",
        )
        have = int(splits.train_labels.bincount(minlength=10).min()) - meta_per_class
        per_class = min(per_class, max(have, 1))
    counts = dict.fromkeys(range(10), per_class)
    chosen = _chosen("cifar10", splits, counts, meta_per_class, seed, "task.per_class", "class")
    train_index = torch.from_numpy(np.sort(np.concatenate(chosen.train)))
    meta_index = torch.from_numpy(np.sort(np.concatenate(chosen.meta)))

    def data(images: Tensor, labels: Tensor, index: Tensor, what: str) -> Data:
        views = crop_and_flip if augment and what != "test" else None
        return Data(normalise_colour(images[index]), labels[index], index, name=what, augment=views)

    everything = torch.arange(len(splits.test_labels))
    task = Task(
        "cifar10",
        splits.name,
        data(splits.train_images, splits.train_labels, train_index, "train"),
        data(splits.train_images, splits.train_labels, meta_index, "meta"),
        data(splits.test_images, splits.test_labels, everything, "test"),
        10,
        {},
        ("clean",),
        1 - noise,
        warnings=warnings,
    )
    task = mislabelled(task, noise, seed, ASYMMETRIC if kind == "asymmetric" else None)
    assert task.right is not None
    share = float(task.right.double().mean())
    groups = {"clean": task.right, "noisy": ~task.right}
    return replace(task, groups=groups, sparsity=share / 2)


ASYMMETRIC = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
"""Classes of CIFAR-10 and those that they are taken for."""


def mislabelled(
    task: Task, noise: float, seed: int, taken_for: dict[int, int] | None = None
) -> Task:
    """The task with a share `noise` of the train labels, drawn by the seed, replaced by another.

    Symmetric noise, floor(noise N_t) labels, makes all other classes equally likely; with
    `taken_for` it is floor(noise n) labels of each class that it names, which become the class it
    names. Meta and test labels stay right.

    Raises:
        InputError: if `noise` is not in [0, 1).
    """
    if not 0 <= noise < 1:
        raise InputError(
            f"task.noise must be in [0, 1), got {noise}: the share of train labels to replace"
        )
    draw = np.random.default_rng(np.random.SeedSequence([seed, 0x776C]))
    target = task.train.target.clone()

    def some(rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(draw.permutation(rows)[: int(len(rows) * noise + 1e-9)])

    if taken_for is None:
        chosen = some(np.arange(len(target)))
        shift = torch.from_numpy(draw.integers(1, task.classes, len(chosen)))
        target[chosen] = (target[chosen] + shift) % task.classes
    else:
        for true, other in taken_for.items():
            target[some(np.flatnonzero(task.train.target.numpy() == true))] = other
    right = target == task.train.target
    train = Data(task.train.input, target, task.train.ids, name="train", augment=task.train.augment)
    return replace(task, train=train, right=right)


def _balancing(
    name: str,
    splits: ImageSplits,
    counts: dict[int, int],
    *,
    rare_classes: Sequence[int],
    meta_per_class: int,
    seed: int,
    select: int,
    knobs: str = "task.rare or task.frequent",
) -> Task:
    """The task that plants rare classes; selects `select` times as many points as are rare."""
    digits = sorted(counts)
    _check_sizes(meta_per_class, counts, knobs)
    warnings: tuple[str, ...] = ()
    if splits.name != "mnist":
        warnings = (
            f"dataset is {splits.name!r}, not MNIST: its numbers cannot be compared with MNIST's",
        )
        counts = _scaled(counts, splits, meta_per_class)
    chosen = _chosen(name, splits, counts, meta_per_class, seed, knobs, "digit")
    train_rows = np.concatenate(chosen.train)
    rare = np.concatenate([np.full(counts[digit], digit in rare_classes) for digit in digits])
    # In the order of the source, so that neither rows nor ids tell the groups apart.
    position = np.argsort(train_rows)
    is_rare = torch.from_numpy(rare[position])
    train_index = torch.from_numpy(train_rows[position])
    meta_index = torch.from_numpy(np.sort(np.concatenate(chosen.meta)))
    test_index = torch.nonzero(torch.isin(splits.test_labels, torch.tensor(digits))).flatten()
    new_label = torch.full((10,), -1)
    new_label[digits] = torch.arange(len(digits))

    def data(images: Tensor, labels: Tensor, index: Tensor, what: str) -> Data:
        return Data(normalise(images[index]), new_label[labels[index]], index, name=what)

    return Task(
        name,
        splits.name,
        data(splits.train_images, splits.train_labels, train_index, "train"),
        data(splits.train_images, splits.train_labels, meta_index, "meta"),
        data(splits.test_images, splits.test_labels, test_index, "test"),
        len(digits),
        {"rare": is_rare, "frequent": ~is_rare},
        ("rare",),
        select * int(is_rare.sum()) / len(is_rare),
        warnings=warnings,
    )


def _check_sizes(meta_per_class: int, counts: dict[int, int], knobs: str) -> None:
    asked = [("task.meta_per_class", meta_per_class), *((knobs, n) for n in counts.values())]
    for knob, value in asked:
        if value < 1:
            raise InputError(f"{knob} must be at least 1, got {value}")


class _Chosen(NamedTuple):
    """Rows of the source by class."""

    train: list[NDArray[np.int64]]
    meta: list[NDArray[np.int64]]


def _chosen(
    name: str,
    splits: ImageSplits,
    counts: dict[int, int],
    meta_per_class: int,
    seed: int,
    knobs: str,
    word: str,
) -> _Chosen:
    """Disjoint rows for the meta set and, `counts` by class, to train on; drawn by the seed."""
    order = np.random.default_rng(np.random.SeedSequence([seed, 0x6D6E]))
    chosen = _Chosen([], [])
    for label in sorted(counts):
        rows = torch.nonzero(splits.train_labels == label).flatten().numpy()
        needed = meta_per_class + counts[label]
        if needed > len(rows):
            raise InputError(
                f"task {name} needs {needed} train images of {word} {label} ({counts[label]} to "
                f"train on and {meta_per_class} for the meta set), {splits.name} has {len(rows)}: "
                f"lower task.meta_per_class or {knobs}"
            )
        rows = order.permutation(rows)[:needed]
        chosen.meta.append(rows[:meta_per_class])
        chosen.train.append(rows[meta_per_class:])
    return chosen


def _scaled(counts: dict[int, int], splits: ImageSplits, meta_per_class: int) -> dict[int, int]:
    """The same imbalance at the size that a smaller source allows, rare classes of 5 at least."""
    have = {d: int((splits.train_labels == d).sum()) - meta_per_class for d in counts}
    factor = min([1.0] + [have[d] / n for d, n in counts.items()])
    return {d: max(int(n * factor), min(n, 5)) for d, n in counts.items()}


def normalise(images: Tensor) -> Tensor:
    """uint8 images (N, 28, 28) to float (N, 1, 28, 28) with MNIST's mean 0 and sd 1."""
    return ((images.float() / 255 - 0.1307) / 0.3081).unsqueeze(1)


def normalise_colour(images: Tensor) -> Tensor:
    """uint8 images (N, 32, 32, 3) to float (N, 3, 32, 32) with CIFAR-10's mean 0 and sd 1."""
    mean, sd = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    return ((images.float() / 255 - mean) / sd).permute(0, 3, 1, 2).contiguous()
