import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from safetensors.torch import load_file, save_file
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import Diverged, InputError
from bads_ppl.losses import cross_entropy
from bads_ppl.primitives import sample_network
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Impact, Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import FixedWeights, InstanceWeights, WeightNetwork
from models import joint, normalised


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logistic_data(size: int = 20, wrong: int = 6, seed: int = 0) -> tuple[Data, Data]:
    """Two features; the first `wrong` train labels are flipped."""
    g = generator(seed)
    x, mx = torch.randn(size, 2, generator=g), torch.randn(10, 2, generator=g)
    y, my = ((z[:, 0] + 0.5 * z[:, 1] > 0).long() for z in (x, mx))
    y[:wrong] = 1 - y[:wrong]
    return Data(x, y), Data(mx, my, name="meta")


def parts(weights=None, *, sparsity=0.5, scale=1.0, impact=None, seed=0) -> Parts:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Linear(2, 2)
    return Parts(
        network,
        weights or InstanceWeights(),
        SparsityPrior(sparsity, scale=scale),
        impact=impact or Impact(),
    )


def kernel(program, train, meta, **options) -> SGLD:
    options = {"step_size": 0.02, "generator": generator(), **options}
    made = SGLD(program, **options)
    made.setup(0, train, meta)
    return made


def theta(kernel: SGLD) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in kernel.latents.networks["theta"].parameters])


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_gaussian_posterior_has_the_closed_form_mean_and_sd(weight):
    """l = (theta - z)^2 / 2 with fixed w: a Gaussian with known mean and precision."""
    g = generator(1)
    train = Data(torch.zeros(30, 1), torch.randn(30, generator=g) + 2)
    meta = Data(torch.zeros(10, 1), torch.randn(10, generator=g), name="meta")

    class Location(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x + self.value

    def squared(output, target):
        return 0.5 * (output[:, 0] - target) ** 2

    made = kernel(
        bind(joint, Parts(Location(), FixedWeights(torch.full((30,), weight)), loss=squared)),
        train,
        meta,
        step_size=0.002,
        train_batch=10,
        meta_batch=10,
    )
    draws = []
    for step in range(12_000):
        made.step()
        if step > 1000:
            draws.append(theta(made))
    values = torch.cat(draws)
    precision = 1 + weight * 30 + 10
    mean = (weight * train.target.sum() + meta.target.sum()) / precision
    # the chain's own sd is the yardstick; its mean is known to about a tenth of it
    assert abs(values.mean() - mean) < 0.25 / math.sqrt(precision)
    assert values.std() * math.sqrt(precision) == pytest.approx(1, abs=0.15)


def small_joint(weights: str) -> Parts:
    """Scales at which no direction of the posterior is much narrower than the others."""
    if weights == "instance":
        return parts(InstanceWeights())
    return parts(WeightNetwork(2, classes=2, prior=NormalPrior(1.0)), scale=3.0)


@pytest.fixture
def nuts_draws(shared):
    """Draws of w and theta (600, 26) by NUTS from the joint program, by kind of weights."""

    def draw(weights: str) -> torch.Tensor:
        train, meta = (data.full() for data in logistic_data())
        program = bind(joint, small_joint(weights))
        pyro.set_rng_seed(0)
        nuts = MCMC(NUTS(program), num_samples=600, warmup_steps=200, disable_progbar=True)
        nuts.run(train, meta)
        found = nuts.get_samples()
        w = [
            poutine.trace(poutine.condition(program, one))
            .get_trace(train, meta)
            .nodes["w"]["value"]
            for one in rows(found)
        ]
        values = torch.stack(w).detach()
        return torch.cat([values, found["theta.weight"].flatten(1), found["theta.bias"]], dim=1)

    def find(weights: str) -> torch.Tensor:
        folder = shared(
            f"nuts-{weights}",
            lambda folder: save_file({"draws": draw(weights)}, folder / "draws.safetensors"),
        )
        return load_file(folder / "draws.safetensors")["draws"]

    return find


def rows(draws: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    count = len(next(iter(draws.values())))
    return [{name: value[i] for name, value in draws.items()} for i in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "options"),
    [
        ("instance", {"train_batch": 20}),
        ("instance", {"train_batch": 5}),
        ("instance", {"train_batch": 6, "minibatches": "importance"}),
        ("network", {"train_batch": 5}),
    ],
)
def test_joint_posterior_agrees_with_nuts_on_the_same_program(weights, options, nuts_draws):
    train, meta = logistic_data()
    wanted = nuts_draws(weights)
    made = kernel(
        bind(joint, small_joint(weights)),
        train,
        meta,
        step_size={"theta": 0.03} | ({"w": 0.3} if weights == "instance" else {"phi": 0.05}),
        generator=generator(2),
        **options,
    )
    draws = []
    for step in range(24_000):  # of 16,000, chance alone takes one of 26 means over the bound
        made.step()
        if step > 1000 and step % 5 == 0:
            draws.append(torch.cat([made.site_values(), theta(made)]))
    found = torch.stack(draws)
    apart = (found.mean(0) - wanted.mean(0)).abs() / wanted.std(0)
    ratio = found.std(0) / wanted.std(0)
    assert apart.max() < 0.3 and apart.mean() < 0.12
    assert ratio.min() > 0.85 and ratio.max() < 1.15
    total, reference = found[:, :20].sum(1), wanted[:, :20].sum(1)
    assert total.std() / reference.std() == pytest.approx(1, abs=0.15)


def potential_by_hand(network, w, train, meta, *, target, scale, prior=1.0):
    """(4) with (2), (3), (8) on all data."""
    train_loss = cross_entropy(network(train.input), train.target)
    meta_loss = cross_entropy(network(meta.input), meta.target)
    decay = sum((p**2).sum() for p in network.parameters()) / (2 * prior**2)
    sparsity = (w.sum() - target) ** 2 / (2 * scale**2)
    return (w * train_loss).sum() + meta_loss.sum() + decay + sparsity


def test_full_batch_gradient_is_that_of_the_energy_written_by_hand():
    train, meta = logistic_data()
    made = kernel(bind(joint, parts(scale=2.0)), train, meta, train_batch=20, meta_batch=10)
    table = made.latents.tables["w"]
    table.value.copy_(torch.randn(20, generator=generator(3)))
    total = made.latents.sums["total_weight"].total
    total.copy_(table.values().sum())
    made.latents.temperature = {"w": 0.0}  # no Jacobian
    made.latents.potential(train.full(), meta.full()).backward()
    network = made.latents.networks["theta"]
    u = table.value.clone().requires_grad_()
    by_hand = potential_by_hand(network.module, torch.sigmoid(u), train, meta, target=10, scale=2.0)
    wanted = torch.autograd.grad(by_hand, [u, *network.parameters])
    assert torch.allclose(table.rows.grad, wanted[0], atol=1e-5)
    for found, expected in zip(network.gradients(), wanted[1:], strict=True):
        assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("weights", ["instance", "network"])
def test_minibatch_gradient_is_unbiased(weights, importance):
    """The mean of the gradients over all rows, each with its chance, is the full gradient."""
    train, meta = logistic_data(size=12)
    source = InstanceWeights() if weights == "instance" else WeightNetwork(2, classes=2)
    made = kernel(bind(joint, parts(source, scale=2.0)), train, meta, train_batch=12)
    latents = made.latents
    if weights == "network":
        with torch.no_grad():
            source.linear.weight.normal_(generator=generator(4))
            memory = latents.sums["total_weight"].memory
            memory.copy_(made.site_values())  # settled: plate_sum is then exact for every batch
            latents.sums["total_weight"].total.copy_(memory.sum())

    def gradients(batch):
        latents.zero_grad()
        latents.potential(batch, meta.full()).backward()
        found = [g.clone() for n in latents.networks.values() for g in n.gradients()]
        rows = torch.zeros(12)
        if "w" in latents.tables:
            table = latents.tables["w"]
            rows.index_add_(0, table.index, table.rows.grad * len(batch) / batch.size)
        return found, rows

    chance = torch.full((12,), 1 / 12)
    if importance:
        chance = torch.rand(12, generator=generator(5)) + 0.1
        chance = chance / chance.sum()
    full, full_rows = gradients(train.full())
    mean = [torch.zeros_like(g) for g in full]
    mean_rows = torch.zeros(12)
    for row in range(12):
        correction = 1 / (12 * chance[row : row + 1]) if importance else None
        found, rows = gradients(train.batch(torch.tensor([row]), correction))
        for total, g in zip(mean, found, strict=True):
            total += chance[row] * g
        # a row moves with probability q_i by 1 / (N q_i) of its step: 1 / N of it on average
        mean_rows += chance[row] * rows * 12
    for found, expected in zip(mean, full, strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
    assert torch.allclose(mean_rows, full_rows, atol=1e-5)


def test_impact_constants_scale_each_update_as_in_24_and_25():
    train, meta = logistic_data()
    impact = Impact(train=0.5, meta=2.0, weight=3.0)
    made = kernel(bind(joint, parts(impact=impact, scale=1e6)), train, meta, train_batch=20)
    made.latents.temperature = {"w": 0.0}
    made.latents.potential(train.full(), meta.full()).backward()
    network = made.latents.networks["theta"]
    table = made.latents.tables["w"]
    w = table.values()
    loss = cross_entropy(network.module(train.input), train.target)
    meta_loss = cross_entropy(network.module(meta.input), meta.target)
    by_hand = 0.5 * (w * loss).sum() + 2.0 * meta_loss.sum()
    decay = [p.detach() for p in network.parameters]
    wanted = torch.autograd.grad(by_hand, network.parameters)
    for found, expected, value in zip(network.gradients(), wanted, decay, strict=True):
        assert torch.allclose(found, expected + value, atol=1e-4)
    assert torch.allclose(table.rows.grad, 3.0 * loss.detach() * w * (1 - w), atol=1e-5)


def test_temperature_zero_is_gradient_descent():
    train, meta = logistic_data()
    made = kernel(
        bind(joint, parts(scale=2.0)),
        train,
        meta,
        step_size={"theta": 0.01, "w": 0.1},
        temperature=0.0,
        train_batch=20,
        meta_batch=10,
    )
    network = nn.Linear(2, 2)
    network.load_state_dict(made.latents.networks["theta"].module.state_dict())
    u = torch.zeros(20, requires_grad=True)
    for _ in range(20):
        made.step()
        energy = potential_by_hand(network, torch.sigmoid(u), train, meta, target=10, scale=2.0)
        values = [u, *network.parameters()]
        grads = torch.autograd.grad(energy, values)
        with torch.no_grad():
            for value, grad, eta in zip(values, grads, [0.1, 0.01, 0.01], strict=True):
                value -= eta / 2 * grad
    assert torch.allclose(made.latents.tables["w"].value, u, atol=1e-5)
    mine = torch.cat([p.detach().flatten() for p in network.parameters()])
    assert torch.allclose(theta(made), mine, atol=1e-5)


@pytest.mark.parametrize("minibatches", ["uniform", "importance"])
@pytest.mark.parametrize("model", [joint, normalised])
def test_running_total_of_w_stays_exact(model, minibatches):
    train, meta = logistic_data()
    made = kernel(
        bind(model, parts()),
        train,
        meta,
        step_size={"theta": 0.01, "w": 0.5},
        train_batch=6,
        minibatches=minibatches,
    )
    for _ in range(300):
        made.step()
    total = made.latents.sums["total_weight"].total
    assert float(total) == pytest.approx(float(made.site_values().sum()), abs=1e-4)


def test_plate_sum_of_a_settled_weight_network_is_exact():
    train, meta = logistic_data()
    made = kernel(
        bind(joint, parts(WeightNetwork(2))),
        train,
        meta,
        train_batch=5,
        temperature=0.0,
        step_size={"theta": 1e-9, "phi": 1e-9},
    )
    with torch.no_grad():
        made.latents.networks["phi"].parameters[0].normal_(generator=generator(6))
    for _ in range(40):
        made.step()
    total = made.latents.sums["total_weight"].total
    assert float(total) == pytest.approx(float(made.site_values().sum()), abs=1e-3)


def test_normalised_drift_on_w_is_the_gain_over_the_companion():
    train, meta = logistic_data()
    program = bind(partial(normalised, auxiliary="persistent"), parts(scale=1e6))
    made = kernel(program, train, meta, train_batch=20, temperature={"w": 0.0})
    companion = made.latents.networks["auxiliary"]
    with torch.no_grad():
        for p in companion.parameters:
            p.add_(0.5)
    made.latents.zero_grad()
    made.latents.potential(train.full(), meta.full()).backward()
    table, w = made.latents.tables["w"], made.site_values()
    own, other = (
        cross_entropy(n.module(train.input), train.target).detach()
        for n in (made.latents.networks["theta"], companion)
    )
    assert torch.allclose(table.rows.grad, (own - other) * w * (1 - w), atol=1e-5)
    meta_free = (w * cross_entropy(companion.module(train.input), train.target)).sum()
    wanted = torch.autograd.grad(meta_free, companion.parameters)
    for found, expected, p in zip(companion.gradients(), wanted, companion.parameters, strict=True):
        assert torch.allclose(found, expected + p.detach(), atol=1e-5)


@pytest.mark.parametrize("every", [1, 3])
def test_companion_restarts_from_theta(every):
    train, meta = logistic_data()
    model = partial(normalised, auxiliary="restarted", window=every)
    made = kernel(bind(model, parts()), train, meta)
    latents = made.latents
    first, other = (latents.networks[n].parameters for n in ("theta", "auxiliary"))
    with torch.no_grad():
        other[0].add_(1.0)
    before = other[0].detach().clone()
    if every > 1:
        latents.finish_step(every + 1)
        assert torch.equal(other[0], before)
    latents.finish_step(every)
    assert torch.equal(other[0], first[0])


def test_a_user_written_program_runs_unchanged():
    """Plain Pyro: a global latent, a local latent per point, no helper but the two batches."""

    def program(train, meta):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        network = sample_network("theta", module, NormalPrior())
        with pyro.plate("train", train.size, subsample=train.index):
            trust = pyro.sample("trust", dist.Beta(0.5, 0.5))
            loss = cross_entropy(network(train.input) * scale, train.target)
            pyro.factor("train_loss", -trust * loss)
        with pyro.plate("meta", meta.size, subsample=meta.index):
            pyro.sample("y", dist.Categorical(logits=network(meta.input) * scale), obs=meta.target)

    train, meta = logistic_data()
    module = nn.Linear(2, 2)
    made = kernel(program, train, meta, train_batch=5)
    before = made.site_values("trust").clone()
    for _ in range(30):
        made.step()
    after = made.site_values("trust")
    assert after.shape == (20,) and ((after > 0) & (after < 1)).all()
    assert (after != before).all()
    assert made.latents.globals["scale"].value != 0
    assert set(made.latents.groups()) == {"theta", "scale", "trust"}


def test_runs_in_plain_pyro_mcmc():
    train, meta = logistic_data()
    made = SGLD(
        bind(joint, parts()), step_size=0.01, generator=generator(), train_batch=5, thinning=3
    )
    run = MCMC(made, num_samples=20, warmup_steps=10, disable_progbar=True)
    run.run(train, meta)
    samples = run.get_samples()
    assert samples["w"].shape == (20, 20)
    assert ((samples["w"] > 0) & (samples["w"] < 1)).all()
    assert samples["theta.weight"].shape == (20, 2, 2)
    assert samples["w"].std(0).min() > 0
    assert made.steps == 30 * 3


@pytest.mark.parametrize("minibatches", ["uniform", "importance"])
@pytest.mark.parametrize("model", [joint, normalised])
def test_restored_state_continues_bit_identically(model, minibatches):
    train, meta = logistic_data()
    options = {
        "step_size": {"theta": 0.01, "w": 0.1},
        "train_batch": 6,
        "meta_batch": 4,
        "minibatches": minibatches,
    }
    straight = kernel(bind(model, parts()), train, meta, **options)
    for _ in range(37):
        straight.step()
    state = straight.state_dict()
    for _ in range(40):
        straight.step()
    again = kernel(
        bind(model, parts(seed=9)),
        train,
        meta,
        **options,
    )
    again.load_state_dict(state)
    for _ in range(40):
        again.step()
    assert torch.equal(theta(again), theta(straight))
    assert torch.equal(again.site_values(), straight.site_values())


def test_state_of_another_program_is_refused():
    train, meta = logistic_data()
    first = kernel(bind(joint, parts()), train, meta)
    other = kernel(bind(normalised, parts()), train, meta)
    with pytest.raises(InputError, match="another program"):
        other.load_state_dict(first.state_dict())


def test_paper_mode_has_fixed_noise_and_no_jacobian():
    train, meta = logistic_data()
    still = {"theta": 1e-12, "w": 1e-12}
    made = kernel(bind(joint, parts()), train, meta, step_size=still, mode="paper")
    before = theta(made)
    made.step()
    assert (theta(made) - before).abs().max() == pytest.approx(1e-5, rel=3)
    assert made.latents.temperature == {"theta": 0.0, "w": 0.0}


def test_clip_bounds_the_move_of_a_group():
    train, meta = logistic_data()
    made = kernel(
        bind(joint, parts()),
        train,
        meta,
        step_size={"theta": 2.0, "w": 3.0},
        mode="paper",
        clip={"theta": 0.1, "w": 0.01},
    )
    before, rows = theta(made), made.latents.tables["w"].value.clone()
    made.step()
    assert (theta(made) - before).norm() == pytest.approx(0.1, rel=0.01)
    assert (made.latents.tables["w"].value - rows).abs().max() == pytest.approx(0.01, rel=0.01)
    assert made.diagnostics()["clipped"]["theta"] == 1.0


def test_divergence_is_named_with_steps_to_try():
    train, meta = logistic_data()
    program = bind(joint, parts())
    growing = {"theta": lambda step: 1e12 if step else 0.1, "w": 0.1}
    made = kernel(program, train, meta, step_size=growing)
    with pytest.raises(Diverged, match=r"theta=1e\+12.*Try smaller ones: theta=2.5e\+11"):
        for _ in range(100):
            made.step()
            made.check_finite()


def test_parameters_that_are_not_finite_are_divergence_before_the_potential_shows_it():
    train, meta = logistic_data()
    made = kernel(bind(joint, parts()), train, meta)
    made.step()
    made.check_finite()
    with torch.no_grad():
        made.latents.networks["theta"].parameters[0].view(-1)[0] = float("inf")
    with pytest.raises(Diverged, match="the chain diverged"):
        made.check_finite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be a finite number >= 0, got -1"),
        ({"temperature": {"v": 1.0}}, "temperature names groups .'v'."),
        ({"mode": "fast"}, "mode must be 'calibrated' or 'paper', got 'fast'"),
        ({"clip": 0.0}, "clip must be a positive number, or None for none, got 0.0"),
        ({"minibatches": "all"}, "minibatches must be"),
        ({"bucket": 0}, "bucket must be at least 1 batch, got 0"),
        ({"thinning": 0}, "thinning must be at least 1"),
        (
            {"train_batch": 21},
            "train_batch must be from 1 to the size of the train set, 20, got 21",
        ),
        ({"meta_batch": 11}, "meta_batch must be from 1 to the size of the meta set, 10, got 11"),
        ({"step_size": {"theta": 0.1}}, "no entry for group 'w'"),
        ({"step_size": {"theta": 0.1, "w": 0.1, "v": 1.0}}, "groups .'v'. that the program"),
        ({"step_size": -0.1}, "must be a positive number, got -0.1"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    train, meta = logistic_data()
    with pytest.raises(InputError, match=message):
        kernel(bind(joint, parts()), train, meta, **options)


def test_a_network_with_nothing_to_sample_is_refused():
    train, meta = logistic_data()
    given = parts()
    given.network.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter with requires_grad=True"):
        kernel(bind(joint, given), train, meta)


def test_discrete_latents_are_refused():
    def program(train, meta):
        pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.raises(InputError, match="'k' is discrete"):
        kernel(program, *logistic_data())
