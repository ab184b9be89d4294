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
from torch import nn

from bads_ppl.data import Data
from inference.fitting import fit, fitted
from inference.instructions import Conversation
from inference.options import ProxyOptions
from inference.pretraining import complete
from inference.scores import content_key
from models.causal import Causal
from models.chat import Chat
from models.language import IGNORED, token_loss
from models.tokens import new_folder

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
        "format": _FORMAT,
        "options": {k: v for k, v in dataclasses.asdict(options).items() if v is not None},
        "conversations": content_key({"all": [list(map(list, one)) for one in conversations]}),
        "max_tokens": max_tokens,
        "built": built.name,
        "device": device.type,
    }
    folder = built.with_name(f"{built.name}-pretrained-{content_key(about)}")
    if folder.is_dir():
        return complete(folder)
    place = built.with_name(f"{built.name}-learning-{content_key(about)}")
    log.info(f"training a model on {len(conversations):,} conversations for {steps} steps, once")

    def network() -> nn.Module:
        return Causal(built, pretrained=False).to(device)

    chain = fit(
        network,
        token_loss,
        _every_token(Chat(built, max_tokens), conversations).to(device),
        options=options,
        batches=(OPTIONS.train_batch, 1),
        folder=place,
        about=about,
        seed=0,
        what="model",
    )
    learned = fitted(chain)
    assert isinstance(learned, Causal)
    with new_folder(folder) as temporary:
        shutil.copytree(built, temporary, dirs_exist_ok=True)
        learned.save(temporary)
    shutil.rmtree(place, ignore_errors=True)
    return folder


def _every_token(chat: Chat, conversations: Sequence[Conversation]) -> Data:
    """The conversations, of which all tokens count but the first."""
    encoded = chat.encode(conversations)
    counted = [[IGNORED, *ids[1:]] for ids in encoded.ids]
    padded = chat.pad(dataclasses.replace(encoded, labels=counted))
    return Data(padded, padded["labels"], name="conversations", lengths=padded["mask"].sum(1))
