from __future__ import annotations

import gzip
import hashlib
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from bads_ppl.errors import InputError
from inference import sources
from inference.sources import load_mnist

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(values: np.ndarray) -> bytes:
    sizes = np.array(values.shape, ">u4").tobytes()
    return bytes((0, 0, 8, values.ndim)) + sizes + values.astype(np.uint8).tobytes()


def small_mnist(train: int = 20, test: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        TRAIN_IMAGES: rng.integers(0, 256, (train, 28, 28)),
        TRAIN_LABELS: np.arange(train) % 10,
        TEST_IMAGES: rng.integers(0, 256, (test, 28, 28)),
        TEST_LABELS: np.arange(test) % 10,
    }


def write(folder: Path, arrays: dict[str, np.ndarray], packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mirror on this machine that torchvision downloads a small MNIST from."""
    folder = tmp_path / "mirror"
    write(folder, small_mnist())
    checksums = [
        (f"{name}.gz", hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest())
        for name in small_mnist()
    ]
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(
        datasets.MNIST,
        "mirrors",
        ["http://127.0.0.1:1/", f"http://127.0.0.1:{server.server_port}/"],  # the first is down
    )
    monkeypatch.setattr(datasets.MNIST, "resources", checksums)
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layout", ["MNIST/raw", "."])
@pytest.mark.parametrize("source", ["auto", "files", "torchvision"])
def test_files_are_read_in_each_layout(
    tmp_path: Path, offline: None, source: str, layout: str, packed: bool
) -> None:
    arrays = small_mnist()
    write(tmp_path / layout, arrays, packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = load_mnist(tmp_path, source)
    assert splits.name == "mnist"
    for tensor, name, dtype in [
        (splits.train_images, TRAIN_IMAGES, torch.uint8),
        (splits.train_labels, TRAIN_LABELS, torch.int64),
        (splits.test_images, TEST_IMAGES, torch.uint8),
        (splits.test_labels, TEST_LABELS, torch.int64),
    ]:
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(tensor.numpy(), arrays[name])


def test_the_folder_is_only_read(tmp_path: Path) -> None:
    write(tmp_path / "MNIST/raw", small_mnist())
    before = sorted(path.name for path in tmp_path.rglob("*"))
    load_mnist(tmp_path, "files")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_images_can_be_written_to(tmp_path: Path) -> None:
    write(tmp_path, small_mnist())
    load_mnist(tmp_path).train_images[0] = 7  # read-only memory would warn or crash


def test_mnist_itself_has_its_known_counts() -> None:
    root = Path(os.environ.get("BADS_DATA", "data"))
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip("needs MNIST in the folder that BADS_DATA names")
    splits = load_mnist(root, "files")
    assert splits.train_labels.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert splits.test_labels.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert splits.train_images.shape == (60_000, 28, 28)
    assert splits.train_images.double().mean().item() == pytest.approx(33.3184, abs=1e-4)


# -------------------------------------------------------------------------------- damaged files


def truncate(folder: Path) -> str:
    path = folder / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-100])
    return rf"{TRAIN_IMAGES}.*whole gzip file"


def corrupt(folder: Path) -> str:
    path = folder / f"{TRAIN_IMAGES}.gz"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(bytes(raw))
    return rf"{TRAIN_IMAGES}.*whole gzip file"


def not_gzip(folder: Path) -> str:
    (folder / f"{TEST_LABELS}.gz").write_bytes(b"<html>not found</html>")
    return rf"{TEST_LABELS}.*whole gzip file"


def wrong_magic(folder: Path) -> str:
    (folder / f"{TEST_LABELS}.gz").write_bytes(gzip.compress(b"\0\0\x0d\x01" + bytes(20)))
    return rf"{TEST_LABELS}.*00000801.*00000d01"


def empty_file(folder: Path) -> str:
    (folder / TEST_LABELS).write_bytes(b"")
    return rf"{TEST_LABELS}: .*got nothing"


def header_only(folder: Path) -> str:
    (folder / TRAIN_IMAGES).write_bytes(bytes((0, 0, 8, 3, 0, 0)))
    return rf"{TRAIN_IMAGES}.*got 6"


def no_points(folder: Path) -> str:
    (folder / TRAIN_LABELS).write_bytes(idx(np.zeros(0)))
    return rf"{TRAIN_LABELS}.*0 values"


def too_short(folder: Path) -> str:
    (folder / TRAIN_LABELS).write_bytes(idx(np.arange(20) % 10)[:-1])
    return rf"{TRAIN_LABELS}.*28 bytes.*got 27"


def too_long(folder: Path) -> str:
    (folder / TRAIN_LABELS).write_bytes(idx(np.arange(20) % 10) + b"x")
    return rf"{TRAIN_LABELS}.*28 bytes.*got 29"


def other_pixels(folder: Path) -> str:
    write(folder, {TRAIN_IMAGES: np.zeros((20, 32, 32))})
    return rf"{TRAIN_IMAGES}.*28x28.*32x32"


def fewer_labels(folder: Path) -> str:
    write(folder, {TRAIN_LABELS: np.arange(19) % 10})
    return rf"{TRAIN_IMAGES}.*20 images.*{TRAIN_LABELS}.*19 labels"


def label_out_of_range(folder: Path) -> str:
    write(folder, {TEST_LABELS: np.array([0, 1, 2, 11, 4, 5, 6, 7, 8, 9])})
    return rf"{TEST_LABELS}.*0 to 9.*11 at index 3"


def missing_file(folder: Path) -> str:
    (folder / f"{TEST_LABELS}.gz").unlink()
    return rf"lacks {TEST_LABELS}"


@pytest.mark.parametrize("source", ["auto", "files", "torchvision"])
@pytest.mark.parametrize(
    "damage",
    [
        truncate, corrupt, not_gzip, wrong_magic, empty_file, header_only, no_points, too_short,
        too_long, other_pixels, fewer_labels, label_out_of_range, missing_file,
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_never_replaced_by_another_source(
    tmp_path: Path, mirror: Path, damage: Callable[[Path], str], source: str
) -> None:
    folder = tmp_path / "data" / "MNIST" / "raw"
    write(folder, small_mnist())
    expected = damage(folder)
    with pytest.raises(InputError, match=expected) as caught:
        load_mnist(tmp_path / "data", source)
    assert "replace" in str(caught.value) or "add what is missing" in str(caught.value)


# ------------------------------------------------------------------------------------- download


@pytest.mark.parametrize("source", ["auto", "torchvision"])
def test_missing_files_are_downloaded_once(
    tmp_path: Path, mirror: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "new" / "data"
    splits = load_mnist(root, source)
    assert splits.name == "mnist"
    np.testing.assert_array_equal(splits.train_images.numpy(), small_mnist()[TRAIN_IMAGES])
    assert all((root / "MNIST" / "raw" / name).is_file() for name in small_mnist())
    assert not list(root.rglob(".download-*"))
    assert socket.getdefaulttimeout() is None

    monkeypatch.setattr(datasets.MNIST, "mirrors", [])
    assert torch.equal(load_mnist(root, source).train_images, splits.train_images)


def test_a_download_that_arrives_damaged_leaves_nothing_behind(
    tmp_path: Path, mirror: Path
) -> None:
    (mirror / f"{TEST_IMAGES}.gz").write_bytes(b"<html>log in first</html>")
    with pytest.raises(InputError, match=r"download into .* failed"):
        load_mnist(tmp_path / "data", "torchvision")
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    with pytest.warns(UserWarning, match="stand in for MNIST"):
        assert load_mnist(tmp_path / "data").name == "digits"


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path, mirror: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*(Not a directory|exists)"):
        load_mnist(tmp_path / "file" / "data", "torchvision")


def test_torchvision_offline_is_refused(tmp_path: Path, offline: None) -> None:
    with pytest.raises(InputError, match=r"mirrors can be reached.*data\.source=auto"):
        load_mnist(tmp_path / "data", "torchvision")
    assert not (tmp_path / "data").exists()


def test_a_network_that_swallows_everything_costs_only_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def hang(*args: object, **kwargs: object) -> None:
        released.wait(30)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(sources, "PROBE_SECONDS", 0.2)
    begun = time.monotonic()
    with pytest.warns(UserWarning, match="stand in for MNIST"):
        load_mnist(tmp_path)
    assert time.monotonic() - begun < 5
    released.set()


# -------------------------------------------------------------------------------------- digits


def test_digits_stand_in_offline_with_one_warning(tmp_path: Path, offline: None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        splits = load_mnist(tmp_path / "nowhere")
    assert splits.name == "digits"
    assert len(caught) == 1
    message = str(caught[0].message)
    assert all(part in message for part in ("scikit-learn", "nowhere", "BADS_DATA", "'digits'"))


def test_digits_on_request_do_not_warn_and_need_no_folder(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_mnist(tmp_path / "nowhere", "digits").name == "digits"


def test_digits_have_mnist_s_form_and_every_class_in_both_splits(tmp_path: Path) -> None:
    first, second = load_mnist(tmp_path, "digits"), load_mnist(tmp_path, "digits")
    for split in ("train", "test"):
        images, labels = getattr(first, f"{split}_images"), getattr(first, f"{split}_labels")
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert images.shape == (len(labels), 28, 28)
        assert images.max() == 255 and images.min() == 0
        counts = labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 6  # as balanced as the 1,797 are
        assert torch.equal(images, getattr(second, f"{split}_images"))
    assert len(first.train_labels) + len(first.test_labels) == 1797
    assert len(first.test_labels) == 599


def test_digits_keep_their_labels(tmp_path: Path) -> None:
    splits = load_mnist(tmp_path, "digits")
    train, test = (
        images.flatten(1).double() for images in (splits.train_images, splits.test_images)
    )
    nearest = splits.train_labels[torch.cdist(test, train).argmin(1)]
    assert (nearest == splits.test_labels).double().mean() > 0.95


# ---------------------------------------------------------------------------------- wrong input


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"auto, files, torchvision, digits, got 'hub'"):
        load_mnist(tmp_path, "hub")


def test_files_that_are_missing_are_named_with_the_folder(tmp_path: Path, mirror: Path) -> None:
    with pytest.raises(InputError, match=rf"nowhere \(no such folder\).*{TRAIN_IMAGES}.*\.gz"):
        load_mnist(tmp_path / "nowhere", "files")


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mnist.gz"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"must be a folder, got the file .*mnist\.gz"):
        load_mnist(path)
