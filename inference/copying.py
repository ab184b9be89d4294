"""What teaches a small language model to look at what it was told: to copy, before it learns texts.

Random tokens, whose parts it has to say in another order, and texts in which tokens stand for
others, differently in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bads_ppl.data import Data
from models.language import IGNORED

PARTS, LENGTH = 3, 4
"""Parts of a random sequence, and tokens of a part."""

KEPT = (0.3, 0.6, 0.8, 1.0)
"""Shares of the vocabulary that stand for themselves in a batch, one of them drawn each time."""

SEQUENCES = 1000
"""Random sequences that a pass has."""

Tokens = dict[str, Tensor]
"""`ids`, `mask` and `labels`, each (B, T)."""


@dataclass(frozen=True)
class Copying:
    """Draws random sequences and, as labels, their parts in another order.

    Args:
        vocabulary: tokens that there are.
        end: id of the end token.
        first: tokens that come first and are not drawn, the special ones.
    """

    vocabulary: int
    end: int
    first: int

    def __call__(self, input: Tokens, generator: torch.Generator) -> Tokens:
        """New tokens in place of those that are there."""
        count, device = len(input["ids"]), input["ids"].device
        shape = (count, PARTS, LENGTH)
        parts = torch.randint(
            self.first, self.vocabulary, shape, generator=generator, device=device
        )
        order = torch.rand(count, PARTS, generator=generator, device=device).argsort(1)
        moved = parts.gather(1, order[:, :, None].expand(shape))
        end = torch.full((count, 1), self.end, device=device)
        ids, labels = self.laid_out(parts.flatten(1), moved.flatten(1), end)
        return {"ids": ids, "mask": torch.ones_like(ids), "labels": labels}

    def laid_out(self, parts: Tensor, moved: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and labels, of the tokens (B, 12) in both orders and the end (B, 1).

        Both (B, 13), for a sequence-to-sequence model.
        """
        return torch.cat([parts, end], 1), torch.cat([moved, end], 1)

    def data(self, points: int = SEQUENCES) -> Data:
        """A set of so many sequences, each of them new whenever it is looked at to step on."""
        empty = torch.full((points, PARTS * LENGTH), self.end)
        ids, labels = self.laid_out(empty, empty, empty[:, :1])
        input = {"ids": ids, "mask": torch.ones_like(ids), "labels": labels}
        return Data(input, labels, name="sequences", augment=self)


class Repeating(Copying):
    """The same for a causal model, which says the second order after the first."""

    def laid_out(self, parts: Tensor, moved: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Both (B, 25); labels count from the second order on."""
        none = torch.full_like(parts, IGNORED)
        return torch.cat([parts, moved, end], 1), torch.cat([none, moved, end], 1)


@dataclass(frozen=True)
class Renaming:
    """Lets some tokens stand for others, the same throughout a batch, in ids and labels.

    Args:
        vocabulary: tokens that there are.
        first: tokens that come first and stay, the special ones.
    """

    vocabulary: int
    first: int

    def __call__(self, input: Tokens, generator: torch.Generator) -> Tokens:
        device = input["ids"].device
        which = torch.randint(len(KEPT), (), generator=generator, device=device)
        share = torch.tensor(KEPT, device=device)[which]
        free = torch.rand(self.vocabulary, generator=generator, device=device) >= share
        free[: self.first] = False
        places = free.nonzero()[:, 0]
        names = torch.arange(self.vocabulary, device=device)
        order = torch.randperm(len(places), generator=generator, device=device)
        names[places] = places[order]
        ids, labels = input["ids"], input["labels"]
        renamed = names[labels.clamp(min=0)].masked_fill(labels == IGNORED, IGNORED)
        return {**input, "ids": names[ids], "labels": renamed}
