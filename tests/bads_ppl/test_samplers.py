"""One table of cases that every sampler passes, against answers that no sampler computed.

Cases run hundreds of equal targets side by side as the elements of one site or the rows of one
table, so that few steps give many independent draws. A tolerance is three standard errors of those
draws plus the sampler's bias in eta, which for a Langevin step h on curvature c multiplies the
variance by 1 / (1 - c h / 4).
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate

from bads_ppl.cyclical import CyclicalSGLD
from bads_ppl.data import Data
from bads_ppl.preconditioned import PreconditionedSGLD
from bads_ppl.sghmc import SGHMC
from bads_ppl.sgld import SGLD

SAMPLERS = {
    "sgld": (SGLD, {}),
    "preconditioned": (PreconditionedSGLD, {}),
    "sghmc": (SGHMC, {}),
    # exploring steps are not part of its target ("approximate"), so none here
    "cyclical": (CyclicalSGLD, {"cycle": 100, "exploration": 0.0}),
}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def points(size: int) -> Data:
    return Data(torch.zeros(size, 1), torch.zeros(size, dtype=torch.int64))


def make(name, program, *, size=1, warmup=300, **options):
    sampler, own = SAMPLERS[name]
    options = {"generator": torch.Generator().manual_seed(3), **own, **options}
    kernel = sampler(program, **options)
    kernel.setup(warmup, points(size), Data(torch.ones(1, 1), torch.zeros(1).long(), name="meta"))
    return kernel


def draws(kernel, steps, value):
    """Values after warm-up, at the steps at which the sampler allows draws."""
    found = []
    for step in range(1, kernel.warmup_steps + steps + 1):
        kernel.step()
        if step > kernel.warmup_steps and kernel.draws_at(step):
            found.append(value())
    return torch.stack(found).double()


@every_sampler
def test_a_gaussian_has_its_mean_and_variance(name):
    def program(train, meta):  # precision 5, mean 1
        x = pyro.sample("x", dist.Normal(torch.zeros(400), 1.0).to_event(1))
        pyro.factor("term", (-2 * (x - 1.25) ** 2).sum())

    kernel = make(name, program, step_size={"x": 0.02})
    x = draws(kernel, 2000, lambda: kernel.latents.globals["x"].value.detach().clone())
    # 400 x 2000 steps over about 40 of autocorrelation: 20,000 draws; bias at most 5 * .02 / 4
    assert x.mean() == pytest.approx(1, abs=3 * math.sqrt(0.2 / 20_000))
    assert x.var() == pytest.approx(0.2, rel=3 * math.sqrt(2 / 20_000) + 0.025)


@every_sampler
def test_a_correlated_gaussian_has_its_covariance(name):
    precision = torch.tensor([[5.0, 4.0], [4.0, 5.0]])

    def program(train, meta):
        x = pyro.sample("x", dist.Normal(torch.zeros(400, 2), 1.0).to_event(2))
        prior = 0.5 * (x**2).sum()
        pyro.factor("term", prior - 0.5 * torch.einsum("ri,ij,rj->", x, precision, x))

    kernel = make(name, program, step_size={"x": 0.02})
    x = draws(kernel, 3000, lambda: kernel.latents.globals["x"].value.detach().clone())
    flat = x.reshape(-1, 2)
    found = flat.T @ flat / len(flat)
    # slowest direction: curvature 1, some 200 steps of autocorrelation (the cyclical mean step is
    # half as long): at least 3,000 draws; the bias is at most .005 in each direction
    error = 3 * 0.556 * math.sqrt(2 / 3000) + 0.01
    assert torch.allclose(found, torch.linalg.inv(precision.double()), atol=error)


def tilted_beta(slope: float) -> tuple[float, float]:
    """Mean and sd of the density w exp(slope w) on (0, 1), by quadrature."""
    mass, first, second = (
        integrate.quad(lambda w, k=k: w ** (1 + k) * math.exp(slope * w), 0, 1)[0] for k in range(3)
    )
    return first / mass, math.sqrt(second / mass - (first / mass) ** 2)


def tilted(slope: float):
    def program(train, meta):
        with train.plate("train"):
            w = pyro.sample("w", dist.Beta(torch.tensor(2.0), torch.tensor(1.0)))
            pyro.factor("term", slope * w)

    return program


@every_sampler
@pytest.mark.parametrize("local_steps", [1, 5])
def test_rows_of_a_table_have_their_own_posterior(name, local_steps):
    kernel = make(
        name,
        tilted(-3.0),
        size=2000,
        warmup=400,
        step_size={"w": 0.2},
        train_batch=1000,
        local_steps=local_steps,
    )
    w = draws(kernel, 400, kernel.site_values)
    mean, sd = tilted_beta(-3.0)
    # 2,000 rows, 200 visits over about 40 of autocorrelation (twice that for the cyclical): at
    # least 4,000 draws; without bias to see at this step (halving it changes nothing)
    assert w.mean() == pytest.approx(mean, abs=3 * sd / math.sqrt(4000))
    assert w.std() == pytest.approx(sd, rel=3 / math.sqrt(2 * 4000) + 0.01)


@pytest.mark.slow
@every_sampler
def test_importance_minibatches_keep_the_posterior_of_rows_that_occur_twice(name):
    """Eight rows of a batch of six: those with large w occur often, and mostly more than once."""
    kernel = make(
        name,
        tilted(-3.0),
        size=8,
        warmup=600,
        step_size={"w": 0.2},
        train_batch=6,
        minibatches="importance",
    )
    kernel.train_rows.block = 1  # draw in proportion to w as it is
    w = draws(kernel, 8_000, kernel.site_values)
    mean, sd = tilted_beta(-3.0)
    # 8 rows, 6,000 steps of the full size over about 40 of autocorrelation, or twice that
    assert w.mean() == pytest.approx(mean, abs=3 * sd / math.sqrt(600))
    assert w.std() == pytest.approx(sd, rel=3 / math.sqrt(2 * 600) + 0.01)


def follow_by_hand(name: str, x: torch.Tensor, eta: float, steps: int, warmup: int) -> torch.Tensor:
    """Steps on U = 2 x_1^2 + x_2^2 / 2 at temperature 0, as the samplers' papers write them."""
    curvature = torch.tensor([4.0, 1.0])
    velocity, square, root = torch.zeros(2), torch.zeros(2), torch.ones(2)
    for step in range(steps):
        grad = curvature * x
        if name == "sghmc":  # Chen et al. (2014), equation 15, with friction .1 and step .1 eta / 2
            velocity = 0.9 * velocity - 0.1 * eta / 2 * grad
            x = x + velocity
            continue
        if name == "cyclical":  # Zhang et al. (2020), equation 1
            step_size = eta / 2 * (math.cos(math.pi * (step % 100) / 100) + 1)
        else:
            step_size = eta
        if name == "preconditioned" and step < warmup:  # Li et al. (2016), with V a plain average
            square = square + (grad**2 - square) * max(1 / (step + 1), 0.01)
            size = square.sqrt()
            root = 1.1 * size.mean() / (0.1 * size.mean() + size)
        x = x - step_size / 2 * root * grad
    return x


@every_sampler
def test_temperature_zero_follows_the_gradient_as_written_by_hand(name):
    def program(train, meta):
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"initial": 1.0})
        pyro.factor("term", -1.5 * x[0] ** 2)

    kernel = make(name, program, warmup=60, step_size={"x": 0.02}, temperature=0.0)
    for _ in range(150):
        kernel.step()
    wanted = follow_by_hand(name, torch.ones(2), 0.02, 150, 60)
    assert torch.allclose(kernel.latents.globals["x"].value, wanted, atol=1e-6)


@every_sampler
def test_a_restored_state_continues_bit_for_bit(name):
    def program(train, meta):
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with train.plate("train"):
            w = pyro.sample("w", dist.Beta(torch.tensor(2.0), torch.tensor(1.0)))
            pyro.factor("term", -w * (x**2).sum())

    options = {"size": 20, "warmup": 30, "step_size": {"x": 0.05, "w": 0.1}, "train_batch": 6}
    straight = make(name, program, **options, minibatches="importance")
    for _ in range(45):
        straight.step()
    state = straight.state_dict()
    again = make(name, program, **options, minibatches="importance")
    again.load_state_dict(state)
    for kernel in (straight, again):
        for _ in range(30):
            kernel.step()
    assert torch.equal(straight.site_values(), again.site_values())
    x, y = (kernel.latents.globals["x"].value for kernel in (straight, again))
    assert torch.equal(x, y) and np.isfinite(x.detach().numpy()).all()
