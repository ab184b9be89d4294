"""A run in several processes, as `accelerate launch` or `torchrun` start them.

Accelerate sets up their group and gives each a device; what they share out is in `bads_ppl.ranks`.
"""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta

import torch
from omegaconf import DictConfig

from bads_ppl.errors import InputError
from bads_ppl.ranks import ALONE, Ranks, processes

WAYS = ("data", "fsdp", "chains")
"""How processes share a run: each has a share of every batch, with "fsdp" also a part of every
network, or chains of its own."""

PATIENCE = timedelta(hours=24)
"""How long a process waits for the others, which may be making a model; launchers end all at once
where one of them ends."""


def joined(config: DictConfig) -> Ranks:
    """The processes of this run; sets the option `device` to that of this process.

    Raises:
        InputError: if an option does not fit several processes, or Accelerate is missing.
    """
    if config.parallel not in WAYS:
        raise InputError(f"parallel must be one of {', '.join(WAYS)}, got {config.parallel!r}")
    count = processes()
    if count == 1:
        return ALONE
    if config.device not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"device must be auto, cpu or cuda in a run of {count} processes, got "
            f"{config.device!r}: each takes a device of its own"
        )
    _check_launcher(config.parallel)
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise InputError(
            f"a run of {count} processes needs the package accelerate: pip install bads-ppl[llm]"
        ) from error
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how many threads it takes
        state = PartialState(cpu=cpu, timeout=PATIENCE)
    config.device = "cpu" if cpu else str(state.device)
    ranks = Ranks.joined()
    if not ranks.first:  # the first says it
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    return ranks


def _check_launcher(parallel: str) -> None:
    """Refuse what `accelerate launch` was told to do and this program would not do.

    Raises:
        InputError: naming the option to take instead.
    """
    told = {
        name.lower(): os.environ.get(f"ACCELERATE_{name}", "no").lower()
        for name in ("USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "MIXED_PRECISION")
    }
    asked = [name for name, value in told.items() if value not in ("", "no", "false", "0")]
    if parallel == "fsdp" and "use_fsdp" in asked:
        asked.remove("use_fsdp")
    if asked:
        raise InputError(
            f"accelerate's settings ask for {', '.join(f'{name}={told[name]}' for name in asked)}, "
            f"which this run does not take from there, got parallel={parallel}: leave them out "
            "(--mixed_precision no), and take parallel=fsdp for sharded networks and "
            "backbone.precision=bfloat16 for mixed precision"
        )
