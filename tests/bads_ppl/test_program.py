import pytest
import torch
from pyro import poutine
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.losses import cross_entropy
from bads_ppl.program import Impact, Parts, bind, capture_features, embedding_layer
from bads_ppl.weights import FixedWeights, InstanceWeights, WeightNetwork


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_sets() -> tuple[Data, Data]:
    g = generator()
    x, mx = torch.randn(6, 3, generator=g), torch.randn(4, 3, generator=g)
    return Data(x, torch.arange(6) % 2), Data(mx, torch.arange(4) % 2, name="meta")


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = body()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.inner(x)


@pytest.mark.parametrize("apart", [False, True])
def test_forward_gives_train_losses_and_meta_outputs(apart):
    train, meta = two_sets()
    network = Counting()
    parts = Parts(network, FixedWeights(torch.ones(6)))
    found = parts.forward(network, train.full(), meta.full(), apart=apart)
    assert network.sizes == ([6, 4] if apart else [10])
    assert torch.allclose(
        found.train_loss, cross_entropy(network.inner(train.input), train.target), atol=1e-6
    )
    assert torch.allclose(found.meta_output, network.inner(meta.input), atol=1e-6)
    assert found.features is None


@pytest.mark.parametrize("apart", [False, True])
def test_forward_gives_the_detached_train_embedding_where_weights_need_it(apart):
    train, meta = two_sets()
    network = body()
    parts = Parts(network, WeightNetwork(5))
    found = parts.forward(network, train.full(), meta.full(), apart=apart)
    assert torch.allclose(found.features, network[:2](train.input), atol=1e-6)
    assert found.features.shape == (6, 5) and not found.features.requires_grad


def test_head_names_the_layer_whose_input_is_the_embedding():
    train, meta = two_sets()
    network = body()
    parts = Parts(network, WeightNetwork(3), head=network[0])
    found = parts.forward(network, train.full(), meta.full())
    assert torch.equal(found.features, train.input)


@pytest.mark.parametrize("impact", [Impact(), Impact(0.3, 1.0, 2.0)])
def test_the_weighted_term_has_the_derivatives_of_24_and_25(impact):
    parts = Parts(body(), InstanceWeights(), impact=impact)
    w = torch.tensor([0.2, 0.9], requires_grad=True)
    loss = torch.tensor([1.5, 4.0], requires_grad=True)
    term = parts.weigh(w, loss)
    assert torch.allclose(term, -impact.train * w * loss)
    term.sum().backward()
    assert torch.allclose(loss.grad, -impact.train * w.detach())
    assert torch.allclose(w.grad, -impact.weight * loss.detach())


def test_meta_targets_are_observed_in_their_plate_with_the_impact():
    _, meta = two_sets()
    network = body()
    parts = Parts(network, InstanceWeights(), impact=Impact(meta=3.0))
    rows = torch.tensor([2, 0])
    batch = meta.batch(rows)
    trace = poutine.trace(parts.observe_meta).get_trace(network(batch.input), batch)
    loss = cross_entropy(network(batch.input), batch.target)
    assert trace.nodes["meta_target"]["is_observed"]
    assert torch.allclose(trace.log_prob_sum(), -3.0 * 2 * loss.sum())


def test_the_companion_starts_as_a_copy():
    parts = Parts(body(), InstanceWeights())
    assert parts.auxiliary is parts.auxiliary and parts.auxiliary is not parts.network
    for a, b in zip(parts.auxiliary.parameters(), parts.network.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b


def test_bind_gives_the_program_of_two_batches():
    seen = []
    parts = Parts(body(), InstanceWeights())
    bind(lambda train, meta, parts: seen.append((train, meta, parts)), parts)("t", "m")
    assert seen == [("t", "m", parts)]


def test_capture_ends_with_its_context():
    network = body()
    with capture_features(network) as kept:
        network(torch.zeros(2, 3))
        network(torch.zeros(1, 3))
    network(torch.zeros(2, 3))
    assert [k.shape for k in kept] == [(2, 5), (1, 5)]


class Named(nn.Module):
    """Calls a layer before its last nn.Linear the embedding layer."""

    def __init__(self, layer):
        super().__init__()
        self.embedding_layer = layer
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.embedding_layer(self.first(x)))


def test_the_embedding_layer_is_the_one_of_that_name():
    network, x = Named(nn.Linear(5, 5)), torch.ones(2, 3)
    assert embedding_layer(network) is network.embedding_layer
    with capture_features(network) as kept:
        network(x)
    assert len(kept) == 1 and torch.equal(kept[0], network.first(x))


def test_the_embedding_layer_is_else_the_last_linear_one():
    network = body()
    assert embedding_layer(network) is network[2]
    for layer in (torch.tanh, nn.Embedding(4, 5)):  # no module, and one that embeds ids
        other = Named(layer)
        assert embedding_layer(other) is other.last


@pytest.mark.parametrize("network", [nn.Sequential(nn.Flatten()), nn.Identity()])
def test_a_network_without_embedding_layer_is_refused(network):
    name = type(network).__name__
    with pytest.raises(InputError, match=rf"{name} has no nn.Linear: name .* or call it"):
        embedding_layer(network)


@pytest.mark.parametrize("name", ["train", "meta", "weight"])
def test_negative_impact_is_refused(name):
    with pytest.raises(InputError, match=f"{name}_impact must be >= 0, got -1"):
        Impact(**{name: -1.0})
