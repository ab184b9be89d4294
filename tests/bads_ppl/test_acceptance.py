"""The acceptance rate against known answers, and what it may not touch."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from bads_ppl.acceptance import acceptance
from bads_ppl.conditional import Conditional
from bads_ppl.data import Data
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights
from models import joint, normalised


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(size: int = 12) -> tuple[Data, Data]:
    x, mx = torch.randn(size, 2, generator=generator()), torch.randn(6, 2, generator=generator(1))
    return Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 0] > 0).long(), name="meta")


def kernel(program, sets=None, **options) -> SGLD:
    made = SGLD(program, **{"step_size": 0.05, "generator": generator(), **options})
    made.setup(0, *(sets or data()))
    return made


def logistic(model=joint) -> SGLD:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = Parts(nn.Linear(2, 2), InstanceWeights(), SparsityPrior(0.5, scale=2.0))
    return kernel(bind(model, parts))


def gaussian(train, meta):
    pyro.sample("x", dist.Normal(torch.zeros(50), 1.0).to_event(1))


def mala_rate(x: np.ndarray, eta: float, temperature: float, rng) -> float:
    """Mean acceptance probability of MALA on exp(-x^2 / (2 T)), from these values."""
    noise = rng.standard_normal((20_000, len(x)))
    y = x - eta / 2 * x + math.sqrt(eta * temperature) * noise

    def log_q(to, start):
        return -((to - start + eta / 2 * start) ** 2).sum(-1) / (2 * eta * temperature)

    ratio = ((x**2).sum() - (y**2).sum(-1)) / (2 * temperature) + log_q(x, y) - log_q(y, x)
    return float(np.minimum(1, np.exp(ratio)).mean())


@pytest.mark.parametrize(("eta", "temperature"), [(0.1, 1.0), (0.8, 1.0), (0.8, 0.2)])
def test_the_rate_is_that_of_mala(eta, temperature):
    made = kernel(gaussian, step_size={"x": eta}, temperature=temperature)
    start = math.sqrt(temperature) * torch.randn(50, generator=generator(2))
    with torch.no_grad():
        made.latents.globals["x"].value.copy_(start)
    train, meta = data()
    noise = generator(3)
    found = [acceptance(made, train.full(), meta.full(), noise)["x"] for _ in range(1500)]
    expected = mala_rate(start.double().numpy(), eta, temperature, np.random.default_rng(0))
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / math.sqrt(1500))


def test_small_steps_are_accepted_and_large_ones_are_not():
    train, meta = data()
    rates = []
    for eta in (1e-4, 3.0):
        made = kernel(gaussian, step_size={"x": eta})
        rates.append(acceptance(made, train.full(), meta.full(), generator(1))["x"])
    assert rates[0] > 0.99 and rates[1] < 0.1


def test_looking_at_it_changes_nothing():
    made, still = logistic(), logistic()
    for one in (made, still):
        for _ in range(5):
            one.step()
    train, meta = data()
    acceptance(made, train.full(), meta.full(), generator(5))
    for one in (made, still):
        one.step()
    mine, theirs = made.state_dict(), still.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_groups_that_have_no_rate_are_left_out():
    train, meta = (one.full() for one in data())
    made = logistic()
    assert set(acceptance(made, train, meta, generator())) == {"theta", "w"}
    made.temperatures["theta"] = 0.0
    assert set(acceptance(made, train, meta, generator())) == {"w"}
    made.mode = "paper"
    assert acceptance(made, train, meta, generator()) == {}
    assert acceptance(logistic(normalised), train, meta, generator()) == {}


def test_a_proposal_that_is_not_finite_is_rejected():
    def cliff(train, meta):
        x = pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))
        pyro.factor("wall", torch.where(x.abs() > 1e-6, x.new_tensor(math.nan), 0 * x))

    made = kernel(cliff)
    train, meta = data()
    assert acceptance(made, train.full(), meta.full(), generator()) == {"x": 0.0}


# the conditional that it looks at


def test_a_conditional_of_rows_has_each_row_s_terms_once():
    made = logistic()
    train, meta = data()
    batch = train.batch(torch.tensor([1, 4, 7]))
    conditional = Conditional(made.latents, "w", batch, meta.full())
    with conditional.kept():
        before, gradient = conditional.evaluate()
        u = conditional.values()[0]
        step = torch.tensor([1e-2, 0.0, 0.0])
        conditional.move([u + step])
        after, _ = conditional.evaluate()
        conditional.move([u - step])
        behind, _ = conditional.evaluate()
    assert float(after - behind) / 2e-2 == pytest.approx(float(gradient[0][0]), rel=1e-2)
    assert float(before) == pytest.approx((float(after) + float(behind)) / 2, abs=1e-3)


def test_leaving_a_conditional_puts_everything_back():
    made = logistic()
    made.step()
    before = made.latents.state_dict()
    train, meta = data()
    for group in ("theta", "w"):
        conditional = Conditional(
            made.latents, group, train.batch(torch.tensor([0, 5])), meta.full()
        )
        with pytest.raises(RuntimeError, match="midway"), conditional.kept():
            conditional.evaluate()
            conditional.move([value + 1 for value in conditional.values()])
            raise RuntimeError("midway")
    after = made.latents.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
