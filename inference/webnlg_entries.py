"""WebNLG: sets of triples with the texts that say them, from JSON lines or the official XML.

The data of Gardent et al. (2017), "The WebNLG Challenge: Generating Text from RDF Data", and of its
later releases up to 2020. Entries without a text are left out and counted; what cannot be read is
named with its line or entry.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from bads_ppl.errors import InputError
from inference.text_files import lines, objects

Triple = tuple[str, str, str]
"""Subject, property, object."""

Split = Literal["train", "dev", "test"]

SPLITS = ("train", "dev", "test")
FILES = ("webnlg_en.jsonl.gz", "webnlg_en.jsonl")
FOLDER = "webnlg"
FIELDS = ("split", "category", "eid", "triples", "references")
"""Keys of a row in JSON lines."""

LAYOUT = "train/<n>triples/*.xml, dev/<n>triples/*.xml and test/*.xml (also below en/)"
EDITIONS = {(6940, 872, 1862): "webnlg 2017", (13211, 1667, 1779): "webnlg 2020"}
"""The releases that are told by how many entries train, dev and test have."""

_COPIES = re.compile(r"no_lex|unseen|without-refs|semantic-parsing")
"""Official test files that hold entries of the main test file a second time."""


@dataclass(frozen=True)
class Entry:
    """Triples with the texts that say them.

    Attributes:
        key: unique in what was read: "<split>/<domain>/<number of triples>/<eid>", with "#2" after
            it where the source has the same a second time.
        split: "train", "dev" or "test", as the source has it.
        domain: the category, such as "Astronaut".
        triples: at least one, as they stand in the source.
        references: the texts, at least one, none of them blank, runs of white space made one blank.
    """

    key: str
    split: Split
    domain: str
    triples: tuple[Triple, ...]
    references: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What was read.

    Attributes:
        entries: those with references, in the order of the source.
        name: the release ("webnlg 2017") where the number of entries tells it, else of the file.
        lacking: entries without any reference, which were left out.
    """

    entries: list[Entry]
    name: str
    lacking: int = 0


def find_webnlg(root: Path, source: str) -> Found | None:
    """The entries in `root`; None where the made-up set is to be taken.

    Args:
        root: as of `read_webnlg`.
        source: "generated": the made-up set; "files": never it; "auto": where nothing is there.

    Raises:
        InputError: if there is nothing for "files", or as `read_webnlg` does.
    """
    found = None if source == "generated" else read_webnlg(root)
    if found is None and source == "files":
        raise InputError(
            f"there is no WebNLG in {root}: put webnlg_en.jsonl.gz or the official release, as the "
            "folder webnlg, into data.root (BADS_DATA), or do without (data.source=generated)"
        )
    return found


def read_webnlg(root: Path) -> Found | None:
    """The entries of the first source that is there.

    Args:
        root: a file .jsonl, .jsonl.gz or .xml, or a folder of the official XML; else a folder that
            holds webnlg_en.jsonl.gz, webnlg_en.jsonl or such a folder named webnlg. Of the XML,
            English texts are read, and test files that repeat others (no_lex, unseen, without-refs,
            semantic-parsing) only where there are no others.

    Returns:
        None where nothing of this is there.

    Raises:
        InputError: if a source is there but damaged or without entries, naming line or entry.
    """
    root = Path(root)
    if root.is_file() or (not root.exists() and root.suffix in (".jsonl", ".gz", ".xml")):
        return _found(_file(root), root)
    if folder := _official(root):
        return _found(_folder(folder), root)
    for name in FILES:
        if (root / name).is_file():
            return _found(_json_lines(root / name), root / name)
    if not (root / FOLDER).is_dir():
        return None
    if folder := _official(root / FOLDER):
        return _found(_folder(folder), root / FOLDER)
    raise InputError(
        f"{root / FOLDER} must hold WebNLG's XML as {LAYOUT}, got none: put an official release "
        "there, or remove the folder"
    )


def linearise(triples: Iterable[Triple]) -> str:
    """Triples as one line of text: "<subject> | <property> | <object> && <subject> | ...".

    Underscores are blanks; quotes around subject or object are left out; properties are lower-case
    words ("leaderName" is "leader name", "LCCN_number" is "lccn number").
    """
    return " && ".join(
        f"{entity_words(subject)} | {property_words(name)} | {entity_words(object_)}"
        for subject, name, object_ in triples
    )


def entity_words(name: str) -> str:
    """A subject or object as words: '"Aarhus_Airport"' is "Aarhus Airport"."""
    if len(name) > 1 and name[0] == name[-1] == '"':
        name = name[1:-1]
    return _one_line(name.replace("_", " "))


def property_words(name: str) -> str:
    """A property as lower-case words: "UTCOffset" is "utc offset"."""
    parted = re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return _one_line(parted.replace("_", " ")).lower()


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------------------------- both formats


def _found(read: Iterable[Entry], source: Path) -> Found:
    """What was read, with unique keys, without entries that have no references."""
    entries, lacking = [], 0
    times: Counter[str] = Counter()
    for entry in read:
        times[entry.key] += 1
        if not entry.references:
            lacking += 1
            continue
        again = times[entry.key]
        entries.append(replace(entry, key=f"{entry.key}#{again}") if again > 1 else entry)
    if not entries:
        raise InputError(
            f"{source} has no entry with a reference text ({lacking} without): replace it by a "
            "whole copy of WebNLG"
        )
    count = Counter(entry.split for entry in entries)
    sizes = (count["train"], count["dev"], count["test"])
    return Found(entries, EDITIONS.get(sizes, source.name), lacking)


def _entry(
    split: str, domain: str, eid: str, triples: tuple[Triple, ...], texts: Iterable[str]
) -> Entry:
    """An entry; blank texts are none."""
    references = tuple(words for text in texts if (words := _one_line(text)))
    key = f"{split}/{domain}/{len(triples)}/{eid}"
    return Entry(key, cast(Split, split), domain, triples, references)


def _file(path: Path) -> Iterator[Entry]:
    if not path.exists():
        raise InputError(f"there is no file {path.absolute()}: name WebNLG's file or folder")
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    if kind == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".xml":
        return _xml(path, _split_of(path))
    raise InputError(
        f"{path} must end in .jsonl, .jsonl.gz or .xml, got {path.suffix or 'no ending'!r}: name "
        "WebNLG's file or folder"
    )


# ------------------------------------------------------------------------------------ JSON lines


def _json_lines(path: Path) -> Iterator[Entry]:
    for where, row in objects(path, f"an object with the keys {', '.join(FIELDS)}"):
        yield _from_row(row, where)


def _from_row(row: dict[str, Any], where: str) -> Entry:
    lacking = [name for name in FIELDS if name not in row]
    if lacking:
        raise InputError(
            f"{where}: expected the keys {', '.join(FIELDS)}, got no {', '.join(lacking)}: add "
            "what is missing (references that there are none of are [])"
        )
    split, domain, eid, triples, references = (row[name] for name in FIELDS)
    if split not in SPLITS:
        raise _wrong(where, "split", "one of train, dev, test", split)
    for name, value in (("category", domain), ("eid", eid)):
        if not _is_text(value):
            raise _wrong(where, name, "text that is not blank", value)
    if not isinstance(triples, list) or not triples or not all(map(_is_triple, triples)):
        raise _wrong(
            where, "triples", "a list of [subject, property, object], one at least", triples
        )
    if not isinstance(references, list) or not all(isinstance(one, str) for one in references):
        raise _wrong(where, "references", "a list of texts", references)
    return _entry(split, domain, eid, tuple((s, p, o) for s, p, o in triples), references)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_triple(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_text, value))


def _wrong(where: str, name: str, expected: str, value: object) -> InputError:
    return InputError(f"{where}: {name!r} must be {expected}, got {value!r:.200}: mend that line")


# ------------------------------------------------------------------------------------------- XML


def _official(folder: Path) -> Path | None:
    """The folder that has train, dev and test of the official XML in it, if there is one."""
    for place in (folder, folder / "en"):
        if any(next(place.glob(f"{split}/*triples/*.xml"), None) for split in SPLITS):
            return place
    return None


def _folder(folder: Path) -> Iterator[Entry]:
    for split in SPLITS:
        paths = sorted((folder / split).rglob("*.xml"))
        for path in [path for path in paths if not _COPIES.search(path.name)] or paths:
            yield from _xml(path, split)


def _split_of(path: Path) -> str:
    """The split of a single file: from its folder, or that above it, or its name."""
    near = path.absolute()
    for name in (near.parent.name, near.parent.parent.name):
        if name in SPLITS:
            return name
    if named := re.match("train|dev|test", path.name):
        return named[0]
    raise InputError(
        f"{path}: expected a file in a folder train, dev or test, or with a name that begins so, "
        f"got {near.parent.name}/{path.name}: move or rename it, to tell its split"
    )


def _xml(path: Path, split: str) -> Iterator[Entry]:
    entries = list(_tree(path).iter("entry"))
    if not entries:
        raise InputError(
            f"{path}: expected <entry> elements, got none: replace it by an intact copy, or remove "
            "it"
        )
    for number, element in enumerate(entries, 1):
        yield _from_element(element, split, path, number)


def _tree(path: Path) -> ET.Element:
    """The parsed file; entities are refused, as a few lines of them expand to gigabytes."""
    text = "".join(lines(path))
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise InputError(
            f"{path}: expected plain XML, got a document type or entity declaration: WebNLG has "
            "none, replace the file by an official copy"
        )
    try:
        return ET.fromstring(text)
    except ET.ParseError as error:
        raise InputError(
            f"{path} cannot be read as XML ({error}): replace it by an intact copy"
        ) from error


def _from_element(element: ET.Element, split: str, path: Path, number: int) -> Entry:
    domain, eid = element.get("category", "").strip(), element.get("eid", "").strip()
    where = f"{path}, entry {number} (eid {eid or 'missing'})"
    if not domain or not eid:
        raise InputError(
            f"{where}: expected the attributes category and eid, got {element.attrib}: add what is "
            "missing"
        )
    triples = tuple(
        _from_mtriple(one.text or "", where)
        for one in element.iterfind("modifiedtripleset/mtriple")
    )
    if not triples:
        raise InputError(
            f"{where}: expected <mtriple> elements in <modifiedtripleset>, got none: add them, or "
            "remove the entry"
        )
    texts = (one.text or "" for one in element.iterfind("lex") if one.get("lang", "") in ("", "en"))
    return _entry(split, domain, eid, triples, texts)


def _from_mtriple(text: str, where: str) -> Triple:
    parts = [part.strip() for part in text.split(" | ")]
    if len(parts) != 3 or not all(parts):
        raise InputError(
            f"{where}: expected <mtriple>subject | property | object</mtriple>, got {text!r}: mend "
            "it"
        )
    return parts[0], parts[1], parts[2]
