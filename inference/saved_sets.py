"""Rows of folders that `save_to_disk` of the package `datasets` wrote, without that package.

Such a folder holds one set (state.json, which names the arrow files) or a dictionary of them, one
folder a split (dataset_dict.json).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from bads_ppl.errors import InputError
from inference.text_files import readable

STATE = "state.json"
SPLITS = "dataset_dict.json"


def set_folder(folder: Path, split: str | None) -> tuple[Path, str | None]:
    """The folder of one set, and the split that its rows are still to be chosen by.

    Args:
        folder: of a set, or of a dictionary of sets.
        split: the one that is asked for; None goes with a single set.

    Returns:
        The folder; and the split, or None where all rows of that folder are of it.

    Raises:
        InputError: if nothing was saved there, or not this split.
    """
    if (folder / SPLITS).is_file():
        names = _read(folder / SPLITS, "splits")["splits"]
        if split is None and len(names) == 1:
            split = str(names[0])
        if split is None or split not in names:
            raise InputError(
                f"{folder} has the splits {', '.join(map(str, names)) or '(none)'}, got split "
                f"{split!r}: name one of them as {folder}/<split>"
            )
        return folder / split, None
    if not (folder / STATE).is_file():
        raise InputError(
            f"{folder} must be a folder that datasets.save_to_disk wrote, got one without {STATE} "
            f"and {SPLITS}: name such a folder, or a file"
        )
    saved = _read(folder / STATE, "_data_files").get("_split")
    return folder, None if split == saved else split


def saved_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of the folder of one set, by column.

    Raises:
        InputError: if a file is missing or damaged, or the set was saved as a selection.
    """
    state = _read(folder / STATE, "_data_files")
    if state.get("_indices_data_files"):
        raise InputError(
            f"{folder} holds a set and, in a file of its own, which rows of it are meant: call "
            "flatten_indices() before save_to_disk"
        )
    for file in state["_data_files"]:
        path = folder / Path(file["filename"]).name
        with readable(path, "an arrow stream"), pa.memory_map(str(path)) as memory:
            for block in pa.ipc.open_stream(memory):
                yield from block.to_pylist()


def _read(path: Path, key: str) -> dict[str, Any]:
    """A JSON object that has a list under the key."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected a JSON object, got: {error}: save the set again"
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get(key), list):
        raise InputError(
            f"{path}: expected an object with a list {key!r}, got {found!r:.200}: save the set "
            "again"
        )
    return found
