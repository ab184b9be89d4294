"""Options of commands that are no runs: name=value, as text."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from bads_ppl.errors import InputError

T = TypeVar("T")


def read_options(kind: type[T], arguments: Sequence[str]) -> T:
    """The options from name=value; those that are not named are as the kind has them.

    Args:
        kind: a dataclass of texts, each with a default.
        arguments: such as "seed=1".

    Raises:
        InputError: for another form, or a name that there is not.
    """
    some: Any = kind
    known = [one.name for one in fields(some)]
    given = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}=...?" if close else f"there are {', '.join(known)}"
            raise InputError(f"options are name=value, got {argument!r}: {hint}")
        given[name] = value
    return kind(**given)
