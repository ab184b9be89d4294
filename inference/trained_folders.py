"""Folders of language models that are trained on the spot, from that of a model without weights."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Lesson:
    """What a model is trained on.

    Attributes:
        name: what is learned, "copy" say; part of the name of the training's folder.
        about: what the model depends on after it, JSON-able; folders go by it.
        data: the set.
    """

    name: str
    about: Mapping[str, Any]
    data: Callable[[], Data]


def taught(
    built: Path,
    fresh: Callable[[], nn.Module],
    lessons: Sequence[Lesson],
    *,
    options: ProxyOptions,
    device: torch.device,
) -> Path:
    """The folder of a model that was given lessons one after the other, made where it is not there.

    The training of the first lesson is kept, since it may serve for other models.

    Args:
        built: the folder of the model without weights, beside which that folder is.
        fresh: builds what is trained.
        lessons: at least one.
        options: of the training.
        device: where it trains.

    Raises:
        InputError: if a folder beside it is damaged.
        Diverged: if training fails.
        Stopped: after SIGINT or SIGTERM, with a checkpoint to go on from.
    """
    folder = built.with_name(f"{built.name}-pretrained-{content_key(lessons[-1].about)}")

    def make() -> None:
        start, places = fresh, []
        for lesson in lessons:
            place = built.with_name(f"{built.name}-{lesson.name}-{content_key(lesson.about)}")
            steps = f"{options.steps} steps, once"
            log.info(f"training a model to {lesson.name} for {steps}; kept in {place}")
            chain = fit(
                start,
                token_loss,
                lesson.data().to(device),
                options=options,
                batches=(options.train_batch, 1),
                folder=place,
                about=lesson.about,
                seed=0,
                what="model",
            )
            network = fitted(chain)
            start = network.train
            places.append(place)
        write_model(folder, built, network)
        for place in places[1:]:
            shutil.rmtree(place, ignore_errors=True)

    return made_once(folder, make)


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
