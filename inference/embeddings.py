"""What a network takes of texts: mean states of a frozen encoder, or token ids.

A frozen encoder sees every collection of texts once. Its states are kept in the cache under a hash
of the texts and of the encoder's files, chunk by chunk, so that a pass that was stopped goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.scores import Points, score_table
from models.encoder import Encoder, Tokenizer, Tune, embed
from models.pretrained import find_model

CHUNK = 512
"""Texts between two writes."""


@dataclass(frozen=True)
class Encoding:
    """How texts become inputs of a network.

    Attributes:
        encoder: id or local folder of a pretrained encoder.
        tune: what of it is trained: "frozen" makes its states the inputs, "full" and "lora" token
            ids and their mask.
        max_tokens: tokens of a text that the encoder sees.
        cache: folder of the states.
        device: where a frozen encoder runs.
        progress: show a progress bar; None: when standard error is a terminal.
    """

    encoder: str
    tune: Tune
    max_tokens: int
    cache: Path
    device: torch.device
    progress: bool | None = None

    @cached_property
    def folder(self) -> Path:
        """Where the encoder's files are; raises InputError if it cannot be had."""
        return find_model(self.encoder)

    @cached_property
    def version(self) -> str:
        """A hash of the encoder's files."""
        return folder_version(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder, self.max_tokens)

    @cached_property
    def _network(self) -> Encoder:
        return Encoder(self.folder).to(self.device)

    def inputs(self, texts: Sequence[str]) -> Any:
        """States (N, D), or {"ids", "mask"}, both (N, max_tokens), of the N texts.

        Raises:
            InputError: if the encoder cannot be had, or max_tokens does not suit it.
        """
        if self.tune != "frozen":
            return self.tokenizer.pad(self.tokenizer(texts), self.max_tokens)
        return self._table(
            "states",
            texts,
            lambda some: embed(some, self.tokenizer, self._network),
            max_tokens=self.max_tokens,
        )

    def cut(self, texts: Sequence[str]) -> Tensor:
        """For each of the N texts, whether it has more tokens than the encoder sees."""
        return self._table("tokens", texts, self.tokenizer.counts) > self.max_tokens

    def _table(self, name: str, texts: Sequence[str], compute: Any, **about: Any) -> Tensor:
        return score_table(
            self.cache,
            name,
            Points.of_texts(texts),
            lambda rows: compute([texts[row] for row in rows.tolist()]),
            {"encoder": self.version, **about},
            chunk=CHUNK,
            progress=self.progress,
        )


def folder_version(folder: Path) -> str:
    """What tells versions of a model in a local folder apart: a hash of its files' content."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*")):
        if path.suffix in (".safetensors", ".json", ".model", ".txt", ".jinja"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
