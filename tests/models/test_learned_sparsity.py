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
def test_gradient_of_beta_is_that_of_the_hierarchy_also_from_a_minibatch(batch):
    """The total of log(1 - w) is exact once every row was seen, so a minibatch adds no noise."""
    train, meta = two_sets()
    kernel = SGLD(
        program(made=parts(impact=Impact(train=0.0, meta=1.0, weight=0.0)), alpha=2.0),
        step_size={"theta": 1e-6, "w": 1e-6, "beta": 1e-6},
        generator=torch.Generator().manual_seed(0),
        train_batch=batch,
        temperature=0.0,
    )
    kernel.setup(0, train, meta)
    for _ in range(30):
        kernel.step()
    w = kernel.site_values().double()
    unconstrained = kernel.latents.globals["beta"].value.detach().double().requires_grad_()
    beta, a = unconstrained.sigmoid(), torch.tensor(0.7, dtype=torch.float64)
    one, two = torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    energy = -Beta(a, a * (1 - beta) / beta).log_prob(w).sum() - Beta(two, one).log_prob(beta)
    (wanted,) = torch.autograd.grad(energy, unconstrained)
    kernel.latents.backward(train.batch(torch.arange(batch)), meta.full())
    assert float(kernel.latents.globals["beta"].value.grad) == pytest.approx(
        float(wanted), rel=1e-3
    )


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
