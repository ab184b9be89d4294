"""Instructions with responses, as conversations: from a user's files or from five public sources.

JSON lines, parquet, and folders that `datasets` saved. Nothing is lost silently: malformed rows and
those without a prompt or a response are refused with their place, or left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from bads_ppl.errors import InputError
from inference.saved_sets import saved_rows, set_folder
from inference.text_files import Empty, attempts, kind_of, parquet_rows
from inference.text_sources import DOLLY

Role = Literal["system", "user", "assistant"]

OnError = Literal["refuse", "skip"]
"""What to do with malformed lines."""

ROLES = ("system", "user", "assistant")
KINDS = (".jsonl", ".ndjson", ".parquet")
"""Endings that are read; all but parquet also with .gz after them."""

FORM = (
    'an object with the key "messages" ([{"role": ..., "content": ...}, ...]), or "prompt" and '
    '"response", or "instruction" (and "input") and "output"'
)


class Message(NamedTuple):
    """What one side says."""

    role: Role
    content: str


Conversation = tuple[Message, ...]
"""Messages that end with an assistant's, the response."""


@dataclass(frozen=True)
class Instructions:
    """Conversations of one source, in its order.

    Attributes:
        source: its name.
        ids: of the N conversations, unique in the source: "id" or "message_id" of the row, else
            the row's number, counted from 0.
        conversations: N, none of their messages blank.
        skipped: malformed rows that were left out.
        empty: rows that were left out because a prompt or response is blank.
    """

    source: str
    ids: list[str]
    conversations: list[Conversation]
    skipped: int = 0
    empty: int = 0

    def __len__(self) -> int:
        return len(self.conversations)

    def keep(self, places: Sequence[int]) -> Instructions:
        """The conversations at these places."""
        return replace(
            self,
            ids=[self.ids[place] for place in places],
            conversations=[self.conversations[place] for place in places],
        )

    def notes(self, what: str) -> list[str]:
        """What to say of rows that were left out; `what` they are rows of."""
        counts = (
            (self.skipped, "are malformed"),
            (self.empty, "have an empty prompt or response"),
        )
        return [f"{n} rows of {what} {why} and were left out" for n, why in counts if n]


class Example(NamedTuple):
    """A public source that the data folder may hold: its file, and the split to train on."""

    file: str
    split: str | None = None


EXAMPLES = {
    "dolly": Example(DOLLY),
    "alpaca": Example("alpaca_sample_15k.jsonl.gz"),
    "flan_cot": Example("flan_cot.jsonl.gz"),
    "oasst1": Example("oasst1_val.jsonl.gz"),
    "gsm8k": Example("gsm8k.jsonl.gz", "train"),
}
"""By the name of the source."""


def find_examples(root: Path) -> dict[str, Path]:
    """The files of those public sources that are there, by name."""
    paths = {name: Path(root) / example.file for name, example in EXAMPLES.items()}
    return {name: path for name, path in paths.items() if path.is_file()}


def repeated(train: Sequence[Conversation], meta: Sequence[Conversation]) -> list[int]:
    """Places of train conversations that are a meta conversation, up to case and white space."""
    there = set(map(_folded, meta))
    return [place for place, one in enumerate(train) if _folded(one) in there]


def _folded(conversation: Conversation) -> Conversation:
    return tuple(Message(one.role, folded(one.content)) for one in conversation)


def folded(text: str) -> str:
    """The text in one case, with runs of white space made one blank."""
    return " ".join(text.casefold().split())


def read_instructions(
    path: Path,
    *,
    source: str,
    split: str | None = None,
    on_error: OnError = "refuse",
    empty: Empty = "refuse",
) -> Instructions:
    """The conversations of a source.

    Args:
        path: a file .jsonl, .ndjson (each also .gz) or .parquet, or a folder that
            `datasets.save_to_disk` wrote. A row has `messages`; or `prompt` and `response`; or
            `instruction`, with or without `input`, and `output`.
        source: name of the source.
        split: keeps the rows whose key "split" is this; of a folder with several splits, that one.
        on_error: "refuse" malformed rows, or "skip" and count them.
        empty: "refuse" rows with a blank prompt or response, or "drop" and count them. Blank system
            messages are left out in either case.

    Raises:
        InputError: if the source cannot be read, has a row that is to be refused (naming it), an id
            that two rows share, or nothing that is left.
    """
    _check_choice("on_error", on_error, ("refuse", "skip"))
    _check_choice("empty", empty, ("refuse", "drop"))
    path = Path(path)
    rows, split = _rows(path, split)
    kept: dict[str, _Row] = {}
    malformed: list[InputError] = []
    blank: list[str] = []
    for number, (where, fields) in enumerate(rows):
        try:
            row = _row(fields, where, number, split)
        except InputError as error:
            if on_error == "refuse":
                raise
            malformed.append(error)
            continue
        if row is not None and not row.conversation:
            blank.append(where)
        elif row is not None:
            _check_new(row, kept)
            kept[row.id] = row
    if blank and empty == "refuse":
        raise InputError(
            f"{blank[0]}: the prompt or the response is blank, as in {len(blank)} of "
            f"{len(blank) + len(kept)} rows: fill them, or leave them out with task.data.empty=drop"
        )
    if not kept:
        raise _nothing(path, split, malformed, len(blank))
    conversations = [row.conversation for row in kept.values()]
    return Instructions(source, list(kept), conversations, len(malformed), len(blank))


class _Row(NamedTuple):
    """A row: where it stands, and its conversation, () where prompt or response is blank."""

    where: str
    id: str
    conversation: Conversation


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{name} must be {' or '.join(known)}, got {value!r}")


def _check_new(row: _Row, kept: dict[str, _Row]) -> None:
    if row.id in kept:
        raise InputError(
            f"{row.where}: the id {row.id!r} must be unique in its source, got it a second time "
            f"after {kept[row.id].where}: remove one of the two rows, or change its id"
        )


def _nothing(path: Path, split: str | None, malformed: list[InputError], empty: int) -> InputError:
    of_split = "" if split is None else f" of the split {split!r}"
    first = f"; the first malformed one is {malformed[0]}" if malformed else ""
    return InputError(
        f"{path} has no rows{of_split} with a prompt and a response ({len(malformed)} malformed, "
        f"{empty} blank): give at least one{first}"
    )


# ------------------------------------------------------------------------------------------- rows


def _row(
    fields: dict[str, Any] | InputError, where: str, number: int, split: str | None
) -> _Row | None:
    """What a row holds; None where it is of another split."""
    if isinstance(fields, InputError):
        raise fields
    if split is not None:
        if "split" not in fields:
            raise _wrong(where, f"the key 'split', to choose {split!r} by", list(fields))
        if fields["split"] != split:
            return None
    said = tuple(
        one for one in _messages(fields, where) if one.role != "system" or one.content.strip()
    )
    whole = any(one.role == "user" for one in said) and all(one.content.strip() for one in said)
    return _Row(where, _id(fields, where, number), said if whole else ())


def _messages(row: dict[str, Any], where: str) -> Iterator[Message]:
    if row.get("messages") is not None:
        yield from _listed(row["messages"], where)
    elif "prompt" in row and "response" in row:
        yield Message("user", _text(row["prompt"], "prompt", where))
        yield Message("assistant", _text(row["response"], "response", where))
    elif "instruction" in row and "output" in row:
        asked = (_text(row.get(key), key, where) for key in ("instruction", "input"))
        yield Message("user", "\n\n".join(text for text in asked if text.strip()))
        yield Message("assistant", _text(row["output"], "output", where))
    else:
        raise _wrong(where, FORM, list(row))


def _listed(messages: object, where: str) -> Iterator[Message]:
    if not isinstance(messages, list) or not messages:
        raise _wrong(where, "'messages' to be a list of messages, one at least", messages)
    for place, one in enumerate(messages, 1):
        if not isinstance(one, dict) or not {"role", "content"} <= one.keys():
            raise _wrong(where, f"message {place} to have the keys role and content", one)
        if one["role"] not in ROLES:
            raise _wrong(
                where, f"the role of message {place} to be one of {', '.join(ROLES)}", one["role"]
            )
        content = _text(one["content"], f"content of message {place}", where)
        yield Message(cast(Role, one["role"]), content)
    roles = [one["role"] for one in messages]
    if roles[-1] != "assistant":
        raise _wrong(where, "'messages' to end with an assistant's, the response", roles[-1])
    if "user" in roles and roles.index("user") > roles.index("assistant"):
        raise _wrong(where, "a user's message before the first of an assistant", roles)


def _text(value: object, key: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _wrong(where, f"{key!r} to be text", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start : error.end]
        raise _wrong(where, f"{key!r} to be text that UTF-8 can hold", half) from error
    return value


def _id(row: dict[str, Any], where: str, number: int) -> str:
    for key in ("id", "message_id"):
        value = row.get(key)
        if value is None or value == "":
            continue
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise _wrong(where, f"{key!r} to be a word or a whole number", value)
        return str(value)
    return str(number)


def _wrong(where: str, expected: str, got: object) -> InputError:
    return InputError(f"{where}: expected {expected}, got {got!r:.200}: mend that row")


# ------------------------------------------------------------------------------------------ files

_Rows = Iterable[tuple[str, dict[str, Any] | InputError]]


def _rows(path: Path, split: str | None) -> tuple[_Rows, str | None]:
    """Rows with where they stand, and the split that they are still to be chosen by."""
    if path.is_dir():
        folder, split = set_folder(path, split)
        return _placed(folder, saved_rows(folder)), split
    if kind_of(path, KINDS, "instructions") == ".parquet":
        return _placed(path, parquet_rows(path)), split
    return attempts(path, FORM), split


def _placed(path: Path, rows: Iterable[dict[str, Any]]) -> _Rows:
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows))
