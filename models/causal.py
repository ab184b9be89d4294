"""Causal language models as networks: log-probabilities of the tokens that responses consist of."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bads_ppl.errors import InputError
from models.language import (
    IGNORED,
    LanguageModel,
    Precision,
    cut,
    language_model,
    log_probabilities,
)
from models.lora import CONFIG, adapted, adapter_base, save_adapter, save_base, with_adapter
from models.pretrained import complete_model, find_model, no_bars_in_logs, read_tokenizer

Tune = Literal["full", "lora"]
"""What is trained: the whole model, or a low-rank change of its linear layers."""


class Causal(LanguageModel):
    """{"ids", "mask", "labels"} to log-probabilities (B, T) of the labels' tokens, 0 where none.

    All are (B, T), as `Chat.pad` makes them: labels[b, t] is the token at place t where it counts,
    as those of responses do, else `IGNORED`. Its log-probability comes from the logits at t - 1;
    at place 0 there are none, so that nothing counts there. The embedding of a row is the mean of
    its token embeddings, those of the input embedding matrix, padding left out.

    Args:
        folder: as of `LanguageModel`, like pretrained, rows, precision and checkpoint.
        pretrained: see there.
        tune: what is trained.
        rank: of the change of each linear layer, with tune "lora" (Hu et al., 2022), at least 1.
        rows: see there.
        precision: see there.
        checkpoint: see there.

    Raises:
        InputError: if the model cannot be had, is not causal or lacks weights, an option is out of
            range, or `peft` is missing for "lora".
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        pretrained: bool,
        tune: Tune = "full",
        rank: int = 8,
        rows: int | None = None,
        precision: Precision = "float32",
        checkpoint: bool = False,
    ) -> None:
        if tune not in ("full", "lora"):
            raise InputError(f"tune must be full or lora, got {tune!r}")
        super().__init__(
            folder, pretrained=pretrained, rows=rows, precision=precision, checkpoint=checkpoint
        )
        self.base, self.tune = str(folder), tune
        if tune == "lora":
            self.model = adapted(self.model, rank)
        self._chooses = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def _load(self, folder: Path, pretrained: bool) -> Any:
        from transformers import AutoModelForCausalLM

        names = {"what": "causal language model", "such": "a Llama"}
        model = language_model(AutoModelForCausalLM, folder, pretrained, **names)
        _check_causal(model, folder)
        return model

    def _width(self, folder: Path) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    def _piece(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        ids, mask = cut(ids, mask)
        logits, columns = self._logits(ids, mask, labels)
        found = log_probabilities(logits, labels[:, columns])
        none = found.new_zeros(labels.shape)
        return none.index_copy(1, columns, found), self._embeddings(ids, mask)

    def _logits(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (b, C, V) for those columns (C,) in which any row has a label."""
        columns = (labels[:, 1 : ids.shape[1]] != IGNORED).any(0).nonzero().flatten()
        chosen = {"logits_to_keep": columns} if self._chooses else {}
        with self.autocast(ids.device):
            output = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **chosen)
        logits = output.logits if self._chooses else output.logits[:, columns]
        return logits, columns + 1

    def _embed(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (self._embeddings(*cut(ids, mask)),)

    @torch.no_grad()
    def _embeddings(self, ids: Tensor, mask: Tensor) -> Tensor:
        weight = mask.unsqueeze(2).float()
        states = self.model.get_input_embeddings()(ids).float()
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)

    @torch.no_grad()
    def read(self, input: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T), and whether the likeliest token is the label's (B, T), bool.

        The latter is False where no token counts.
        """
        log_probs, hits = self._in_pieces(self._read, input)
        return log_probs, hits

    def _read(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, columns = self._logits(*cut(ids, mask), labels)
        shown = labels[:, columns]
        found = log_probabilities(logits, shown)
        hits = logits.argmax(2) == shown
        none = torch.zeros_like(labels)
        return (
            none.to(found.dtype).index_copy(1, columns, found),
            none.bool().index_copy(1, columns, hits),
        )

    def save(self, folder: Path, base: str | None = None) -> None:
        """Write the model into a folder that is there, or with tune "lora" the adapter.

        The former is read as any model of `transformers`, the latter by `peft`, which puts it on
        the model that it was made for.

        Args:
            folder: gets the files.
            base: id or folder of that model, as the adapter is to tell; None: as was given.
        """
        if self.tune == "lora":
            save_adapter(self.model, base or self.base, "CAUSAL_LM", folder)
        else:
            super().save(folder)

    def save_base(self, folder: Path) -> None:
        """Write the model that an adapter is made for into a folder that is there."""
        no_bars_in_logs()
        save_base(self.model, folder)


@torch.no_grad()
def _check_causal(model: Any, folder: Path) -> None:
    """Refuse a model whose logits change with what comes after them: it would see its labels."""
    ids = torch.tensor([[1, 1], [1, 2]])
    first, second = model(input_ids=ids, use_cache=False).logits[:, 0].float()
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.std())):
        raise InputError(
            f"model {folder} is no causal language model: what it says of a token depends on the "
            "tokens that follow; take one that goes from left to right, such as a Llama"
        )


def read_causal(name: str | Path, adapter: Path | None = None) -> tuple[Any, Any]:
    """A causal language model as it was saved, in float32 on the CPU, and its tokenizer.

    Args:
        name: id or folder of the model, or the folder of an adapter, which is put on the model
            that it was made for; the tokenizer is the adapter's, where it has one.
        adapter: folder of an adapter to put on the model.

    Raises:
        InputError: if the model cannot be had, is not causal or lacks weights, or the adapter does
            not fit it.
    """
    from transformers import AutoModelForCausalLM

    if (Path(name) / CONFIG).is_file():
        if adapter is not None:
            raise InputError(
                f"{name} is an adapter itself, got adapter={adapter} beside it: give the folder of "
                "the model that it was made for"
            )
        return _on_its_base(Path(name))
    folder = find_model(str(name))
    model = complete_model(AutoModelForCausalLM, folder)
    _check_causal(model, folder)
    tokenizer = read_tokenizer(folder)
    return model if adapter is None else with_adapter(model, adapter), tokenizer


def _on_its_base(adapter: Path) -> tuple[Any, Any]:
    base = adapter_base(adapter)
    try:
        model, tokenizer = read_causal(base, adapter)
    except InputError as error:
        raise InputError(
            f"adapter {adapter} was made for model {base!r}. {error} (adapter={adapter} puts it on "
            "the model that is named)"
        ) from error
    own = (adapter / "tokenizer_config.json").is_file()  # may have a chat template that it lacks
    return model, read_tokenizer(adapter) if own else tokenizer
