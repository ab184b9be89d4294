"""A small sequence-to-sequence model, trained on the spot where no pretrained one can be had.

What a model without pretraining learns from two thousand texts is their names by heart. So it is
first taught to copy: sequences of random tokens, whose thirds it has to say in another order. Then
it learns from other pairs of source and target, with tokens that stand for others, differently in
every batch, so that what matters is in the source. Both are plain training (`inference.fitting`).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bads_ppl.data import Data
from inference.fitting import fit, fitted
from inference.options import ProxyOptions
from inference.scores import content_key
from models.seq2seq import IGNORED, Seq2Seq, token_loss
from models.seq2seq_tokens import SPECIAL, Pieces, new_folder

PARTS, LENGTH = 3, 4
"""Parts of a random sequence, and tokens of a part."""

KEPT = (0.3, 0.6, 0.8, 1.0)
"""Shares of the vocabulary that stand for themselves in a batch, one of them drawn each time."""

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
    seed: int = 0,
) -> Path:
    """The folder of a built model with weights, from beside it or trained and put there.

    Args:
        built: the folder of a model without weights (`models.seq2seq_tokens.build_folder`).
        pairs: what it learns from after it has learned to copy; none: nothing.
        steps: of each of the two.
        max_source: longest source in tokens; what is longer is cut.
        max_target: longest target, likewise.
        device: where it is trained.
        seed: source of all randomness.

    Raises:
        InputError: if a folder beside it is damaged.
        Stopped: after SIGINT or SIGTERM, with a checkpoint to go on from.
    """
    about = {
        "options": dataclasses.asdict(OPTIONS),
        "built": built.name,
        "pairs": content_key({"pairs": list(pairs)}),
        "lengths": [max_source, max_target],
        "steps": steps,
        "seed": seed,
    }
    folder = built.with_name(f"{built.name}-pretrained-{content_key(about)}")
    if folder.is_dir():
        return folder
    pieces = Pieces(built, max_source, max_target)

    def train(name: str, network: Callable[[], nn.Module], data: Data) -> nn.Module:
        chain = fit(
            network,
            token_loss,
            data.to(device),
            options=dataclasses.replace(OPTIONS, steps=steps),
            batches=(OPTIONS.train_batch, 1),
            folder=folder.with_name(f"{folder.name}-{name}"),
            about={**about, "on": name},
            seed=seed,
        )
        return fitted(chain)

    copied = Copying(pieces.vocabulary, pieces.end).data(1000)
    network = train("copying", lambda: Seq2Seq(built, pretrained=False).to(device), copied)
    if pairs:
        copier = network
        network = train("saying", lambda: copier.train(), _renamed(pieces, pairs))
    with new_folder(folder) as temporary:
        shutil.copytree(built, temporary, dirs_exist_ok=True)
        assert isinstance(network, Seq2Seq)
        network.save(temporary)
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
        lengths=torch.tensor([len(a) + len(b) for a, b in zip(sources, targets, strict=True)]),
        augment=Renaming(pieces.vocabulary),
    )
