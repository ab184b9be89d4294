"""Checkpoints: one safetensors file with tensors and, in its header, JSON about the run.

One file, replaced atomically, so that a checkpoint is either the last one or the one before.
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


def save_checkpoint(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and a JSON-able description to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(ready, temporary, {"format": FORMAT, "about": json.dumps(about)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and description from `path`.

    Raises:
        InputError: if the file is damaged or not a checkpoint of this program.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"checkpoint {path} cannot be read ({error}): it is damaged; remove it to start that "
            "chain anew"
        ) from error
    if header.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a bads-ppl checkpoint: its header says {header.get('format')!r}, "
            f"expected {FORMAT!r}"
        )
    about: dict[str, Any] = json.loads(header["about"])
    return tensors, about
