"""Instructions where there are none: sums, sentences, and sums with the answers of others."""

from __future__ import annotations

import numpy as np

from inference.instruction_sets import Target, shuffled
from inference.instructions import Conversation, Instructions, Message
from inference.sentences import sentences

MADE = "made"
"""Name of these data in results."""

COUNT, HELD, TESTED = 300, 60, 240
"""Examples of a source, of the meta and the validation set each, and of the test set."""

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def made_instructions() -> tuple[list[Instructions], Target]:
    """Three sources and the target of the first: always the same ones.

    "sums" is the target's own: sums of two digits, few enough to be learned from these examples,
    and words of the question to repeat. "sentences" has nothing to do with it, and "wrong" has
    other such sums whose answers are those of others.
    """
    draw = np.random.default_rng(0)
    size = 2 * COUNT + 2 * HELD + TESTED
    digits = draw.choice(10_000, size, replace=False).tolist()  # no question occurs twice
    sums = [_sum(one // 1000, one // 100 % 10, one % 100) for one in digits]
    said = sentences((COUNT + 5) // 6)
    others: list[Conversation] = [
        (Message("user", f"Write a sentence on {kind}."), Message("assistant", text))
        for text, kind in zip(said.texts, said.labels, strict=True)
    ]
    parts = (
        ("sums", sums[:COUNT]),
        ("sentences", others[:COUNT]),
        ("wrong", sums[COUNT : 2 * COUNT]),
    )
    found = [Instructions(name, [str(k) for k in range(len(part))], part) for name, part in parts]
    found[2] = shuffled(found[2], 0)
    rest = sums[2 * COUNT :]
    return found, Target(MADE, rest[:HELD], rest[HELD : 2 * HELD], rest[2 * HELD :])


def _sum(a: int, b: int, c: int) -> Conversation:
    place = WORDS[a]
    question = (
        f"What is {a} plus {b}? Name house {place} too, and {c}."
        if c % 2
        else f"Add {b} to {a}, then say {c} and house {place}."
    )
    return Message("user", question), Message("assistant", f"{a + b}; house {place}; {c}.")
