"""A small sequence-to-sequence model, trained on the spot where no pretrained one can be had.

What a model without pretraining learns from two thousand texts is their names by heart. So it is
first taught to copy: sequences of random tokens, whose thirds it has to say in another order. Then
it learns from other pairs of source and target, with tokens that stand for others, differently in
every batch, so that what matters is in the source. Both are plain training (`inference.fitting`).
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bads_ppl.data import Data
from inference.options import ProxyOptions
from inference.scores import content_key
from inference.trained_folders import complete, depends, learned, write_model
from models.language import IGNORED
from models.seq2seq import Seq2Seq
from models.seq2seq_tokens import SPECIAL, Pieces

log = logging.getLogger(__name__)

PARTS, LENGTH = 3, 4
"""Parts of a random sequence, and tokens of a part."""

KEPT = (0.3, 0.6, 0.8, 1.0)
"""Shares of the vocabulary that stand for themselves in a batch, one of them drawn each time."""

SEQUENCES = 1000
"""Random sequences that a pass has."""

_FORMAT = 1  # of pretrained folders: part of their names

OPTIONS = ProxyOptions(
    learning_rate=5.0,
    prior_scale=10.0,
    clip=2.0,
    train_batch=40,
    preconditioned=True,
    schedule="warmdown",
    bucket=20,
)

Pair = tuple[str, str]
"""Source and target."""


@dataclass(frozen=True)
class Copying:
    """Draws random sequences and, as labels, their parts in another order.

    Args:
        vocabulary: tokens that there are; the special ones, which come first, are not drawn.
        end: id of the end token.
    """

    vocabulary: int
    end: int

    def __call__(self, input: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """New `ids` and `labels` (B, 13) in place of those that are there."""
        count, device = len(input["ids"]), input["ids"].device
        shape = (count, PARTS, LENGTH)
        parts = torch.randint(
            len(SPECIAL), self.vocabulary, shape, generator=generator, device=device
        )
        order = torch.rand(count, PARTS, generator=generator, device=device).argsort(1)
        moved = parts.gather(1, order[:, :, None].expand(shape))
        end = torch.full((count, 1), self.end, device=device)
        ids, labels = (torch.cat([part.flatten(1), end], 1) for part in (parts, moved))
        return {**input, "ids": ids, "labels": labels}

    def data(self, points: int) -> Data:
        """A set of so many sequences, each of them new whenever it is looked at to step on."""
        empty = torch.full((points, PARTS * LENGTH + 1), self.end)
        input = {"ids": empty, "mask": torch.ones_like(empty), "labels": empty}
        return Data(input, empty, name="sequences", augment=self)


@dataclass(frozen=True)
class Renaming:
    """Lets some tokens stand for others, the same throughout a batch, in sources and labels.

    Args:
        vocabulary: tokens that there are; the special ones, which come first, stay.
    """

    vocabulary: int

    def __call__(self, input: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        device = input["ids"].device
        which = torch.randint(len(KEPT), (), generator=generator, device=device)
        share = torch.tensor(KEPT, device=device)[which]
        free = torch.rand(self.vocabulary, generator=generator, device=device) >= share
        free[: len(SPECIAL)] = False
        places = free.nonzero()[:, 0]
        names = torch.arange(self.vocabulary, device=device)
        order = torch.randperm(len(places), generator=generator, device=device)
        names[places] = places[order]
        ids, labels = input["ids"], input["labels"]
        renamed = names[labels.clamp(min=0)].masked_fill(labels == IGNORED, IGNORED)
        return {**input, "ids": names[ids], "labels": renamed}


def pretrained_folder(
    built: Path,
    pairs: Sequence[Pair],
    *,
    steps: int,
    max_source: int,
    max_target: int,
    device: torch.device,
) -> Path:
    """The folder of a built model with weights, from beside it or trained and put there.

    Args:
        built: the folder of a model without weights (`models.seq2seq_tokens.build_folder`).
        pairs: what it learns from after it has learned to copy; none: nothing.
        steps: of each of the two.
        max_source: longest source in tokens; what is longer is cut.
        max_target: longest target, likewise.
        device: where it is trained.

    Raises:
        InputError: if a folder beside it is damaged.
        Diverged: if training fails.
        Stopped: after SIGINT or SIGTERM, with a checkpoint to go on from.
    """
    options = dataclasses.replace(OPTIONS, steps=steps)
    about = {
        **depends(built, options, device, _FORMAT),
        "copying": [PARTS, LENGTH, SEQUENCES],
    }
    more = {
        **about,
        "renaming": KEPT,
        "pairs": content_key({"pairs": list(pairs)}),
        "lengths": [max_source, max_target],
    }
    folder = built.with_name(f"{built.name}-pretrained-{content_key(more if pairs else about)}")
    if folder.is_dir():
        return complete(folder)
    pieces = Pieces(built, max_source, max_target)

    def train(
        name: str, network: Callable[[], nn.Module], data: Data, about: dict[str, Any]
    ) -> tuple[nn.Module, Path]:
        place = built.with_name(f"{built.name}-{name}-{content_key(about)}")
        log.info(f"training a model to {name} for {steps} steps, once; kept in {place}")
        found = learned(network, data, options=options, folder=place, about=about, device=device)
        return found, place

    copied = Copying(pieces.vocabulary, pieces.end).data(SEQUENCES)
    network, place = train(
        "copy", lambda: Seq2Seq(built, pretrained=False).to(device), copied, about
    )
    if pairs:
        copier = network
        network, place = train("say", lambda: copier.train(), _renamed(pieces, pairs), more)
    write_model(folder, built, network)
    if pairs:
        shutil.rmtree(place, ignore_errors=True)  # the copier may serve for other pairs
    return folder


def _renamed(pieces: Pieces, pairs: Sequence[Pair]) -> Data:
    """The pairs, with tokens that stand for others."""
    sources = pieces.source([source for source, _ in pairs])
    targets = pieces.target([target for _, target in pairs])
    padded = pieces.pad(sources, targets)
    return Data(
        padded,
        padded["labels"],
        name="pairs",
        lengths=padded["mask"].sum(1) + (padded["labels"] != IGNORED).sum(1),
        augment=Renaming(pieces.vocabulary),
    )
