"""Checkpoints: one safetensors file with tensors and, in its header, JSON about the run.

One file, replaced atomically, so that a checkpoint is either the last one or the one before. Files
of other kinds that a run leaves for later runs have the same form under a format of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bads_ppl.atomic import atomic_path
from bads_ppl.errors import InputError

FORMAT = "bads-ppl checkpoint 1"


def save_checkpoint(
    path: Path, tensors: dict[str, Tensor], about: dict[str, Any], *, format: str = FORMAT
) -> None:
    """Write tensors and a JSON-able description to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(ready, temporary, {"format": format, "about": json.dumps(about)})


def load_checkpoint(
    path: Path, *, format: str = FORMAT, remedy: str = "remove it to start that chain anew"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and description from `path`.

    Args:
        path: the file.
        format: what its header must say that it is: this program's name, the kind, a number.
        remedy: what to do where it is damaged.

    Raises:
        InputError: if the file is damaged or not of this format.
    """
    kind = format.removeprefix("bads-ppl ").rpartition(" ")[0]
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{kind} {path} cannot be read ({error}): it is damaged; {remedy}"
        ) from error
    if header.get("format") != format:
        raise InputError(
            f"{path} is not a bads-ppl {kind}: its header says {header.get('format')!r}, "
            f"expected {format!r}"
        )
    about: dict[str, Any] = json.loads(header["about"])
    return tensors, about
