"""Sentences of six kinds, made from a few patterns: texts where there are none."""

from __future__ import annotations

import numpy as np

from inference.text_files import Texts

_PATTERNS = {
    "cooking": (
        ("Simmer", "Fry", "Bake", "Season", "Chop", "Marinate"),
        ("the onions", "the chicken", "a tray of potatoes", "the bread dough", "some mushrooms"),
        ("with garlic and butter", "until golden", "in olive oil", "for the Sunday dinner"),
    ),
    "finance": (
        ("Transfer", "Refund", "Check", "Invest", "Deposit", "Report"),
        ("my monthly salary", "the mortgage payment", "the account balance", "the credit card fee"),
        ("before the tax year ends", "at the bank", "into a savings fund", "on the next invoice"),
    ),
    "health": (
        ("Treat", "Describe", "Prevent", "Examine", "Relieve", "Monitor"),
        ("a persistent cough", "high blood pressure", "the sprained ankle", "a mild fever"),
        ("with the right medicine", "after seeing a doctor", "in elderly patients", "at night"),
    ),
    "sport": (
        ("Watch", "Win", "Replay", "Predict", "Celebrate", "Score in"),
        ("the cup final", "the tennis match", "the relay race", "yesterday's football game"),
        ("in extra time", "with a new coach", "at the Olympic stadium", "against the champions"),
    ),
    "travel": (
        ("Book", "Cancel", "Plan", "Board", "Compare", "Delay"),
        ("a flight to Lisbon", "the night train", "two hotel rooms", "a weekend trip by the sea"),
        ("for next summer", "without a visa", "near the old town", "with only hand luggage"),
    ),
    "weather": (
        ("Expect", "Forecast", "Measure", "Fear", "Record", "Await"),
        (
            "heavy rain",
            "a thunderstorm",
            "thick morning fog",
            "frost and light snow",
            "strong wind",
        ),
        ("over the northern hills", "by the afternoon", "along the coast", "for the whole week"),
    ),
}
"""Beginnings, middles and ends by kind."""


def sentences(per_kind: int = 400) -> Texts:
    """`per_kind` sentences of each kind in a random order; always the same ones.

    What patterns cannot tell apart is told apart by a number at the end.
    """
    draw = np.random.default_rng(0)
    rows = []
    for kind, parts in _PATTERNS.items():
        for _ in range(per_kind):
            rows.append((" ".join(draw.choice(part) for part in parts), kind))
    order = draw.permutation(len(rows))
    texts = [f"{rows[k][0]} (note {number})." for number, k in enumerate(order)]
    return Texts(texts, [rows[k][1] for k in order], list(range(len(rows))))
