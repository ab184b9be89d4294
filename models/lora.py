"""Low-rank changes of pretrained models (Hu et al., 2022), made and kept by `peft`."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from bads_ppl.atomic import atomic_path
from bads_ppl.errors import InputError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter."""

BASE = "base"
"""Folder of the model that an adapter was made for, in the adapter's, where it is nowhere else."""

_UNFIT = (OSError, ValueError, KeyError, TypeError, RuntimeError)


def adapted(model: Any, rank: int) -> Any:
    """The model with its own weights fixed and a trainable low-rank change of each linear layer.

    The layer that gives a language model's logits stays as it is.

    Args:
        model: of `transformers`; it is changed in place.
        rank: of the changes, at least 1.

    Raises:
        InputError: if `peft` is missing, or the rank is out of range.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(
            "tune=lora needs the package peft: pip install bads-ppl[text], or take tune=full or "
            "tune=frozen"
        ) from error
    if rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}")
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    model.requires_grad_(False)
    return inject_adapter_in_model(lora, model)


def save_adapter(model: Any, base: str, task: str, folder: Path) -> None:
    """Write the change of an adapted model into a folder that is there, as `peft` does.

    `peft.PeftModel.from_pretrained` reads it back, given the model that was adapted.

    Args:
        model: as `adapted` gives it.
        base: id or folder of the model that was adapted.
        task: what the model is for, as `peft` calls it, such as "CAUSAL_LM".
        folder: gets adapter_config.json and adapter_model.safetensors.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    weights = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
    about = copy.deepcopy(model.peft_config["default"])
    about.base_model_name_or_path = base
    about.task_type = task
    about.inference_mode = True
    about.target_modules = sorted(about.target_modules)  # of a set the order would be random
    with atomic_path(folder / WEIGHTS) as path:
        save_file(weights, path, metadata={"format": "pt"})
    about.save_pretrained(str(folder))


def save_base(model: Any, folder: Path) -> None:
    """Write an adapted model as it was before into a folder that is there."""
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }
    model.save_pretrained(folder, state_dict=state)


def adapter_base(folder: Path) -> str:
    """Id or folder of the model that the adapter in a folder was made for.

    Raises:
        InputError: if it is not with the adapter, and the configuration cannot be read or does not
            tell.
    """
    if (folder / BASE).is_dir():
        return str(folder / BASE)
    path = folder / CONFIG
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if isinstance(base, str) and base:
            return base
        reason = f"got {base!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise InputError(
        f"{path} must tell the model that the adapter was made for, as base_model_name_or_path "
        f"({reason}): mend it"
    )


def with_adapter(model: Any, folder: Path) -> Any:
    """A model with the adapter in a folder put on it by `peft`.

    Args:
        model: of `transformers`; it is changed in place.
        folder: has adapter_config.json and adapter_model.safetensors.

    Raises:
        InputError: if `peft` or a file is missing, or the adapter was made for another model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(
            f"adapter {folder} needs the package peft: pip install bads-ppl[llm]"
        ) from error
    lacking = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if lacking:
        raise InputError(
            f"adapter {folder} lacks {' and '.join(lacking)}: give a folder as "
            "save_pretrained(folder) of peft writes it (pickles are not read)"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
    except (*_UNFIT, SafetensorError, UserWarning) as error:
        raise InputError(
            f"adapter {folder} does not fit its model ({' '.join(str(error).split()):.300}): name "
            "the model that it was made for"
        ) from error
