"""Stochastic gradient Hamiltonian Monte Carlo: its update, its bias, its refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sghmc import SGHMC
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights
from models import joint

SETS = (
    Data(torch.randn(6, 2), torch.tensor([0, 1] * 3)),
    Data(torch.randn(2, 2), torch.tensor([0, 1]), name="meta"),
)


def program(train, meta):
    pyro.sample("x", dist.Normal(torch.zeros(2000), 1.0).to_event(1))


def kernel(program=program, sampler=SGHMC, **options):
    options = {"step_size": 0.2, "generator": torch.Generator().manual_seed(0), **options}
    made = sampler(program, **options)
    made.setup(0, *SETS)
    return made


def test_two_steps_are_those_of_the_equations():
    made = kernel(temperature=0.0, friction=0.3)
    x = made.latents.globals["x"].value
    with torch.no_grad():
        x.fill_(2.0)
    value, velocity = 2.0, 0.0
    for _ in range(2):
        made.step()
        velocity = 0.7 * velocity - 0.3 * 0.1 * value
        value += velocity
    assert torch.allclose(x, torch.full_like(x, value))


def test_friction_1_is_sgld():
    mine, theirs = kernel(friction=1.0), kernel(sampler=SGLD)
    for one in (mine, theirs):
        for _ in range(5):
            one.step()
    assert torch.equal(mine.latents.globals["x"].value, theirs.latents.globals["x"].value)


@pytest.mark.parametrize(("friction", "eta"), [(1.0, 1.0), (0.3, 3.0)])
def test_the_bias_of_the_variance_is_the_one_in_its_docstring(friction, eta):
    made = kernel(step_size={"x": eta}, friction=friction)
    square, steps = 0.0, 2000
    for step in range(steps + 200):
        made.step()
        if step >= 200:
            square += float((made.latents.globals["x"].value.detach() ** 2).mean()) / steps
    expected = 1 / (1 - friction * eta / (4 * (2 - friction)))
    # 2,000 elements, a draw in at least 20 steps
    assert square == pytest.approx(expected, rel=3 * math.sqrt(2 / (2000 * steps / 20)))


def logistic(**options):
    parts = Parts(nn.Linear(2, 2), InstanceWeights(), SparsityPrior(0.5, scale=2.0))
    return kernel(bind(joint, parts), step_size=0.01, **options)


def test_local_sites_carry_no_momentum_unless_asked_to():
    assert logistic().frictions == {"theta": 0.1, "w": 1.0}
    assert "velocity" not in logistic().states["w"]
    assert logistic(friction={"w": 0.5}).frictions == {"theta": 0.1, "w": 0.5}


@pytest.mark.parametrize("friction", [0.0, 1.5, {"theta": -1.0}])
def test_frictions_out_of_range_are_refused(friction):
    with pytest.raises(InputError, match=r"friction must be in \(0, 1\]"):
        logistic(friction=friction)


def test_momentum_of_rows_and_importance_minibatches_do_not_go_together():
    with pytest.raises(InputError, match="friction of 'w' must be 1"):
        logistic(friction={"w": 0.5}, minibatches="importance")
