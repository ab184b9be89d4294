"""The task `webnlg`: sentences for triples of facts, in domains that the train set does not have.

A point is a set of triples with one text that says them. Train points are of some domains, meta and
test points of others (`inference.webnlg_splits`). The network is a sequence-to-sequence model of
`transformers`, by its id or from a local folder; where none is to be had it is a small T5 that is
trained on the spot: to copy, and on the train domains that the task leaves out
(`inference.pretraining`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from inference.embeddings import folder_version
from inference.options import names
from inference.pretraining import pretrained_folder
from inference.sources import SPLITS
from inference.tasks import Task
from inference.token_sets import token_sets
from inference.webnlg_entries import Entry, find_webnlg, linearise
from inference.webnlg_splits import Kind, Splits, generated, splits_of
from inference.writing import Writing
from models.language import IGNORED, sequence_loss, token_loss
from models.pretrained import T5_SMALL, find_model
from models.seq2seq_tokens import Pieces, build_folder

SOURCES = ("auto", "files", "generated")
LOSSES = {"token": token_loss, "sequence": sequence_loss}

Long = Literal["cut", "drop", "refuse"]
"""What becomes of train and meta points with more tokens than the network is shown."""


def webnlg(
    *,
    root: str,
    source: str,
    seed: int,
    cache: Path,
    split: str = "test",
    kind: Kind = "full",
    meta_per_domain: int = 30,
    train_domains: Sequence[str] = (),
    target_domains: Sequence[str] = (),
    close: str | None = None,
    model: str | None = None,
    size: Literal["tiny", "small"] = "tiny",
    vocabulary: int = 2000,
    pretraining: int = 2500,
    device: torch.device | None = None,
    max_source: int = 128,
    max_target: int = 64,
    long: Long = "cut",
    loss: Literal["token", "sequence"] = "token",
    beams: int = 1,
    curve: int = 60,
) -> Task:
    """Triples to English text.

    Args:
        root: where WebNLG is (`inference.webnlg_entries.read_webnlg`).
        source: "auto"; "files" never comes to the made-up set; "generated" takes it.
        seed: draws the meta entries.
        cache: folder of built models.
        split: "validation" scores on other entries than "test", which no seed ever tests on.
        kind: "full": all seen domains against all unseen ones; "controlled": a close and a far one.
        meta_per_domain: meta entries of each target domain, each with its first reference.
        train_domains: other domains to train on than those of `kind`.
        target_domains: other domains to write for.
        close: which of two train domains is close to the targets ("controlled").
        model: id or local folder of a sequence-to-sequence model; "built": one made on the spot;
            None: T5-small if it can be had, else built.
        size: of a built model.
        vocabulary: most tokens of a built model.
        pretraining: steps in which a built model learns to copy, and as many from the train domains
            that are left out, if there are any; 0: none. Never for the made-up set.
        device: where it does; None: the CPU.
        max_source: tokens of the triples that the network is shown, the end token included.
        max_target: tokens of a text that it learns, and writes at most.
        long: what becomes of longer train and meta points; those of the test are cut.
        loss: "token": mean over the text's tokens, so that long texts weigh as much as short ones;
            "sequence": their sum, the likelihood of (3).
        beams: of the search for a text; 1: always the likeliest token.
        curve: test entries that are written for at each evaluation along a chain; 0: none.

    Raises:
        InputError: for files that cannot be used, domains that do not exist, impossible sizes, or a
            model that cannot be had.
    """
    if source not in SOURCES:
        raise InputError(f"data.source must be one of {', '.join(SOURCES)}, got {source!r}")
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if pretraining < 0:
        raise InputError(
            f"task.data.pretraining must be 0 steps or more, got {pretraining}: 0 leaves it out"
        )
    for name, value, known in (("long", long, ("cut", "drop", "refuse")), ("loss", loss, LOSSES)):
        if value not in known:
            raise InputError(f"task.data.{name} must be one of {', '.join(known)}, got {value!r}")
    found = find_webnlg(Path(root), source)
    read = generated(kind) if found is None else found
    entries = read.entries
    splits = splits_of(
        read,
        kind,
        seed=seed,
        meta_per_domain=meta_per_domain,
        train_domains=names(train_domains),
        target_domains=names(target_domains),
        close=close,
    )
    train = [(entry, text) for entry in splits.train for text in entry.references]
    meta = [(entry, entry.references[0]) for entry in splits.meta]
    test = [(one, one.references[0]) for one in getattr(splits, split)]
    others = [(entry, text) for entry in splits.others for text in entry.references]

    def built() -> tuple[Path, bool, str]:
        """A model of the texts that no seed draws, whether it has weights, and what it knows."""
        pairs = [(linearise(entry.triples), said) for entry, said in train + others]
        texts = [text for pair in pairs for text in pair]
        made = build_folder(cache, [*texts, _characters(entries)], size, vocabulary)
        if found is None or not pretraining:
            return made, False, "without pretraining"
        more = pairs[len(train) :]
        lengths = {"max_source": max_source, "max_target": max_target}
        where = device or torch.device("cpu")
        taught = pretrained_folder(made, more, steps=pretraining, device=where, **lengths)
        said = f"on {len(more):,} texts of other domains only" if more else "to copy only"
        return taught, True, f"trained {said}"

    folder, pretrained, notes = _model(model, size, built)
    version = folder_version(folder)
    pieces = Pieces(folder, max_source, max_target)
    train, told = _fitting("train", train, pieces, long)
    meta, told_meta = _fitting("meta", meta, pieces, long)
    _, told_test = _fitting("test", test, pieces, "cut")
    if not train or not meta:
        raise InputError(
            "no train or no meta point is short enough: raise task.data.max_source and max_target"
        )
    sets = _data(pieces, {"train": train, "meta": meta, "test": test})
    domains = sorted({entry.domain for entry, _ in train})
    of = [entry.domain for entry, _ in train]
    groups = {name: torch.tensor([one == name for one in of]) for name in domains}
    close_mask = None if splits.close is None else groups[splits.close]
    writing = Writing(
        pieces.text,
        [linearise(entry.triples) for entry, _ in test],
        [entry.references for entry, _ in test],
        beams=beams,
        max_tokens=max_target,
        curve=curve,
    )
    return Task(
        "webnlg",
        splits.name,
        sets["train"],
        sets["meta"],
        sets["test"],
        classes=0,
        groups=groups,
        high=() if splits.close is None else (splits.close,),
        sparsity=_share(splits, close_mask),
        right=close_mask,
        right_means="domain is close",
        warnings=(*splits.warnings, *notes, *told, *told_meta, *told_test),
        texts=[f"{linearise(entry.triples)}\n{text}" for entry, text in train],
        facts={
            "model": str(model or "auto"),
            "pretrained": pretrained,
            "built": folder.parent == cache,
            "model_version": version,
            "kind": kind,
            "sizes": {name: len(one) for name, one in sets.items()},
        },
        loss=LOSSES[loss],
        network={"folder": str(folder), "pretrained": pretrained},
        scoring=writing,
        depends={"model": version, "pretrained": pretrained, "loss": loss},
        probe=128,  # of long rows
    )


def _characters(entries: Sequence[Entry]) -> str:
    """All characters of these entries, apart: a tokenizer that has seen them can write them."""
    texts = [text for one in entries for text in (linearise(one.triples), *one.references)]
    return " ".join(sorted(set().union(*texts)))


SHARE = 0.1
"""Share of the train points to select where nothing is known of them."""


def _share(splits: Splits, close: Tensor | None) -> float:
    return SHARE if close is None else float(close.double().mean()) / 2


def _model(
    name: str | None, size: str, built: Callable[[], tuple[Path, bool, str]]
) -> tuple[Path, bool, tuple[str, ...]]:
    """The model's folder, whether it has weights, and what the reader must know."""
    if name not in (None, "built"):
        return find_model(str(name)), True, ()
    why = ""
    if name is None:
        try:
            return find_model(T5_SMALL), True, ()
        except InputError as error:
            why = f"; {error}"
    folder, pretrained, how = built()
    note = (
        f"the network is a T5 of size {size} {how}: what it writes cannot be compared with a "
        f"pretrained one's (task.model names one){why}"
    )
    return folder, pretrained, (note,)


Point = tuple[Entry, str]


def _fitting(
    name: str, points: list[Point], pieces: Pieces, long: Long
) -> tuple[list[Point], tuple[str, ...]]:
    """The points to use, and a note on those with more tokens than the network is shown."""
    sources = pieces.source([linearise(entry.triples) for entry, _ in points])
    targets = pieces.target([text for _, text in points])
    over = [
        len(one) > pieces.max_source or len(other) > pieces.max_target
        for one, other in zip(sources, targets, strict=True)
    ]
    if not any(over):
        return points, ()
    said = (
        f"{sum(over)} of {len(points)} {name} points have more than "
        f"{pieces.max_source} tokens of triples or {pieces.max_target} of text"
    )
    if long == "refuse":
        raise InputError(
            f"{said}: raise task.data.max_source or max_target, or take task.data.long=cut or drop"
        )
    if long == "cut":
        return points, (f"{said}: cut",)
    kept = [point for point, too in zip(points, over, strict=True) if not too]
    return kept, (f"{said}: left out",)


def _data(pieces: Pieces, sets: dict[str, list[Point]]) -> dict[str, Data]:
    """All sets, padded to the same lengths, with ids that count through them."""
    every = [point for points in sets.values() for point in points]
    padded = pieces.pad(
        pieces.source([linearise(entry.triples) for entry, _ in every]),
        pieces.target([text for _, text in every]),
    )
    lengths = padded["mask"].sum(1) + (padded["labels"] != IGNORED).sum(1)
    return token_sets(padded, lengths, {name: len(points) for name, points in sets.items()})
