import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.latents import Latents
from bads_ppl.losses import cross_entropy
from bads_ppl.preconditioned import PreconditionedSGLD
from bads_ppl.primitives import plate_sum, release_graph, sample_network
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Impact, Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.sites import NetworkSite, evaluation_mode, first_occurrence, zero_mean_scale
from bads_ppl.tracing import Evaluate
from bads_ppl.weights import FixedWeights, InstanceWeights, WeightNetwork
from models import joint, normalised


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_sets(size: int = 12) -> tuple[Data, Data]:
    g = generator(1)
    x, mx = torch.randn(size, 2, generator=g), torch.randn(6, 2, generator=g)
    return Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 0] > 0).long(), name="meta")


def kernel(program, train, meta, **options) -> SGLD:
    made = SGLD(program, **{"step_size": 0.02, "generator": generator(), **options})
    made.setup(0, train, meta)
    return made


def find(program) -> Latents:
    train, meta = two_sets()
    return Latents.find(program, train.full(), meta.full())


def normed(dropped: float = 0.5) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(dropped), nn.Linear(4, 2))


# local latents


def one_local_latent(prior, **infer):
    """A program with one latent per train point, at site "z"."""

    def program(train, meta):
        with train.plate("train"):
            pyro.sample("z", prior, infer=infer)

    return program


def test_a_bounded_local_latent_has_a_row_per_point_within_its_bounds():
    train, meta = two_sets()
    made = kernel(one_local_latent(dist.Uniform(2.0, 5.0)), train, meta, train_batch=4)
    table = made.latents.tables["z"]
    assert table.value.shape == (12,) and table.plate == "train"
    assert torch.allclose(table.values(), torch.full((12,), 3.5))  # the middle, where none is given
    table.value.copy_(torch.linspace(-50, 50, 12))
    assert table.values().min() >= 2 and table.values().max() <= 5
    made.step()
    assert (table.value != torch.linspace(-50, 50, 12)).sum() == 4  # the batch's rows, no other


@pytest.mark.parametrize("minibatches", ["uniform", "importance"])
def test_a_uniform_latent_is_sampled_uniformly(minibatches):
    def program(train, meta):
        with train.plate("train"):
            pyro.sample("w", dist.Uniform(2.0, 5.0))

    train, meta = two_sets()
    made = kernel(program, train, meta, step_size=0.5, train_batch=6, minibatches=minibatches)
    draws = []
    for _ in range(4000):
        made.step()
        draws.append(made.site_values("w").clone())
    values = torch.stack(draws)
    assert float(values.mean()) == pytest.approx(3.5, abs=0.1)
    assert float(values.std()) == pytest.approx(3 / 12**0.5, rel=0.07)


def test_a_local_latent_starts_where_its_site_says():
    table = find(one_local_latent(dist.Beta(2.0, 3.0), initial=0.2)).tables["z"]
    assert torch.allclose(table.values(), torch.full((12,), 0.2))


def test_local_latents_may_have_event_dimensions():
    prior = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
    train, meta = two_sets()
    made = kernel(one_local_latent(prior), train, meta, train_batch=5)
    assert made.latents.tables["z"].value.shape == (12, 3)
    made.step()
    assert (made.latents.tables["z"].value != 0).all(1).sum() == 5


def test_the_density_on_the_real_line_has_the_jacobian_times_the_temperature():
    train, meta = two_sets()
    latents = find(one_local_latent(dist.Beta(2.0, 3.0), initial=0.3))
    value = torch.full((12,), 0.3)
    prior = dist.Beta(2.0, 3.0).log_prob(value).sum()
    jacobian = (value * (1 - value)).log().sum()
    for temperature in (1.0, 0.5, 0.0):
        latents.temperature = {"z": temperature}
        found = -latents.potential(train.full(), meta.full())
        assert torch.allclose(found, prior + temperature * jacobian, rtol=1e-5)


def test_a_latent_per_meta_point_takes_the_step_of_its_own_conditional():
    """Its plate scales by N_m / B_m, which is not the train plate's factor."""

    def program(train, meta):
        with train.plate("train"):
            pyro.sample("w", dist.Beta(2.0, 2.0))
        with meta.plate("meta"):
            pyro.sample("z", dist.Normal(4.0, 1.0))

    train, meta = two_sets()
    made = kernel(
        program,
        train,
        meta,
        train_batch=4,
        meta_batch=3,
        step_size=0.1,
        temperature=0.0,
        minibatches="importance",
    )
    made.step()
    table = made.latents.tables["z"]
    wanted = torch.zeros(6)
    wanted[table.index] = 0.1 / 2 * 4.0
    assert torch.allclose(table.value, wanted)


def test_a_row_that_occurs_twice_moves_once_and_totals_stay_exact():
    def program(train, meta):
        plate = train.plate("train")
        with plate:
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
        pyro.factor("total", plate_sum("sum", z, train))

    train, meta = two_sets()
    latents = Latents.find(program, train.full(), meta.full())
    batch = train.batch(torch.tensor([7, 2, 7]))
    latents.potential(batch, meta.full())
    index = latents.tables["z"].index
    latents.move_rows("z", torch.tensor([1.0, 2.0, 3.0]), first_occurrence(index))
    table = latents.tables["z"]
    assert table.value[7] == 1.0 and table.value[2] == 2.0
    assert (table.value != 0).sum() == 2
    assert torch.allclose(latents.sums["sum"].total.float(), table.values().sum())


def test_masked_terms_are_left_out():
    keep = torch.arange(12) < 5

    def program(train, meta):
        with train.plate("train"), poutine.mask(mask=keep[train.index]):
            pyro.sample("z", dist.Normal(3.0, 1.0))

    train, meta = two_sets()
    made = kernel(program, train, meta, temperature=0.0, train_batch=12)
    made.step()
    assert torch.equal(made.latents.tables["z"].value != 0, keep)


# global latents


def test_a_global_latent_is_kept_on_the_real_line():
    def program(train, meta):
        pyro.sample("scale", dist.LogNormal(1.0, 0.5), infer={"initial": 3.0})

    train, meta = two_sets()
    made = kernel(program, train, meta)
    site = made.latents.globals["scale"]
    assert float(site.transform(site.value.detach())) == pytest.approx(3.0)
    made.latents.backward(train.full(), meta.full())
    # on the log scale a LogNormal is a Normal: score (u - 1) / 0.5^2
    assert float(site.value.grad) == pytest.approx((torch.log(torch.tensor(3.0)) - 1) / 0.25)


def test_a_global_latent_has_its_prior_as_posterior_where_nothing_is_observed():
    def program(train, meta):
        pyro.sample("scale", dist.LogNormal(1.0, 0.5))

    train, meta = two_sets()
    made = kernel(program, train, meta, step_size=0.1)
    draws = []
    for step in range(4000):
        made.step()
        if step > 100:
            draws.append(made.latents.globals["scale"].value.detach().clone())
    values = torch.stack(draws)
    assert float(values.mean()) == pytest.approx(1.0, abs=0.1)
    assert float(values.std()) == pytest.approx(0.5, abs=0.06)


# networks


def laplace(name, parameter):
    return dist.Laplace(torch.zeros_like(parameter), 0.5).to_event()


def shifted(name, parameter):
    return dist.Normal(torch.full_like(parameter, 0.7), 2.0).to_event()


@pytest.mark.parametrize(
    ("prior", "score"),
    [
        (laplace, lambda name, p: p.sign() / 0.5),
        (shifted, lambda name, p: (p - 0.7) / 4),
        (NormalPrior(2.0), lambda name, p: p / 4),
        (
            NormalPrior(2.0, {"bias": 0.5}),
            lambda name, p: p / (0.25 if name == "bias" else 4.0),
        ),
    ],
)
def test_gradient_of_any_prior_is_the_analytic_one(prior, score):
    train, meta = two_sets()
    network = nn.Linear(2, 2)
    made = kernel(
        bind(joint, Parts(network, FixedWeights(torch.ones(12)), prior=prior)), train, meta
    )
    made.latents.backward(train.full(), meta.full())
    energy = cross_entropy(network(train.input), train.target).sum()
    energy = energy + cross_entropy(network(meta.input), meta.target).sum()
    wanted = torch.autograd.grad(energy, list(network.parameters()))
    found = made.latents.networks["theta"].gradients()
    for (name, p), gradient, data in zip(network.named_parameters(), found, wanted, strict=True):
        assert torch.allclose(gradient, data + score(name, p.detach()), atol=1e-5)


@pytest.mark.parametrize("prior", [laplace, shifted, NormalPrior(2.0)])
def test_joint_potential_counts_each_prior_once(prior):
    train, meta = two_sets()
    network = nn.Linear(2, 2)
    parts = Parts(network, FixedWeights(torch.ones(12)), prior=prior)
    latents = Latents.find(bind(joint, parts), train.full(), meta.full())
    energy = cross_entropy(network(train.input), train.target).sum()
    energy = energy + cross_entropy(network(meta.input), meta.target).sum()
    for name, parameter in network.named_parameters():
        energy = energy - prior(name, parameter).log_prob(parameter)
    assert torch.allclose(latents.joint_potential(train.full(), meta.full()), energy, rtol=1e-5)


def test_only_a_zero_mean_gaussian_of_one_scale_has_a_closed_form_score():
    assert zero_mean_scale(dist.Normal(torch.zeros(3), 2.0).to_event(1)) == 2.0
    assert zero_mean_scale(dist.Normal(torch.tensor([0.0, 1.0]), 2.0)) is None
    assert zero_mean_scale(dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0]))) is None
    assert zero_mean_scale(dist.Laplace(torch.zeros(2), 1.0)) is None


def test_frozen_parameters_stay_and_are_no_part_of_the_state():
    train, meta = two_sets()
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    network[0].requires_grad_(False)
    before = network[0].weight.clone()
    parts = Parts(network, InstanceWeights(), SparsityPrior(0.5))
    made = kernel(bind(joint, parts), train, meta)
    made.step()
    assert torch.equal(network[0].weight, before)
    assert made.latents.networks["theta"].names == ["1.weight", "1.bias"]
    assert not any("0.weight" in name for name in made.state_dict())


@pytest.mark.parametrize("auxiliary", ["persistent", "restarted", "reverted"])
def test_running_statistics_of_networks_are_restored(auxiliary):
    train, meta = two_sets()

    def program(network):
        parts = Parts(network, InstanceWeights(), SparsityPrior(0.5))
        return bind(lambda t, m, parts: normalised(t, m, parts, auxiliary=auxiliary), parts)

    network, other = normed(0.0), normed(0.0)
    first = kernel(program(network), train, meta, train_batch=6)
    for _ in range(5):
        first.step()
    again = kernel(program(other), train, meta, train_batch=6)
    again.load_state_dict(first.state_dict())
    assert torch.equal(other[1].running_mean, network[1].running_mean)
    first.step()
    again.step()
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_reverted_companion_has_the_running_statistics_of_its_network():
    train, meta = two_sets()
    parts = Parts(normed(dropped=0.0), InstanceWeights(), SparsityPrior(0.5))
    made = kernel(bind(normalised, parts), train, meta)
    made.step()
    assert torch.equal(parts.auxiliary[1].running_mean, parts.network[1].running_mean)


@pytest.mark.parametrize("auxiliary", ["persistent", "restarted", "reverted"])
def test_a_network_that_drops_units_has_no_companion(auxiliary):
    """Two passes that drop different units differ by that, and not by what the meta set did."""
    parts = Parts(normed(), InstanceWeights(), SparsityPrior(0.5))
    program = bind(lambda t, m, parts: normalised(t, m, parts, auxiliary=auxiliary), parts)
    with pytest.raises(InputError, match=r"dropout layers would differ .*set p=0 .*model=joint"):
        find(program)
    parts.network.eval(), parts.auxiliary.eval()
    assert set(find(program).networks) == {"theta", "auxiliary"}
    find(bind(joint, Parts(normed(), InstanceWeights(), SparsityPrior(0.5))))


@pytest.mark.parametrize("auxiliary", ["persistent", "restarted"])
def test_a_companion_with_equal_parameters_sees_equal_losses(auxiliary):
    """Batch normalisation makes a row's loss depend on the rows beside it."""
    train, meta = two_sets()
    parts = Parts(normed(0.0), InstanceWeights(), SparsityPrior(0.5))
    latents = find(bind(lambda t, m, parts: normalised(t, m, parts, auxiliary=auxiliary), parts))
    latents.potential(train.full(), meta.full())
    mine, theirs = latents.terms["train_loss"], latents.terms["auxiliary_loss"]
    torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        parts.auxiliary[3].weight.mul_(2)
    latents.potential(train.full(), meta.full())
    assert not torch.allclose(latents.terms["auxiliary_loss"], theirs, atol=1e-2)


def laplace(name, parameter):
    return dist.Laplace(torch.zeros_like(parameter), 0.5).to_event()


@pytest.mark.parametrize("auxiliary", [None, "persistent", "restarted", "reverted"])
@pytest.mark.parametrize("importance", [None, torch.linspace(0.5, 2, 6)])
@pytest.mark.parametrize("prior", [NormalPrior(0.5), laplace])
def test_gradients_without_the_sum_are_those_of_the_potential(prior, importance, auxiliary):
    train, meta = two_sets()
    options = {} if auxiliary is None else {"auxiliary": auxiliary}
    model = joint if auxiliary is None else normalised
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    sparsity, impact = SparsityPrior(0.3, scale=2.0), Impact(2, 3)
    parts = Parts(network, InstanceWeights(0.3), sparsity, prior=prior, impact=impact)
    latents = find(bind(lambda t, m, parts: model(t, m, parts, **options), parts))
    batch, others = train.batch(torch.arange(6), importance), meta.full()
    leaves = list(network.parameters())
    if auxiliary in ("persistent", "restarted"):
        leaves += parts.auxiliary.parameters()

    def found():
        return [leaf.grad.clone() for leaf in [*leaves, latents.tables["w"].rows]]

    potential = latents.potential(batch, others)
    potential.backward()
    expected = found()
    latents.backward(batch, others)
    for mine, other in zip(found(), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(latents.told.potential(), potential.detach())


class Bytes:
    """Counts what backward passes have kept for them, and the most there was at a time."""

    def __init__(self):
        self.now = self.most = 0

    def hooks(self):
        def keep(tensor):
            return Kept(self, tensor)

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor)


class Kept:
    def __init__(self, count, tensor):
        self.count, self.tensor, self.size = count, tensor, tensor.nbytes
        count.now += self.size
        count.most = max(count.most, count.now)

    def __del__(self):
        self.count.now -= self.size


@pytest.mark.parametrize("weights", ["instance", "network"])
def test_what_two_chains_keep_for_their_backward_passes_is_not_held_at_once(weights):
    """As much as `joint` keeps, and not two thirds more for the companion's 120 of 180 rows."""
    g = generator()
    train, meta = (
        Data(torch.randn(size, 2, generator=g), torch.zeros(size).long(), name=name)
        for size, name in ((120, "train"), (60, "meta"))
    )

    def most(model):
        layers = [nn.Linear(2, 8), *(nn.Tanh() for _ in range(40)), nn.Linear(8, 2)]
        network = nn.Sequential(*layers)  # many activations and few parameters
        source = InstanceWeights(0.3) if weights == "instance" else WeightNetwork(8)
        program = bind(model, Parts(network, source, SparsityPrior(0.3)))
        latents = Latents.find(program, train.full(), meta.full())
        count = Bytes()
        with count.hooks():
            latents.backward(train.full(), meta.full())
        return count.most

    restarted = most(lambda t, m, parts: normalised(t, m, parts, auxiliary="restarted"))
    assert restarted < 1.1 * most(joint)


@pytest.mark.parametrize(
    "weights, options",
    [
        ("instance", {}),
        ("instance", {"local_steps": 2}),
        ("instance", {"minibatches": "importance"}),
        ("network", {}),
    ],
)
def test_steps_that_release_a_graph_are_those_that_keep_it(weights, options, monkeypatch):
    train, meta = two_sets()

    def state():
        network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        with torch.no_grad():
            for number, p in enumerate(network.parameters()):
                p.copy_(torch.linspace(-1, 1 + number, p.numel()).view_as(p))
        source = InstanceWeights(0.3) if weights == "instance" else WeightNetwork(3)
        parts = Parts(network, source, SparsityPrior(0.3))
        program = bind(lambda t, m, parts: normalised(t, m, parts, auxiliary="restarted"), parts)
        made = kernel(program, train, meta, train_batch=6, meta_batch=4, **options)
        for _ in range(25):
            made.step()
        return made.state_dict()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        released = state()
    monkeypatch.setattr(Evaluate, "_pyro_release_graph", lambda self, msg: None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kept = state()
    for name, value in kept.items():
        torch.testing.assert_close(released[name], value, rtol=1e-6, atol=1e-6)


def test_densities_of_latents_are_differentiated_at_the_end():
    """What follows may use a latent whose density was stated before a graph was released."""

    def program(train, meta):
        with train.plate("train"):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()), torch.ones(())))
            pyro.factor("before", -(z.detach() ** 2))
        release_graph("before")
        with train.plate("train"):
            pyro.factor("after", -(z**2))

    latents = find(program)
    train, meta = two_sets()
    latents.potential(train.full(), meta.full()).backward()
    expected = latents.tables["z"].rows.grad.clone()
    latents.backward(train.full(), meta.full())
    assert torch.equal(latents.tables["z"].rows.grad, expected) and (expected > 1).all()


def lets_go(train, meta, *, released, use=lambda loss: loss):
    """States three factors of one network's loss, and after each one releases those listed."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    network = sample_network("theta", module, NormalPrior())
    loss = cross_entropy(network(train.input), train.target)
    for name, names in zip(("first", "second", "third"), released, strict=True):
        with train.plate("train"):
            pyro.factor(name, -(loss if name == "first" else use(loss)))
        if names:
            release_graph(*names)


@pytest.mark.parametrize(
    "released, refused",
    [
        ((["first"], [], []), r"\['second', 'third'\] is .* one among \['first'\]"),
        ((["first"], ["second"], []), r"\['second'\] is .* one among \['first'\]"),
        (([], ["first", "second"], []), r"\['third'\] is .* one among \['first', 'second'\]"),
    ],
)
def test_a_program_that_uses_what_it_released_is_refused(released, refused):
    train, meta = two_sets()
    made = kernel(lambda t, m: lets_go(t, m, released=released), train, meta)
    with pytest.raises(InputError, match=refused + r", whose graph .*: detach\(\) what they share"):
        made.step()
    kernel(lambda t, m: lets_go(t, m, released=released, use=Tensor.detach), train, meta).step()
    all_at_once = ([], [], ["first", "second", "third"])
    kernel(lambda t, m: lets_go(t, m, released=all_at_once), train, meta).step()


def test_releasing_what_was_not_stated_is_refused():
    train, meta = two_sets()
    made = kernel(lambda t, m: lets_go(t, m, released=(["frist"], [], [])), train, meta)
    with pytest.raises(InputError, match=r"names \['frist'\], .* those are \['first'\]"):
        made.step()


def test_a_graph_that_the_program_itself_kept_is_no_matter_of_releases():
    kept = []

    def program(train, meta):
        network = sample_network("theta", nn.Linear(2, 2), NormalPrior())
        kept.append(cross_entropy(network(train.input), train.target))
        with train.plate("train"):
            pyro.factor("loss", -kept[0])

    with pytest.raises(RuntimeError, match="a second time"):
        made = kernel(program, *two_sets())
        kept.clear()
        made.step(), made.step()


def test_factors_of_the_weights_do_not_hinder_a_release():
    class Spread(InstanceWeights):
        def sample(self, train, plate, features=None):
            w = super().sample(train, plate, features)
            with plate:
                pyro.factor("spread", w * (1 - w))
            return w

    train, meta = two_sets()
    parts = Parts(nn.Linear(2, 2), Spread(0.3), SparsityPrior(0.3))
    program = bind(lambda t, m, parts: normalised(t, m, parts, auxiliary="restarted"), parts)
    kernel(program, train, meta).step()


def test_a_state_is_a_copy_and_that_of_another_kind_of_device_is_refused():
    train, meta = two_sets()
    parts = Parts(nn.Linear(2, 2), InstanceWeights(), SparsityPrior(0.5))
    made = PreconditionedSGLD(bind(joint, parts), step_size=0.02, clip=1e-3, generator=generator())
    made.setup(1, train, meta)
    made.step()
    state = made.state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    made.step()
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert any(not torch.equal(made.state_dict()[name], value) for name, value in kept.items())
    before = made.state_dict()
    of_cuda = torch.zeros(16, dtype=torch.uint8)  # as large as such states are
    with pytest.raises(InputError, match=r"another kind of device.*\(16 bytes of .*resume on that"):
        made.load_state_dict({**state, "generator": of_cuda})
    assert all(torch.equal(made.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("model", [joint, normalised])
def test_looking_at_a_chain_does_not_change_it(model):
    """Values and potentials are taken in eval mode: no statistics move, no dropout."""
    train, meta = two_sets()
    network = normed(0.5 if model is joint else 0.0)
    parts = Parts(network, WeightNetwork(4), SparsityPrior(0.5, scale=2.0))
    made = kernel(bind(model, parts), train, meta)
    for _ in range(3):
        made.step()
    before, noise = made.state_dict(), torch.get_rng_state()
    w = made.site_values(chunk=5)
    torch.testing.assert_close(made.site_values(chunk=12), w)  # equal but for rounding
    rows = torch.tensor([7, 0, 7, 3])
    torch.testing.assert_close(made.site_values(chunk=3, rows=rows), w[rows])
    made.latents.joint_potential(train.full(), meta.full())
    assert all(torch.equal(made.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), noise)
    assert network.training and network[1].training


def test_evaluation_mode_restores_every_part_as_it_was():
    network = normed()
    network[1].eval()
    with evaluation_mode(network):
        assert not any(part.training for part in network.modules())
    assert network.training and network[2].training and not network[1].training
    with pytest.raises(ValueError, match="here"), evaluation_mode(network):
        raise ValueError("here")
    assert network.training and not network[1].training


# groups, state, refusals


def test_groups_are_networks_and_latents_and_name_what_companions_follow():
    parts = Parts(nn.Linear(2, 2), InstanceWeights(), SparsityPrior(0.5))

    def groups(auxiliary):
        model = bind(lambda t, m, parts: normalised(t, m, parts, auxiliary=auxiliary), parts)
        return find(model).groups()

    assert groups("persistent") == {"theta": None, "auxiliary": "theta", "w": None}
    assert groups("reverted") == {"theta": None, "w": None}  # moves with theta
    network = Parts(nn.Linear(2, 2), WeightNetwork(2), SparsityPrior(0.5))
    assert find(bind(joint, network)).groups() == {"theta": None, "phi": None}


def test_state_of_another_shape_is_refused_by_name():
    first, other = (
        find(bind(joint, Parts(nn.Linear(2, classes), InstanceWeights()))) for classes in (2, 3)
    )
    with pytest.raises(InputError, match=r"network/theta/weight has shape \(3, 2\)"):
        first.load_state_dict(other.state_dict())


def test_a_program_without_latents_is_refused():
    with pytest.raises(InputError, match="no latent site"):
        find(lambda train, meta: pyro.factor("f", torch.tensor(1.0)))


def test_values_of_a_site_that_is_not_there_are_refused():
    train, meta = two_sets()
    made = kernel(bind(joint, Parts(nn.Linear(2, 2), InstanceWeights())), train, meta)
    with pytest.raises(InputError, match="no site 'v'"):
        made.site_values("v")


def test_user_networks_beside_theta_are_networks_too():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)

    def program(train, meta):
        a = sample_network("theta", first, NormalPrior())
        b = sample_network("gate", second, NormalPrior())
        with meta.plate("meta"):
            logits = a(meta.input) * b(meta.input)
            pyro.sample("y", dist.Categorical(logits=logits), obs=meta.target)

    train, meta = two_sets()
    made = kernel(program, train, meta, step_size={"theta": 0.1, "gate": 0.2})
    before = second.weight.detach().clone()
    made.step()
    assert set(made.latents.groups()) == {"theta", "gate"}
    assert not torch.equal(second.weight, before)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_logits_stay_where_a_weight_is_neither_0_nor_1(logit):
    train, meta = two_sets()
    parts = Parts(nn.Linear(2, 2), InstanceWeights(), SparsityPrior(0.5, scale=3.0))
    made = kernel(bind(joint, parts), train, meta)
    made.step()
    table = made.latents.tables["w"]
    made.latents.potential(train.full(), meta.full())
    made.latents.move_rows("w", torch.full_like(table.rows, logit))
    w = made.site_values("w")
    assert ((w > 0) & (w < 1)).all()
    assert torch.log(w).isfinite().all()
    assert torch.log1p(-w).isfinite().all()
    assert float(made.latents.total("w")) == pytest.approx(float(w.double().sum()), rel=1e-6)


@pytest.mark.parametrize(
    "prior", [NormalPrior(0.3), NormalPrior(0.3, {"0.weight": 2.0})], ids=["alike", "apart"]
)
def test_the_log_prior_of_all_parameters_at_once_is_that_of_each(prior):
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3).double())
    site = NetworkSite("theta", module, prior, None)
    assert site.decay is not None
    each = [q.log_prob(p).double() for q, p in zip(site.priors, site.parameters, strict=True)]
    found = site.log_prior()
    torch.testing.assert_close(found.double(), sum(each), rtol=1e-6, atol=1e-4)
    found.backward()
    for parameter, scale in zip(module.parameters(), site.decay, strict=True):
        torch.testing.assert_close(parameter.grad, -scale * parameter.detach())
