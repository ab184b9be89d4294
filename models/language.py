"""Language models as networks: what those with an encoder and those without share.

Any model of `transformers` that is given a text's tokens so far and says which comes next will do,
pretrained or built from its configuration. Dropout stays off: the regulariser here is the prior,
and two passes over the same batch must differ by nothing but theta. Where memory is short, a batch
goes through in pieces that are computed again in the backward pass (Chen et al., 2016); gradients
are those of the whole batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from bads_ppl.errors import InputError
from bads_ppl.shards import is_sharded
from models.pretrained import complete_model, find_model, no_bars_in_logs, read_config, width

IGNORED = -100
"""Stands in labels where no token counts."""

Precision = Literal["float32", "bfloat16"]
"""What a model computes in; its parameters and the loss are float32 in any case."""

INPUTS = ("ids", "mask", "labels")
"""What a language model is given."""


class Embedding(nn.Identity):
    """Gets the embedding (B, D) of every forward pass.

    Attributes:
        in_features: the width D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = width


class LanguageModel(nn.Module):
    """{"ids", "mask", "labels"} to log-probabilities (B, T) of the labels' tokens, 0 where none.

    `ids` and `mask` are (B, S) and `labels` (B, T), padded on the right, `IGNORED` in labels where
    no token counts. Columns that are padding in all rows cost nothing.

    Args:
        folder: id or local folder of a pretrained model; of one that is built, its folder.
        pretrained: whether it comes with weights. Otherwise initial values are drawn from torch's
            global generator.
        rows: rows per pass of the network, at least 1; None: the whole batch. Memory is that of
            one piece, at the cost of a second forward pass.
        precision: "bfloat16" computes products in half the memory, under autocast.
        checkpoint: keep the states between layers only, and compute the rest again.

    Attributes:
        embedding_layer: the module whose input is the embedding.
        embeds_alone: `forward` takes `embedding_only`, see `bads_ppl.program.Parts.forward`.

    Raises:
        InputError: if the model cannot be had, is of another kind or lacks weights, or an option
            is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        pretrained: bool,
        rows: int | None = None,
        precision: Precision = "float32",
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.embeds_alone = True
        if rows is not None and rows < 1:
            raise InputError(f"rows per pass must be at least 1, got {rows}: null takes all")
        if precision not in ("float32", "bfloat16"):
            raise InputError(f"precision must be float32 or bfloat16, got {precision!r}")
        self.rows = rows
        self.precision = precision
        folder = find_model(str(folder)) if pretrained else Path(folder)
        self.model = self._load(folder, pretrained)
        self.embedding_layer = Embedding(self._width(folder))
        if checkpoint:
            self._keep_little()
        self.train()

    def _load(self, folder: Path, pretrained: bool) -> Any:
        """The model of `transformers`."""
        raise NotImplementedError

    def _width(self, folder: Path) -> int:
        """Of the embedding of a row."""
        return width(folder)

    def _keep_little(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions have another name
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=self._again())
        for layer in self.model.modules():
            again = getattr(layer, "_gradient_checkpointing_func", None)
            if again is not None:
                layer._gradient_checkpointing_func = partial(_where_kept, again)

    def _again(self) -> dict[str, Any]:
        """Options of a checkpoint: there is nothing random, and parameters may be lent."""
        return {
            "use_reentrant": False,
            "preserve_rng_state": False,
            "context_fn": self._contexts,
        }

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around a part's first pass: nothing; around its second: the parameters of the first."""
        if is_sharded(self):  # its layers come by their parameters themselves
            return nullcontext(), nullcontext()
        return nullcontext(), _Parameters(self.model)

    def forward(self, input: dict[str, Tensor], *, embedding_only: bool = False) -> Tensor:
        """Log-probabilities (B, T), or with `embedding_only` the embedding (B, D) alone."""
        if embedding_only:
            (states,) = self._in_pieces(self._embed, input)
            embedding: Tensor = self.embedding_layer(states)
            return embedding
        log_probs, states = self._in_pieces(self._piece, input)
        self.embedding_layer(states)
        return log_probs

    def _in_pieces(
        self, function: Callable[..., tuple[Tensor, ...]], input: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """What a function of ids, mask and labels gives for all rows, from `rows` at a time."""
        rows = self.rows or len(input["ids"])
        if rows >= len(input["ids"]):
            return function(*(input[name] for name in INPUTS))
        order = self._lengths(input).argsort(stable=True)  # rows of about one length: less padding
        parts = [input[name][order].split(rows) for name in INPUTS]
        pieces = list(zip(*parts, strict=True))
        if torch.is_grad_enabled():
            found = [recomputed(function, *piece, **self._again()) for piece in pieces]
        else:
            found = [function(*piece) for piece in pieces]
        back = order.argsort()
        return tuple(torch.cat(values)[back] for values in zip(*found, strict=True))

    def _lengths(self, input: dict[str, Tensor]) -> Tensor:
        """Tokens (B,) that each row has the model work on."""
        return input["mask"].sum(1)

    def _piece(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (b, T) and embeddings (b, D) of some rows."""
        raise NotImplementedError

    def _embed(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor]:
        """Embeddings (b, D) of some rows, as `_piece` has them, with no more than they take."""
        raise NotImplementedError

    def autocast(self, device: torch.device) -> Any:
        """A context in which products are computed in the model's precision."""
        enabled = self.precision == "bfloat16"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    def save(self, folder: Path) -> None:
        """Write configuration and weights into a folder that is there, as `transformers` does."""
        no_bars_in_logs()
        self.model.save_pretrained(folder)


# ----------------------------------------------------------------------------- losses and padding


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood (B,) per token that counts, in nats.

    Args:
        output: log-probabilities (B, T) of the labels' tokens.
        target: their ids (B, T), `IGNORED` where there is none.
    """
    return sequence_loss(output, target) / (target != IGNORED).sum(1).clamp(min=1)


def sequence_loss(output: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood (B,) of each row's labels, in nats; arguments as of `token_loss`."""
    return -output.masked_fill(target == IGNORED, 0.0).sum(1)


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities (b, T) of the labels' tokens by logits (b, T, V), 0 where none counts."""
    loss = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -loss.view_as(labels)


def longest(mask: Tensor) -> int:
    """Columns (at least 1) up to the last one in which a row has a token."""
    filled = mask.any(0).nonzero()
    return int(filled[-1]) + 1 if len(filled) else 1


def cut(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows without the columns on the right that are padding in all of them."""
    end = longest(mask > 0)
    return ids[:, :end], mask[:, :end]


# ----------------------------------------------------------------------------------- the model


def _where_kept(again: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """A checkpointed call; a plain one where no backward pass follows, for which nothing is kept.

    Checkpoints of torch below 2.12 have no forward mode.
    """
    return again(function, *args) if torch.is_grad_enabled() else function(*args)


class _Parameters:
    """A context in which a model has the parameters that it has now, whatever it has meanwhile.

    `functional_call` lends a model other parameters for the time of a call; what is computed again
    later must be computed with those.
    """

    def __init__(self, model: nn.Module) -> None:
        self.values = [dict(module._parameters) for module in model.modules()]
        self.places = [module._parameters for module in model.modules()]
        self.others: list[list[dict[str, Any]]] = []

    def __enter__(self) -> None:
        self.others.append([dict(place) for place in self.places])
        self._put(self.values)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._put(self.others.pop())

    def _put(self, values: list[dict[str, Any]]) -> None:
        for place, own in zip(self.places, values, strict=True):
            place.update(own)


def language_model(kind: Any, folder: Path, pretrained: bool, *, what: str, such: str) -> Any:
    """The model in a folder, without dropout, with attention that can be differentiated twice.

    Args:
        kind: the class of `transformers` to make it with.
        folder: of the model.
        pretrained: whether it comes with weights. Otherwise initial values are drawn from torch's
            global generator.
        what: what it must be, for the error message.
        such: a model that is one.

    Raises:
        InputError: if it cannot be read or built, or lacks weights.
    """
    config = read_config(folder)
    _drop_nothing(config)
    no_bars_in_logs()
    options = {"config": config, "attn_implementation": "eager"}
    if pretrained:
        model = complete_model(kind, folder, **options)
    else:
        try:
            model = kind.from_config(**options).float()
        except ValueError as error:
            raise InputError(
                f"no {what} can be built from config.json in {folder} "
                f"({' '.join(str(error).split())}): take that of {such}"
            ) from error
    _search_plainly(model)
    return model


def _drop_nothing(config: Any) -> None:
    """No dropout, of units or layers, in a configuration and those inside it."""
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, int | float):
            setattr(config, name, 0.0)
        elif hasattr(value, "to_json_string"):
            _drop_nothing(value)


def _search_plainly(model: Any) -> None:
    """Of the model's settings for generation its special tokens alone stay.

    Settings for sampling would be in the way of a search, and some keep a model from being saved.
    """
    from transformers import GenerationConfig

    special = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    own = model.generation_config
    model.generation_config = GenerationConfig(
        **{name: getattr(own, name, None) for name in special}
    )
