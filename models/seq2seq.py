"""Sequence-to-sequence language models as networks: log-probabilities of the targets' tokens.

Any encoder-decoder of `transformers` will do, pretrained or built from its configuration. Dropout
stays off: the regulariser here is the prior, and two passes over the same batch must differ by
nothing but theta. Where memory is short, a batch goes through in pieces that are computed again in
the backward pass (Chen et al., 2016); gradients are those of the whole batch.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from bads_ppl.errors import InputError
from bads_ppl.sites import evaluation_mode
from models.pretrained import find_model, load_weights, no_bars_in_logs, read_config, width

IGNORED = -100
"""Stands in labels where a target has no token."""

Precision = Literal["float32", "bfloat16"]
"""What a model computes in; its parameters and the loss are float32 in any case."""


class Embedding(nn.Identity):
    """Gets the embedding (B, D) of every forward pass: the state of each source's end token.

    Attributes:
        in_features: the width D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_features = width


class Seq2Seq(nn.Module):
    """{"ids", "mask", "labels"} to log-probabilities (B, T) of the targets' tokens, 0 where none.

    `ids` and `mask` are (B, S) and `labels` (B, T), as `Pieces.pad` makes them: padded on the
    right, `IGNORED` in labels where there is no token. Columns that are padding in all rows cost
    nothing.

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

    Raises:
        InputError: if the model cannot be had, is no sequence-to-sequence model or lacks weights,
            or an option is out of range.
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
        if rows is not None and rows < 1:
            raise InputError(f"rows per pass must be at least 1, got {rows}: null takes all")
        if precision not in ("float32", "bfloat16"):
            raise InputError(f"precision must be float32 or bfloat16, got {precision!r}")
        self.rows = rows
        self.precision = precision
        folder = find_model(str(folder)) if pretrained else Path(folder)
        self.model = _model(folder, pretrained)
        self.embedding_layer = Embedding(width(folder))
        if checkpoint:
            self._keep_little()
        self.train()

    def _keep_little(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions have another name
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=self._again())

    def _again(self) -> dict[str, Any]:
        """Options of a checkpoint: there is nothing random, and parameters may be lent."""
        return {
            "use_reentrant": False,
            "preserve_rng_state": False,
            "context_fn": self._contexts,
        }

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around a part's first pass: nothing; around its second: the parameters of the first."""
        return nullcontext(), _Parameters(self.model)

    def forward(self, input: dict[str, Tensor]) -> Tensor:
        rows = self.rows or len(input["ids"])
        if rows >= len(input["ids"]):
            log_probs, states = self._piece(input["ids"], input["mask"], input["labels"])
            self.embedding_layer(states)
            return log_probs
        length = input["mask"].sum(1) + (input["labels"] != IGNORED).sum(1)
        order = length.argsort(stable=True)  # pieces of like rows have little padding
        parts = [input[name][order].split(rows) for name in ("ids", "mask", "labels")]
        pieces = list(zip(*parts, strict=True))
        if torch.is_grad_enabled():
            found = [recomputed(self._piece, *piece, **self._again()) for piece in pieces]
        else:
            found = [self._piece(*piece) for piece in pieces]
        back = order.argsort()
        self.embedding_layer(torch.cat([states for _, states in found])[back])
        return torch.cat([log_probs for log_probs, _ in found])[back]

    def _piece(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (b, T) and embeddings (b, D) of some rows."""
        ids, mask = _cut(ids, mask)
        longest = _longest(labels != IGNORED)
        shown = labels[:, :longest]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels=shown),
                use_cache=False,
            )
        loss = functional.cross_entropy(
            output.logits.flatten(0, 1).float(),
            shown.flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        log_probs = -loss.view_as(shown)
        states = output.encoder_last_hidden_state
        last = mask.sum(1) - 1
        embedding = states[torch.arange(len(ids), device=ids.device), last].float()
        return functional.pad(log_probs, (0, labels.shape[1] - longest)), embedding

    def save(self, folder: Path) -> None:
        """Write configuration and weights into a folder that is there, as `transformers` does."""
        no_bars_in_logs()
        self.model.save_pretrained(folder)

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
        ids, mask = _cut(ids, mask)
        enabled = self.precision == "bfloat16"
        with (
            evaluation_mode(self.model),
            torch.autocast(ids.device.type, torch.bfloat16, enabled=enabled),
        ):
            found: Tensor = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                num_beams=beams,
                do_sample=False,
                max_new_tokens=max_tokens,
            )
        return found


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean negative log-likelihood (B,) per token of the target, in nats.

    Args:
        output: log-probabilities (B, T) of the targets' tokens.
        target: their ids (B, T), `IGNORED` where there is none.
    """
    return sequence_loss(output, target) / (target != IGNORED).sum(1).clamp(min=1)


def sequence_loss(output: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood (B,) of each target, in nats; arguments as of `token_loss`."""
    return -output.masked_fill(target == IGNORED, 0.0).sum(1)


# ----------------------------------------------------------------------------------- the model


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


def _longest(mask: Tensor) -> int:
    """Columns (at least 1) up to the last one in which a row has a token."""
    filled = mask.any(0).nonzero()
    return int(filled[-1]) + 1 if len(filled) else 1


def _cut(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sources without the columns on the right that are padding in all rows."""
    longest = _longest(mask > 0)
    return ids[:, :longest], mask[:, :longest]


def _model(folder: Path, pretrained: bool) -> Any:
    """The model in a folder, without dropout, with attention that can be differentiated twice."""
    from transformers import AutoModelForSeq2SeqLM, GenerationConfig

    config = read_config(folder)
    _drop_nothing(config)
    start = start_token(config, folder)
    no_bars_in_logs()
    options = {"config": config, "attn_implementation": "eager"}
    if pretrained:
        model = _complete(folder, **options)
    else:
        try:
            model = AutoModelForSeq2SeqLM.from_config(**options)
        except ValueError as error:
            raise InputError(
                f"no sequence-to-sequence model can be built from config.json in {folder} "
                f"({' '.join(str(error).split())}): take that of a T5"
            ) from error
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=getattr(config, "bos_token_id", None),
    )
    return model


def _drop_nothing(config: Any) -> None:
    """No dropout, of units or layers, in a configuration and those inside it."""
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, int | float):
            setattr(config, name, 0.0)
        elif hasattr(value, "to_json_string"):
            _drop_nothing(value)


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


def _complete(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    model, found = load_weights(AutoModelForSeq2SeqLM, folder, output_loading_info=True, **options)
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise InputError(
            f"model {folder} lacks the weights of {len(names)} parameters, the first of them "
            f"{names[0]}: they would be random; give all *.safetensors of the model"
        )
    return model
