"""What token ids of all language models have in common, and folders of models made on the spot."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bads_ppl.atomic import atomic_path, make_folder
from bads_ppl.errors import InputError
from models.pretrained import read_config

_FORMAT = 1  # of built folders: part of their names


# ------------------------------------------------------------------------------------- token ids


def known(folder: Path, tokenizer: Any) -> int:
    """Tokens that the model in a folder knows.

    Raises:
        InputError: if the tokenizer knows more.
    """
    vocabulary: int = read_config(folder).get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"the tokenizer of model {folder} knows {len(tokenizer)} tokens and its config.json "
            f"says vocab_size {vocabulary}: take the tokenizer that the model was made with"
        )
    return vocabulary


def special(folder: Path, name: str, found: int | None) -> int:
    """The id of a special token.

    Raises:
        InputError: if the tokenizer of the model in the folder has none.
    """
    if found is None:
        raise InputError(
            f"the tokenizer of model {folder} has no {name} token: take the tokenizer's files that "
            "belong to the model, or another model"
        )
    return found


def padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows as a tensor (N, longest), int64, with the filler on the right."""
    found = torch.full((len(rows), max(map(len, rows))), filler)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return found


# --------------------------------------------------------------------------- made of the texts


def trained_on(tokenizer: Any, trainer: Any, texts: Sequence[str], least: str) -> None:
    """Train a tokenizer of `tokenizers` on texts. The same texts give the same ids.

    Args:
        tokenizer: is changed in place.
        trainer: of the package, with the most tokens that there may be.
        texts: to train on.
        least: what a vocabulary holds at least, for the error message.

    Raises:
        InputError: if there are no texts, or the vocabulary does not hold what it must.
    """
    if not any(text.strip() for text in texts):
        raise InputError(f"a tokenizer needs texts to be trained on, got {len(texts)} without any")
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() > trainer.vocab_size:  # the trainer keeps every character
        raise InputError(
            f"vocabulary must be at least {tokenizer.get_vocab_size()}, {least}, got "
            f"{trainer.vocab_size}: try 8000"
        )


def write_tokenizer(tokenizer: Any, about: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder that is there."""
    with atomic_path(folder / "tokenizer.json") as path:
        tokenizer.save(str(path))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **about,
    }
    with atomic_path(folder / "tokenizer_config.json") as path:
        path.write_text(json.dumps(about, indent=2))


def write_config(config: Any, folder: Path) -> None:
    """Write config.json into a folder that is there."""
    with atomic_path(folder / "config.json") as path:
        path.write_text(config.to_json_string())


def built(
    cache: Path, name: str, parts: Sequence[Any], texts: Sequence[str], fill: Callable[[Path], None]
) -> Path:
    """The folder of a model without weights, from the cache or made and put there.

    Args:
        cache: folder of such folders.
        name: what the folder's name begins with.
        parts: what it is made from beside the texts; it goes by their content and these.
        texts: of its tokenizer.
        fill: writes the files into a folder.
    """
    content = hashlib.sha256(json.dumps([_FORMAT, *parts]).encode())
    for text in texts:
        content.update(json.dumps(text).encode() + b"\n")
    folder = cache / f"{name}-{content.hexdigest()[:16]}"
    if not folder.is_dir():
        with new_folder(folder) as temporary:
            fill(temporary)
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, which takes the name of `folder` once the body has filled it.

    Where another process has made `folder` meanwhile, that one stays.
    """
    make_folder(folder.parent, "cache")
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
