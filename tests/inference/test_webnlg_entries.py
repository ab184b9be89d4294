"""WebNLG's entries: both formats, what is refused, and triples as a line of text."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from bads_ppl.errors import InputError
from inference.webnlg_entries import Entry, linearise, read_webnlg

REAL = Path(os.environ.get("BADS_DATA", "data")) / "webnlg_en.jsonl.gz"
ROW = {
    "split": "train",
    "category": "Food",
    "eid": "Id1",
    "triples": [["Bionico", "country", "Mexico"]],
    "references": ["Bionico is from  Mexico.\n", " "],
}


def lines(path: Path, *rows: dict) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def element(
    eid: str = "Id1",
    triples: tuple[str, ...] = ("Bionico | country | Mexico",),
    lexes: str = '<lex comment="good" lid="Id1">Bionico is from\n Mexico.</lex>',
    domain: str = "Food",
) -> str:
    sets = "".join(f"<mtriple>{one}</mtriple>" for one in triples)
    return (
        f'<entry category="{domain}" eid="{eid}" size="{len(triples)}">'
        "<originaltripleset><otriple>x | y | z</otriple></originaltripleset>"
        f"<modifiedtripleset>{sets}</modifiedtripleset>{lexes}</entry>"
    )


def xml(path: Path, *elements: str, before: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = f"<benchmark><entries>{''.join(elements)}</entries></benchmark>"
    path.write_text(f'<?xml version="1.0" encoding="UTF-8"?>{before}{content}', encoding="utf-8")
    return path


FOOD = Entry(
    "train/Food/1/Id1",
    "train",
    "Food",
    (("Bionico", "country", "Mexico"),),
    ("Bionico is from Mexico.",),
)


@pytest.mark.parametrize("name", ["webnlg_en.jsonl.gz", "webnlg_en.jsonl", "mine.jsonl"])
def test_json_lines_are_read_from_a_folder_or_by_name(name, tmp_path):
    path = lines(tmp_path / name, ROW)
    found = read_webnlg(path if name == "mine.jsonl" else tmp_path)
    assert (found.entries, found.name, found.lacking) == ([FOOD], name, 0)


@pytest.mark.parametrize("inner", ["", "en", "webnlg", "webnlg/en"])
def test_the_official_xml_gives_what_json_lines_give(inner, tmp_path):
    xml(tmp_path / inner / "train" / "1triples" / "Food.xml", element())
    xml(tmp_path / inner / "dev" / "1triples" / "Food.xml", element())
    xml(tmp_path / inner / "test" / "testdata_with_lex.xml", element())
    found = read_webnlg(tmp_path)
    assert found.entries[0] == FOOD
    assert [one.key for one in found.entries] == [
        f"{split}/Food/1/Id1" for split in ("train", "dev", "test")
    ]


def test_one_xml_file_has_the_split_of_its_folder_or_of_its_name(tmp_path):
    below = xml(tmp_path / "dev" / "1triples" / "train.xml", element())
    named = xml(tmp_path / "testdata.xml", element())
    assert [read_webnlg(path).entries[0].split for path in (below, named)] == ["dev", "test"]
    with pytest.raises(InputError, match=r"got .*/food.xml: move or rename it, to tell its split"):
        read_webnlg(xml(tmp_path / "food.xml", element()))


def test_other_languages_are_skipped_and_entries_left_without_text_are_counted(tmp_path):
    lexes = '<lex lang="ru">Бионико</lex>', '<lex lang="en">A</lex><lex lang="">B</lex><lex> </lex>'
    path = xml(tmp_path / "train.xml", *(element(f"Id{k}", lexes=lexes[k]) for k in (0, 1)))
    found = read_webnlg(path)
    assert [(one.key, one.references) for one in found.entries] == [
        ("train/Food/1/Id1", ("A", "B"))
    ]
    assert found.lacking == 1
    rows = [ROW, {**ROW, "eid": "Id2", "references": []}, {**ROW, "references": [" "]}]
    assert read_webnlg(lines(tmp_path / "mine.jsonl", *rows)).lacking == 2


def test_test_files_that_repeat_others_are_read_only_where_they_are_alone(tmp_path):
    xml(tmp_path / "train" / "1triples" / "Food.xml", element())
    xml(tmp_path / "test" / "testdata_unseen_with_lex.xml", element("Id7"))
    assert [one.key for one in read_webnlg(tmp_path).entries][1:] == ["test/Food/1/Id7"]
    for name in ("rdf-to-text-generation-test-data-with-refs-en", "semantic-parsing-test-data"):
        xml(tmp_path / "test" / f"{name}.xml", element("Id8"))
    xml(tmp_path / "test" / "testdata_no_lex.xml", element("Id8", lexes=""))
    found = read_webnlg(tmp_path)
    assert [one.key for one in found.entries][1:] == ["test/Food/1/Id8"] and not found.lacking


def test_keys_are_unique(tmp_path):
    two = {**ROW, "triples": [["a", "b", "c"], ["d", "e", "f"]]}
    found = read_webnlg(lines(tmp_path / "mine.jsonl", ROW, ROW, two, ROW))
    assert [one.key for one in found.entries] == [
        "train/Food/1/Id1",
        "train/Food/1/Id1#2",
        "train/Food/2/Id1",
        "train/Food/1/Id1#3",
    ]


def test_where_nothing_is_there_nothing_is_found(tmp_path):
    assert read_webnlg(tmp_path) is None
    assert read_webnlg(tmp_path / "nowhere") is None
    with pytest.raises(InputError, match=r"there is no file .*mine.jsonl.gz: name"):
        read_webnlg(tmp_path / "mine.jsonl.gz")
    (tmp_path / "webnlg").mkdir()
    with pytest.raises(InputError, match=r"webnlg must hold WebNLG's XML as train/<n>triples"):
        read_webnlg(tmp_path)
    (tmp_path / "mine.csv").touch()
    with pytest.raises(InputError, match=r"must end in .jsonl, .jsonl.gz or .xml, got '.csv'"):
        read_webnlg(tmp_path / "mine.csv")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split": "valid"}, "'split' must be one of train, dev, test, got 'valid'"),
        ({"category": " "}, "'category' must be text that is not blank, got ' '"),
        ({"eid": 3}, "'eid' must be text that is not blank, got 3"),
        ({"triples": []}, r"'triples' must be a list of .*, one at least, got \[\]"),
        ({"triples": [["a", "b"]]}, r"'triples' must be .* got \[\['a', 'b'\]\]"),
        ({"triples": [["a", "b", ""]]}, r"'triples' must be .* got \[\['a', 'b', ''\]\]"),
        ({"references": "text"}, "'references' must be a list of texts, got 'text'"),
        ({"references": [None]}, r"'references' must be a list of texts, got \[None\]"),
    ],
)
def test_wrong_fields_are_refused_with_their_line(changed, message, tmp_path):
    path = lines(tmp_path / "mine.jsonl", ROW, {**ROW, **changed})
    with pytest.raises(InputError, match=f"mine.jsonl, line 2: {message}"):
        read_webnlg(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('\n{"split": ', "line 2: expected one JSON object, got: .*: mend that line"),
        ("[1]", "line 1: expected a JSON object, got list"),
        ('{"split": "dev", "eid": "Id1"}', "line 1: .* got no category, triples, references: add"),
        ("\n", r"has no entry with a reference text \(0 without\): replace it"),
    ],
)
def test_damaged_lines_are_refused(text, message, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_webnlg(path)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    path = lines(tmp_path / "webnlg_en.jsonl.gz", ROW)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match="expected a whole gzip file"):
        read_webnlg(tmp_path)
    path = xml(tmp_path / "train.xml", element())
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match=r"train.xml cannot be read as XML \(.*line 2"):
        read_webnlg(path)


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        ([], "expected <entry> elements, got none"),
        ([element(domain="")], r"entry 1 \(eid Id1\): expected the attributes category and eid"),
        ([element(), element(eid="")], r"entry 2 \(eid missing\): expected the attributes"),
        ([element(triples=())], "expected <mtriple> elements in <modifiedtripleset>, got none"),
        ([element(triples=("a | b",))], r"got 'a \| b': mend it"),
        ([element(triples=("a | b | ",))], r"got 'a \| b \| ': mend it"),
        ([element(lexes="")], r"has no entry with a reference text \(1 without\)"),
    ],
)
def test_wrong_xml_is_refused_with_its_entry(elements, message, tmp_path):
    path = xml(tmp_path / "train.xml", *elements)
    with pytest.raises(InputError, match=rf"train.xml.*{message}"):
        read_webnlg(path)


def test_xml_that_declares_entities_is_refused_before_it_is_parsed(tmp_path):
    before = '<!DOCTYPE b [<!ENTITY a "aaaa"><!ENTITY c "&a;&a;&a;&a;">]>'
    lexes = "<lex>&c;</lex>"
    with pytest.raises(InputError, match="got a document type or entity declaration"):
        read_webnlg(xml(tmp_path / "train.xml", element(lexes=lexes), before=before))


def test_triples_are_linearised_with_words_for_names():
    triples = [
        ("Aarhus_Airport", "leaderName", '"Aarhus, Denmark"'),
        ('"A"_and_"B"', "LCCN_number", '"'),
        ("X_(band)", "UTCOffset", "'+2'"),
        ("Y", "elevationAboveTheSeaLevel_(in_metres)", "25.0"),
        ("Z", "5th_runway_SurfaceType", "dateOfBirth"),
        ("Z", "was selected by NASA", "1963"),
    ]
    assert linearise(triples).split(" && ") == [
        "Aarhus Airport | leader name | Aarhus, Denmark",
        'A" and "B | lccn number | "',
        "X (band) | utc offset | '+2'",
        "Y | elevation above the sea level (in metres) | 25.0",
        "Z | 5th runway surface type | dateOfBirth",
        "Z | was selected by nasa | 1963",
    ]


@pytest.mark.skipif(not REAL.is_file(), reason="BADS_DATA names no folder with WebNLG")
def test_the_real_file_is_read_whole():
    found = read_webnlg(REAL.parent)
    count = Counter(one.split for one in found.entries)
    assert (count["train"], count["dev"], count["test"]) == (6940, 872, 1862)
    assert sum(len(one.references) for one in found.entries) == 18_102 + 2268 + 4928
    assert found.name == "webnlg 2017" and found.lacking == 0
    domains = {s: {one.domain for one in found.entries if one.split == s} for s in count}
    assert len(domains["train"]) == len(domains["dev"]) == 10
    assert len(domains["test"] - domains["train"]) == 5
    assert len({one.key for one in found.entries}) == len(found.entries)
