"""One-step bi-level optimisation against finite differences and by what it finds."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.losses import cross_entropy
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights, WeightNetwork
from models.bilevel import bilevel, hypergradient


def network(dtype=torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def blobs(size: int, seed: int, wrong: int = 0) -> Data:
    """Two classes apart in the first coordinate; `wrong` points of class 0 are said to be of 1."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(size) % 2
    input = torch.randn(size, 2, generator=generator)
    input[:, 0] += 6.0 * target - 3.0
    target[: 2 * wrong : 2] = 1
    return Data(input, target)


def right_labels(size: int, wrong: int) -> torch.Tensor:
    right = torch.ones(size, dtype=torch.bool)
    right[: 2 * wrong : 2] = False
    return right


def kernel(train: Data, weights=None, *, rate=0.1, sparsity=0.5, net=None, **options) -> SGLD:
    net = net or network()
    parts = Parts(net, weights or InstanceWeights(), SparsityPrior(sparsity, scale=1e6))
    model = partial(bilevel, rate=rate, **options.pop("model", {}))
    options = {"step_size": {"theta": 0.01, "w": 0.1}, "temperature": 0.0, **options}
    made = SGLD(bind(model, parts), generator=torch.Generator().manual_seed(0), **options)
    made.setup(0, train, blobs(10, 7))
    return made


def test_the_hypergradient_is_the_derivative_through_the_inner_step():
    """Against central differences of the meta loss after the step, in double precision."""
    net = network(torch.float64)
    theta = {name: value.detach() for name, value in net.named_parameters()}
    train, meta = blobs(6, 1), blobs(5, 2)

    def losses(values, data):
        return cross_entropy(functional_call(net, values, (data.input.double(),)), data.target)

    def rest(values):
        return 0.3 * losses(values, meta).sum()

    def meta_loss(values):
        return losses(values, meta).mean()

    def after(share):
        lower = share @ losses(leaves, train) + rest(leaves)
        slope = torch.autograd.grad(lower, list(leaves.values()))
        ahead = {n: v - rate * s for (n, v), s in zip(leaves.items(), slope, strict=True)}
        return float(meta_loss(ahead).detach())

    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    rate, share = 0.7, torch.rand(6, generator=torch.Generator().manual_seed(4)).double()
    steps = 1e-5 * torch.eye(6, dtype=torch.float64)
    expected = [(after(share + step) - after(share - step)) / 2e-5 for step in steps]
    found = hypergradient(lambda values: losses(values, train), rest, meta_loss, theta, share, rate)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert found.abs().max() > 1e-3


@pytest.mark.parametrize("lower_meta", [True, False])
def test_weights_move_along_the_scaled_hypergradient_of_the_whole_lower_level(lower_meta):
    """One step on all data: theta'(w) by hand, and the first step's scale is the gain's own."""
    train, net, rate, beta = blobs(12, 1), network(), 0.4, 0.5
    theta = {name: value.detach().clone() for name, value in net.named_parameters()}
    meta = blobs(10, 7)

    def losses(values, data):
        return cross_entropy(functional_call(net, values, (data.input,)), data.target)

    share = torch.full((12,), 0.5 / (beta * 12 + 10 * lower_meta))
    gain = -hypergradient(
        lambda values: losses(values, train),
        lambda values: lower_meta * losses(values, meta).sum() / (beta * 12 + 10),
        lambda values: losses(values, meta).mean(),
        theta,
        share,
        rate,
    )
    made = kernel(
        train, net=net, rate=rate, model={"lower_meta": lower_meta}, train_batch=12, meta_batch=10
    )
    made.step()
    scaled = 3.0 / beta * (gain / gain.abs().mean()).clamp(-3, 3)
    moved = 0.1 / 2 * scaled * 0.25  # eta / 2, and dw/du = w (1 - w)
    assert torch.allclose(made.latents.tables["w"].value, moved, rtol=1e-4, atol=1e-6)


def test_theta_trains_on_the_weighted_points_alone_without_lower_meta():
    train, net = blobs(12, 1), network()
    loss = 0.5 * cross_entropy(net(train.input), train.target).sum()
    slope = torch.autograd.grad(loss, list(net.parameters()))
    before = [value.detach().clone() for value in net.parameters()]
    made = kernel(train, net=net, model={"lower_meta": False}, train_batch=12)
    made.step()
    for now, value, grad in zip(net.parameters(), before, slope, strict=True):
        decay = value  # the prior Normal(0, 1)
        assert torch.allclose(now, value - 0.005 * (grad + decay), atol=1e-6)


@pytest.mark.parametrize("minibatches", ["uniform", "importance"])
def test_wrong_labels_lose_their_weight(minibatches):
    made = kernel(blobs(60, 1, wrong=6), train_batch=20, minibatches=minibatches)
    for _ in range(400):
        made.step()
    w, right = made.site_values(), right_labels(60, wrong=6)
    assert w[~right].max() < 0.1 and w[right].median() > 0.5


def test_a_weight_network_moves_by_the_hypergradient_too():
    made = kernel(
        blobs(60, 1, wrong=6),
        WeightNetwork(4, classes=2),
        train_batch=20,
        step_size={"theta": 0.01, "phi": 1e-3},
    )
    for _ in range(400):
        made.step()
    w, right = made.site_values(), right_labels(60, wrong=6)
    assert w[right].min() > w[~right].max()


def test_running_statistics_follow_the_chain_s_own_pass_alone():
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    made = kernel(blobs(12, 1), net=net, train_batch=12, meta_batch=10)
    count = net[1].num_batches_tracked.item()
    mean = net[1].running_mean.clone()
    both = torch.cat([made.train.input, made.meta.input])
    expected = 0.9 * mean + 0.1 * net[0](both).mean(0).detach()
    made.latents.backward(made.train.full(), made.meta.full())
    assert net[1].num_batches_tracked.item() == count + 1
    assert torch.allclose(net[1].running_mean, expected, atol=1e-6)


def test_its_path_is_called_no_posterior():
    made = kernel(blobs(12, 1))
    made.step()
    assert made.evidence == "optimisation path"


def test_a_rate_that_takes_no_step_is_refused():
    with pytest.raises(InputError, match=r"rate .* must be positive, got 0"):
        kernel(blobs(12, 1), rate=0.0)


class Attending(nn.Module):
    """One fused attention over the two coordinates of a point."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.up, self.out = nn.Linear(1, 8), nn.Linear(16, 2)

    def forward(self, x):
        tokens = self.up(x[:, None, :, None])  # (B, one head, two tokens, 8)
        mixed = functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.out(mixed.flatten(1))


def test_a_network_with_fused_attention_has_a_hypergradient_too():
    net = Attending()
    made = kernel(blobs(20, 1), net=net)
    before = made.site_values().clone()
    for _ in range(3):
        made.step()
    assert made.site_values().isfinite().all() and not made.site_values().equal(before)


def test_losses_that_do_not_depend_on_theta_have_no_hypergradient():
    share, theta = torch.ones(3), {"a": torch.ones(2)}
    found = hypergradient(
        lambda values: torch.ones(3),
        lambda values: values["a"].sum(),
        lambda values: (values["a"] ** 2).sum(),
        theta,
        share,
        0.1,
    )
    assert found.tolist() == [0.0, 0.0, 0.0]
