"""Which entries of WebNLG are for what, what a seed may change, and the made-up set."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from bads_ppl.errors import InputError
from inference.webnlg_entries import Entry, Found, read_webnlg
from inference.webnlg_splits import Splits, generated, splits_of

REAL = Path(os.environ.get("BADS_DATA", "data")) / "webnlg_en.jsonl.gz"
SIZES = {
    "train": {"Astronaut": 9, "City": 8, "Food": 7},
    "dev": {"City": 3},
    "test": {"City": 5, "Athlete": 20, "Politician": 21, "Artist": 22},
}


def entry(split: str, domain: str, number: int, *about: str) -> Entry:
    """An entry about one thing of its own, or about those that are named."""
    triples = tuple((name, "p", "o") for name in about or (f"{split} {domain} {number}",))
    return Entry(f"{split}/{domain}/{len(triples)}/Id{number}", split, domain, triples, ("text",))


def found(*more: Entry, lacking: int = 0, **changed: dict[str, int]) -> Found:
    sizes = {split: {**of, **changed.get(split, {})} for split, of in SIZES.items()}
    entries = [
        entry(split, domain, number)
        for split, of in sizes.items()
        for domain, count in of.items()
        for number in range(count)
    ]
    return Found([*entries, *more], "tiny", lacking)


def split(data: Found, kind: str = "controlled", seed: int = 0, meta: int = 4, **options) -> Splits:
    return splits_of(data, kind, seed=seed, meta_per_domain=meta, **options)


def keys(entries: list[Entry]) -> set[str]:
    return {one.key for one in entries}


def domains(entries: list[Entry]) -> dict[str, int]:
    return dict(Counter(one.domain for one in entries))


def test_others_are_what_is_neither_trained_on_nor_a_target_nor_said_there():
    data = found(
        entry("train", "Athlete", 1),
        entry("train", "Food", 9, "test Athlete 3", "something else"),
    )
    splits = split(data)
    assert domains(splits.train) == {"Astronaut": 9, "City": 8}
    assert domains(splits.others) == {"Food": 7}
    assert {one.split for one in splits.others} == {"train"}
    swapped = split(data, train_domains=["Food", "City"], close="Food")
    assert domains(swapped.others) == {"Astronaut": 9}
    assert split(data, "full").others == []


def test_full_trains_on_all_seen_domains_and_tests_on_those_that_are_in_test_alone():
    splits = split(found(dev={"City": 0, "Artist": 1}), "full")
    assert domains(splits.train) == {"Astronaut": 9, "City": 8, "Food": 7}
    assert {one.split for one in splits.train} == {"train"}
    assert domains(splits.meta) == {"Athlete": 4, "Politician": 4}
    assert domains(splits.validation) == {"Athlete": 5, "Politician": 5}
    assert domains(splits.test) == {"Athlete": 11, "Politician": 12}
    assert {one.split for one in splits.test} == {"test"}
    assert (splits.close, splits.name, splits.warnings) == (None, "tiny", ())


def test_controlled_trains_on_a_close_and_a_far_domain():
    splits = split(found())
    assert domains(splits.train) == {"Astronaut": 9, "City": 8}
    assert set(domains(splits.test)) == {"Athlete", "Politician", "Artist"}
    assert splits.close == "Astronaut"


def test_controlled_has_the_paper_s_domains_where_artist_is_trained_on():
    splits = split(found(train={"Artist": 6}, test={"Astronaut": 20}))
    assert domains(splits.train) == {"City": 8, "Artist": 6}
    assert set(domains(splits.test)) == {"Athlete", "Politician", "Astronaut"}
    assert splits.close == "Artist"


def test_domains_can_be_named():
    splits = split(found(), train_domains=["City", "Food"], target_domains=["Artist"], close="Food")
    assert (set(domains(splits.train)), set(domains(splits.test))) == ({"City", "Food"}, {"Artist"})
    assert splits.close == "Food"
    full = split(found(), "full", meta=1, target_domains=["City"])
    assert (set(domains(full.train)), set(domains(full.test))) == ({"Astronaut", "Food"}, {"City"})
    assert set(domains(split(found(), "full", train_domains=["Food"]).train)) == {"Food"}


@pytest.mark.parametrize("kind", ["full", "controlled"])
def test_no_seed_tests_on_an_entry_that_is_for_validation_or_meta(kind):
    every = [split(found(), kind, seed) for seed in range(8)]
    for one in every:
        parts = [keys(part) for part in (one.train, one.meta, one.validation, one.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(one.train) + 63
        assert keys(one.validation) == keys(every[0].validation)
    assert len({frozenset(keys(one.meta)) for one in every}) == 8


def test_a_seed_always_gives_the_same_splits_whatever_the_order_of_the_file():
    assert split(found(), seed=3) == split(found(), seed=3)
    turned = split(Found(found().entries[::-1], "tiny"), seed=3)
    for name in ("train", "meta", "validation", "test"):
        assert keys(getattr(turned, name)) == keys(getattr(split(found(), seed=3), name))


def test_validation_is_no_run_of_the_file_or_of_its_keys():
    whole = [one.key for one in found().entries if (one.split, one.domain) == ("test", "Artist")]
    validation = {key for key in keys(split(found()).validation) if "/Artist/" in key}
    assert validation not in (set(whole[:5]), set(sorted(whole)[:5]))


def test_train_entries_with_the_triples_of_a_target_entry_are_left_out_and_counted():
    shared = entry("train", "City", 50, "b", "a"), entry("test", "Artist", 50, "a", "b")
    splits = split(found(*shared))
    assert keys(splits.train) == keys(split(found()).train)
    assert splits.warnings == (
        "1 train entries have the triples of an entry of the target domains and were left out",
    )
    alone = found(
        entry("train", "Food", 9, "a"), entry("test", "Artist", 9, "a"), train={"Food": 0}
    )
    with pytest.raises(InputError, match="all train entries of Food have the triples"):
        split(alone, "full")


def test_target_entries_with_the_same_triples_are_not_in_two_sets():
    more = entry("test", "Artist", 50, "a"), entry("test", "Athlete", 50, "a")
    splits = split(found(*more))
    whole = [*splits.meta, *splits.validation, *splits.test]
    assert sum(one.triples == (("a", "p", "o"),) for one in whole) == 1 and len(whole) == 64
    assert splits.warnings == (
        "1 entries of the target domains have the triples of another and were left out",
    )


def test_entries_without_references_are_told():
    assert split(found(lacking=7)).warnings == (
        "7 entries have no reference text and were left out",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "half"}, "kind must be full or controlled, got 'half'"),
        ({"kind": "full", "close": "City"}, "close='City' goes with task.kind=controlled"),
        (
            {"train_domains": ["Astronaut", "Car"]},
            r"train_domains must name domains of the train split, got 'Car': there are "
            r"Astronaut \(9\), City \(8\), Food \(7\)",
        ),
        (
            {"target_domains": ["Food"]},
            r"target_domains must name domains of the test split, got 'Food': there are "
            r"Artist \(22\), Athlete \(20\), City \(5\), Politician \(21\)",
        ),
        ({"target_domains": ["Artist", "City"]}, "no domain in common, got City in both"),
        ({"close": "City"}, "one that is far, got City, City alone"),
        ({"train_domains": ["Food", "City"]}, r"close must be one of .* got 'Astronaut' \(the def"),
        ({"train_domains": ["Food", "City"], "close": "Car"}, "close must be .* got 'Car': name"),
        ({"meta": 0}, "meta_per_domain must be at least 1, got 0"),
        (
            {"meta": 15},
            r"Athlete has 20 entries, of which 5 .* got task.meta_per_domain=15: take at most 14",
        ),
        (
            {"kind": "full", "target_domains": ["City"], "meta": 4},
            "City has 5 entries, of which 1 .* take at most 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        split(found(), **options)


def test_data_without_targets_are_refused():
    data = Found([one for one in found().entries if one.split == "train"], "tiny")
    with pytest.raises(InputError, match=r"test split alone, got none: .* of none"):
        split(data, "full")
    few = found(test={"Artist": 3})
    with pytest.raises(
        InputError, match=r"Artist has 3 entries.*: name others with task.data.target_domains"
    ):
        split(few, meta=1)
    assert len(split(found(), meta=14).test) == 1 + 2 + 3


@pytest.mark.parametrize(("kind", "meta", "known"), [("full", 30, 4), ("controlled", 50, 2)])
def test_the_made_up_set_fits_the_defaults_and_warns(kind, meta, known):
    data = generated(kind)
    assert data == generated(kind) != generated(kind, 1)
    splits = split(data, kind, meta=meta)
    assert len(splits.train) == 600 and len(domains(splits.train)) == known
    assert domains(splits.meta) == {"Athlete": meta, "Politician": meta, "Artist": meta}
    assert len(splits.validation) == 90 and len(splits.test) == 270 - 3 * meta
    assert splits.close == (None if kind == "full" else "Astronaut")
    assert splits.name == "generated" and len(splits.warnings) == 1
    assert "its numbers cannot be compared" in splits.warnings[0]


def test_made_up_entries_are_like_real_ones():
    data = generated("full")
    assert len(keys(data.entries)) == len(data.entries)
    assert {one.split for one in data.entries} == {"train", "dev", "test"}
    assert {len(one.triples) for one in data.entries} == {1, 2, 3}
    for one in data.entries:
        assert one.key.startswith(f"{one.split}/{one.domain}/{len(one.triples)}/")
        assert len(set(one.references)) == 2
        for text in one.references:
            said = [name.replace("_", " ") for s, _, o in one.triples for name in (s, o)]
            assert all(name in text for name in said) and "_" not in text and "{" not in text


def test_the_close_domain_shares_properties_with_the_targets_and_the_far_one_none():
    def properties(*names: str) -> set[str]:
        entries = generated("controlled").entries
        return {name for one in entries if one.domain in names for _, name, _ in one.triples}

    targets = properties("Athlete", "Politician", "Artist")
    assert len(properties("Astronaut") & targets) == 4
    assert not properties("City") & targets


@pytest.mark.skipif(not REAL.is_file(), reason="BADS_DATA names no folder with WebNLG")
def test_the_real_file_has_the_known_domains():
    data = read_webnlg(REAL.parent)
    full = split(data, "full", meta=30)
    unseen = {"Artist", "Athlete", "CelestialBody", "MeanOfTransportation", "Politician"}
    assert domains(full.meta) == dict.fromkeys(unseen, 30) and len(domains(full.train)) == 10
    assert sum(len(part) for part in (full.meta, full.validation, full.test)) == 891
    assert len(full.train) == 6936 and full.warnings[0].startswith("4 train entries")
    controlled = split(data, meta=50)
    assert domains(controlled.train) == {"Astronaut": 530, "City": 243}
    assert controlled.close == "Astronaut" and len(controlled.meta) == 150
