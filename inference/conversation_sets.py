"""Conversations as sets of tokens, and what becomes of those that are too long to be shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from inference.instructions import Conversation
from inference.token_sets import token_sets
from models.chat import Chat, Encoded

Long = Literal["cut", "drop", "refuse"]
"""What becomes of conversations with more tokens than the network is shown."""


def conversation_sets(
    chat: Chat, parts: Mapping[str, Sequence[Conversation]], long: Long
) -> tuple[dict[str, Data], list[int], list[str]]:
    """Sets of tokens, padded to the same length, with ids that count through them.

    Args:
        chat: lays conversations out.
        parts: conversations by the set's name, "train" and "meta" among them.
        long: what becomes of longer train and meta conversations; others are cut. What loses its
            whole response is left out.

    Returns:
        The sets, the places of the train conversations that are in theirs, and what is to be said.

    Raises:
        InputError: if one is too long and `long` refuses it, or nothing is left of a set.
    """
    encoded = {key: chat.encode(part) for key, part in parts.items()}
    kept, notes = _fitting(encoded, chat.max_tokens, long)
    return _data(chat, encoded, kept), kept["train"], notes


def _fitting(
    encoded: Mapping[str, Encoded], most: int, long: Long
) -> tuple[dict[str, list[int]], list[str]]:
    """Places of the conversations to use, and notes on those that are longer than what is shown."""
    kept, notes = {}, []
    for name, part in encoded.items():
        lost, size = part.lost, len(part)
        gone = set(lost)
        said = f"{len(part.cut)} of {size} {name} conversations have more than {most} tokens"
        if part.cut and long == "refuse":
            raise InputError(
                f"{said}: raise task.data.max_tokens, or take task.data.long=cut or drop"
            )
        if long == "drop" and name in ("train", "meta"):
            gone |= set(part.cut)
        kept[name] = [place for place in range(size) if place not in gone]
        if not kept[name]:
            raise InputError(
                f"{said}, and nothing is left of the {name} set: raise task.data.max_tokens"
            )
        if part.cut:
            whose = f", {len(lost)} of them as their prompts alone are longer" if lost else ""
            notes.append(
                f"{said}: {len(part.cut) - len(gone)} were cut, {len(gone)} left out{whose}"
            )
    return kept, notes


def _data(
    chat: Chat, encoded: Mapping[str, Encoded], kept: Mapping[str, list[int]]
) -> dict[str, Data]:
    """All sets, padded to the same length, with ids that count through them."""
    parts = [part.take(kept[name]) for name, part in encoded.items()]
    ids = [row for part in parts for row in part.ids]
    labels = [row for part in parts for row in part.labels]
    padded = chat.pad(Encoded(ids, labels, cut=[]))
    sizes = {name: len(places) for name, places in kept.items()}
    return token_sets(padded, padded["mask"].sum(1), sizes)
