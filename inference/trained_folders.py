"""Folders of language models that are trained on the spot, from that of a model without weights."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from inference.fitting import fit, fitted
from inference.options import ProxyOptions
from inference.scores import content_key, locked
from models.language import LanguageModel, token_loss
from models.tokens import new_folder

log = logging.getLogger(__name__)


def depends(built: Path, options: ProxyOptions, device: torch.device, form: int) -> dict[str, Any]:
    """What every training depends on, JSON-able; `form` is that of the caller's folders."""
    return {
        "format": form,
        "options": {k: v for k, v in dataclasses.asdict(options).items() if v is not None},
        "built": built.name,
        "device": device.type,
    }


def learned_beside(
    built: Path,
    name: str,
    network: Callable[[], nn.Module],
    data: Data,
    about: Mapping[str, Any],
    *,
    options: ProxyOptions,
    device: torch.device,
) -> tuple[nn.Module, Path]:
    """A network that has learned a set's tokens, and the folder of its training.

    Args:
        built: the folder of the model without weights, beside which that folder is.
        name: what is learned, "copy" say; part of the folder's name.
        network: builds what is trained.
        data: the set.
        about: what the result depends on, JSON-able; the folder goes by it.
        options: of the training.
        device: where it trains.

    Raises:
        Diverged: if training fails.
        Stopped: after SIGINT or SIGTERM, with a checkpoint to go on from.
    """
    folder = built.with_name(f"{built.name}-{name}-{content_key(about)}")
    log.info(f"training a model to {name} for {options.steps} steps, once; kept in {folder}")
    chain = fit(
        network,
        token_loss,
        data.to(device),
        options=options,
        batches=(options.train_batch, 1),
        folder=folder,
        about=about,
        seed=0,
        what="model",
    )
    return fitted(chain), folder


def write_model(folder: Path, built: Path, network: nn.Module) -> None:
    """Make the folder of a network, with the tokenizer of the one that it was built from."""
    assert isinstance(network, LanguageModel)
    with new_folder(folder) as temporary:
        shutil.copytree(built, temporary, dirs_exist_ok=True)
        network.save(temporary)


def made_once(folder: Path, make: Callable[[], None]) -> Path:
    """The folder of a model that is trained on the spot, by the first of the runs that want it.

    Args:
        folder: the model's.
        make: trains it, writes the folder, and removes what only the training needed.

    Raises:
        InputError: if it is there without weights.
    """
    if not folder.is_dir():
        with locked(folder):
            if not folder.is_dir():  # else a run that this one waited for has made it
                make()
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"the model in {folder} lacks its weights: remove it to have it made anew")
    return folder
