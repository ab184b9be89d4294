"""Labelled texts from a user's file: CSV, TSV, JSON lines (each gzip-compressed or not), parquet.

Nothing is lost silently: a row whose text or label is empty is refused, or dropped and counted, and
what cannot be read is named with its line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bads_ppl.errors import InputError

KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Endings that are read; all but parquet also with .gz after them."""

Empty = Literal["refuse", "drop"]
"""What to do with rows whose text or label is empty."""


@dataclass(frozen=True)
class Texts:
    """Labelled texts, in the order of their file.

    Attributes:
        texts: the N texts, none of them empty.
        labels: their N labels, as they stand in the file.
        ids: rows of the file that they come from, counted from 0.
        empty: rows that were left out because text or label was empty.
    """

    texts: list[str]
    labels: list[str]
    ids: list[int]
    empty: int = 0

    def __len__(self) -> int:
        return len(self.texts)


class _Row(NamedTuple):
    """A row of a file: where it stands ("line 5", "row 4"), and its text and label."""

    where: str
    text: Any
    label: Any


def read_texts(path: Path, *, text: str, label: str, empty: Empty = "refuse") -> Texts:
    """The labelled texts of a file.

    Args:
        path: the file; its ending says what it is.
        text: column (in JSON lines: key) of the texts.
        label: column of the labels: words or whole numbers.
        empty: "refuse" rows whose text or label is empty or blank, or "drop" and count them.

    Raises:
        InputError: if the file cannot be read, lacks a column, or holds something else than texts
            and labels; naming the line.
    """
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _json, ".ndjson": _json, ".parquet": _parquet}
    reader = readers[kind_of(path, KINDS, "texts")]
    found, missing = Texts([], [], []), []
    for number, row in enumerate(reader(path, text, label)):
        words, name = _text(row, path, text), _label(row, path, label)
        if not words.strip() or not name:
            missing.append(row.where)
            continue
        found.texts.append(words)
        found.labels.append(name)
        found.ids.append(number)
    if missing and empty == "refuse":
        raise InputError(
            f"{path} has {len(missing)} of {len(missing) + len(found)} rows whose {text!r} or "
            f"{label!r} is empty, the first at {', '.join(missing[:5])}: fill them, or leave them "
            "out with task.data.empty=drop"
        )
    if not len(found):
        raise InputError(f"{path} has no rows with text and label: give at least one per class")
    return Texts(found.texts, found.labels, found.ids, len(missing))


def kind_of(path: Path, kinds: Sequence[str], what: str) -> str:
    """The ending of a file that is there, .gz left out.

    Args:
        path: the file.
        kinds: endings that are read, .parquet among them; all others also with .gz.
        what: what the file holds, for messages.

    Raises:
        InputError: if it is not there, or ends otherwise.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path.absolute()}: name the file of {what}")
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    if kind not in kinds or (kind == ".parquet" and path.suffix == ".gz"):
        raise InputError(
            f"{path} must end in {', '.join(kinds)} (all but .parquet also with .gz), got "
            f"{path.suffix or 'no ending'!r}: write the {what} as one of these"
        )
    return kind


def _text(row: _Row, path: Path, column: str) -> str:
    if row.text is None or isinstance(row.text, str):
        return row.text or ""
    raise InputError(
        f"{path}, {row.where}: {column!r} must be text, got {row.text!r}: name the column of the "
        "texts with data.text"
    )


def _label(row: _Row, path: Path, column: str) -> str:
    """A label as a word: whole numbers may be written 3 or 3.0."""
    value = row.label
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or isinstance(value, str | int):
        return "" if value is None else str(value).strip()
    raise InputError(
        f"{path}, {row.where}: {column!r} must be a word or a whole number, got {value!r}: name "
        "the column of the labels with data.label"
    )


def _check_columns(path: Path, there: list[str], wanted: list[str]) -> None:
    lacking = [repr(name) for name in wanted if name not in there]
    if lacking:
        raise InputError(
            f"{path} has no column {' and no column '.join(lacking)}; there are "
            f"{', '.join(map(repr, there)) or 'none'}: name yours with data.text and "
            "data.label"
        )


def lines(path: Path) -> Iterator[str]:
    """Lines of a file with their ends.

    Raises:
        InputError: if it is not UTF-8, naming the line, or a damaged gzip file.
    """
    for number, line in _numbered(path):
        yield _decoded(line, f"{path}, line {number}")


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1 on, without a byte order mark."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}, after line {number}: expected a whole gzip file, got: {error}: replace it by "
            "an intact copy"
        ) from error


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: expected UTF-8, got the byte {error.object[error.start]:#04x}: save the "
            "file as UTF-8"
        ) from error


def _csv(path: Path, text: str, label: str) -> Iterator[_Row]:
    csv.field_size_limit(2**31 - 1)  # process-wide; longer texts than 128 KiB are texts too
    tab = ".tsv" in path.suffixes
    reader = csv.reader(lines(path), delimiter="\t" if tab else ",", strict=True)
    start = 1
    try:
        header = next(reader, [])
        _check_columns(path, header, [text, label])
        places = header.index(text), header.index(label)
        start = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):
                raise InputError(
                    f"{path}, line {start}: expected {len(header)} fields as in the first line, "
                    f"got {len(values)}: quote fields that hold {'tabs' if tab else 'commas'} or "
                    "line ends"
                )
            if values:
                yield _Row(f"line {start}", values[places[0]], values[places[1]])
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}, the row that begins in line {start}: {error}: mend its quotes"
        ) from error


def objects(path: Path, form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with where it stands; blank lines are left out.

    Args:
        path: .jsonl or .jsonl.gz.
        form: what an object should look like, for messages.

    Raises:
        InputError: if the file cannot be read, or a line is no JSON object.
    """
    for where, row in attempts(path, form):
        if isinstance(row, InputError):
            raise row
        yield where, row


def attempts(path: Path, form: str) -> Iterator[tuple[str, dict[str, Any] | InputError]]:
    """As `objects`, with what is wrong in place of a line that is no JSON object in UTF-8.

    Raises:
        InputError: if the file cannot be read, such as a damaged gzip file.
    """
    for number, line in _numbered(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row: dict[str, Any] | InputError
        try:
            row = _object(_decoded(line, where), where, form)
        except InputError as error:
            row = error
        yield where, row


def _object(line: str, where: str, form: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: expected one JSON object, got: {error}: mend that line"
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(row).__name__}: write {form}")
    return row


def _json(path: Path, text: str, label: str) -> Iterator[_Row]:
    for where, row in objects(path, f'{{"{text}": ..., "{label}": ...}}'):
        if text not in row or label not in row:
            lacking = text if text not in row else label
            raise InputError(
                f"{where}: no key {lacking!r}; there are "
                f"{', '.join(map(repr, row)) or 'none'}: name yours with data.text and "
                "data.label, or write null for what is missing"
            )
        yield _Row(where.removeprefix(f"{path}, "), row[text], row[label])


def _parquet(path: Path, text: str, label: str) -> Iterator[_Row]:
    with readable(path, "parquet"):
        _check_columns(path, pq.read_schema(path).names, [text, label])
    for number, row in enumerate(parquet_rows(path, [text, label])):
        yield _Row(f"row {number}", row[text], row[label])


def parquet_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, by column.

    Raises:
        InputError: if it cannot be read.
    """
    with readable(path, "parquet"):
        for block in pq.ParquetFile(path).iter_batches(columns=columns):
            yield from block.to_pylist()


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Says of what goes wrong in pyarrow that the file is damaged."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} cannot be read as {kind} ({' '.join(str(error).split())}): write it again"
        ) from error
