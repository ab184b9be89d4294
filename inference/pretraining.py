"""A small sequence-to-sequence model, trained on the spot where no pretrained one can be had.

What a model without pretraining learns from two thousand texts is their names by heart. So it is
first taught to copy: sequences of random tokens, whose thirds it has to say in another order. Then
it learns from other pairs of source and target, with tokens that stand for others, differently in
every batch, so that what matters is in the source. Both are plain training (`inference.fitting`).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bads_ppl.data import Data
from inference.copying import KEPT, LENGTH, PARTS, SEQUENCES, Copying, Renaming
from inference.options import ProxyOptions
from inference.scores import content_key
from inference.trained_folders import depends, learned_beside, made_once, write_model
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
    folder = built.with_name(f"{built.name}-pretrained-{content_key(more if pairs else about)}")

    def make() -> None:
        pieces = Pieces(built, max_source, max_target)
        copied = Copying(pieces.vocabulary, pieces.end, len(SPECIAL)).data()
        learn = partial(learned_beside, built, options=options, device=device)
        network, place = learn(
            "copy", lambda: Seq2Seq(built, pretrained=False).to(device), copied, about
        )
        if pairs:
            copier = network
            said = _renamed(pieces, pairs)
            network, place = learn("say", lambda: copier.train(), said, more)
        write_model(folder, built, network)
        if pairs:
            shutil.rmtree(place, ignore_errors=True)  # the copier may serve for other pairs

    return made_once(folder, make)


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
