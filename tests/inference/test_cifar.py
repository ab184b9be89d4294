"""CIFAR-10 from files, torchvision or drawn shapes, its wrong labels, and damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from bads_ppl.errors import InputError
from inference.augmentation import crop_and_flip
from inference.cifar import load_cifar10, shapes
from inference.experiment import first_chain, prepare
from inference.run import compose_run
from inference.tasks import ASYMMETRIC, cifar10, normalise_colour


def arrays(train: int = 400, test: int = 20) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def images(count: int) -> np.ndarray:
        return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)

    return {
        "x_train": images(train),
        "y_train": np.arange(train) % 10,
        "x_test": images(test),
        "y_test": np.arange(test) % 10,
    }


def write(folder: Path, name: str = "cifar10.npz", **changed: np.ndarray | None) -> Path:
    kept = {key: value for key, value in (arrays() | changed).items() if value is not None}
    np.savez(folder / name, **kept)
    return folder / name


def task(folder: Path, **options):
    options = {"per_class": 20, "meta_per_class": 5, **options}
    return cifar10(root=str(folder), source="files", seed=0, **options)


def test_a_file_is_read_as_it_is(tmp_path):
    write(tmp_path, "cifar10_subset.npz")
    found, given = load_cifar10(tmp_path), arrays()
    assert found.name == "cifar10"
    assert np.array_equal(found.train_images.numpy(), given["x_train"])
    assert np.array_equal(found.test_labels.numpy(), given["y_test"])


def test_without_files_shapes_stand_in_with_a_warning(tmp_path):
    with pytest.warns(
        UserWarning, match=r"drawn shapes .* stand in for CIFAR-10: there is neither"
    ):
        found = load_cifar10(tmp_path)
    assert found.name == "shapes"


def test_shapes_are_the_same_every_time_and_what_their_labels_say():
    """A ring has less ink than a disc (0.64 of it), a frame less than a square (0.63)."""
    first, again = shapes(1500, 100), shapes(1500, 100)
    assert torch.equal(first.train_images, again.train_images)
    assert first.train_labels.bincount().min() >= 100
    images = first.train_images.float()
    ink = ((images - images[:, :2, :2].mean((1, 2))[:, None, None]).abs().amax(-1) > 60).float()
    share = [float(ink[first.train_labels == kind].mean()) for kind in range(4)]
    assert share[1] < 0.8 * share[0] and share[3] < 0.8 * share[2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"y_test": None}, "lacks the arrays y_test"),
        ({"x_train": np.zeros((400, 28, 28), np.uint8)}, r"x_train must be \(N, 32, 32, 3\)"),
        ({"x_test": np.zeros((20, 32, 32, 3))}, r"of uint8, got .* of float64"),
        ({"y_train": np.zeros(7, int)}, r"y_train must be \(400,\) whole numbers"),
        ({"y_train": np.zeros(400)}, "of float64"),
        ({"y_test": np.full(20, 10)}, "from 0 to 9, got 10 at index 0 of y_test"),
        ({"y_test": np.array([None] * 20)}, "cannot be read"),  # would need pickle
    ],
)
def test_wrong_arrays_are_refused_by_name(changed, message, tmp_path):
    write(tmp_path, **changed)
    with pytest.raises(InputError, match=message):
        load_cifar10(tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cannot be read .*: replace it by an intact copy"):
        load_cifar10(tmp_path)


def test_what_is_missing_or_twice_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"data.source=files, but there is neither"):
        load_cifar10(tmp_path, "files")
    with pytest.raises(InputError, match="must be one of auto, files, torchvision, shapes"):
        load_cifar10(tmp_path, "digits")
    write(tmp_path), write(tmp_path, "cifar10_more.npz")
    with pytest.raises(InputError, match="2 files"):
        load_cifar10(tmp_path)


def test_damaged_torchvision_files_are_refused(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(InputError, match=r"torchvision's CIFAR-10 in .* cannot be had"):
        load_cifar10(tmp_path)


def test_symmetric_noise_replaces_the_share_that_was_asked_for(tmp_path):
    write(tmp_path)
    found, clean = task(tmp_path), task(tmp_path, noise=0.0)
    assert len(found.train) == 200 and len(found.meta) == 50 and len(found.test) == 20
    assert torch.equal(found.right, found.train.target == clean.train.target)
    assert int((~found.right).sum()) == 100 and found.sparsity == 0.25
    assert torch.equal(found.groups["noisy"], ~found.right) and found.high == ("clean",)
    assert clean.sparsity == 0.5


def test_asymmetric_noise_takes_classes_for_those_that_look_alike(tmp_path):
    write(tmp_path)
    found = task(tmp_path, noise=0.4, kind="asymmetric")
    clean = task(tmp_path, noise=0.0).train.target
    for true in range(10):
        labels = found.train.target[clean == true]
        other = ASYMMETRIC.get(true)
        assert int((labels != true).sum()) == (8 if other is not None else 0)
        assert set(labels.tolist()) <= {true, other}


def test_meta_and_train_images_are_the_source_s_own_and_disjoint(tmp_path):
    write(tmp_path)
    found, given = task(tmp_path), arrays()
    for part in (found.train, found.meta):
        images = normalise_colour(torch.from_numpy(given["x_train"])[part.ids])
        assert torch.equal(part.input, images)
    assert np.array_equal(given["y_train"][found.meta.ids], found.meta.target)
    assert not set(found.train.ids.tolist()) & set(found.meta.ids.tolist())


def test_a_class_with_too_few_points_is_named(tmp_path):
    write(tmp_path)
    with pytest.raises(InputError, match=r"needs 41 train images of class 0 \(36 .*has 40"):
        task(tmp_path, per_class=36)


def test_views_are_made_of_train_and_meta_points_and_never_of_test_points(tmp_path):
    write(tmp_path)
    on, off = task(tmp_path), task(tmp_path, augment=False)
    assert on.train.augment is on.meta.augment is crop_and_flip
    assert on.test.augment is off.train.augment is off.meta.augment is None


def test_the_paper_s_size_has_its_network_its_batches_and_its_steps():
    config, _ = compose_run(["task=cifar10_paper"], "the paper")
    assert (config.steps, config.sampler.train_batch, config.sampler.meta_batch) == (20_000, 60, 60)
    assert (config.task.per_class, config.task.meta_per_class) == (4000, 1000)
    network = instantiate(config.backbone)(classes=10)
    assert sum(p.numel() for p in network.parameters()) == 464_154
    small, _ = compose_run(["task=cifar10"], "two cores")
    assert 10 * small.task.per_class == 10_000
    assert sum(p.numel() for p in instantiate(small.backbone)(classes=10).parameters()) < 100_000


def test_the_size_for_two_cores_has_settings_of_its_own_which_go_with_its_parts():
    def of(*options):
        return compose_run(["task=cifar10", *options], "two cores")[0]

    config, longer = of(), of("steps=100", "method=dup_meta")
    assert (longer.burn_in, longer.evaluate_every, of("steps=1").evaluate_every) == (80, 4, 1)
    assert config.method.learning_rate == longer.method.learning_rate == 1.0
    assert of("method.learning_rate=.5").method.learning_rate == 0.5
    assert (config.weights.schedule, config.model.loss_contrast) == ("constant", 4.0)
    assert (
        of("method=meta_only").sampler.meta_batch
        == 100
        == sum(config.sampler[name] for name in ("train_batch", "meta_batch"))
    )
    other = of("model=joint", "weights=network")
    assert other.weights.schedule is None and "loss_contrast" not in other.model
    assert of("task=mnist10_noise").model.loss_contrast == 2.0


def test_weights_keep_their_step_where_their_schedule_says_so(tmp_path):
    def steps(*options):
        small = ["data.source=shapes", f"run_dir={tmp_path / 'run'}", "task.per_class=20"]
        config, choices = compose_run(
            ["task=cifar10", "steps=10", "thinning=1", *small, *options], "a run"
        )
        schedules = first_chain(prepare(config, choices))[0].schedules
        return {name: one(9) / one(0) for name, one in schedules.items() if name in ("theta", "w")}

    assert steps() == pytest.approx({"theta": 0.1, "w": 1.0})
    assert steps("weights.schedule=null") == pytest.approx({"theta": 0.1, "w": 0.1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 0}, "task.per_class must be at least 1, got 0"),
        ({"per_class": -5}, "task.per_class must be at least 1, got -5"),
        ({"meta_per_class": 0}, "task.meta_per_class must be at least 1, got 0"),
        ({"per_class": 39}, "needs 44 train images of class 0 .* has 40: lower .*task.per_class"),
        ({"noise": 1.0}, r"task.noise must be in \[0, 1\), got 1.0"),
    ],
)
def test_sizes_and_noise_that_do_not_fit_are_refused(options, message, tmp_path):
    write(tmp_path)
    with pytest.raises(InputError, match=message):
        task(tmp_path, **options)
