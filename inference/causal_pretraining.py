"""A small causal language model, trained on the spot where no pretrained one can be had.

Plain training (`inference.fitting`) on all tokens of conversations, prompts and responses alike.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from bads_ppl.data import Data
from inference.instructions import Conversation
from inference.options import ProxyOptions
from inference.scores import content_key
from inference.trained_folders import complete, depends, learned, write_model
from models.causal import Causal
from models.chat import Chat
from models.language import IGNORED

log = logging.getLogger(__name__)

_FORMAT = 1  # of pretrained folders: part of their names

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
        conversations: what it learns the language from.
        steps: of training.
        max_tokens: of a conversation that it is shown; what is beyond is cut.
        device: where it is trained.

    Raises:
        InputError: if a folder beside it is damaged.
        Diverged: if training fails.
        Stopped: after SIGINT or SIGTERM, with a checkpoint to go on from.
    """
    options = dataclasses.replace(OPTIONS, steps=steps)
    about = {
        **depends(built, options, device, _FORMAT),
        "conversations": content_key({"all": [list(map(list, one)) for one in conversations]}),
        "max_tokens": max_tokens,
    }
    folder = built.with_name(f"{built.name}-pretrained-{content_key(about)}")
    if folder.is_dir():
        return complete(folder)
    place = built.with_name(f"{built.name}-learning-{content_key(about)}")
    log.info(f"training a model on {len(conversations):,} conversations for {steps} steps, once")
    network = learned(
        lambda: Causal(built, pretrained=False).to(device),
        _every_token(Chat(built, max_tokens), conversations),
        options=options,
        folder=place,
        about=about,
        device=device,
    )
    write_model(folder, built, network)
    shutil.rmtree(place, ignore_errors=True)
    return folder


def _every_token(chat: Chat, conversations: Sequence[Conversation]) -> Data:
    """The conversations, of which all tokens count but the first."""
    encoded = chat.encode(conversations)
    counted = [[IGNORED, *ids[1:]] for ids in encoded.ids]
    padded = chat.pad(dataclasses.replace(encoded, labels=counted))
    return Data(padded, padded["labels"], name="conversations", lengths=padded["mask"].sum(1))
