"""Pretrained text encoders of `transformers`: token ids and mean states.

Dropout stays off: the regulariser here is the prior, and two passes over the same texts must differ
by nothing but theta.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bads_ppl.errors import InputError
from models.lora import adapted
from models.pretrained import complete_model, read_config, read_tokenizer

Tune = Literal["frozen", "full", "lora"]
"""What of an encoder is trained: nothing, all of it, or a low-rank change of its linear layers."""

PASS = 64
"""Texts per pass of an encoder where no gradients are kept: little memory, no slower."""


# ------------------------------------------------------------------------------------- token ids


class Tokenizer:
    """Texts to token ids, of which an encoder sees the first `max_tokens`, special ones included.

    Args:
        folder: of the encoder.
        max_tokens: at most, per text.

    Raises:
        InputError: if the encoder has no tokenizer, or takes fewer tokens than that.
    """

    def __init__(self, folder: Path, max_tokens: int) -> None:
        self._tokenizer = read_tokenizer(folder)
        self.max_tokens = max_tokens
        self.padding: int = self._tokenizer.pad_token_id or 0  # never seen: the mask hides it
        special = self._tokenizer.num_special_tokens_to_add()
        positions = getattr(read_config(folder), "max_position_embeddings", None)
        most = min(self._tokenizer.model_max_length, positions or self._tokenizer.model_max_length)
        if not special < max_tokens <= most:
            raise InputError(
                f"max_tokens must be from {special + 1} to {most} for encoder {folder}, got "
                f"{max_tokens}: what a text has beyond it is cut off"
            )

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, the longer ones cut."""
        found: list[list[int]] = self._tokenizer(
            list(texts), truncation=True, max_length=self.max_tokens
        )["input_ids"]
        return found

    def counts(self, texts: Sequence[str]) -> Tensor:
        """Number of tokens (N,) of each text, before any are cut off."""
        return torch.tensor(
            [len(ids) for ids in self._tokenizer(list(texts), verbose=False)["input_ids"]]
        )

    def pad(self, ids: Sequence[list[int]], width: int) -> dict[str, Tensor]:
        """`ids` and `mask` (N, width) int64: 1 for tokens and, on the right, 0 for padding."""
        padded = torch.full((len(ids), width), self.padding)
        mask = torch.zeros_like(padded)
        for row, text in enumerate(ids):
            padded[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        return {"ids": padded, "mask": mask}


# ---------------------------------------------------------------------------------------- states


class Encoder(nn.Module):
    """Token ids and mask, both (B, L), to the mean (B, D) of the last states of each text's tokens.

    Args:
        folder: of the pretrained encoder; of an encoder-decoder the encoder is taken.
        tune: what is trained.
        rank: of the change of each linear layer, with tune "lora" (Hu et al., 2022), at least 1.

    Raises:
        InputError: if weights cannot be read or are missing, or `peft` is missing for "lora".
    """

    def __init__(self, folder: Path, tune: Tune = "frozen", rank: int = 8) -> None:
        super().__init__()
        self.model = adapted(_load(folder), rank) if tune == "lora" else _load(folder)
        if tune == "frozen":
            self.model.requires_grad_(False)

    def train(self, mode: bool = True) -> Encoder:
        """Dropout stays off, whatever the mode."""
        return super().train(False)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        ids, mask = tokens["ids"], tokens["mask"]
        if torch.is_grad_enabled() or len(ids) <= PASS:
            return self._mean(ids, mask)
        parts = zip(ids.split(PASS), mask.split(PASS), strict=True)
        return torch.cat([self._mean(*part) for part in parts])

    def _mean(self, ids: Tensor, mask: Tensor) -> Tensor:
        longest = int(mask.sum(1).max())  # columns that are padding in all rows cost time only
        ids, mask = ids[:, :longest], mask[:, :longest]
        states: Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(2).to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1)


def _load(folder: Path) -> Any:
    from transformers import AutoModel

    paired = read_config(folder).is_encoder_decoder
    spare = ("pooler.", "decoder.") if paired else ("pooler.",)
    model = complete_model(AutoModel, folder, spare=spare)
    if paired:
        model = model.get_encoder()
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # the mean of the states takes its place
    return model.eval()


@torch.no_grad()
def embed(texts: Sequence[str], tokenizer: Tokenizer, encoder: Encoder) -> Tensor:
    """Mean states (N, D) of texts, on the CPU; those of like length go through together."""
    device = next(encoder.parameters()).device
    ids = tokenizer(texts)
    order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
    found = []
    for start in range(0, len(order), PASS):
        some = [ids[k] for k in order[start : start + PASS]]
        tokens = tokenizer.pad(some, len(some[-1]))
        found.append(encoder({name: x.to(device) for name, x in tokens.items()}).cpu())
    values = torch.empty(len(ids), found[0].shape[1])
    values[order] = torch.cat(found)
    return values
