"""Which conversations the task `llm` trains on, selects for, chooses by and tests on.

Train examples come from named sources. What to select for is a benchmark (MMLU, ARC, HellaSwag), an
example file with a test split (GSM8K), or the user's own file; meta, validation and test examples
are never the same ones, and no seed's meta or validation example is ever tested on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from bads_ppl.errors import InputError
from inference.benchmark_files import BENCHMARKS, benchmark_splits, conversation, read_benchmark
from inference.instructions import (
    EXAMPLES,
    Conversation,
    Instructions,
    OnError,
    find_examples,
    read_instructions,
    repeated,
)
from inference.text_files import Empty
from inference.text_sources import generator

TARGET_EXAMPLE = "gsm8k"
"""The example whose test split may be a target."""

MADE = "made"


@dataclass(frozen=True)
class Sets:
    """Conversations by what they are for.

    Attributes:
        name: of the data, as recorded in the results.
        train: sources to weight.
        meta: examples of what is selected for.
        validation: examples that the network to keep is chosen by.
        test: examples to report on.
        others: conversations that are none of these, to learn a language from.
        warnings: what a reader of the results must know.
    """

    name: str
    train: list[Instructions]
    meta: list[Conversation]
    validation: list[Conversation]
    test: list[Conversation]
    others: list[Conversation] = field(default_factory=list)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        on_error: what becomes of malformed lines.
        empty: what becomes of rows with an empty prompt or response.
    """

    on_error: OnError = "refuse"
    empty: Empty = "refuse"

    def __call__(self, path: Path, source: str, split: str | None = None) -> Instructions:
        return read_instructions(
            path, source=source, split=split, on_error=self.on_error, empty=self.empty
        )


# ------------------------------------------------------------------------------------- sources


def read_sources(
    root: Path, sources: Mapping[str, str] | None, reading: Reading
) -> list[Instructions]:
    """The sources, in the order given; without any, the examples that `root` has.

    Args:
        root: folder of the examples.
        sources: name to the name of an example, or else to a file or folder.
        reading: how.

    Raises:
        InputError: if there are none, or one cannot be read.
    """
    there = find_examples(root)
    chosen = sources or {name: name for name in there}
    if not chosen:
        raise InputError(
            f"there are no sources to weigh: none is named, and {root.absolute()} has none of the "
            f"examples {', '.join(EXAMPLES)}; name one with data.train=<file>, several with "
            "task.data.sources='{mine: a.jsonl, web: b.parquet}', or set data.root (BADS_DATA)"
        )
    found = []
    for name, place in chosen.items():
        if place not in EXAMPLES:
            found.append(reading(Path(place), name))
        elif place in there:
            found.append(reading(there[place], name, EXAMPLES[place].split))
        else:
            raise InputError(
                f"source {name!r}: the example {place!r} is not in {root.absolute()}; there are "
                f"{', '.join(there) or 'none'}: name a file, or set data.root"
            )
    return found


def find_instructions(
    root: Path, source: str, *, sources: Sequence[str], target: str
) -> dict[str, Path]:
    """Public sources and a benchmark in a folder, by name.

    Args:
        root: the data folder.
        source: as `data.source`; nothing is downloaded whatever it says.
        sources: names of `EXAMPLES`.
        target: one of `BENCHMARKS`.

    Raises:
        InputError: if one is missing.
    """
    found = {name: Path(root) / EXAMPLES[name].file for name in sources}
    found[target] = Path(root) / BENCHMARKS[target].file
    missing = [name for name, path in found.items() if not path.is_file()]
    if missing:
        raise InputError(
            f"{', '.join(missing)} cannot be found in {root.absolute()}: put their files there "
            "(docs/llm.md), or name another folder with data.root (BADS_DATA)"
        )
    return found


def thinned(source: Instructions, count: int | None, seed: int) -> Instructions:
    """At most `count` examples of a source, drawn by the seed, in their order."""
    if count is None or len(source) <= count:
        return source
    if count < 1:
        raise InputError(f"task.data.per_source must be at least 1 example, got {count}")
    rows = generator(seed, f"thinned {source.source}").permutation(len(source))[:count]
    return source.keep(np.sort(rows).tolist())


def shuffled(source: Instructions, seed: int) -> Instructions:
    """The source with each response at another example: trouble to find.

    Raises:
        InputError: if there is one example only.
    """
    size = len(source)
    if size < 2:
        raise InputError(f"responses of source {source.source!r} cannot be shuffled: it has {size}")
    order = generator(seed, f"shuffled {source.source}").permutation(size)
    other = np.empty(size, dtype=np.int64)
    other[order] = np.roll(order, 1)  # one cycle through all: none keeps its own
    moved = [
        (*one[:-1], source.conversations[k][-1])
        for one, k in zip(source.conversations, other.tolist(), strict=True)
    ]
    return replace(source, conversations=moved)


# -------------------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """What is selected for, in conversations."""

    name: str
    meta: list[Conversation]
    validation: list[Conversation]
    test: list[Conversation]
    warnings: tuple[str, ...] = ()


def read_target(
    root: Path,
    target: str | None,
    *,
    meta: str | None,
    test: str | None,
    count: int | None,
    seed: int,
    reading: Reading,
) -> Target:
    """Meta, validation and test conversations.

    Args:
        root: folder of benchmarks and examples.
        target: a benchmark, the example with a test split, or None: the file `meta`.
        meta: the user's file of checked examples.
        test: the user's file of test examples; None: a quarter of the meta file is set aside.
        count: meta examples, and validation examples; None: the benchmark's usual number, 100 of an
            example, half of a file each.
        seed: draws which.
        reading: how files are read.

    Raises:
        InputError: if there is no such target, or too few examples.
    """
    if meta is not None:
        if target is not None:
            raise InputError(
                f"got both data.meta={meta} and task.target={target}: leave one of them out"
            )
        return _of_files(Path(meta), test, count, seed, reading)
    if test is not None:
        raise InputError(f"data.test={test} goes with data.meta: name a file of checked examples")
    if target in BENCHMARKS:
        splits = benchmark_splits(read_benchmark(root, target), target, seed=seed, count=count)
        parts = (splits.meta, splits.validation, splits.test)
        meta_part, validation, tested = ([conversation(one) for one in part] for part in parts)
        notes = (
            f"{splits.left_out} test questions of {target} repeat one that meta or validation "
            "examples are drawn from, and were left out",
        )
        return Target(target, meta_part, validation, tested, notes if splits.left_out else ())
    if target == TARGET_EXAMPLE:
        there = find_examples(root)
        if target not in there:
            raise InputError(f"target {target!r} is not in {root.absolute()}: set data.root")
        whole = reading(there[target], target, "test")
        drawn = _drawn(whole.conversations, 100 if count is None else count, seed, target)
        return Target(target, *drawn, tuple(whole.notes(f"target {target!r}")))
    raise InputError(
        f"task.target must be one of {', '.join((*BENCHMARKS, TARGET_EXAMPLE))}, got {target!r}: "
        "or name a file of checked examples with data.meta"
    )


def _drawn(
    whole: Sequence[Conversation], count: int, seed: int, name: str
) -> tuple[list[Conversation], list[Conversation], list[Conversation]]:
    """Meta, validation and test conversations of one set.

    The first half by a hash is for meta and validation, of which the seed draws; the rest is the
    test, under any seed.
    """
    order = sorted(range(len(whole)), key=lambda k: _hash(whole[k]))
    half = len(whole) // 2
    if not 1 <= count <= half // 2:
        raise InputError(
            f"task.meta_count must be from 1 to {half // 2}, as half of the {len(whole)} examples "
            f"of {name} is for meta and validation, got {count}"
        )
    drawn = generator(seed, f"target {name}").permutation(order[:half]).tolist()
    parts = sorted(drawn[:count]), sorted(drawn[count : 2 * count]), sorted(order[half:])
    meta, validation, test = ([whole[k] for k in part] for part in parts)
    return meta, validation, test


def _hash(one: Conversation) -> bytes:
    return sha256(repr([tuple(message) for message in one]).encode()).digest()


def _of_files(
    path: Path, test: str | None, count: int | None, seed: int, reading: Reading
) -> Target:
    """Those of the user's files. What is set aside to test on is the same under any seed."""
    read = reading(path, "meta")
    whole, notes = read.conversations, read.notes("the meta file")
    if test is not None:
        read = reading(Path(test), "test")
        tested = read.conversations
        notes += read.notes("the test file")
    else:
        aside = len(whole) // 4
        if aside < 1:
            raise InputError(
                f"{path} has {len(whole)} examples: give at least 4, or test ones with data.test"
            )
        tested = sorted(whole, key=_hash)[:aside]
        notes.append(
            f"no test file: {aside} of the {len(whole)} meta examples were set aside to test on"
        )
    known = set(repeated(whole, tested))
    rest = [one for place, one in enumerate(whole) if place not in known]
    if test is not None and known:
        notes.append(f"{len(known)} meta examples are test examples and were left out")
    count = len(rest) // 2 if count is None else count
    if not 1 <= count <= len(rest) // 2:
        raise InputError(
            f"task.meta_count must be from 1 to {len(rest) // 2}, half of what {path} has to "
            f"select for and to choose by, got {count}"
        )
    order = generator(seed, "meta file").permutation(len(rest)).tolist()
    parts = sorted(order[:count]), sorted(order[count : 2 * count])
    meta, validation = ([rest[k] for k in part] for part in parts)
    return Target(path.stem, meta, validation, tested, tuple(notes))


# ------------------------------------------------------------------------------------- together


def without_targets(
    sources: Sequence[Instructions], target: Target, *, remove: bool
) -> tuple[list[Instructions], tuple[str, ...]]:
    """The sources, and what is to say of train examples that are the target's own.

    Args:
        sources: the sources.
        target: the target.
        remove: leave such examples out; test and validation examples always are.
    """
    kept, notes = [], []
    for source in sources:
        tested = set(repeated(source.conversations, [*target.test, *target.validation]))
        met = set(repeated(source.conversations, target.meta)) - tested
        if tested:
            notes.append(
                f"{len(tested)} examples of source {source.source!r} are test or validation "
                "examples and were left out"
            )
        if met:
            what = "were left out" if remove else "stay (task.data.remove_meta=true removes them)"
            notes.append(
                f"{len(met)} examples of source {source.source!r} are meta examples and {what}"
            )
        gone = tested | met if remove else tested
        kept.append(source.keep([k for k in range(len(source)) if k not in gone]))
    return kept, tuple(notes)
