"""Which WebNLG entries are train, meta, validation and test points, and a set without files.

A model learns from some domains and is tested on others, of which the meta set has a few entries.
Each target domain has a fixed order, that of a hash of its entries' keys. Its first quarter is for
validation; of the others the seed draws the meta entries, and the rest is for the test. So an entry
that settings are tuned on is no test entry under any seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from typing import Literal

import numpy as np

from bads_ppl.errors import InputError
from inference.text_sources import generator
from inference.webnlg_entries import Entry, Found, Split, Triple, entity_words

Kind = Literal["full", "controlled"]

GENERATED = "generated"


@dataclass(frozen=True)
class Splits:
    """Entries by what they are for; no two of the lists share an entry or a set of triples.

    Attributes:
        train: entries to weight, in the order of the source.
        others: entries of the train split whose domains are neither trained on nor targets, and
            that share no triple with an entry of the targets.
        meta: checked entries, by target domain.
        validation: entries to choose settings on, by target domain.
        test: entries to report on, by target domain.
        close: the train domain that is close to the targets, where kind is "controlled".
        name: of the data, as recorded in the results.
        warnings: what a reader of the results must know.
    """

    train: list[Entry]
    others: list[Entry]
    meta: list[Entry]
    validation: list[Entry]
    test: list[Entry]
    close: str | None
    name: str
    warnings: tuple[str, ...] = ()


def splits_of(
    found: Found,
    kind: Kind,
    *,
    seed: int,
    meta_per_domain: int,
    train_domains: Sequence[str] = (),
    target_domains: Sequence[str] = (),
    close: str | None = None,
) -> Splits:
    """Train, meta, validation and test entries.

    Args:
        found: what was read.
        kind: "full" trains on all domains of the train split that are no targets, and its targets
            are those in the test split alone; "controlled" trains on a domain close to its targets
            and on one that is far.
        seed: draws the meta entries of each target domain.
        meta_per_domain: meta entries of each target domain, at least 1.
        train_domains: other domains to train on.
        target_domains: other targets.
        close: another close domain, one of those trained on; "controlled" only.

    Raises:
        InputError: if a domain does not exist, is both trained on and a target, or has too few
            entries.
    """
    train_names, targets, close = _domains(found, kind, train_domains, target_domains, close)
    notes = list(_notes(found))
    there: set[frozenset[Triple]] = set()
    meta: list[Entry] = []
    validation: list[Entry] = []
    test: list[Entry] = []
    repeated = 0
    for domain in targets:
        entries = _of(found, "test", domain)
        fresh = []
        for entry in entries:
            if (said := frozenset(entry.triples)) not in there:
                there.add(said)
                fresh.append(entry)
        repeated += len(entries) - len(fresh)
        parts = _parted(fresh, domain, seed, meta_per_domain)
        for whole, part in zip((validation, meta, test), parts, strict=True):
            whole.extend(part)
    offered = [one for one in found.entries if one.split == "train"]
    chosen = [one for one in offered if one.domain in train_names]
    train = [one for one in chosen if frozenset(one.triples) not in there]
    said_there = frozenset().union(*there)
    others = [
        one
        for one in offered
        if one.domain not in (*train_names, *targets) and said_there.isdisjoint(one.triples)
    ]
    _check_left(train, train_names)
    if repeated:
        notes.append(
            f"{repeated} entries of the target domains have the triples of another and were left "
            "out"
        )
    if len(chosen) > len(train):
        notes.append(
            f"{len(chosen) - len(train)} train entries have the triples of an entry of the target "
            "domains and were left out"
        )
    return Splits(train, others, meta, validation, test, close, found.name, tuple(notes))


def _notes(found: Found) -> list[str]:
    notes = []
    if found.name == GENERATED:
        notes.append(
            f"dataset is {GENERATED!r}, made on the spot from a few templates: it shows that "
            "things run, and its numbers cannot be compared with those of WebNLG"
        )
    if found.lacking:
        notes.append(f"{found.lacking} entries have no reference text and were left out")
    return notes


def _of(found: Found, split: Split, domain: str) -> list[Entry]:
    return [one for one in found.entries if one.split == split and one.domain == domain]


# --------------------------------------------------------------------------------------- domains


def _domains(
    found: Found, kind: Kind, train: Sequence[str], targets: Sequence[str], close: str | None
) -> tuple[list[str], list[str], str | None]:
    """Names of the domains to train on and of the targets, and which of the former is close."""
    counts = {
        split: Counter(one.domain for one in found.entries if one.split == split)
        for split in ("train", "dev", "test")
    }
    _check_known(train, targets, counts)
    if kind == "controlled":
        return _checked(*_controlled(counts["train"], train, targets, close), counts)
    if kind != "full":
        raise InputError(f"task.kind must be full or controlled, got {kind!r}")
    if close is not None:
        raise InputError(
            f"task.data.close={close!r} goes with task.kind=controlled, got full: leave it out"
        )
    unseen = sorted(set(counts["test"]) - set(counts["train"]) - set(counts["dev"]))
    if not unseen and not targets:
        raise InputError(
            "kind=full tests on domains that stand in the test split alone, got none: name some "
            f"with task.data.target_domains, of {_listed(counts['test'])}"
        )
    targets = targets or unseen
    train = train or sorted(set(counts["train"]) - set(targets))
    return _checked(train, targets, None, counts)


def _controlled(
    trained: Counter[str], train: Sequence[str], targets: Sequence[str], close: str | None
) -> tuple[Sequence[str], Sequence[str], str]:
    """Of 2017 the paper's close domain, Artist, is in the test split alone: Astronaut stands in."""
    usual, other = ("Artist", "Astronaut") if "Artist" in trained else ("Astronaut", "Artist")
    near = usual if close is None else close
    train = train or (near, "City")
    targets = targets or ("Athlete", "Politician", other)
    if near not in train:
        raise InputError(
            f"close must be one of the train domains {', '.join(train)}, got {near!r}"
            f"{' (the default)' if close is None else ''}: name one of them with task.data.close"
        )
    if len(set(train)) < 2:
        raise InputError(
            "kind=controlled trains on a domain that is close and one that is far, got "
            f"{', '.join(train)} alone: name both with task.data.train_domains"
        )
    return train, targets, near


def _check_known(
    train: Sequence[str], targets: Sequence[str], counts: dict[str, Counter[str]]
) -> None:
    for knob, names, split in (
        ("train_domains", train, "train"),
        ("target_domains", targets, "test"),
    ):
        missing = [name for name in names if name not in counts[split]]
        if missing:
            raise InputError(
                f"task.data.{knob} must name domains of the {split} split, got "
                f"{', '.join(map(repr, missing))}: there are {_listed(counts[split])}"
            )


def _checked(
    train: Sequence[str],
    targets: Sequence[str],
    close: str | None,
    counts: dict[str, Counter[str]],
) -> tuple[list[str], list[str], str | None]:
    _check_known(train, targets, counts)
    if not train:
        raise InputError(
            "there is no train domain beside the targets: name task.data.train_domains"
        )
    both = sorted(set(train) & set(targets))
    if both:
        raise InputError(
            f"task.data.train_domains and target_domains must have no domain in common, got "
            f"{', '.join(both)} in both: leave it out of one"
        )
    return list(dict.fromkeys(train)), list(dict.fromkeys(targets)), close


def _listed(count: Counter[str]) -> str:
    return ", ".join(f"{name} ({count[name]})" for name in sorted(count)) or "none"


def _check_left(train: list[Entry], names: list[str]) -> None:
    lost = sorted(set(names) - {one.domain for one in train})
    if lost:
        raise InputError(
            f"all train entries of {', '.join(lost)} have the triples of an entry of the target "
            "domains: leave these out of task.data.train_domains"
        )


# ----------------------------------------------------------------------------------------- draws


def _parted(
    entries: list[Entry], domain: str, seed: int, meta: int
) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Validation, meta and test entries of a target domain; the first do not depend on the seed."""
    if meta < 1:
        raise InputError(f"task.meta_per_domain must be at least 1, got {meta}")
    ordered = sorted(entries, key=lambda one: sha256(one.key.encode()).digest())
    quarter = len(ordered) // 4
    if quarter < 1 or len(ordered) - quarter <= meta:
        raise InputError(
            f"target domain {domain} has {len(ordered)} entries, of which {quarter} (a quarter) "
            f"are for validation and at least 1 is to test on, got task.meta_per_domain={meta}: "
            + (
                f"take at most {len(ordered) - quarter - 1}"
                if quarter and len(ordered) - quarter > 1
                else "name others with task.data.target_domains, of at least 4 entries"
            )
        )
    rest = ordered[quarter:]
    drawn = set(generator(seed, f"meta {domain}").permutation(len(rest))[:meta].tolist())
    return (
        ordered[:quarter],
        [one for place, one in enumerate(rest) if place in drawn],
        [one for place, one in enumerate(rest) if place not in drawn],
    )


# ------------------------------------------------------------------------------------- made up

_PLACES = ("Velden", "Marrow_Bay", "Kestrel_Hill", "Oldwick", "Tarn", "Sallow_Ridge", "Lund_Cross")
_SCHOOLS = tuple(f"University_of_{place}" for place in _PLACES)
_COUNTRIES = ("Norlund", "Estaria", "Quillia", "Port_Verra", "Osmark")
_YEARS = tuple(str(year) for year in range(1931, 1996, 4))
_PEOPLE = {
    "birthPlace": (_PLACES, "was born in {}", "comes from {}"),
    "almaMater": (_SCHOOLS, "studied at the {}", "graduated from the {}"),
    "birthYear": (_YEARS, "was born in the year {}", "has {} as year of birth"),
    "occupation": (
        ("pilot", "teacher", "doctor", "baker", "journalist"),
        "worked as a {}",
        "had a post as a {}",
    ),
}
_PROPERTIES = {
    "Astronaut": {
        **_PEOPLE,
        "mission": (("Helios_3", "Lyra_7", "Orbiter_12"), "flew on {}", "was in the crew of {}"),
    },
    "City": {
        "country": (_COUNTRIES, "is in {}", "is a city of {}"),
        "populationTotal": (
            tuple(str(1370 * n) for n in range(9, 60)),
            "has {} inhabitants",
            "has a population of {}",
        ),
        "areaTotal": (
            tuple(f"{n}.4" for n in range(11, 95)),
            "covers {} square kilometres",
            "has an area of {} square kilometres",
        ),
        "mayor": (
            ("Ada_Brenner", "Colm_Reyes", "Ines_Vasko", "Teo_Lindqvist"),
            "is led by {}",
            "has {} as its mayor",
        ),
        "foundingYear": (
            tuple(str(year) for year in range(1104, 1800, 29)),
            "was founded in {}",
            "has stood since {}",
        ),
    },
    "Airport": {
        "cityServed": (_PLACES, "serves {}", "is the airport of {}"),
        "runwayLength": (
            tuple(f"{n}00.0" for n in range(13, 42)),
            "has a runway of {} metres",
            "has a runway that is {} metres long",
        ),
        "operatingOrganisation": (
            ("Skyways_Trust", "Norlund_Air_Board", "Blue_Harbour_Group"),
            "is run by the {}",
            "has the {} as its operator",
        ),
        "country": (_COUNTRIES, "is in {}", "can be found in {}"),
        "openingYear": (_YEARS, "opened in {}", "has been in use since {}"),
    },
    "Food": {
        "country": (_COUNTRIES, "comes from {}", "is a dish of {}"),
        "mainIngredient": (
            ("barley", "smoked_eel", "red_lentils", "goat_cheese", "plums", "chestnuts"),
            "is made with {}",
            "has {} as its main ingredient",
        ),
        "course": (("starter", "main_course", "dessert"), "is a {}", "is eaten as a {}"),
        "region": (_PLACES, "is typical of {}", "can be had in {}"),
        "servingTemperature": (("hot", "cold", "warm"), "is served {}", "should be eaten {}"),
    },
    "Athlete": {
        **_PEOPLE,
        "club": (
            ("Velden_Rovers", "Tarn_United", "Oldwick_Town"),
            "played for {}",
            "was on the team of {}",
        ),
    },
    "Politician": {
        **_PEOPLE,
        "party": (
            ("Green_Union", "Civic_League", "Labour_Front"),
            "belongs to the {}",
            "is a member of the {}",
        ),
    },
    "Artist": {
        **_PEOPLE,
        "instrument": (("cello", "trumpet", "piano"), "plays the {}", "performs on the {}"),
    },
}
"""By domain and property: its values, and two phrases that say it."""

_FIRST = (
    "Ada",
    "Bruno",
    "Clara",
    "Dario",
    "Elif",
    "Finn",
    "Greta",
    "Hugo",
    "Iris",
    "Jonas",
    "Kira",
)
_LAST = (
    *("Almgren", "Bexley", "Corvo", "Dahl", "Estrin", "Falk", "Grieve", "Holt", "Ivers", "Juhl"),
    *("Kovar", "Lindqvist", "Maro", "Nyberg", "Orsini"),
)
_NAMES = {
    "person": (_FIRST, _LAST),
    "City": (
        ("Bram", "Kes", "Dun", "Mil", "Har", "Wes", "Fal", "Gold"),
        ("ford", "haven", "burg", "mouth", "stead", "bridge", "minster", "ton"),
    ),
    "Airport": (
        ("North", "South", "East", "West", "Old", "New", "Lake", "Coast"),
        tuple(f"_{place}_Airport" for place in _PLACES),
    ),
    "Food": (
        ("Saffron", "Winter", "Shepherd", "Harbour", "Sunday", "Golden", "Velvet", "Smoky"),
        ("_Stew", "_Pie", "_Dumplings", "_Soup", "_Cake", "_Pudding", "_Rolls", "_Hotpot"),
    ),
}
"""Beginnings and ends of names."""

_TARGETS = ("Athlete", "Politician", "Artist")
_TRAIN = 600  # train entries over all domains
_PER_TARGET = 120
_FACTS = 6  # entries about one and the same thing


def generated(kind: Kind, seed: int = 0) -> Found:
    """Entries about made-up people, cities, airports and dishes, where there are no files.

    One to three triples each with two references. Astronauts share four of their five properties,
    and the phrases for them, with the targets (athletes, politicians, artists); cities share none.

    Args:
        kind: "full" has the domains Astronaut, City, Airport and Food to train on, "controlled" the
            first two of these.
        seed: draws the made-up world; at its default all runs share their test entries.
    """
    draw = np.random.default_rng(seed)
    people = iter(_names("person", draw))
    known = ("Astronaut", "City", "Airport", "Food")[: 2 if kind == "controlled" else 4]
    seen: dict[Split, int] = {"train": _TRAIN // len(known), "dev": 24, "test": 24}
    entries = []
    for domain in (*known, *_TARGETS):
        person = "birthPlace" in _PROPERTIES[domain]
        things = people if person else iter(_names(domain, draw))
        sizes: dict[Split, int] = {"test": _PER_TARGET} if domain in _TARGETS else seen
        for split, count in sizes.items():
            made: list[Entry] = []
            while len(made) < count:
                made += _about(next(things), domain, split, len(made), draw)
            entries += made[:count]
    return Found(entries, GENERATED)


def _names(kind: str, draw: np.random.Generator) -> list[str]:
    link = "_" if kind == "person" else ""
    names = [first + link + last for first, last in product(*_NAMES[kind])]
    return [names[place] for place in draw.permutation(len(names))]


def _about(
    name: str, domain: str, split: Split, first: int, draw: np.random.Generator
) -> list[Entry]:
    """Entries with different facts about one thing, numbered from `first`."""
    facts = [
        ((name, key, str(draw.choice(values))), (phrase, other))
        for key, (values, phrase, other) in _PROPERTIES[domain].items()
    ]
    chosen: dict[frozenset[int], list[int]] = {}
    while len(chosen) < _FACTS:
        some = draw.permutation(len(facts))[: draw.integers(1, 4)].tolist()
        chosen.setdefault(frozenset(some), some)
    made = []
    for number, places in enumerate(chosen.values(), first):
        said = [facts[place] for place in places]
        clauses = [
            [phrases[way].format(entity_words(triple[2])) for triple, phrases in said]
            for way in (0, 1)
        ]
        subject = entity_words(name)
        references = (
            f"{subject} {_joined(clauses[0])}.",
            " ".join(f"{subject} {clause}." for clause in clauses[1]),
        )
        key = f"{split}/{domain}/{len(said)}/Id{number + 1}"
        made.append(Entry(key, split, domain, tuple(triple for triple, _ in said), references))
    return made


def _joined(clauses: list[str]) -> str:
    *most, last = clauses
    return f"{', '.join(most)} and {last}" if most else last
