"""A small sequence-to-sequence model, trained on the spot where no pretrained one can be had.

What a model without pretraining learns from two thousand texts is their names by heart. So it is
first taught to copy: sequences of random tokens, whose thirds it has to say in another order. Then
it learns from other pairs of source and target, with tokens that stand for others, differently in
every batch, so that what matters is in the source. Both are plain training (`inference.fitting`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from bads_ppl.data import Data
from inference.copying import KEPT, LENGTH, PARTS, SEQUENCES, Copying, Renaming
from inference.options import ProxyOptions
from inference.scores import content_key
from inference.trained_folders import Lesson, depends, taught
from models.language import IGNORED
from models.seq2seq import Seq2Seq
from models.seq2seq_tokens import SPECIAL, Pieces

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
    pieces = Pieces(built, max_source, max_target)
    copying = Copying(pieces.vocabulary, pieces.end, len(SPECIAL))
    lessons = [Lesson("copy", about, copying.data)]
    if pairs:
        lessons.append(Lesson("say", more, lambda: _renamed(pieces, pairs)))
    fresh = lambda: Seq2Seq(built, pretrained=False).to(device)
    return taught(built, fresh, lessons, options=options, device=device)


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
        augment=Renaming(pieces.vocabulary, len(SPECIAL)),
    )
