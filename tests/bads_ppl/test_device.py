import pytest
import torch

from bads_ppl.device import resolve_device
from bads_ppl.errors import InputError


@pytest.fixture
def machine(monkeypatch):
    """Sets which accelerators this machine seems to have."""

    def have(*, cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return have


@pytest.mark.parametrize(
    ("there", "device"),
    [
        ({}, "cpu"),
        ({"mps": True}, "mps"),
        ({"cuda": 1}, "cuda"),
        ({"cuda": 1, "mps": True}, "cuda"),
    ],
)
def test_auto_takes_the_best_that_is_there(machine, there, device):
    machine(**there)
    assert resolve_device() == resolve_device("auto") == torch.device(device)


def test_named_devices_are_taken_as_named(machine):
    machine(cuda=2)
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("there", "name", "message"),
    [
        ({}, "cuda", "'cuda' is not there: this machine has cpu;"),
        ({}, "mps", "'mps' is not there"),
        ({"cuda": 2}, "cuda:2", "'cuda:2' is not there: this machine has cpu, cuda;"),
        ({"cuda": 1}, "mps", "'mps' is not there"),
        ({}, "meta", "'meta' is not there"),
        ({}, "gpu", "must be auto, cpu, cuda or mps, got 'gpu'"),
        ({}, "", "must be auto, cpu, cuda or mps, got ''"),
    ],
)
def test_devices_that_are_not_there_are_refused(machine, there, name, message):
    machine(**there)
    with pytest.raises(InputError, match=message):
        resolve_device(name)
