"""Token ids of sequence-to-sequence models, and a tokenizer made of the texts at hand.

Where no pretrained model can be had, `build_folder` makes the folder of one without weights: a
tokenizer that was trained on the texts, and the configuration of a T5 (Raffel et al., 2020).
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bads_ppl.atomic import atomic_path, make_folder
from bads_ppl.errors import InputError
from models.pretrained import read_config, read_tokenizer
from models.seq2seq import IGNORED, start_token

SPECIAL = ("<pad>", "</s>", "<unk>")
"""Special tokens of a tokenizer that is made here, ids 0, 1 and 2 as T5 has them."""

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 512, "num_layers": 2},
    "small": {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 2048, "num_layers": 6},
}
"""Sizes of a T5; `num_layers` of the encoder, and as many of the decoder. "small" is T5-small."""

_FORMAT = 1  # of built folders: part of their names


class Pieces:
    """Texts to token ids of a sequence-to-sequence model and back.

    Args:
        folder: of the model.
        max_source: most tokens of a source that the model is shown, the end token included.
        max_target: most tokens of a target, likewise.

    Attributes:
        start: id of the token from which the decoder starts.
        padding: id of the padding token.
        end: id of the token with which sources and targets end.
        vocabulary: tokens that the model knows.

    Raises:
        InputError: if a length is below 2 or beyond the model's positions, the tokenizer cannot be
            read, has no padding or end token, or knows more tokens than the model.
    """

    def __init__(self, folder: Path, max_source: int, max_target: int) -> None:
        self._tokenizer = read_tokenizer(folder)
        config = read_config(folder)
        most = getattr(config, "max_position_embeddings", None)
        for name, length in (("max_source", max_source), ("max_target", max_target)):
            if length < 2 or (most is not None and length > most):
                raise InputError(
                    f"{name} must be at least 2 tokens{f' and at most {most}' if most else ''} for "
                    f"model {folder}, got {length}: the last one is the end token"
                )
        self.max_source, self.max_target = max_source, max_target
        self.padding: int = self._special(folder, "padding", self._tokenizer.pad_token_id)
        self.end: int = self._special(folder, "end", self._tokenizer.eos_token_id)
        self.start: int = start_token(config, folder)
        self.vocabulary: int = config.vocab_size
        if len(self._tokenizer) > config.vocab_size:
            raise InputError(
                f"the tokenizer of model {folder} knows {len(self._tokenizer)} tokens and its "
                f"config.json says vocab_size {config.vocab_size}: take the tokenizer that the "
                "model was made with"
            )

    def _special(self, folder: Path, name: str, found: int | None) -> int:
        if found is None:
            raise InputError(
                f"the tokenizer of model {folder} has no {name} token: take a sequence-to-sequence "
                "model such as T5, with the tokenizer's files that belong to it"
            )
        return found

    def source(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each source, the end token last, however long."""
        return self._ended(self._tokenizer(list(texts), truncation=False, verbose=False))

    def target(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each target, the end token last, however long."""
        found = self._tokenizer(text_target=list(texts), truncation=False, verbose=False)
        return self._ended(found)

    def _ended(self, encoded: Any) -> list[list[int]]:
        ids: list[list[int]] = encoded["input_ids"]
        return [text if text[-1:] == [self.end] else [*text, self.end] for text in ids]

    def text(self, ids: Tensor) -> list[str]:
        """The texts of token ids (B, L), special tokens and IGNORED left out."""
        shown = ids.masked_fill(ids == IGNORED, self.padding).tolist()
        found: list[str] = self._tokenizer.batch_decode(
            shown, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return found

    def pad(self, sources: Sequence[list[int]], targets: Sequence[list[int]]) -> dict[str, Tensor]:
        """N pairs of sources and targets as tensors, int64, padded on the right.

        What is longer than `max_source` or `max_target` is cut to that length, and keeps its end
        token.

        Returns:
            `ids` and `mask` (N, S), 1 for tokens and 0 for padding; `labels` (N, T), IGNORED where
            there is no token. S and T are the lengths of the longest there are.

        Raises:
            InputError: if there are not as many targets as sources, or none.
        """
        if len(sources) != len(targets) or not sources:
            raise InputError(
                f"each source needs one target, got {len(sources)} sources and {len(targets)} "
                "targets"
            )
        ids = self._padded(sources, self.max_source, self.padding)
        mask = self._padded([[1] * len(text) for text in sources], self.max_source, 0)
        return {
            "ids": ids,
            "mask": mask,
            "labels": self._padded(targets, self.max_target, IGNORED),
        }

    def _padded(self, rows: Sequence[list[int]], most: int, filler: int) -> Tensor:
        cut = [row if len(row) <= most else [*row[: most - 1], row[-1]] for row in rows]
        padded = torch.full((len(cut), max(map(len, cut))), filler)
        for place, row in zip(padded, cut, strict=True):
            place[: len(row)] = torch.tensor(row)
        return padded


# ------------------------------------------------------------------------- made of the texts


def train_tokenizer(texts: Sequence[str], vocabulary: int, folder: Path) -> None:
    """Train a tokenizer on texts and write its files into a folder that is there.

    Byte-pair encoding (Sennrich et al., 2016) of all characters that the texts have; normalisation,
    marks for spaces and special tokens are those of T5. The same texts give the same ids.

    Args:
        texts: to train on.
        vocabulary: most tokens; fewer where the texts do not support as many.
        folder: gets tokenizer.json and tokenizer_config.json.

    Raises:
        InputError: if there are no texts, or the vocabulary does not hold their characters.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    if not any(text.strip() for text in texts):
        raise InputError(f"a tokenizer needs texts to be trained on, got {len(texts)} without any")
    made = Tokenizer(models.BPE(unk_token=SPECIAL[2]))
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Nmt(),
            normalizers.NFKC(),
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    if made.get_vocab_size() > vocabulary:  # the trainer keeps every character
        raise InputError(
            f"vocabulary must be at least {made.get_vocab_size()}, the special tokens and the "
            f"characters of the texts, got {vocabulary}: try 8000"
        )
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[1]}", special_tokens=[(SPECIAL[1], 1)]
    )
    with atomic_path(folder / "tokenizer.json") as path:
        made.save(str(path))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "unk_token": SPECIAL[2],
        "clean_up_tokenization_spaces": False,
    }
    with atomic_path(folder / "tokenizer_config.json") as path:
        path.write_text(json.dumps(about, indent=2))


def build_folder(
    cache: Path, texts: Sequence[str], size: Literal["tiny", "small"], vocabulary: int
) -> Path:
    """The folder of a T5 without weights for these texts, from the cache or made and put there.

    It has config.json and the files of a tokenizer that was trained on the texts, and goes by
    their content, the size and the vocabulary.

    Args:
        cache: folder of such folders.
        texts: sources and targets.
        size: one of `SIZES`.
        vocabulary: most tokens of the tokenizer.

    Raises:
        InputError: for an unknown size, or as `train_tokenizer` does.
    """
    if size not in SIZES:
        raise InputError(f"size of a built model must be one of {sorted(SIZES)}, got {size!r}")
    folder = cache / f"t5-{size}-{_key(texts, size, vocabulary)}"
    if not folder.is_dir():
        with new_folder(folder) as temporary:
            train_tokenizer(texts, vocabulary, temporary)
            _write_config(temporary, size)
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


def _key(texts: Sequence[str], size: str, vocabulary: int) -> str:
    content = hashlib.sha256(json.dumps([_FORMAT, size, vocabulary]).encode())
    for text in texts:
        content.update(json.dumps(text).encode() + b"\n")
    return content.hexdigest()[:16]


def _write_config(folder: Path, size: str) -> None:
    from transformers import T5Config

    tokens = len(read_tokenizer(folder))
    config = T5Config(vocab_size=tokens, dropout_rate=0.0, decoder_start_token_id=0, **SIZES[size])
    with atomic_path(folder / "config.json") as path:
        path.write_text(config.to_json_string())
