from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.losses import cross_entropy
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Impact, Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import FixedWeights, InstanceWeights, WeightNetwork
from models import joint, normalised
from models.lenet5 import LeNet5

KINDS = ("persistent", "restarted", "reverted")
PROGRAMS = [joint, *(partial(normalised, auxiliary=kind) for kind in KINDS)]


def two_sets(size: int = 12) -> tuple[Data, Data]:
    g = torch.Generator().manual_seed(1)
    x, mx = torch.randn(size, 2, generator=g), torch.randn(6, 2, generator=g)
    return Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 1] > 0).long(), name="meta")


def parts(weights=None, *, sparsity=0.25, **options) -> Parts:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    prior = None if sparsity is None else SparsityPrior(sparsity, scale=1e6)
    return Parts(network, weights or InstanceWeights(), prior, **options)


def kernel(program, **options) -> SGLD:
    options = {"step_size": 0.05, "temperature": 0.0, "train_batch": 12, **options}
    made = SGLD(program, generator=torch.Generator().manual_seed(0), **options)
    made.setup(0, *two_sets())
    return made


# both


@pytest.mark.parametrize("model", PROGRAMS)
@pytest.mark.parametrize(
    "weights", [InstanceWeights(), WeightNetwork(3, classes=2), FixedWeights(torch.ones(12))]
)
def test_models_have_their_sites_under_a_plain_trace(model, weights):
    train, meta = two_sets()
    program = bind(
        model, parts(weights, sparsity=None if isinstance(weights, FixedWeights) else 0.5)
    )
    trace = poutine.trace(program).get_trace(train.full(), meta.full())
    latent = set(trace.stochastic_nodes) - {"train", "meta"}
    theta = {f"theta.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    wanted = set(theta)
    if model is not joint:
        wanted |= {name.replace("theta", "auxiliary") for name in theta}
    if isinstance(weights, InstanceWeights):
        wanted.add("w")
    if isinstance(weights, WeightNetwork):
        wanted |= {"phi.linear.weight", "phi.linear.bias"}
    assert latent == wanted
    assert trace.nodes["w"]["value"].shape == (12,)
    assert trace.nodes["meta_target"]["is_observed"]
    assert torch.isfinite(trace.log_prob_sum())


@pytest.mark.parametrize("model", PROGRAMS)
@pytest.mark.parametrize("weights", ["instance", "network"])
def test_models_run_on_minibatches_and_move_everything(model, weights):
    source = InstanceWeights() if weights == "instance" else WeightNetwork(3)
    made = kernel(bind(model, parts(source)), train_batch=5, temperature=1.0, step_size=0.01)
    before, w = made._params(), made.site_values().clone()
    for _ in range(40):
        made.step()
    made.check_finite()
    after = made._params()
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    assert (made.site_values() != w).all()


@pytest.mark.parametrize("model", PROGRAMS)
def test_weights_of_all_points_take_no_pass_of_the_companion(model):
    given = parts(WeightNetwork(3))
    made, seen = kernel(bind(model, given)), []
    given.network.register_forward_pre_hook(lambda _, args: seen.append("theta"))
    given.auxiliary.register_forward_pre_hook(lambda _, args: seen.append("auxiliary"))
    made.site_values(chunk=12)
    assert set(seen) == {"theta"}


@pytest.mark.parametrize("model", PROGRAMS)
def test_models_keep_no_state_between_calls(model):
    train, meta = two_sets()
    program = bind(model, parts())

    def density():
        with torch.random.fork_rng():
            pyro.set_rng_seed(5)
            return poutine.trace(program).get_trace(train.full(), meta.full()).log_prob_sum()

    assert torch.equal(density(), density())


@pytest.mark.parametrize("model", PROGRAMS)
def test_meta_data_reach_theta(model):
    """Without train data the meta loss falls."""
    made = kernel(bind(model, parts(FixedWeights(torch.zeros(12)), sparsity=None)))
    network, meta = made.latents.networks["theta"].module, made.meta
    before = float(cross_entropy(network(meta.input), meta.target).mean().detach())
    for _ in range(200):
        made.step()
    assert float(cross_entropy(network(meta.input), meta.target).mean().detach()) < 0.8 * before


# joint


def test_joint_takes_weight_from_points_in_proportion_to_their_loss():
    made = kernel(bind(joint, parts()), step_size={"theta": 1e-9, "w": 1e-2})
    loss = cross_entropy(made.latents.networks["theta"].module(made.train.input), made.train.target)
    made.step()
    moved = made.latents.tables["w"].value
    assert torch.allclose(moved, -1e-2 / 2 * loss.detach() / 4, rtol=1e-3)


# normalised


def drift_of_w(kind, shift=0.0, *, beta=0.25, impact=None, weights=None, **options):
    """Minus the gradient of the potential in w, at w = 1/2, and the losses of both networks."""
    given = parts(weights, sparsity=beta, impact=impact or Impact())
    made = kernel(bind(partial(normalised, auxiliary=kind, **options), given))
    theta, other = (made.latents.networks[name] for name in ("theta", "auxiliary"))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in other.parameters:
            p.add_(shift * torch.randn(p.shape, generator=g))
        own, others = (
            cross_entropy(site.module(made.train.input), made.train.target)
            for site in (theta, other)
        )
    made.latents.backward(made.train.full(), made.meta.full())
    grad = made.latents.tables["w"].rows.grad
    return -grad / 0.25, own, others, made


def test_persistent_gain_is_the_plain_difference_of_the_losses():
    drift, own, other, _ = drift_of_w("persistent", 0.5)
    assert torch.allclose(drift, other - own, atol=1e-5)


@pytest.mark.parametrize("kind", ["restarted", "reverted"])
@pytest.mark.parametrize("beta", [0.25, 0.5])
def test_other_gains_are_scaled_by_their_mean_size_and_beta(kind, beta):
    options = {"beta": beta, "contrast": 2.0, "clip": 100.0}
    drift, own, other, _ = drift_of_w(kind, 0.5, loss_contrast=0.0, **options)
    gain = other - own
    wanted = 2.0 / beta * gain / gain.abs().mean()
    assert torch.allclose(drift, wanted, rtol=1e-3, atol=1e-4)
    both, *_ = drift_of_w(kind, 0.5, loss_contrast=1.5, **options)
    apart = own - own.mean()
    wanted = wanted - 1.5 / beta * apart / apart.abs().mean()
    assert torch.allclose(both, wanted, rtol=1e-3, atol=1e-4)


def test_centred_gains_are_those_less_their_mean():
    drift, own, other, _ = drift_of_w(
        "reverted", 0.5, contrast=2.0, clip=100.0, loss_contrast=0.0, centre=True
    )
    gain = other - own
    assert abs(gain.mean()) > 0.1 * gain.std()
    apart = gain - gain.mean()
    assert torch.allclose(drift, 2.0 / 0.25 * apart / apart.abs().mean(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["restarted", "reverted"])
def test_scaled_gains_do_not_depend_on_how_far_apart_the_networks_are(kind):
    near, *_ = drift_of_w(kind, 0.01, clip=100.0, loss_contrast=0.0)
    far, *_ = drift_of_w(kind, 0.02, clip=100.0, loss_contrast=0.0)
    assert torch.allclose(near, far, rtol=0.1, atol=0.3)


def test_scaled_gains_are_clipped():
    drift, *_ = drift_of_w("reverted", 0.5, contrast=2.0, clip=0.5, loss_contrast=0.0)
    assert drift.abs().max() == pytest.approx(2.0 / 0.25 * 0.5, rel=1e-4)
    drift, *_ = drift_of_w("reverted", 0.5, contrast=0.0, clip=0.5, loss_contrast=2.0)
    assert drift.abs().max() == pytest.approx(2.0 / 0.25 * 0.5, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_impact_multiplies_the_gain(kind):
    once, *_ = drift_of_w(kind, 0.5)
    thrice, *_ = drift_of_w(kind, 0.5, impact=Impact(weight=3.0))
    assert torch.allclose(thrice, 3 * once, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_theta_sees_weighted_train_losses_and_meta_losses_with_their_impacts(kind):
    impact = Impact(train=0.5, meta=2.0, weight=7.0)
    _, _, _, made = drift_of_w(kind, 0.5, impact=impact)
    site = made.latents.networks["theta"]
    network, train, meta = site.module, made.train, made.meta
    energy = 0.5 * 0.5 * cross_entropy(network(train.input), train.target).sum()
    energy = energy + 2.0 * cross_entropy(network(meta.input), meta.target).sum()
    wanted = torch.autograd.grad(energy, site.parameters)
    for found, expected, p in zip(site.gradients(), wanted, site.parameters, strict=True):
        assert torch.allclose(found, expected + p.detach(), atol=1e-4)


@pytest.mark.parametrize("kind", ["persistent", "restarted"])
def test_the_companion_never_sees_the_meta_data(kind):
    _, _, _, made = drift_of_w(kind, 0.5)
    site, train = made.latents.networks["auxiliary"], made.train
    wanted = torch.autograd.grad(
        0.5 * cross_entropy(site.module(train.input), train.target).sum(), site.parameters
    )
    for found, expected, p in zip(site.gradients(), wanted, site.parameters, strict=True):
        assert torch.allclose(found, expected + p.detach(), atol=1e-4)


@pytest.mark.parametrize("kind", ["restarted", "reverted"])
def test_points_that_the_meta_set_explains_gain_weight(kind):
    """Train points are those of the meta set, half of them with the other label."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(20, 2, generator=g)
    y = (x[:, 0] > 0).long()
    given = y.clone()
    given[10:] = 1 - given[10:]
    train, meta = Data(x, given), Data(x, y, name="meta")
    program = bind(partial(normalised, auxiliary=kind), parts(sparsity=0.5))
    made = SGLD(
        program,
        step_size={"theta": 0.02, "w": 0.05},
        temperature=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    made.setup(0, train, meta)
    for _ in range(60):
        made.step()
    w = made.site_values()
    assert w[:10].min() > w[10:].max()


def test_the_kind_of_companion_must_be_known():
    with pytest.raises(InputError, match=r"'persistent', 'restarted', 'reverted'\], got 'none'"):
        kernel(bind(partial(normalised, auxiliary="none"), parts()))


@pytest.mark.parametrize("kind", ["restarted", "reverted"])
def test_the_window_must_be_a_step_at_least(kind):
    with pytest.raises(InputError, match="got 0"):
        kernel(bind(partial(normalised, auxiliary=kind, window=0), parts()))


# networks


@pytest.mark.parametrize("classes", [2, 10])
def test_lenet5_maps_images_to_logits(classes):
    network = LeNet5(classes)
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, classes)
    if classes == 10:
        assert sum(p.numel() for p in network.parameters()) == 61_706
    assert network.head.in_features == 84
