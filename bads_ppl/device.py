"""Where to compute."""

import torch

from bads_ppl.errors import InputError


def resolve_device(name: str = "auto") -> torch.device:
    """The device called `name`: auto, cpu, cuda, cuda:<k> or mps; auto takes cuda, mps, cpu.

    Raises:
        InputError: if the device does not exist here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = ["cpu"] + ["cuda"] * cuda + ["mps"] * mps
    if name == "auto":
        return torch.device(there[-1] if not cuda else "cuda")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu, cuda or mps, got {name!r}") from error
    missing = device.type not in there
    if device.type == "cuda" and cuda:
        missing = (device.index or 0) >= torch.cuda.device_count()
    if missing:
        raise InputError(
            f"device {name!r} is not there: this machine has {', '.join(there)}; "
            "use one of them, or device=auto"
        )
    return device
