"""Draws of one chain, appended to disk as they are made.

A chain's folder holds `w.f32`, one row of N little-endian float32 per draw, and `functions.f64`,
one row of little-endian float64 per draw: functions of theta by name, listed in `draws.json`.
Rows are appended and flushed, so memory does not grow with the number of draws, and a chain that
is resumed cuts both files to the rows of its checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from bads_ppl.atomic import atomic_path, write_error
from bads_ppl.errors import InputError

WEIGHTS, FUNCTIONS, HEADER = "w.f32", "functions.f64", "draws.json"


@dataclass(frozen=True)
class ChainDraws:
    """The draws of one chain.

    Attributes:
        w: (D, N) float32, constrained weights, memory-mapped where read from disk.
        values: name to (D,) float64: functions of theta, "potential" and "step".
    """

    w: NDArray[np.float32]
    values: dict[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.w)


class Draws(Protocol):
    """What is asked of a chain's draws; `ChainDraws` is such."""

    @property
    def w(self) -> NDArray[np.float32]:
        """(D, N) weights."""
        ...

    @property
    def values(self) -> dict[str, NDArray[np.float64]]:
        """Name to (D,): functions of theta, "potential" and "step"."""
        ...


def check_chains(chains: Sequence[Draws]) -> None:
    """Refuse chains that cannot be looked at together.

    Raises:
        InputError: if there is no chain or no draw, or chains differ in their numbers of draws or
            weights, or in the functions of theta.
    """
    lengths = [len(chain.w) for chain in chains]
    if not lengths or min(lengths) == 0:
        raise InputError(
            f"every chain must have at least one draw, got {lengths} draws: run more steps, or less"
            " burn-in or thinning"
        )
    if len(set(lengths)) > 1:
        shortest = lengths.index(min(lengths))
        raise InputError(
            f"chains must have the same number of draws, got {lengths}, fewest in chain {shortest}:"
            " resume those that were stopped"
        )
    shapes = [chain.w.shape for chain in chains]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise InputError(
            f"all chains must have weights of one shape (draws, points), got {shapes}: give chains "
            "of one run"
        )
    names = set(chains[0].values)
    for number, chain in enumerate(chains):
        if set(chain.values) != names:
            raise InputError(
                f"chains must have the same functions of theta, got {sorted(chain.values)} in chain"
                f" {number} and {sorted(names)} in chain 0: give chains of one run"
            )
        for name, value in chain.values.items():
            if np.shape(value) != (lengths[0],):
                raise InputError(
                    f"functions of theta must have one value per draw, got shape {np.shape(value)} "
                    f"for {name!r} in chain {number} and {lengths[0]} draws"
                )


class DrawWriter:
    """Appends draws to a folder. Use as a context manager.

    Args:
        folder: the chain's folder; created if absent.
        size: N, weights per draw.
        keep: draws to keep of those already there; the rest is cut off.
    """

    def __init__(self, folder: Path, size: int, keep: int = 0) -> None:
        self.folder = folder
        self.size = size
        self.count = keep
        self._names: list[str] | None = None
        self._files: list[BinaryIO] = []

    def __enter__(self) -> DrawWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.count:
            self._names = _read_header(self.folder)["names"]
        widths = [4 * self.size, 8 * len(self._names or [])]
        for name, width in zip((WEIGHTS, FUNCTIONS), widths, strict=True):
            path = self.folder / name
            file = path.open("r+b" if path.exists() else "w+b")
            self._files.append(file)
            if path.stat().st_size < self.count * width:
                raise InputError(
                    f"{path} holds fewer draws than its checkpoint says ({self.count}): the run "
                    "is damaged; start it anew in another run_dir"
                )
            file.truncate(self.count * width)
            file.seek(0, 2)
        return self

    def append(self, w: NDArray[np.float32], values: dict[str, float]) -> None:
        """Add one draw: weights (N,) and functions of theta by name, the same names every time."""
        if self._names is None:
            self._names = sorted(values)
            with atomic_path(self.folder / HEADER) as path:
                path.write_text(json.dumps({"size": self.size, "names": self._names}))
        row = np.array([values[name] for name in self._names], dtype="<f8")
        with self._writing():
            self._files[0].write(np.ascontiguousarray(w, dtype="<f4").data)
            self._files[1].write(row.tobytes())
        self.count += 1

    def flush(self) -> None:
        """Bring all rows to the disk, before a checkpoint counts on them."""
        with self._writing():
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Names the folder and the remedy where the disk takes no more."""
        try:
            yield
        except OSError as failure:
            raise write_error(failure.errno or errno.EIO, self.folder) from failure

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for file in self._files:
            with suppress(OSError):  # rows since the last flush: no checkpoint counts on them
                file.close()


def _read_header(folder: Path) -> dict[str, list[str]]:
    path = folder / HEADER
    try:
        header: dict[str, list[str]] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): the run has no draws to load"
        ) from error
    return header


def read_draws(folder: Path, count: int | None = None) -> ChainDraws:
    """The draws of a chain's folder, weights memory-mapped.

    Args:
        folder: the chain's folder.
        count: draws to read; default all complete ones.

    Raises:
        InputError: if there are none, or files are damaged.
    """
    header = _read_header(folder)
    size, names = int(header["size"]), header["names"]  # type: ignore[call-overload]
    if not (folder / WEIGHTS).exists():
        raise InputError(f"{folder} has no weights, {WEIGHTS} is missing: the run is damaged")
    found = (folder / WEIGHTS).stat().st_size // (4 * size)
    count = found if count is None else count
    if count == 0 or count > found:
        raise InputError(f"{folder} holds {found} draws, expected {count or 'at least 1'}")
    w = np.memmap(folder / WEIGHTS, dtype="<f4", mode="r", shape=(count, size))
    raw = np.fromfile(folder / FUNCTIONS, dtype="<f8", count=count * len(names))
    if raw.size != count * len(names):
        raise InputError(f"{folder / FUNCTIONS} is shorter than {count} draws: the run is damaged")
    table = raw.reshape(count, len(names))
    return ChainDraws(w, {name: table[:, k].copy() for k, name in enumerate(names)})
