"""The latent share: its density written by hand, its prior as a target, and what it refuses."""

from functools import partial

import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import Beta

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.losses import cross_entropy
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Impact, Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights, WeightNetwork
from models import joint, learned_sparsity

SIZE = 8


def two_sets() -> tuple[Data, Data]:
    g = torch.Generator().manual_seed(1)
    x, mx = torch.randn(SIZE, 2, generator=g), torch.randn(6, 2, generator=g)
    return Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 1] > 0).long(), name="meta")


def parts(weights=None, **options) -> Parts:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Linear(2, 2)
    return Parts(network, weights or InstanceWeights(0.3, 0.7), SparsityPrior(0.3), **options)


def program(base=joint, made=None, **options):
    return bind(partial(learned_sparsity, base=base, **options), made or parts())


def test_density_is_the_hierarchy_written_by_hand():
    """beta ~ Beta(2, 3), w_i | beta ~ Beta(a, a (1 - beta) / beta): the base prior cancels."""
    train, meta = two_sets()
    made = parts()
    w, beta = torch.linspace(0.05, 0.9, SIZE), torch.tensor(0.37)
    theta = {f"theta.{n}": p.detach() for n, p in made.network.named_parameters()}
    given = poutine.condition(
        program(made=made, alpha=2.0, alpha_rest=3.0), {"w": w, "beta": beta, **theta}
    )
    trace = poutine.trace(given).get_trace(train.full(), meta.full())
    a = 0.7
    wanted = Beta(torch.tensor(2.0), torch.tensor(3.0)).log_prob(beta)
    wanted = wanted + Beta(torch.tensor(a), a * (1 - beta) / beta).log_prob(w).sum()
    wanted = wanted - sum((p**2).sum() / 2 + p.numel() * 0.918938533 for p in theta.values())
    loss = cross_entropy(made.network(train.input), train.target)
    wanted = wanted - (w * loss).sum()
    wanted = wanted - cross_entropy(made.network(meta.input), meta.target).sum()
    assert float(trace.log_prob_sum().detach()) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("batch", [SIZE, 3])
def test_with_data_that_say_nothing_beta_has_its_hyperprior(batch):
    """The normaliser of p(w | beta) is right: without it the weights would pull beta along.

    beta ~ Beta(3, 3) has mean 1/2 and sd 0.189. Draws are correlated over some 400 steps (twice the
    decorrelation seen), so that 60,000 steps fix the mean to 0.189 / sqrt(150) = 0.016: three
    times that, and 15 % of the sd.
    """
    train, meta = two_sets()
    silent = parts(InstanceWeights(0.5, 1.0), impact=Impact(train=0.0, meta=1e-6, weight=0.0))
    kernel = SGLD(
        program(made=silent, alpha=3.0, alpha_rest=3.0),
        step_size={"theta": 0.1, "w": 0.5, "beta": 0.05},
        generator=torch.Generator().manual_seed(0),
        train_batch=batch,
    )
    kernel.setup(0, train, meta)
    site, draws = None, []
    for step in range(60_000):
        kernel.step()
        if step > 500 and step % 5 == 0:
            site = kernel.latents.globals["beta"]
            draws.append(site.transform(site.value.detach()).clone())
    beta = torch.stack(draws)
    assert float(beta.mean()) == pytest.approx(0.5, abs=0.048)
    assert float(beta.std()) == pytest.approx(0.189, rel=0.15)


def test_the_default_base_is_normalised_and_beta_moves():
    train, meta = two_sets()
    kernel = SGLD(
        bind(learned_sparsity, parts()),
        step_size={"theta": 0.01, "w": 0.1, "beta": 0.01},
        generator=torch.Generator().manual_seed(0),
    )
    kernel.setup(0, train, meta)
    assert set(kernel.latents.networks) == {"theta", "auxiliary"}
    for _ in range(3):
        kernel.step()
    site = kernel.latents.globals["beta"]
    assert 0 < float(site.transform(site.value)) < 1
    assert float(site.transform(site.value)) != pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (parts(WeightNetwork(2)), {}, "needs instance weights"),
        (parts(), {"alpha": 0.0}, "alpha must be positive, got 0"),
        (parts(), {"alpha_rest": -1.0}, "alpha_rest must be positive, got -1"),
    ],
)
def test_wrong_parts_are_refused(made, options, message):
    train, meta = two_sets()
    with pytest.raises(InputError, match=message):
        program(made=made, **options)(train.full(), meta.full())
