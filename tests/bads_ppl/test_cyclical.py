"""Cyclical SGLD: the wave of its steps, where it explores, and what that is good for."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from bads_ppl.cyclical import CyclicalSGLD
from bads_ppl.data import Data
from bads_ppl.errors import InputError

SETS = (
    Data(torch.zeros(4, 1), torch.zeros(4).long()),
    Data(torch.ones(2, 1), torch.zeros(2).long(), name="meta"),
)


def program(train, meta):
    pyro.sample("x", dist.Normal(torch.zeros(100), 1.0).to_event(1))


def kernel(**options) -> CyclicalSGLD:
    options = {"step_size": 0.1, "generator": torch.Generator().manual_seed(0), **options}
    made = CyclicalSGLD(program, **options)
    made.setup(0, *SETS)
    return made


def test_steps_follow_half_a_cosine_from_eta_to_almost_0_and_start_again():
    made = kernel(cycle=8)
    rates = []
    for _ in range(16):
        rates.append(made.rate("x"))
        made.step()
    expected = [0.05 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates == pytest.approx(expected * 2)


def test_exploring_steps_have_no_noise_and_no_draws():
    made = kernel(cycle=8, exploration=0.25)
    x = made.latents.globals["x"].value
    with torch.no_grad():
        x.fill_(1.0)
    noisy = []
    for _ in range(8):
        before = x.detach().clone()
        eta = made.rate("x")
        made.step()
        noisy.append(not torch.allclose(x, before * (1 - eta / 2)))
    assert noisy == [False, False, True, True, True, True, True, True]
    assert [made.draws_at(step) for step in range(1, 17)] == noisy * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycle": 1}, "cycle must be at least 2 steps, got 1"),
        ({"exploration": 1.0}, r"exploration must be in \[0, 1\), got 1"),
        ({"exploration": -0.1}, r"exploration must be in \[0, 1\)"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        kernel(**options)
