"""A classifier of texts: a pretrained encoder, trained or not, with a small head.

Of a frozen encoder the network is the head alone: its inputs are the encoder's mean states, which
are computed once for all. Otherwise inputs are token ids and a mask.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as functional
from torch import Tensor, nn

from bads_ppl.errors import InputError
from models.encoder import Encoder, Tune
from models.pretrained import MINILM, find_model, width


class TextClassifier(nn.Module):
    """Mean states (B, D), or {"ids", "mask"} (B, L) unless frozen, to logits (B, classes).

    The head scales each text's D values to mean 0 and variance 1, so that one step size suits all
    encoders; one hidden layer of `hidden` rectified units follows, or none.

    Args:
        classes: number of classes.
        encoder: id or local folder of the encoder.
        tune: what of it is trained: "frozen" (nothing), "full", "lora".
        hidden: units of the hidden layer; 0: the head is linear.
        rank: of the low-rank change of "lora".

    Raises:
        InputError: if the encoder cannot be had, or `hidden` is negative.
    """

    def __init__(
        self,
        classes: int,
        *,
        encoder: str = MINILM,
        tune: Tune = "frozen",
        hidden: int = 128,
        rank: int = 8,
    ) -> None:
        super().__init__()
        if hidden < 0:
            raise InputError(f"hidden must be at least 0 units, got {hidden}")
        folder = find_model(encoder)
        self.encoder = None if tune == "frozen" else Encoder(folder, tune, rank)
        self.width = width(folder)
        layers: list[nn.Module] = [nn.Linear(hidden or self.width, classes)]
        if hidden:
            layers = [nn.Linear(self.width, hidden), nn.ReLU(), *layers]
        self.head = nn.Sequential(*layers)
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # He et al., 2015
                nn.init.zeros_(layer.bias)

    def forward(self, input: Any) -> Tensor:
        states = input if self.encoder is None else self.encoder(input)
        logits: Tensor = self.head(functional.layer_norm(states, (self.width,)))
        return logits
