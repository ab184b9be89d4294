from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.losses import cross_entropy
from bads_ppl.primitives import (
    Restart,
    Revert,
    plate_sum,
    running_mean,
    sample_network,
    steps_taken,
)
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Impact, Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.tracing import _PlateTotal
from bads_ppl.weights import FixedWeights, InstanceWeights
from models import normalised


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_sets(size: int = 12) -> tuple[Data, Data]:
    g = generator(1)
    x, mx = torch.randn(size, 2, generator=g), torch.randn(6, 2, generator=g)
    return Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 1] > 0).long(), name="meta")


def kernel(program, train, meta, **options) -> SGLD:
    made = SGLD(
        program, **{"step_size": 0.02, "generator": generator(), "temperature": 0.0, **options}
    )
    made.setup(0, train, meta)
    return made


# the plain meaning, under any Pyro handler


def test_a_network_has_one_site_per_trainable_parameter():
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    module[0].bias.requires_grad_(False)
    trace = poutine.trace(sample_network).get_trace("theta", module, NormalPrior(2.0))
    sites = {name for name, node in trace.nodes.items() if node["type"] == "sample"}
    assert sites == {"theta.0.weight", "theta.2.weight", "theta.2.bias"}
    node = trace.nodes["theta.2.weight"]
    assert node["value"].shape == (1, 3) and node["fn"].event_shape == (1, 3)


def test_the_network_computes_with_sampled_values_and_keeps_its_own():
    module = nn.Linear(2, 1)
    own = {name: p.detach().clone() for name, p in module.named_parameters()}
    given = {"theta.weight": torch.tensor([[1.0, 2.0]]), "theta.bias": torch.tensor([3.0])}
    network = poutine.condition(sample_network, given)("theta", module, NormalPrior())
    assert float(network(torch.tensor([[10.0, 100.0]]))) == 213.0
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, own[name])


def test_gradients_reach_the_sampled_values():
    module = nn.Linear(2, 1)
    weight = torch.ones(1, 2, requires_grad=True)
    network = poutine.condition(sample_network, {"theta.weight": weight})(
        "theta", module, NormalPrior()
    )
    network(torch.tensor([[4.0, 5.0]])).sum().backward()
    assert weight.grad.tolist() == [[4.0, 5.0]] and module.weight.grad is None


def test_plate_sum_is_exact_on_all_data_and_scaled_on_a_batch():
    train, _ = two_sets(12)
    value = torch.rand(12, generator=generator(2))
    assert torch.allclose(plate_sum("total", value, train.full()), value.sum())
    rows = torch.tensor([3, 5, 8])
    found = plate_sum("total", value[rows], train.batch(rows))
    assert torch.allclose(found, value[rows].sum() * 4)


def test_running_mean_is_the_value_itself_without_its_graph():
    value = torch.tensor(3.0, requires_grad=True)
    found = running_mean("mean", value * 2, window=5)
    assert float(found) == 6.0 and not found.requires_grad


@pytest.mark.parametrize("make", [partial(Restart, "theta"), partial(Revert, "theta", "meta")])
def test_companions_must_look_back_one_step_at_least(make):
    with pytest.raises(InputError, match=r"1 .*step.*, got 0"):
        make(0)


# under SGLD, which keeps state over the steps


def test_steps_are_those_of_the_kernel_and_none_without_one():
    seen: list[int] = []

    def program(train, meta):
        network = sample_network("theta", module, NormalPrior())
        seen.append(steps_taken())
        pyro.factor("loss", -(network(torch.ones(1, 2)) ** 2).sum())

    module = nn.Linear(2, 1)
    poutine.trace(program).get_trace(None, None)
    made = kernel(program, *two_sets(), clip=1.0)
    seen.clear()
    made.step(), made.step(), made.step()
    assert seen == [0, 1, 2]
    again = kernel(program, *two_sets(), clip=1.0)
    again.load_state_dict(made.state_dict())
    seen.clear()
    again.step()
    assert seen == [3]
    assert poutine.trace(steps_taken).get_trace().nodes["_RETURN"]["value"] == 0


@pytest.mark.parametrize("kind", ["simple", "exponential"])
def test_running_mean_under_sgld_is_of_the_steps_before(kind):
    seen, given = [], []

    def program(train, meta):
        sample_network("theta", module, NormalPrior())
        value = torch.tensor(float(len(given)) ** 2)
        given.append(float(value))
        seen.append(float(running_mean("mean", value, window=4, kind=kind)))

    module = nn.Linear(1, 1)
    train, meta = two_sets()
    made = kernel(program, train, meta)
    seen.clear()
    given.clear()

    def step():
        made.latents.prepare_step()
        made.latents._evaluate(train.full(), meta.full())
        made.latents.count_step(made.latents.commit_means())

    for _ in range(9):
        step()
    wanted, average = [given[0]], None
    for k in range(1, 9):
        if kind == "simple":
            average = sum(given[max(0, k - 4) : k]) / min(k, 4)
        else:
            share = max(1 / 4, 1 / k)
            average = given[0] if average is None else average + share * (given[k - 1] - average)
        wanted.append(average)
    assert seen == pytest.approx(wanted)


def test_an_evaluation_that_is_no_step_leaves_statistics_as_they_are():
    train, meta = two_sets()
    program = bind(normalised, Parts(nn.Linear(2, 2), InstanceWeights(), SparsityPrior(0.5)))
    made = kernel(program, train, meta)
    for _ in range(3):
        made.step()
    before = made.latents.state_dict()
    made.latents.joint_potential(train.full(), meta.full())
    made.latents.values("w", train.full(), meta.full())
    made.latents.finish_step(1)  # nothing is pending
    after = made.latents.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("clip", [None, 0.02])
def test_reverted_companion_takes_back_the_recent_meta_moves(clip):
    """theta' = theta + m with m <- (1 - 1 / window) m + eta / 2 grad U_meta(theta)."""
    train, meta = two_sets()
    w = torch.rand(12, generator=generator(3))
    network, eta, window, rho = nn.Linear(2, 2), 0.1, 4, 2.0
    mine = nn.Linear(2, 2)
    mine.load_state_dict(network.state_dict())
    program = bind(
        partial(normalised, auxiliary="reverted", window=window),
        Parts(network, FixedWeights(w), impact=Impact(meta=rho)),
    )
    made = kernel(program, train, meta, step_size=eta, clip=clip, train_batch=12, meta_batch=6)
    memory = [torch.zeros_like(p) for p in mine.parameters()]
    for _ in range(7):
        made.step()
        values = list(mine.parameters())
        meta_term = rho * cross_entropy(mine(meta.input), meta.target).sum()
        rest = (w * cross_entropy(mine(train.input), train.target)).sum()
        rest = rest + sum((p**2).sum() for p in values) / 2
        from_meta = torch.autograd.grad(meta_term, values)
        from_rest = torch.autograd.grad(rest, values)
        drift = [eta / 2 * (a + b) for a, b in zip(from_meta, from_rest, strict=True)]
        norm = torch.cat([d.flatten() for d in drift]).norm()
        shorter = 1.0 if clip is None else min(1.0, clip / float(norm))
        assert clip is None or shorter < 1  # else the case shows nothing
        with torch.no_grad():
            for value, move, m, g in zip(values, drift, memory, from_meta, strict=True):
                value.sub_(shorter * move)
                m.mul_(1 - 1 / window).add_(shorter * eta / 2 * g)
        found = made.latents.networks
        for theta, other, value, m in zip(
            found["theta"].parameters, found["auxiliary"].parameters, values, memory, strict=True
        ):
            assert torch.allclose(theta, value, atol=1e-5)
            assert torch.allclose(other, value + m, atol=1e-5)
    assert max(float(m.abs().max()) for m in memory) > 1e-3


def test_parts_of_a_reverted_companion_serve_a_second_kernel():
    train, meta = two_sets()
    program = bind(normalised, Parts(nn.Linear(2, 2), InstanceWeights(), SparsityPrior(0.5)))
    for _ in range(2):
        kernel(program, train, meta).step()


def test_a_companion_of_a_network_that_is_not_there_is_refused():
    def program(train, meta):
        sample_network("theta", module, NormalPrior())
        sample_network("other", nn.Linear(2, 2), NormalPrior(), companion=Restart("psi"))

    module = nn.Linear(2, 2)
    with pytest.raises(InputError, match="'other' accompanies 'psi', not a network"):
        kernel(program, *two_sets())


def test_persistent_companion_goes_its_own_way():
    train, meta = two_sets()
    parts = Parts(nn.Linear(2, 2), InstanceWeights(), SparsityPrior(0.5))
    made = kernel(bind(partial(normalised, auxiliary="persistent"), parts), train, meta)
    for _ in range(20):
        made.step()
    networks = made.latents.networks
    assert networks["auxiliary"].companion == Restart("theta", None)
    assert not torch.equal(networks["auxiliary"].parameters[0], networks["theta"].parameters[0])


@pytest.mark.parametrize("importance", [None, torch.tensor([0.5, 2.0, 1.5])])
def test_a_known_total_has_the_derivative_of_the_estimate(importance):
    batch = two_sets()[0].batch(torch.tensor([3, 0, 5]), importance)
    slopes, values = [], []
    for known in (True, False):
        value = torch.tensor([0.2, 0.7, 0.4], requires_grad=True)
        total = torch.tensor(3.3, dtype=torch.float64)
        if known:
            found = _PlateTotal.apply(value, total, batch)
        else:
            found = total.float() + batch.total(value - value.detach())
        found.square().backward()
        slopes.append(value.grad)
        values.append(found.detach())
    torch.testing.assert_close(*slopes)
    torch.testing.assert_close(*values)
