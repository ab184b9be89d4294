"""Sequence-to-sequence language models as networks: log-probabilities of the targets' tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from bads_ppl.errors import InputError
from bads_ppl.sites import evaluation_mode
from models.language import (
    IGNORED,
    LanguageModel,
    cut,
    language_model,
    log_probabilities,
    longest,
)
from models.pretrained import read_config


class Seq2Seq(LanguageModel):
    """{"ids", "mask", "labels"} to log-probabilities (B, T) of the targets' tokens, 0 where none.

    Any encoder-decoder will do. `ids` and `mask` are (B, S) and `labels` (B, T), as `Pieces.pad`
    makes them. The embedding is the state of each source's end token. The arguments are those of
    `LanguageModel`.

    Raises:
        InputError: if the model cannot be had, is no sequence-to-sequence model or lacks weights,
            or an option is out of range.
    """

    def _load(self, folder: Path, pretrained: bool) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        start = start_token(read_config(folder), folder)
        names = {"what": "sequence-to-sequence model", "such": "a T5"}
        model = language_model(AutoModelForSeq2SeqLM, folder, pretrained, **names)
        model.generation_config.decoder_start_token_id = start
        return model

    def _lengths(self, input: dict[str, Tensor]) -> Tensor:
        return super()._lengths(input) + (input["labels"] != IGNORED).sum(1)

    def _piece(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        ids, mask = cut(ids, mask)
        shown = labels[:, : longest(labels != IGNORED)]
        with self.autocast(ids.device):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels=shown),
                use_cache=False,
            )
        log_probs = log_probabilities(output.logits, shown)
        embedding = _at_the_end(output.encoder_last_hidden_state, mask)
        return functional.pad(log_probs, (0, labels.shape[1] - shown.shape[1])), embedding

    def _embed(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor]:
        ids, mask = cut(ids, mask)
        with self.autocast(ids.device):
            output = self.model.get_encoder()(input_ids=ids, attention_mask=mask)
        return (_at_the_end(output.last_hidden_state, mask),)

    @torch.no_grad()
    def generate(self, ids: Tensor, mask: Tensor, *, beams: int = 1, max_tokens: int) -> Tensor:
        """The likeliest targets (B, L) of sources (B, S), as token ids that begin with the start.

        Rows that have ended are padded.

        Args:
            ids: token ids of the sources.
            mask: 1 for tokens, 0 for padding.
            beams: beams of the search; 1: greedy.
            max_tokens: most tokens of a target.

        Raises:
            InputError: if beams or max_tokens is below 1.
        """
        for name, value in (("beams", beams), ("max_tokens", max_tokens)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        ids, mask = cut(ids, mask)
        with evaluation_mode(self.model), self.autocast(ids.device):
            found: Tensor = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                num_beams=beams,
                do_sample=False,
                max_new_tokens=max_tokens,
            )
        return found


def _at_the_end(states: Tensor, mask: Tensor) -> Tensor:
    """States (b, D) of the last tokens of sources, by states (b, S, D) and their mask (b, S)."""
    return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1].float()


def start_token(config: Any, folder: Path) -> int:
    """Id of the token from which a model's decoder starts.

    Raises:
        InputError: if the configuration names none.
    """
    found = getattr(config, "decoder_start_token_id", None)
    if found is None:
        raise InputError(
            f"config.json of model {folder} has no decoder_start_token_id: take a "
            "sequence-to-sequence model such as T5, or add the id (T5's is that of padding, 0)"
        )
    return int(found)
