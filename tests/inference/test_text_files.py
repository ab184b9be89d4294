"""Files of texts: what each kind says, and what is refused with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bads_ppl.errors import InputError
from inference.text_files import read_texts

ROWS = [("one, two", "a"), ('say "so"\non two lines', "b"), ("drei Übel", "a")]


def write(path: Path, rows: list[tuple[object, object]]) -> Path:
    """The rows in the file's own kind, with a third column."""
    kind = next(s for s in reversed(path.suffixes) if s != ".gz")
    if kind == ".parquet":
        words, labels = zip(*rows, strict=True)
        pq.write_table(pa.table({"n": range(len(rows)), "body": words, "queue": labels}), path)
        return path
    if kind == ".jsonl":
        lines = [json.dumps({"body": a, "queue": b, "n": 0}) for a, b in rows]
    else:
        tab = "\t" if kind == ".tsv" else ","
        quoted = ['"' + str(a).replace('"', '""') + f'"{tab}{b}{tab}0' for a, b in rows]
        lines = [tab.join(["body", "queue", "n"]), *quoted]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path: Path, **options):
    return read_texts(path, text="body", label="queue", **options)


@pytest.mark.parametrize(
    "name", ["x.csv", "x.tsv", "x.jsonl", "x.parquet", "x.csv.gz", "x.y.jsonl.gz"]
)
def test_every_kind_of_file_gives_the_same_texts(name, tmp_path):
    found = read(write(tmp_path / name, ROWS))
    assert list(zip(found.texts, found.labels, strict=True)) == ROWS
    assert found.ids == [0, 1, 2] and found.empty == 0


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
def test_empty_rows_are_refused_with_their_places_or_dropped_and_counted(name, tmp_path):
    path = write(tmp_path / name, [*ROWS, (" \n", "a"), ("five", ""), ("six", "b")])
    with pytest.raises(InputError, match=r"has 2 of 6 rows whose 'body' or 'queue' is empty") as e:
        read(path)
    first = {".csv": "line 6, line 8", ".jsonl": "line 4, line 5", ".parquet": "row 3, row 4"}
    assert f"the first at {first[path.suffix]}:" in str(e.value)
    found = read(path, empty="drop")
    assert found.empty == 2 and found.ids == [0, 1, 2, 5] and found.texts[-1] == "six"


def test_whole_numbers_are_labels_and_other_values_are_not(tmp_path):
    numbers = [("x", 3), ("y", 3.0), ("z", None)]
    found = read(write(tmp_path / "x.parquet", numbers), empty="drop")
    assert found.labels == ["3", "3"] and found.empty == 1
    with pytest.raises(InputError, match=r"line 1: 'queue' must be a word .* got 0.5"):
        read(write(tmp_path / "x.jsonl", [("x", 0.5)]))
    with pytest.raises(InputError, match=r"line 1: 'body' must be text, got 7"):
        read(write(tmp_path / "x.jsonl", [(7, "a")]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"body,label\na,b\n", "has no column 'queue'; there are 'body', 'label'"),
        ("x.csv", b"", "no column 'body' and no column 'queue'; there are none"),
        ("x.csv", b"body,queue\na,b\nc,d,e\n", "line 3: expected 2 fields .* got 3"),
        ("x.csv", b"body,queue\na,b\nc\n", "line 3: expected 2 fields .* got 1"),
        ("x.csv", b'body,queue\na,b\n"c,d\ne,f\n', "the row that begins in line 3: .*quotes"),
        ("x.csv", b"body,queue\na,b\n\xe9t\xe9,d\n", "line 3: expected UTF-8, got the byte 0xe9"),
        ("x.csv", b"body,queue\n", "has no rows with text and label"),
        ("x.jsonl", b'{"body": "a", "queue": "b"}\n{"body": ', "line 2: expected one JSON object"),
        ("x.jsonl", b"[1]\n", "line 1: expected a JSON object, got list"),
        ("x.jsonl", b'{"body": "a"}\n', "line 1: no key 'queue'; there are 'body'"),
        ("x.jsonl.gz", b"plain", "expected a whole gzip file"),
        ("x.parquet", b"plain", "cannot be read as parquet"),
        ("x.xlsx", b"", "must end in .csv, .tsv, .jsonl, .ndjson, .parquet .* got '.xlsx'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_a_file_that_is_not_there_and_a_parquet_file_without_the_column(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*x\.csv"):
        read(tmp_path / "x.csv")
    with pytest.raises(InputError, match="has no column 'text'; there are 'n', 'body', 'queue'"):
        read_texts(write(tmp_path / "x.parquet", ROWS), text="text", label="queue")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbfbody,queue\na,b\n")
    assert read(tmp_path / "x.csv").texts == ["a"]
