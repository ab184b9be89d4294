"""A small causal language model, trained on the spot where no pretrained one can be had.

First it is taught to copy: random tokens, whose parts it has to say in another order. Then it
learns all tokens of conversations, prompts and responses alike, with some that stand for others, so
that responses are learned from what was asked. Both are plain training (`inference.fitting`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from bads_ppl.data import Data
from inference.copying import KEPT, LENGTH, PARTS, SEQUENCES, Renaming, Repeating
from inference.instructions import Conversation
from inference.options import ProxyOptions
from inference.scores import content_key
from inference.trained_folders import Lesson, depends, taught
from models.causal import Causal
from models.chat import SPECIAL, Chat
from models.language import IGNORED

_FORMAT = 2  # of pretrained folders: part of their names

OPTIONS = ProxyOptions(
    learning_rate=3.0,
    prior_scale=10.0,
    clip=2.0,
    train_batch=16,
    preconditioned=True,
    schedule="warmdown",
    bucket=20,
)


def pretrained_causal(
    built: Path,
    conversations: Sequence[Conversation],
    *,
    steps: int,
    max_tokens: int,
    device: torch.device,
) -> Path:
    """The folder of a built model with weights, from beside it or trained and put there.

    Args:
        built: the folder of a model without weights (`models.chat.build_folder`).
        conversations: what it learns from after it has learned to copy; none: nothing.
        steps: of each of the two.
        max_tokens: of a conversation that it is shown; what is beyond is cut.
        device: where it is trained.

    Raises:
        InputError: if a folder beside it is damaged.
        Diverged: if training fails.
        Stopped: after SIGINT or SIGTERM, with a checkpoint to go on from.
    """
    options = dataclasses.replace(OPTIONS, steps=steps)
    about = {**depends(built, options, device, _FORMAT), "copying": [PARTS, LENGTH, SEQUENCES]}
    more = {
        **about,
        "renaming": KEPT,
        "conversations": content_key({"all": [list(map(list, one)) for one in conversations]}),
        "max_tokens": max_tokens,
    }
    chat = Chat(built, max_tokens)
    copying = Repeating(chat.vocabulary, SPECIAL.index("<|end|>"), len(SPECIAL))
    lessons = [Lesson("copy", about, copying.data)]
    if conversations:
        lessons.append(Lesson("say", more, lambda: _every_token(chat, conversations)))
    fresh = lambda: Causal(built, pretrained=False).to(device)
    return taught(built, fresh, lessons, options=options, device=device)


def _every_token(chat: Chat, conversations: Sequence[Conversation]) -> Data:
    """The conversations, of which all tokens count but the first."""
    encoded = chat.encode(conversations)
    counted = [[IGNORED, *ids[1:]] for ids in encoded.ids]
    padded = chat.pad(dataclasses.replace(encoded, labels=counted))
    return Data(
        padded,
        padded["labels"],
        name="conversations",
        lengths=padded["mask"].sum(1),
        augment=Renaming(chat.vocabulary, len(SPECIAL)),
    )
