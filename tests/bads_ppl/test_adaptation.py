"""Step sizes that adapt in burn-in come near the rate that was asked for, and then stay."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from bads_ppl.acceptance import acceptance
from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights
from models import normalised

SETS = (
    Data(torch.zeros(4, 1), torch.zeros(4).long()),
    Data(torch.ones(2, 1), torch.zeros(2).long(), name="meta"),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_scales(train, meta):
    pyro.sample("wide", dist.Normal(torch.zeros(30), 10.0).to_event(1))
    pyro.sample("narrow", dist.Normal(torch.zeros(30), 0.1).to_event(1))


def kernel(program=two_scales, warmup=2000, step_size=0.02, **options) -> SGLD:
    made = SGLD(program, step_size=step_size, generator=generator(), **options)
    made.setup(warmup, *SETS)
    return made


def steps(made: SGLD, count: int) -> None:
    for _ in range(count):
        made.step()


def test_every_group_comes_near_the_target_at_a_step_of_its_own():
    made = kernel(step_size={"wide": 1.0, "narrow": 1e-4}, target_acceptance=0.8)
    steps(made, 2000)
    train, meta = (one.full() for one in SETS)
    noise = generator(1)
    rates = []
    for _ in range(400):  # along the chain: the rate depends on where it stands
        made.step()
        rates.append(acceptance(made, train, meta, noise))
    for group in ("wide", "narrow"):
        assert sum(rate[group] for rate in rates) / 400 == pytest.approx(0.8, abs=0.08)
    # the same shape at a hundredth of the width: a ten-thousandth of the step
    assert made.rate("wide") / made.rate("narrow") == pytest.approx(1e4, rel=0.5)


def test_after_warm_up_nothing_adapts():
    made = kernel(target_acceptance=0.8, warmup=100)
    steps(made, 100)
    frozen = made.rate("wide")
    assert frozen != 0.02
    steps(made, 50)
    assert made.rate("wide") == frozen


def test_without_a_target_steps_stay_as_given():
    made = kernel(warmup=100)
    steps(made, 50)
    assert made.rate("wide") == made.rate("narrow") == 0.02


def test_what_is_told_of_a_step_is_not_that_of_a_proposal():
    made = kernel(target_acceptance=0.8, warmup=100)
    steps(made, 10)  # the tenth looks at a proposal
    terms = made.latents.terms
    told = {name: value.clone() for name, value in terms.items()}
    acceptance(made, *(one.full() for one in SETS), generator(1))
    assert made.latents.terms is terms
    assert all(torch.equal(terms[name], value) for name, value in told.items())


def test_a_restored_chain_adapts_on_as_if_never_stopped():
    made, other = (kernel(target_acceptance=0.8, warmup=200) for _ in range(2))
    steps(made, 90)
    other.load_state_dict(made.state_dict())
    for one in (made, other):
        steps(one, 60)
    assert made.rate("wide") == other.rate("wide") != 0.02
    mine, theirs = made.state_dict(), other.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("target", [0.0, 1.0, -1.0, 80.0])
def test_a_target_that_is_no_rate_is_refused(target):
    with pytest.raises(InputError, match=r"must be in \(0, 1\), got .*: 0\.8, say"):
        kernel(target_acceptance=target)


def test_there_must_be_a_burn_in_to_adapt_in():
    with pytest.raises(InputError, match="burn-in of 0 steps"):
        kernel(target_acceptance=0.8, warmup=0)


def test_a_program_without_density_has_no_rate_to_adapt_to():
    parts = Parts(nn.Linear(1, 2), InstanceWeights(), SparsityPrior(0.5))
    with pytest.raises(
        InputError, match="companion network or changes with the steps: use model=joint"
    ):
        kernel(bind(normalised, parts), step_size=0.01, target_acceptance=0.8)
