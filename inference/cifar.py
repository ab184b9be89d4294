"""Where small colour images come from: files, torchvision's copy of CIFAR-10, or drawn shapes.

The first that is there is taken, and its name travels with the images, so that results can say
what they were measured on. Files that are there but damaged stop the search.
"""

from __future__ import annotations

import lzma
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bads_ppl.errors import InputError
from inference.sources import ImageSplits

SOURCES = ("auto", "files", "torchvision", "shapes")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
CLASSES = 10


def load_cifar10(root: Path, source: str = "auto") -> ImageSplits:
    """Load CIFAR-10, or what stands in for it.

    Args:
        root: folder that holds one `cifar10*.npz` with arrays x_train (N, 32, 32, 3) uint8, y_train
            (N,), x_test and y_test, or torchvision's `cifar-10-batches-py`.
        source: "files" takes what is under root and nothing else; "torchvision" downloads where
            it is missing; "shapes" draws coloured shapes; "auto" takes files if there are any, and
            else warns and draws shapes.

    Raises:
        InputError: an unknown source, or a missing or damaged file.
    """
    if source not in SOURCES:
        raise InputError(f"data.source must be one of {', '.join(SOURCES)}, got {source!r}")
    if source == "shapes":
        return shapes()
    found = sorted(Path(root).glob("cifar10*.npz"))
    if len(found) > 1:
        raise InputError(
            f"{root} has {len(found)} files cifar10*.npz, {', '.join(p.name for p in found)}: "
            "leave one there"
        )
    if found:
        return _from_npz(found[0])
    if source == "torchvision" or (Path(root) / "cifar-10-batches-py").is_dir():
        return _from_torchvision(Path(root), download=source == "torchvision")
    missing = f"there is neither cifar10*.npz nor cifar-10-batches-py in {Path(root).absolute()}"
    if source == "files":
        raise InputError(
            f"data.source=files, but {missing}: put one there, name another folder with data.root, "
            "or use data.source=auto"
        )
    warnings.warn(
        f"drawn shapes (10 classes, 32x32 pixels) stand in for CIFAR-10: {missing}. For CIFAR-10 "
        "itself put it there, set data.root (environment variable BADS_DATA) to its folder, or "
        "download it with data.source=torchvision; results are recorded under the name 'shapes'.",
        stacklevel=2,
    )
    return shapes()


def _from_npz(path: Path) -> ImageSplits:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in ARRAYS if name not in archive]
            if missing:
                raise InputError(
                    f"{path} lacks the arrays {', '.join(missing)}: it must hold "
                    f"{', '.join(ARRAYS)}"
                )
            arrays = {name: archive[name] for name in ARRAYS}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): replace it by an intact copy, or remove it to use "
            "another source"
        ) from error
    return _splits("cifar10", arrays, str(path))


def _from_torchvision(root: Path, *, download: bool) -> ImageSplits:
    """Torchvision checks each batch against its known checksum before it is opened."""
    from torchvision import datasets  # seconds, for this alone

    arrays: dict[str, NDArray[Any]] = {}
    try:
        for name, train in (("train", True), ("test", False)):
            one = datasets.CIFAR10(str(root), train=train, download=download)
            arrays[f"x_{name}"], arrays[f"y_{name}"] = one.data, np.asarray(one.targets)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"torchvision's CIFAR-10 in {root.absolute()} cannot be had ({reason}): connect this "
            "machine to the network, put cifar10.npz there, or use data.source=shapes"
        ) from error
    return _splits("cifar10", arrays, str(root))


def _splits(name: str, arrays: dict[str, NDArray[Any]], where: str) -> ImageSplits:
    """Check what was read, and make tensors of it."""
    for split in ("train", "test"):
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if images.shape[1:] != (32, 32, 3) or images.dtype != np.uint8:
            raise InputError(
                f"{where}: x_{split} must be (N, 32, 32, 3) of uint8, got {images.shape} of "
                f"{images.dtype}"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise InputError(
                f"{where}: y_{split} must be ({len(images)},) whole numbers, one per image, got "
                f"{labels.shape} of {labels.dtype}"
            )
        wrong = np.flatnonzero((labels < 0) | (labels >= CLASSES))
        if len(wrong):
            raise InputError(
                f"{where}: labels must be from 0 to {CLASSES - 1}, got {labels[wrong[0]]} at index "
                f"{wrong[0]} of y_{split}"
            )
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}
    return ImageSplits(
        name,
        tensors["x_train"],
        tensors["y_train"].long(),
        tensors["x_test"],
        tensors["y_test"].long(),
    )


# ---------------------------------------------------------------------------------- stand-in


def shapes(train: int = 6000, test: int = 2000) -> ImageSplits:
    """Ten kinds of shapes in random colours, places and sizes; always the same ones."""
    rng = np.random.default_rng(0)
    images, labels = _draw(rng, train + test)
    arrays: dict[str, NDArray[Any]] = {
        "x_train": images[:train],
        "y_train": labels[:train],
        "x_test": images[train:],
        "y_test": labels[train:],
    }
    return _splits("shapes", arrays, "shapes")


def _draw(rng: np.random.Generator, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (count, 32, 32, 3) and the kinds of their shapes (count,)."""
    labels = rng.permutation(np.arange(count) % CLASSES)
    size = rng.uniform(6, 12, (count, 1, 1))
    centre = rng.uniform(11, 21, (2, count, 1, 1))
    angle = rng.uniform(-0.25, 0.25, (count, 1, 1))
    down, right = np.mgrid[:32, :32]
    y, x = (down - centre[0]) / size, (right - centre[1]) / size
    y, x = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
    radius, square = np.hypot(x, y), np.maximum(abs(x), abs(y))
    triangle = (abs(x) < (y + 1) / 2) & (y < 1)
    masks = [
        radius < 1,
        (radius < 1) & (radius > 0.6),
        square < 0.9,
        (square < 0.9) & (square > 0.55),
        triangle,
        (abs(x) < (1 - y) / 2) & (y > -1),
        (square < 1) & (np.minimum(abs(x), abs(y)) < 0.25),
        (square < 1) & (abs(abs(x) - abs(y)) < 0.3),
        (square < 1) & (np.sin(7 * y) > 0),
        (square < 1) & (np.sin(7 * x) > 0),
    ]
    mask = np.select([labels[:, None, None] == kind for kind in range(CLASSES)], masks)[..., None]
    paper, ink = rng.uniform(0, 255, (2, count, 1, 1, 3))
    near = np.abs(paper - ink).max(-1, keepdims=True) < 80  # to be told apart
    ink = np.where(near, (ink + 128) % 256, ink)
    noise = rng.normal(0, 25, (count, 32, 32, 3))
    images = np.clip(np.where(mask, ink, paper) + noise, 0, 255).round().astype(np.uint8)
    return images, labels
