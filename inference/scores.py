"""Scores of the points of a set, kept in a cache under a hash of all that they depend on.

A table holds one value (or row of values) per point. It is computed in chunks, each of which is on
disk once it is done, so that a pass that was stopped, or killed, goes on where it was. A table
knows which points it is about, and in which order; another set's is refused, never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from bads_ppl.atomic import make_folder
from bads_ppl.chains import fingerprint
from bads_ppl.checkpoint import load_checkpoint, save_checkpoint
from bads_ppl.data import Data
from bads_ppl.errors import InputError

log = logging.getLogger(__name__)

FORMAT = "bads-ppl score table 1"

CHUNK = 2048
"""Points that are scored between two writes."""

Compute = Callable[[Tensor], Tensor]
"""Values (B, ...) of the points at rows (B,) of the set, on any device."""


@dataclass(frozen=True)
class Points:
    """What a table is about.

    Attributes:
        ids: (N,) int64, one number per point that goes with it wherever it stands.
        content: hash of all that the points are, in their order.
    """

    ids: Tensor
    content: str

    @classmethod
    def of(cls, data: Data) -> Points:
        """The points of a set: ids, targets and all inputs."""
        return cls(data.ids, fingerprint(data, inputs=None))

    @classmethod
    def of_texts(cls, texts: Sequence[str]) -> Points:
        """Texts, which have no ids: the hash of each stands for it."""
        hashes = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
        ids = torch.tensor([int.from_bytes(one, "little", signed=True) for one in hashes])
        whole = hashlib.blake2b(b"".join(hashes), digest_size=16)
        return cls(ids, whole.hexdigest())

    def __len__(self) -> int:
        return len(self.ids)


def content_key(about: Mapping[str, Any]) -> str:
    """A short hash of JSON-able settings, the same for the same settings in any order."""
    text = json.dumps(about, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def score_table(
    cache: Path,
    name: str,
    points: Points,
    compute: Compute,
    about: Mapping[str, Any],
    *,
    chunk: int = CHUNK,
    progress: bool | None = None,
) -> Tensor:
    """Values (N, ...) of all points: from the cache, or computed and put there.

    Args:
        cache: folder of tables and proxies; made if absent.
        name: what the values are; the file is `<name>-<hash>.safetensors`.
        points: what is scored.
        compute: values for rows; called once per chunk, in order.
        about: JSON-able: all that the values depend on beside the points.
        chunk: points between two writes.
        progress: show a progress bar; None: when standard error is a terminal.

    Raises:
        InputError: if what is in the cache is damaged or about other points, or values are not
            finite.
        OSError: if the cache cannot be written.
    """
    whole = {"name": name, "points": points.content, **about}
    path = cache / f"{name}-{content_key(whole)}.safetensors"
    with locked(path):
        if not path.exists():
            values = _compute(path.with_suffix(".parts"), name, points, compute, chunk, progress)
            tensors = {"ids": points.ids, "values": values}
            save_checkpoint(path, tensors, whole, format=FORMAT)
            shutil.rmtree(path.with_suffix(".parts"))
    return load_scores(path, name, points)


def load_scores(path: Path, name: str, points: Points) -> Tensor:
    """Values (N, ...) of a table that is called `name`, in the order of the points.

    Raises:
        InputError: if there is no such table, it is damaged, holds something else, or is about
            other points or the same ones in another order.
    """
    if not path.exists():
        raise InputError(f"there is no score table {path}: name one that a run left in its cache")
    tensors, about = load_checkpoint(
        path, format=FORMAT, remedy="remove it to have the points scored again"
    )
    if about["name"] != name:
        raise InputError(
            f"score table {path} holds scores of {about['name']}, expected those of {name}: name a "
            "table that the same method made"
        )
    ids = tensors["ids"]
    if about["points"] != points.content:
        where = f"score table {path} is of another data set"
        found = f"{len(ids)} points that begin with ids {ids[:3].tolist()}"
        wanted = f"{len(points)} that begin with {points.ids[:3].tolist()}"
        if torch.equal(ids, points.ids):
            where += ", with the same ids and other inputs or targets"
        elif torch.equal(ids.sort().values, points.ids.sort().values):
            where = f"score table {path} has the points in another order"
        raise InputError(
            f"{where}: got {found}, expected {wanted}; scores would go to the wrong points. Score "
            "these points anew, or give the data that the table was made from"
        )
    return tensors["values"]


def _compute(
    folder: Path, name: str, points: Points, compute: Compute, chunk: int, progress: bool | None
) -> Tensor:
    """Values of all points, chunk by chunk; chunks that are in the folder are read instead."""
    make_folder(folder, "cache")
    hidden = None if progress is None else not progress
    parts: list[Tensor] = []
    with tqdm(total=len(points), disable=hidden, unit="point", desc=f"scores ({name})") as bar:
        for rows in torch.arange(len(points)).split(chunk):
            path = folder / f"{int(rows[0]):09d}-{int(rows[-1]):09d}.safetensors"
            if not path.exists():
                values = compute(rows).detach().float().cpu()
                _check(values, points.ids[rows], name)
                save_checkpoint(path, {"values": values}, {}, format=FORMAT)
            tensors, _ = load_checkpoint(
                path, format=FORMAT, remedy="remove it to have these points scored again"
            )
            parts.append(tensors["values"])
            bar.update(len(rows))
    return torch.cat(parts)


def _check(values: Tensor, ids: Tensor, name: str) -> None:
    if len(values) != len(ids):
        raise InputError(f"{name} must give one score per point, got {len(values)} for {len(ids)}")
    wrong = (~values.reshape(len(values), -1).isfinite().all(1)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"{name} must be finite, got {values[row].flatten()[:3].tolist()} for point "
            f"{int(ids[row])}: the proxy may have diverged; train it with a smaller "
            "method.proxy.learning_rate"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with what is at `path` of a cache: runs that want the same thing make it once."""
    make_folder(path.parent, "cache")
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another run is making %s: waiting for it", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
