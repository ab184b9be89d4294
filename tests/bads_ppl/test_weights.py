import pytest
import torch
from pyro import poutine
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import FixedWeights, InstanceWeights, WeightNetwork, _Beta
from models import joint


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(size: int = 8) -> Data:
    g = generator()
    return Data(torch.randn(size, 3, generator=g), torch.randint(4, (size,), generator=g))


def traced(weights, batch, features=None):
    trace = poutine.trace(weights.sample).get_trace(batch, batch.plate("train"), features)
    trace.compute_log_prob()
    return trace


@pytest.mark.parametrize("mean", [0.05, 0.5, 0.8])
@pytest.mark.parametrize("concentration", [0.5, 1.0, 3.0])
def test_instance_weights_are_beta_with_the_given_mean(mean, concentration):
    trace = traced(InstanceWeights(mean, concentration), points().full())
    node = trace.nodes["w"]
    assert torch.allclose(node["fn"].mean, torch.tensor(mean), atol=1e-6)
    assert torch.allclose(node["fn"].concentration1, torch.tensor(concentration))
    assert node["infer"]["initial"] == mean
    assert node["value"].shape == (8,) and ((node["value"] >= 0) & (node["value"] <= 1)).all()
    assert [frame.name for frame in node["cond_indep_stack"]] == ["train"]


def test_default_instance_weights_are_uniform():
    node = traced(InstanceWeights(), points().full()).nodes["w"]
    assert torch.allclose(node["log_prob"], torch.zeros(8), atol=1e-6)


def test_weight_network_starts_at_the_initial_weight_everywhere():
    weights = WeightNetwork(5, classes=4, initial=0.2)
    features, target = torch.randn(8, 5, generator=generator()), torch.arange(8) % 4
    assert torch.allclose(weights(features, target), torch.full((8,), 0.2))


def test_weight_network_is_a_sigmoid_of_a_linear_layer_on_direction_and_label():
    weights = WeightNetwork(2, classes=3, initial=0.5)
    with torch.no_grad():
        weights.linear.weight.copy_(torch.tensor([[1.0, -2.0, 0.1, 0.2, 0.3]]))
        weights.linear.bias.fill_(0.5)
    found = weights(torch.tensor([[6.0, 8.0], [0.0, 0.0]]), torch.tensor([2, 0]))
    assert torch.allclose(found, torch.sigmoid(torch.tensor([0.6 - 1.6 + 0.3 + 0.5, 0.1 + 0.5])))


def test_the_length_of_an_embedding_does_not_matter_to_a_weight_network():
    weights = WeightNetwork(3)
    with torch.no_grad():
        weights.linear.weight.normal_(generator=generator())
    data = points()
    first = weights(data.input, data.target)
    assert torch.allclose(first, weights(100 * data.input, data.target))
    assert first.std() > 0.05


def test_labels_do_not_matter_to_a_weight_network_without_classes():
    weights = WeightNetwork(2)
    with torch.no_grad():
        weights.linear.weight.normal_(generator=generator())
    features = torch.randn(4, 2, generator=generator())
    first = weights(features, torch.zeros(4, dtype=torch.long))
    assert torch.equal(first, weights(features, torch.ones(4, dtype=torch.long)))


def test_sampled_weight_network_is_latent_in_phi_and_computes_w():
    data, weights = points(), WeightNetwork(3, prior=NormalPrior(2.0))
    trace = traced(weights, data.full(), data.input)
    phi = {name: trace.nodes[name]["value"] for name in ("phi.linear.weight", "phi.linear.bias")}
    direction = data.input / data.input.norm(dim=1, keepdim=True)
    logit = direction @ phi["phi.linear.weight"][0] + phi["phi.linear.bias"]
    assert torch.allclose(trace.nodes["w"]["value"], torch.sigmoid(logit))
    wanted = sum(torch.distributions.Normal(0, 2.0).log_prob(v).sum() for v in phi.values())
    assert float(trace.log_prob_sum()) == pytest.approx(float(wanted), rel=1e-5)  # w adds nothing


def test_fixed_weights_are_those_of_the_rows_and_add_no_density():
    values = torch.linspace(0, 1, 8)
    trace = traced(FixedWeights(values), points().batch(torch.tensor([6, 1])))
    assert torch.equal(trace.nodes["w"]["value"], values[[6, 1]])
    assert float(trace.log_prob_sum()) == 0


def test_each_source_says_whether_it_needs_the_embedding():
    assert WeightNetwork(2).needs_features
    assert not InstanceWeights().needs_features
    assert not FixedWeights(torch.ones(2)).needs_features


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InstanceWeights(mean=1.0), r"must be in \(0, 1\), got 1.0"),
        (lambda: InstanceWeights(concentration=0.0), "concentration must be positive, got 0.0"),
        (lambda: WeightNetwork(3, initial=0.0), r"initial weight must be in \(0, 1\), got 0.0"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_weight_network_without_embedding_is_refused():
    with pytest.raises(InputError, match="needs the embedding of the batch, got None"):
        traced(WeightNetwork(3), points().full())


@pytest.mark.parametrize("mean", [0.05, 0.5])
@pytest.mark.parametrize("concentration", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
def test_the_density_of_a_logit_is_that_of_the_weight_and_the_jacobian(
    mean, concentration, temperature
):
    prior = traced(InstanceWeights(mean, concentration), points().full()).nodes["w"]["fn"]
    plain = torch.distributions.Beta(prior.concentration1, prior.concentration0)
    found, gradients = [], []
    for fused in (True, False):
        logit = torch.linspace(-8, 8, 8, dtype=torch.float64).requires_grad_()
        w = torch.sigmoid(logit)
        if fused:
            density = prior.log_density_of_logit(logit, w, temperature)
        else:
            density = plain.log_prob(w) + temperature * (w.log() + torch.log1p(-w))
        gradients.append(torch.autograd.grad(density @ torch.arange(8.0).double(), logit)[0])
        found.append(density.detach())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-5)


def test_a_kernel_takes_the_fused_density_and_the_plain_one_alike(monkeypatch):
    """Same seed, same draws."""
    chains = []
    for fused in (True, False):
        if not fused:
            monkeypatch.delattr(_Beta, "log_density_of_logit")
        torch.manual_seed(0)
        parts = Parts(nn.Linear(3, 4), InstanceWeights(0.2), SparsityPrior(0.25))
        kernel = SGLD(
            bind(joint, parts),
            step_size={"theta": 0.01, "w": 0.2},
            temperature={"w": 0.2},
            train_batch=4,
            generator=generator(),
        )
        kernel.setup(0, points(), points(6))
        for _ in range(20):
            kernel.step()
        chains.append([kernel.site_values(), *parts.network.parameters()])
    assert chains[0][0].std() > 0.05
    for one, other in zip(*chains, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
