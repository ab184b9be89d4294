"""The functions of theta that every draw records, by hand."""

import pytest
import torch
from torch import nn

from bads_ppl.data import Data
from bads_ppl.losses import cross_entropy
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights
from models import joint, normalised


def sets() -> tuple[Data, Data]:
    g = torch.Generator().manual_seed(0)
    x, mx = torch.randn(30, 2, generator=g), torch.randn(8, 2, generator=g)
    return Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 1] > 0).long(), name="meta")


def made(model=joint, **options) -> tuple[SGLD, ThetaMonitor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropout = nn.Dropout(0.5 if model is joint else 0.0)
        network = nn.Sequential(nn.Linear(2, 3), dropout, nn.Linear(3, 2))
    network[0].bias.requires_grad_(False)
    parts = Parts(network, InstanceWeights(), SparsityPrior(0.5, scale=2.0))
    kernel = SGLD(bind(model, parts), step_size=0.01, generator=torch.Generator().manual_seed(0))
    train, meta = sets()
    kernel.setup(0, train, meta)
    for _ in range(3):
        kernel.step()
    return kernel, ThetaMonitor(network, cross_entropy, train, meta, **options)


def test_losses_norms_and_potential_of_a_draw_are_those_by_hand():
    kernel, monitor = made()
    network = monitor.network.eval()
    train, meta = sets()
    found = monitor.on_draw(kernel)
    train_loss = cross_entropy(network(train.input), train.target).detach()
    meta_loss = cross_entropy(network(meta.input), meta.target).detach()
    assert found["train_loss"] == pytest.approx(float(train_loss.mean()), rel=1e-5)
    assert found["meta_loss"] == pytest.approx(float(meta_loss.mean()), rel=1e-5)
    norms = {name for name in found if name.startswith("norm.")}
    assert norms == {"norm.0.weight", "norm.2.weight", "norm.2.bias"}  # not the frozen one
    assert found["norm.2.bias"] == pytest.approx(float(network[2].bias.detach().norm()), rel=1e-5)
    w = kernel.site_values()
    theta = [p.detach() for p in network.parameters() if p.requires_grad]
    log_prior = sum(torch.distributions.Normal(0.0, 1.0).log_prob(p).sum() for p in theta)
    log_jacobian = (w * (1 - w)).log().sum()  # of the logits, w being uniform
    sparsity = (w.sum() - 15) ** 2 / (2 * 2.0**2)
    potential = (w * train_loss).sum() + meta_loss.sum() + sparsity - log_prior - log_jacobian
    assert found["potential"] == pytest.approx(float(potential), rel=1e-4)


def test_other_sets_are_recorded_by_their_name():
    train, _ = sets()
    kernel, monitor = made(others={"held_out": train.subset(torch.arange(5))})
    assert "held_out_loss" in monitor.on_draw(kernel)


def test_probes_are_evenly_spaced_and_no_larger_than_asked():
    _, monitor = made(probe=10)
    rows = monitor.probes["train"].index
    assert rows[0] == 0 and rows[-1] == 29 and set(rows.diff().tolist()) == {3, 4}
    assert len(rows) == 10
    assert len(monitor.probes["meta"]) == 8


def test_a_network_in_training_is_looked_at_in_eval_mode_and_left_in_training():
    kernel, monitor = made()
    monitor.network.train()
    assert monitor.on_draw(kernel) == monitor.on_draw(kernel)  # no dropout
    assert monitor.network.training


def test_acceptance_is_recorded_where_there_is_a_density():
    kernel, monitor = made()
    state = kernel.generator.get_state()
    found = monitor.on_evaluate(kernel, burnt_in=True)
    assert set(found) == {"acceptance.theta", "acceptance.w"}
    assert all(0 < rate <= 1 for rate in found.values())
    assert torch.equal(kernel.generator.get_state(), state)
    kernel, monitor = made(density=False)
    assert monitor.on_evaluate(kernel, burnt_in=True) == {}
    kernel, monitor = made(normalised)
    assert monitor.on_evaluate(kernel, burnt_in=True) == {}
