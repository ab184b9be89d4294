"""The sizes and groups of the tasks, which points the seed draws, and what a task refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from inference.tasks import Task, mnist, mnist10, mnist10_noise, mnist10_noisy, normalise

MNIST = os.environ.get("BADS_DATA", "")
with_mnist = pytest.mark.skipif(
    not (MNIST and Path(MNIST, "MNIST").is_dir()),
    reason="BADS_DATA names no folder with MNIST",
)

TASKS = [mnist, mnist10]


def digits(make: Callable[..., Task], seed: int = 0, **options: float) -> Task:
    return make(root="none", source="digits", seed=seed, **options)


@pytest.mark.parametrize("make", TASKS)
def test_validation_scores_on_train_images_that_nothing_else_uses(make, tmp_path):
    labels = np.random.default_rng(0).integers(0, 10, 600)
    write_mnist(tmp_path / "raw", labels, np.arange(10).repeat(5))
    root = str(tmp_path / "raw")
    task = make(
        root=root, source="files", seed=0, split="validation", meta_per_class=2, frequent=9, rare=3
    )
    used = torch.cat([task.train.ids, task.meta.ids])
    assert used.max() < 540 and task.test.ids.max() < 60
    number = task.test.input[:, 0, 0, :2] * 0.3081 + 0.1307  # written as quotient and remainder
    shown = (number * 255).round().long() @ torch.tensor([256, 1])
    assert torch.equal(shown, task.test.ids + 540)


@pytest.mark.parametrize(("make", "noise"), [(mnist10_noise, 0.6), (mnist10_noisy, 0.4)])
def test_wrong_labels_are_those_that_differ_from_the_source(make, noise):
    task, clean = digits(make), digits(make, noise=0.0)
    assert torch.equal(task.train.ids, clean.train.ids)
    assert torch.equal(task.right, task.train.target == clean.train.target)
    assert int((~task.right).sum()) == int(noise * len(task.train))
    assert torch.equal(task.meta.target, clean.meta.target) and bool(clean.right.all())
    assert torch.equal(task.groups["wrong"], ~task.right)
    assert torch.stack(list(task.groups.values())).sum(0).eq(1).all()  # groups part the set


def test_all_other_classes_are_equally_likely_as_wrong_labels():
    task, clean = digits(mnist10_noise, noise=0.9), digits(mnist10_noise, noise=0.0)
    shift = (task.train.target - clean.train.target)[~task.right] % 10
    count = torch.bincount(shift, minlength=10)
    expected = len(shift) / 9
    chi_square = float(((count[1:] - expected) ** 2 / expected).sum())
    assert count[0] == 0 and chi_square < 26.1  # 99.9 % of chi-square with 8 degrees of freedom


def test_noisy_keeps_the_rare_classes_of_the_images_and_noise_selects_the_right_share():
    noisy, plain = digits(mnist10_noisy, noise=0.0), digits(mnist10_noise)
    assert set(noisy.train.target[noisy.groups["rare_right"]].tolist()) == {0, 2, 4, 6, 8}
    assert noisy.sparsity == 2 * int(noisy.groups["rare_right"].sum()) / len(noisy.train)
    assert noisy.high == ("rare_right", "frequent_right")
    assert plain.sparsity == pytest.approx(0.4) and plain.high == ("right",)


@pytest.mark.parametrize("noise", [-0.1, 1.0, float("nan")])
def test_a_share_of_noise_outside_its_range_is_refused(noise):
    with pytest.raises(InputError, match=r"task.noise must be in \[0, 1\), got"):
        digits(mnist10_noisy, noise=noise)


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="split must be one of test, validation, got 'dev'"):
        mnist(root="none", source="digits", seed=0, split="dev")


def idx(values: np.ndarray) -> bytes:
    sizes = np.array(values.shape, ">u4").tobytes()
    return bytes((0, 0, 8, values.ndim)) + sizes + values.astype(np.uint8).tobytes()


def write_mnist(folder: Path, train_labels: np.ndarray, test_labels: np.ndarray) -> None:
    """A tiny MNIST whose every image carries its own number in its first pixels."""
    folder.mkdir()
    for split, labels in (("train", train_labels), ("t10k", test_labels)):
        images = np.zeros((len(labels), 28, 28), np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.arange(len(labels)) // 256, np.arange(len(labels))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))


@pytest.mark.parametrize("make", TASKS)
def test_train_and_meta_are_disjoint_and_groups_part_the_train_set(make):
    task = digits(make)
    assert not set(task.train.ids.tolist()) & set(task.meta.ids.tolist())
    assert len(task.train.ids.unique()) == len(task.train)
    assert torch.equal(task.groups["rare"], ~task.groups["frequent"])
    assert set(task.groups) == {"rare", "frequent"} and task.high == ("rare",)


@pytest.mark.parametrize("make", TASKS)
def test_the_seed_draws_the_points_and_nothing_else_does(make):
    first, again, other = digits(make), digits(make), digits(make, seed=1)
    for name in ("train", "meta"):
        assert torch.equal(getattr(first, name).ids, getattr(again, name).ids)
        assert torch.equal(getattr(first, name).input, getattr(again, name).input)
        assert not torch.equal(getattr(first, name).ids, getattr(other, name).ids)
    assert torch.equal(first.test.ids, other.test.ids)


@pytest.mark.parametrize("make", TASKS)
def test_an_id_names_the_same_image_whatever_the_seed(make):
    first, other = digits(make), digits(make, seed=1)
    places = {int(i): row for row, i in enumerate(first.train.ids)}
    shared = [(places[int(i)], row) for row, i in enumerate(other.train.ids) if int(i) in places]
    assert shared
    for mine, theirs in shared:
        assert torch.equal(first.train.input[mine], other.train.input[theirs])
        assert first.train.target[mine] == other.train.target[theirs]


def test_the_digits_keep_the_imbalance_at_their_size_and_say_so():
    task = digits(mnist)
    assert task.dataset == "digits" and "not MNIST" in task.warnings[0]
    rare, frequent = int(task.groups["rare"].sum()), int(task.groups["frequent"].sum())
    assert rare == 5 and frequent > 10 * rare
    assert torch.equal(task.meta.target.bincount(), torch.tensor([25, 25]))
    assert task.sparsity == rare / (rare + frequent)


def test_four_is_the_rare_class_of_mnist_and_the_even_digits_are_those_of_mnist10():
    two, ten = digits(mnist), digits(mnist10)
    assert set(two.train.target[two.groups["rare"]].tolist()) == {0}
    assert set(two.train.target[two.groups["frequent"]].tolist()) == {1}
    assert set(ten.train.target[ten.groups["rare"]].tolist()) == {0, 2, 4, 6, 8}
    assert set(ten.train.target[ten.groups["frequent"]].tolist()) == {1, 3, 5, 7, 9}
    assert ten.classes == 10 and two.classes == 2


def test_images_and_labels_stay_together(tmp_path):
    labels = np.array([4, 9, 1] * 40)
    write_mnist(tmp_path / "raw", labels, np.array([9, 4, 4]))
    task = mnist(
        root=str(tmp_path / "raw"), source="files", seed=3, meta_per_class=5, frequent=20, rare=5
    )
    assert task.dataset == "mnist" and task.warnings == ()
    for data in (task.train, task.meta):
        pixels = (data.input[:, 0, 0, :2] * 0.3081 + 0.1307) * 255
        number = (pixels.round() @ torch.tensor([256.0, 1.0])).long()
        assert torch.equal(number, data.ids)
        assert torch.equal(data.target, (torch.from_numpy(labels)[data.ids] == 9).long())
    assert task.test.target.tolist() == [1, 0, 0]
    assert [len(task.train), len(task.meta)] == [25, 10]


@pytest.mark.parametrize("per_class", [5, 10, 50])
def test_the_meta_set_has_as_many_points_per_class_as_asked_for(per_class):
    task = digits(mnist, meta_per_class=per_class)
    assert torch.equal(task.meta.target.bincount(), torch.tensor([per_class, per_class]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"meta_per_class": 0}, "task.meta_per_class must be at least 1, got 0"),
        ({"rare": 0}, "must be at least 1, got 0"),
        ({"frequent": -3}, "must be at least 1, got -3"),
        ({"meta_per_class": 500}, "lower task.meta_per_class"),
    ],
)
@pytest.mark.parametrize("make", TASKS)
def test_impossible_sizes_are_refused(make, options, message):
    with pytest.raises(InputError, match=message):
        digits(make, **options)


def test_a_task_refuses_sets_that_share_points():
    task = digits(mnist)
    shared = int(task.train.ids[3])
    meta = Data(
        task.meta.input, task.meta.target, torch.cat([task.train.ids[3:4], task.meta.ids[1:]])
    )
    with pytest.raises(InputError, match=rf"must not share points, got 1 .*\[{shared}\]"):
        replace(task, meta=meta)


def test_a_task_has_one_text_per_train_point_or_none():
    task = digits(mnist)
    assert task.texts is None
    texts = [f"point {k}" for k in range(len(task.train))]
    assert replace(task, texts=texts).texts == texts
    with pytest.raises(InputError, match=f"got {len(texts) - 1} texts for {len(texts)} points"):
        replace(task, texts=texts[1:])


def test_a_task_refuses_a_meta_set_that_lacks_a_class_of_the_test():
    task = digits(mnist10)
    meta = task.meta.subset((task.meta.target != 7).nonzero().flatten())
    with pytest.raises(InputError, match=r"meta set lacks classes \[7\] that the test set has"):
        replace(task, meta=meta)


def test_normalise_gives_mnist_mean_zero_and_unit_variance():
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1).expand(2, 28, 28)
    values = normalise(images)
    assert values.shape == (2, 1, 28, 28)
    assert values[0].unique().item() == pytest.approx(-0.1307 / 0.3081)
    assert values[1].unique().item() == pytest.approx((1 - 0.1307) / 0.3081)


@with_mnist
@pytest.mark.parametrize("per_class", [5, 25])
def test_mnist_has_the_sizes_of_the_paper(per_class):
    task = mnist(root=MNIST, source="files", seed=0, meta_per_class=per_class)
    assert task.dataset == "mnist" and task.warnings == ()
    assert task.train.target.bincount().tolist() == [25, 4975]
    assert task.meta.target.bincount().tolist() == [per_class, per_class]
    assert task.test.target.bincount().tolist() == [982, 1009]
    assert int(task.groups["rare"].sum()) == 25 and task.sparsity == 0.005


@with_mnist
def test_mnist10_has_five_rare_classes_of_twenty_points():
    task = mnist10(root=MNIST, source="files", seed=0)
    assert task.train.target.bincount().tolist() == [20, 2000] * 5
    assert task.meta.target.bincount().tolist() == [10] * 10
    assert len(task.test) == 10_000 and int(task.groups["rare"].sum()) == 100
