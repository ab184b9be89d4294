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
    chat: Chat,
    parts: Mapping[str, Sequence[Conversation]],
    long: Long,
    train_names: Sequence[str],
) -> tuple[dict[str, Data], list[int], list[str]]:
    """Sets of tokens, padded to the same length, with ids that count through them.

    Args:
        chat: lays conversations out.
        parts: conversations by the set's name, "train" and "meta" among them.
        long: what becomes of longer train and meta conversations; others are cut.
        train_names: what error messages call the train conversations.

    Returns:
        The sets, the places of the train conversations that are in theirs, and what is to be said.

    Raises:
        InputError: if one is too long and `long` refuses it, or nothing is left of a set.
    """
    names = {key: [f"{key} conversation {k + 1}" for k in range(len(parts[key]))] for key in parts}
    names["train"] = list(train_names)
    encoded = {key: chat.encode(part, names[key]) for key, part in parts.items()}
    kept, notes = _fitting(encoded, chat.max_tokens, long)
    return _data(chat, encoded, kept), kept["train"], notes


def _fitting(
    encoded: Mapping[str, Encoded], most: int, long: Long
) -> tuple[dict[str, list[int]], list[str]]:
    """Places of the conversations to use, and notes on those that are longer than what is shown."""
    kept, notes = {}, []
    for name, part in encoded.items():
        size, chosen = len(part), name in ("train", "meta")
        said = f"{len(part.cut)} of {size} {name} conversations have more than {most} tokens"
        if part.cut and chosen and long == "refuse":
            raise InputError(
                f"{said}: raise task.data.max_tokens, or take task.data.long=cut or drop"
            )
        dropped = set(part.cut) if chosen and long == "drop" else set()
        kept[name] = [place for place in range(size) if place not in dropped]
        if not kept[name]:
            raise InputError(
                f"{said}, and nothing is left of the {name} set: raise task.data.max_tokens"
            )
        if dropped:
            notes.append(f"{said}: left out")
        elif part.cut:
            notes.append(
                f"{said}: cut, {len(part.headless)} of them at the beginning of the prompt, so "
                "that their responses are shown"
            )
    return kept, notes


def _data(
    chat: Chat, encoded: Mapping[str, Encoded], kept: Mapping[str, list[int]]
) -> dict[str, Data]:
    """All sets, padded to the same length, with ids that count through them."""
    rows = [(encoded[name], place) for name, places in kept.items() for place in places]
    ids = [part.ids[place] for part, place in rows]
    labels = [part.labels[place] for part, place in rows]
    padded = chat.pad(Encoded(ids, labels, [], []))
    sizes = {name: len(places) for name, places in kept.items()}
    return token_sets(padded, padded["mask"].sum(1), sizes)
