"""Token ids of sequence-to-sequence models, and a tokenizer made of the texts at hand.

Where no pretrained model can be had, `build_folder` makes the folder of one without weights: a
tokenizer that was trained on the texts, and the configuration of a T5 (Raffel et al., 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from bads_ppl.errors import InputError
from models.language import IGNORED
from models.pretrained import read_config, read_tokenizer
from models.seq2seq import start_token
from models.tokens import (
    built,
    known,
    padded,
    special,
    trained_on,
    write_config,
    write_tokenizer,
)

SPECIAL = ("<pad>", "</s>", "<unk>")
"""Special tokens of a tokenizer that is made here, ids 0, 1 and 2 as T5 has them."""

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 512, "num_layers": 2},
    "small": {"d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 2048, "num_layers": 6},
}
"""Sizes of a T5; `num_layers` of the encoder, and as many of the decoder. "small" is T5-small."""


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
            read, has no padding or end token, or does not fit the model's.
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
        self.padding: int = special(folder, "padding", self._tokenizer.pad_token_id)
        self.end: int = special(folder, "end", self._tokenizer.eos_token_id)
        expected = getattr(config, "eos_token_id", None)
        if isinstance(expected, int) and expected != self.end:
            raise InputError(
                f"the end token of model {folder} has id {self.end} in its tokenizer and "
                f"eos_token_id {expected} in its config.json: take the tokenizer that the model "
                "was made with"
            )
        self.start: int = start_token(config, folder)
        self.vocabulary: int = known(folder, self._tokenizer)

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
        sources = [self._cut(source, self.max_source) for source in sources]
        targets = [self._cut(target, self.max_target) for target in targets]
        return {
            "ids": padded(sources, self.padding),
            "mask": padded([[1] * len(source) for source in sources], 0),
            "labels": padded(targets, IGNORED),
        }

    def _cut(self, row: list[int], most: int) -> list[int]:
        return row if len(row) <= most else [*row[: most - 1], row[-1]]


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
    trained_on(made, trainer, texts, "the special tokens and the characters of the texts")
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIAL[1]}", special_tokens=[(SPECIAL[1], 1)]
    )
    names = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[1], "unk_token": SPECIAL[2]}
    write_tokenizer(made, names, folder)


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

    def fill(folder: Path) -> None:
        train_tokenizer(texts, vocabulary, folder)
        _write_config(folder, size)

    return built(cache, f"t5-{size}", (size, vocabulary), texts, fill)


def _write_config(folder: Path, size: str) -> None:
    from transformers import T5Config

    tokens = len(read_tokenizer(folder))
    config = T5Config(vocab_size=tokens, dropout_rate=0.0, decoder_start_token_id=0, **SIZES[size])
    write_config(config, folder)
