"""Where the handwritten digits come from: files, torchvision's download, or scikit-learn's digits.

The first that is there is taken, and its name travels with the images, so that results can say
what they were measured on. Files that are there but damaged stop the search: a run never goes on
with other data than its user has put in place.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import tempfile
import threading
import time
import urllib.request
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bads_ppl.errors import InputError

SOURCES = ("auto", "files", "torchvision", "digits")
SPLITS = ("test", "validation")
PROBE_SECONDS = 4.0  # how long a mirror may take to answer before it counts as out of reach
STALL_SECONDS = 30.0  # how long a download may stand still

_IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}
_NAMES = (*_IMAGES.values(), *_LABELS.values())
_REPLACE = "replace the file by an intact copy, or remove all four files to use another source"


@dataclass(frozen=True)
class ImageSplits:
    """Labelled images, split into train and test.

    Attributes:
        name: "mnist" or "cifar10", or the name of what stands in for it: "digits", "shapes".
        train_images: uint8, grey (N, 28, 28), where 0 is paper and 255 is ink, or (N, 32, 32, 3).
        train_labels: (N,) int64, 0 to 9.
        test_images: (M, ...) uint8.
        test_labels: (M,) int64, 0 to 9.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def scored_on(self, split: str) -> ImageSplits:
        """The splits as they are ("test"), or for tuning ("validation"): a tenth of the train
        images, the last ones, held back in place of the test images, which nothing sees then.

        Raises:
            InputError: for another split.
        """
        if split not in SPLITS:
            raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if split == "test":
            return self
        kept = len(self.train_labels) * 9 // 10
        images, labels = self.train_images, self.train_labels
        return ImageSplits(self.name, images[:kept], labels[:kept], images[kept:], labels[kept:])


def load_mnist(root: Path, source: str = "auto") -> ImageSplits:
    """Load MNIST, or what stands in for it.

    Args:
        root: folder with the four files of MNIST in it or in ``MNIST/raw`` (torchvision's layout),
            as they are or gzip-compressed; it is only read, unless MNIST has to be downloaded
            into it.
        source: "files" takes the files under root and nothing else; "torchvision" downloads them
            where they are missing; "digits" takes scikit-learn's 8x8 digits, scaled up; "auto"
            takes the first of the three that is there, and warns when it comes to the digits.

    Raises:
        InputError: an unknown source, a missing or damaged file, or a download that failed where
            nothing may stand in.
    """
    root = Path(root)
    if source not in SOURCES:
        raise InputError(f"data.source must be one of {', '.join(SOURCES)}, got {source!r}")
    if source == "digits":
        return _digits()
    if root.exists() and not root.is_dir():
        raise InputError(f"data.root must be a folder, got the file {root}; name its folder")

    files = _files_under(root)
    if files is None and source == "files":
        raise InputError(
            f"data.source=files, but {_absent(root)}; put {', '.join(_NAMES)} (or the same names "
            "with .gz) there, name another folder with data.root, or use data.source=auto"
        )
    if files is None:
        try:
            files = _download(root)
        except _DownloadError as failure:
            if source == "torchvision":
                raise InputError(
                    f"data.source=torchvision, but {_absent(root)} and {failure}; connect this "
                    "machine to the network (data.root must be writable), put the files there, or "
                    "let scikit-learn's digits stand in with data.source=auto"
                ) from failure
            warnings.warn(
                f"scikit-learn's digits (1,797 images of 8x8 pixels, scaled up) stand in for "
                f"MNIST: {_absent(root)} and {failure}. For MNIST itself put its four files "
                "there or set data.root (environment variable BADS_DATA) to the folder that "
                "has them; results are recorded under the name 'digits'.",
                stacklevel=2,
            )
            return _digits()
    return ImageSplits("mnist", *_split(files, "train"), *_split(files, "test"))


# ---------------------------------------------------------------------------------------- files


def _absent(root: Path) -> str:
    where = root.absolute()
    return f"there are no MNIST files in {where}" + ("" if root.exists() else " (no such folder)")


def _files_under(root: Path) -> dict[str, Path] | None:
    """MNIST's four files by name, unpacked before packed; raises where some of them are missing."""
    for folder in (root / "MNIST" / "raw", root):
        packed = {name: folder / f"{name}.gz" for name in _NAMES}
        paths = {name: folder / name for name in _NAMES}
        paths = {name: path if path.is_file() else packed[name] for name, path in paths.items()}
        missing = [name for name, path in paths.items() if not path.is_file()]
        if not missing:
            return paths
        if len(missing) < len(_NAMES):
            raise InputError(
                f"{folder.absolute()} has some of MNIST's four files but lacks "
                f"{', '.join(missing)} (.gz or not); add what is missing, or remove the others to "
                "use another source"
            )
    return None


def _split(files: dict[str, Path], split: str) -> tuple[Tensor, Tensor]:
    """Read one split's images (N, 28, 28) and labels (N,), and check that they fit together."""
    image_path, label_path = files[_IMAGES[split]], files[_LABELS[split]]
    images, labels = _read_idx(image_path, 3), _read_idx(label_path, 1)
    if images.shape[1:] != (28, 28):
        size = "x".join(str(side) for side in images.shape[1:])
        raise InputError(f"{image_path}: expected images of 28x28 pixels, got {size}; {_REPLACE}")
    if len(images) != len(labels):
        raise InputError(
            f"{image_path} has {len(images)} images, but {label_path} has {len(labels)} labels; "
            "expected one label an image; replace the two files by copies that belong together"
        )
    if labels.max() > 9:
        at = int((labels > 9).argmax())
        raise InputError(
            f"{label_path}: expected labels from 0 to 9, got {labels[at]} at index {at}; {_REPLACE}"
        )
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read one IDX file of bytes: magic (0, 0, 8, dimensions), big-endian sizes, values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: expected a whole gzip file, got: {error}; {_REPLACE}") from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); check its permissions and disk"
        ) from error
    magic, header = bytes((0, 0, 8, dimensions)), 4 + 4 * dimensions
    if raw[:4] != magic:
        begins = raw[:4].hex() or "nothing"
        raise InputError(
            f"{path}: expected an IDX file of bytes, which begins with {magic.hex()} (the last "
            f"byte counts its dimensions), got {begins}; {_REPLACE}"
        )
    sizes = [int(size) for size in np.frombuffer(raw[4:header].ljust(header - 4, b"\0"), ">u4")]
    expected = header + int(np.prod(sizes, dtype=object))
    if len(raw) != expected or sizes[0] == 0:
        raise InputError(
            f"{path}: its header tells of {'x'.join(map(str, sizes))} values, which is {expected} "
            f"bytes with the header, got {len(raw)}; {_REPLACE}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(sizes).copy()


# ------------------------------------------------------------------------------------- download


class _DownloadError(RuntimeError):
    """MNIST could not be downloaded; the message ends a sentence that begins with the want."""


def _download(root: Path) -> dict[str, Path]:
    """Download MNIST into root/MNIST/raw, where only whole files arrive; the files by name."""
    from torchvision import datasets  # seconds, for this alone

    mirrors = _reachable(datasets.MNIST.mirrors)
    if not mirrors:
        raise _DownloadError("none of torchvision's mirrors can be reached")

    # torchvision names the folder after the class.
    mnist = type("MNIST", (datasets.MNIST,), {"mirrors": mirrors})
    folder = root / "MNIST" / "raw"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            with _stalls_raise():
                mnist(root=scratch, download=True)
            for file in sorted((Path(scratch) / "MNIST" / "raw").iterdir()):
                os.replace(file, folder / file.name)
    except (OSError, HTTPException, RuntimeError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _DownloadError(f"torchvision's download into {folder} failed ({reason})") from error
    return {name: folder / name for name in _NAMES}


def _reachable(mirrors: list[str]) -> list[str]:
    """Those of the mirrors that answer soon, in their order.

    Without a network a name look-up or a connection can hang far beyond any socket's time limit,
    hence threads that are left behind when the time is up.
    """
    answered: list[str] = []

    def probe(mirror: str) -> None:
        request = urllib.request.Request(f"{mirror}{_NAMES[-1]}.gz", method="HEAD")
        # Time-outs and URLError are OSErrors.
        with contextlib.suppress(OSError, HTTPException):
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            answered.append(mirror)

    threads = [threading.Thread(target=probe, args=(mirror,), daemon=True) for mirror in mirrors]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PROBE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [mirror for mirror in mirrors if mirror in answered]


@contextlib.contextmanager
def _stalls_raise() -> Iterator[None]:
    """Within, a connection that stands still raises; torchvision itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# ---------------------------------------------------------------------------------- stand-in


def _digits() -> ImageSplits:
    """Scikit-learn's 1,797 digits, from 8x8 pixels to 28x28; a third of each class is the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    images = images.squeeze(1).round().to(torch.uint8)
    targets = torch.from_numpy(labels).long()
    train, test = train_test_split(
        np.arange(len(labels)), test_size=len(labels) // 3, stratify=labels, random_state=0
    )
    train, test = np.sort(train), np.sort(test)
    return ImageSplits("digits", images[train], targets[train], images[test], targets[test])
