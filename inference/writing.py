"""Texts that a network writes for the points of a test set, and how near they are to references.

Scores are those of a whole test set, from 0 to 100, by sacrebleu with its defaults: BLEU (Papineni
et al., 2002) counts shared runs of words, chrF (Popović, 2015) shared runs of letters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.sites import evaluation_mode

SHOWN = 20
"""Written texts that a run keeps for its reader."""


@dataclass(frozen=True)
class Writing:
    """How a task's texts are written and scored.

    Attributes:
        text: token ids (B, L) to B texts.
        sources: what each of the M test points is written from.
        references: for each, the texts that would be right, one at least.
        beams: of the search; 1: always the likeliest token.
        max_tokens: of a text, at most.
        batch: test points that go through the network together.
        curve: test points that are written for at each evaluation along a chain; 0: none.

    Raises:
        InputError: for numbers out of range, or a point without reference.
    """

    text: Callable[[Tensor], list[str]]
    sources: Sequence[str]
    references: Sequence[Sequence[str]]
    beams: int = 1
    max_tokens: int = 64
    batch: int = 64
    curve: int = 100

    def __post_init__(self) -> None:
        for name, least in (("beams", 1), ("max_tokens", 2), ("batch", 1), ("curve", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        lacking = [k for k, several in enumerate(self.references) if not several]
        if lacking or len(self.references) != len(self.sources):
            raise InputError(
                f"every test point must have a reference, got {len(self.references)} lists for "
                f"{len(self.sources)} points, empty at {lacking[:5]}: leave out what has none"
            )

    def some(self) -> Tensor:
        """Rows of the test points that are looked at along a chain, evenly spaced."""
        count = min(self.curve, len(self.sources))
        return torch.arange(count) * (len(self.sources) - 1) // max(count - 1, 1)

    def every(self) -> Tensor:
        """Rows of all test points."""
        return torch.arange(len(self.sources))

    @torch.no_grad()
    def write(self, network: Any, test: Data, rows: Tensor) -> list[str]:
        """Texts for rows (B,) of the test set; sources of like length go through together."""
        if not len(rows):
            return []
        lengths = test.input["mask"].sum(1)[rows.to(test.device)].cpu()
        order = lengths.argsort(stable=True)
        found = [""] * len(rows)
        with evaluation_mode(network):
            for places in order.split(self.batch):
                batch = test.batch(rows[places].to(test.device))
                ids = network.generate(
                    batch.input["ids"],
                    batch.input["mask"],
                    beams=self.beams,
                    max_tokens=self.max_tokens,
                )
                for place, text in zip(places.tolist(), self.text(ids), strict=True):
                    found[place] = text
        return found

    def score(self, texts: Sequence[str], rows: Tensor) -> dict[str, float]:
        """BLEU and chrF of texts written for rows (B,), from 0 to 100; empty for no rows."""
        if not len(rows):
            return {}
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        several = [self.references[row] for row in rows.tolist()]
        most = max(map(len, several))
        streams: Any = [[one[k] if k < len(one) else None for one in several] for k in range(most)]
        return {
            "bleu": float(BLEU().corpus_score(list(texts), streams).score),
            "chrf": float(CHRF().corpus_score(list(texts), streams).score),
        }
