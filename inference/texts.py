"""The task `text`: noisy labelled texts, a small set of checked ones, and a pretrained encoder.

A frozen encoder sees all texts once, and its states are kept in the cache; the network that is
trained is then a small head. Trouble may be planted: wrong labels, rare classes, and texts from
elsewhere with labels at random.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._pytree import tree_map

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from inference.embeddings import Encoding
from inference.options import names
from inference.sources import SPLITS
from inference.tasks import Task, mislabelled
from inference.text_files import Empty, kind_of, objects
from inference.text_sources import Files, Part, Sets, example, generator
from models.encoder import Tune
from models.pretrained import MINILM

SOURCES = ("auto", "files", "generated")
EXAMPLE_NOISE = 0.4
UNKNOWN_SHARE = 0.5
"""Share of a user's train texts to select, of which nothing is known."""

Strays = Literal["refuse", "drop"]
"""What to do with rows whose label another set lacks."""


def text(
    *,
    root: str,
    source: str,
    seed: int,
    cache: Path,
    device: torch.device,
    split: str = "test",
    train: str | None = None,
    meta: str | None = None,
    test: str | None = None,
    text: str = "text",
    label: str = "label",
    empty: Empty = "refuse",
    strays: Strays = "refuse",
    test_share: float = 0.25,
    encoder: str = MINILM,
    tune: Tune = "frozen",
    max_tokens: int = 128,
    meta_per_class: int = 20,
    per_class: int | None = None,
    noise: float | None = None,
    rare: int = 20,
    rare_classes: Sequence[str] = (),
    off_domain: int = 0,
    off_domain_from: str = "gsm8k.jsonl.gz",
) -> Task:
    """Texts to classify: the user's files, else Dolly, else made sentences.

    Args:
        root: folder with Dolly, and with the file of `off_domain_from`.
        source: "auto"; "files" never comes to made sentences; "generated" takes them.
        seed: draws meta points, wrong labels, and what is set aside or mixed in.
        cache: folder of a frozen encoder's states.
        device: where it runs.
        split: "validation" scores on other texts than "test": a tenth of the example's train texts,
            or the share `test_share` of the user's meta set.
        train: file of noisy texts (`inference.text_files`).
        meta: file of checked texts.
        test: file of test texts; None: the share `test_share` of the meta set is set aside.
        text: column of the texts.
        label: column of the labels.
        empty: what becomes of rows whose text or label is empty.
        strays: what becomes of rows whose label does not stand in both train and meta set.
        test_share: share of each class of the meta set to set aside.
        encoder: id or local folder of a pretrained encoder.
        tune: what of it is trained.
        max_tokens: tokens of a text that the encoder sees.
        meta_per_class: meta texts per class of an example.
        per_class: most train texts per class of an example; None: all.
        noise: share of train labels to replace; None: 0.4 of an example's, none of a user's.
        rare: train texts that are left of each class in `rare_classes`.
        rare_classes: classes to make rare.
        off_domain: texts from elsewhere to add to the train set, with labels at random.
        off_domain_from: file of JSON lines below root that they come from, under the key "prompt"
            or "question".

    Raises:
        InputError: for files that cannot be used, labels that do not fit each other, impossible
            sizes, or an encoder that cannot be had.
    """
    if source not in SOURCES:
        raise InputError(f"data.source must be one of {', '.join(SOURCES)}, got {source!r}")
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    files = Files(train, meta, test, text, label, empty, test_share)
    if files and source == "generated":
        raise InputError("data.source=generated takes no files: leave out data.train and meta")
    sets = (
        files.read(split, seed)
        if files
        else example(
            Path(root), source, split, seed, meta_per_class=meta_per_class, per_class=per_class
        )
    )
    scarce = names(rare_classes)
    sets = _with_rare(_of_same_classes(sets, strays), scarce, rare, seed)
    encoding = Encoding(encoder, tune, max_tokens, cache, device)
    task = _of_texts(sets, encoding)
    share = noise if noise is not None else EXAMPLE_NOISE * sets.example
    if share != 0:
        task = mislabelled(task, share, seed)
    if off_domain:
        strangers = _elsewhere(Path(root) / off_domain_from, off_domain)
        task = _mixed(task, strangers, encoding, seed)
    return _grouped(_counted(task, max_tokens), sets.train.labels, scarce)


# ---------------------------------------------------------------------------------- the classes


def _of_same_classes(sets: Sets, strays: Strays) -> Sets:
    """Sets whose classes are those that train and meta set share.

    Raises:
        InputError: if a label stands in some sets only and is to be refused, or too few are left.
    """
    counts = {name: Counter(getattr(sets, name).labels) for name in ("train", "meta", "test")}
    shared = counts["train"].keys() & counts["meta"].keys()
    found = {
        name: {label: n for label, n in count.items() if label not in shared}
        for name, count in counts.items()
    }
    lacking = {"train": "the meta set", "meta": "the train set", "test": "train or meta set"}
    told = [
        f"{sum(odd.values())} rows of the {name} set have labels that {lacking[name]} lacks "
        f"({_listed(odd)})"
        for name, odd in found.items()
        if odd
    ]
    if told and strays == "refuse":
        raise InputError(
            f"{'; '.join(told)}. What the meta set lacks cannot be selected for, and what the "
            "train set lacks cannot be selected: mend the labels, add such rows, or leave these "
            "out with task.data.strays=drop"
        )
    if len(shared) < 2:
        raise InputError(
            f"train and meta set must share at least 2 labels, got {sorted(shared)}: the train set "
            f"has {_listed(counts['train'])}, the meta set {_listed(counts['meta'])}"
        )
    kept = {
        name: getattr(sets, name).keep(np.isin(getattr(sets, name).labels, sorted(shared)))
        for name in counts
    }
    if not len(kept["test"]):
        raise InputError("no test text has a label of the train and meta set: mend its labels")
    return replace(sets, **kept, warnings=(*sets.warnings, *(f"{one}: left out" for one in told)))


def _listed(count: dict[str, int], most: int = 8) -> str:
    """Labels with their numbers of rows, the most frequent first."""
    order = sorted(count, key=lambda label: -count[label])
    rest = ", ..." if len(order) > most else ""
    return ", ".join(f"{label!r}: {count[label]}" for label in order[:most]) + rest


def _with_rare(sets: Sets, scarce: list[str], rare: int, seed: int) -> Sets:
    """Sets with `rare` train texts, drawn by the seed, of each of the classes `scarce`."""
    labels = np.array(sets.train.labels)
    kept, draw = np.ones(len(labels), bool), generator(seed, "rare")
    for name in scarce:
        rows = draw.permutation(np.flatnonzero(labels == name))
        if not 1 <= rare <= len(rows):
            raise InputError(
                f"task.data.rare must be from 1 to the {len(rows)} train texts of class {name!r}, "
                f"got {rare}; there are {_listed(Counter(sets.train.labels))}"
            )
        kept[rows[rare:]] = False
    return replace(sets, train=sets.train.keep(kept))


# ------------------------------------------------------------------------------------- the task


def _of_texts(sets: Sets, encoding: Encoding) -> Task:
    """The task without trouble: all labels are those of the source."""
    classes = sorted(set(sets.train.labels))
    number = {label: k for k, label in enumerate(classes)}
    inputs: dict[int, Any] = {}  # a collection may be in two sets
    cut = {}

    def data(part: Part, name: str) -> Data:
        key = id(part.pool)
        if key not in inputs:
            inputs[key] = encoding.inputs(part.pool.texts)
        rows = torch.from_numpy(part.rows)
        cut[name] = int(encoding.cut(part.pool.texts)[rows].sum())
        target = torch.tensor([number[label] for label in part.labels])
        return Data(tree_map(lambda x: x[rows], inputs[key]), target, part.ids, name=name)

    parts = {"train": sets.train, "meta": sets.meta, "test": sets.test}
    train, meta, test = (data(part, name) for name, part in parts.items())
    return Task(
        "text",
        sets.name,
        train,
        meta,
        test,
        classes=len(classes),
        groups={},
        high=(),
        sparsity=UNKNOWN_SHARE,
        warnings=sets.warnings,
        texts=sets.train.texts,
        class_names=tuple(classes),
        facts={
            "encoder": encoding.encoder,
            "encoder_version": encoding.version,
            "classes": classes,
            "cut": cut,
        },
        depends={} if encoding.tune == "frozen" else {"encoder": encoding.version},
    )


def _elsewhere(path: Path, count: int) -> list[str]:
    """Texts of another data set of JSON lines: the same ones every time.

    Raises:
        InputError: if there is no such file, it is damaged, or has fewer texts.
    """
    if count < 1:
        raise InputError(f"task.data.off_domain must be at least 0 texts, got {count}")
    kind_of(path, (".jsonl", ".ndjson"), "texts from elsewhere (task.data.off_domain_from)")
    form = 'an object with a text under the key "prompt" or "question"'
    found = set()
    for where, row in objects(path, form):
        one = row.get("prompt") or row.get("question")
        if not isinstance(one, str):
            raise InputError(
                f"{where}: expected {form}, got the keys {', '.join(row) or 'none'}: rename yours"
            )
        found.add(one)
    texts = sorted(found)
    if count > len(texts):
        raise InputError(
            f"{path} has {len(texts)} texts, got task.data.off_domain={count}: lower it"
        )
    order = generator(0, "elsewhere").permutation(len(texts))[:count]
    return [texts[k] for k in order]


def _mixed(task: Task, texts: list[str], encoding: Encoding, seed: int) -> Task:
    """The task with texts from elsewhere in its train set, whose labels are drawn by the seed."""
    train, count = task.train, len(texts)
    drawn = generator(seed, "off domain").integers(0, task.classes, count)
    first = max(int(data.ids.max()) for data in (train, task.meta, task.test)) + 1
    mixed = Data(
        tree_map(lambda *both: torch.cat(both), train.input, encoding.inputs(texts)),
        torch.cat([train.target, torch.from_numpy(drawn)]),
        torch.cat([train.ids, torch.arange(first, first + count)]),
        name="train",
    )
    known = torch.ones(len(train), dtype=torch.bool) if task.right is None else task.right
    right = torch.cat([known, torch.zeros(count, dtype=torch.bool)])
    before = task.facts["cut"]
    cut = {**before, "train": before["train"] + int(encoding.cut(texts).sum())}
    return replace(
        task,
        train=mixed,
        right=right,
        texts=[*(task.texts or ()), *texts],
        facts={**task.facts, "cut": cut},
    )


def _counted(task: Task, max_tokens: int) -> Task:
    """The task with the sizes of its sets, and a warning where texts are cut."""
    sizes = {name: len(getattr(task, name)) for name in ("train", "meta", "test")}
    task = replace(task, facts={**task.facts, "sizes": sizes})
    told = ", ".join(f"{n} of {sizes[name]} {name}" for name, n in task.facts["cut"].items() if n)
    if not told:
        return task
    note = f"texts longer than task.max_tokens={max_tokens} tokens are cut: {told} texts"
    return replace(task, warnings=(*task.warnings, note))


def _grouped(task: Task, labels: list[str], scarce: list[str]) -> Task:
    """The task with groups by the trouble that was planted, and the share of points to select.

    Args:
        task: the task.
        labels: the source's labels of its train texts, those from elsewhere left out.
        scarce: the classes that were made rare.
    """
    size = len(task.train)
    right = torch.ones(size, dtype=torch.bool) if task.right is None else task.right
    strange = torch.arange(size) >= len(labels)
    groups, sparsity = {}, UNKNOWN_SHARE
    if scarce:
        is_rare = torch.zeros(size, dtype=torch.bool)
        is_rare[: len(labels)] = torch.from_numpy(np.isin(labels, scarce))
        groups = {"rare_right": is_rare & right, "frequent_right": ~is_rare & right}
        sparsity = 2 * int(groups["rare_right"].sum()) / size
    elif task.right is not None:
        groups = {"right": right}
        sparsity = min(float(right.double().mean()), 0.99)
    high = tuple(groups)
    if groups:
        groups |= {"wrong": ~right & ~strange, "off_domain": strange}
    filled = {name: mask for name, mask in groups.items() if bool(mask.any())}
    return replace(task, groups=filled, high=high, sparsity=sparsity)
