import math

import pytest
import torch
from pyro import poutine
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.priors import NormalPrior, SparsityPrior, default_scale, default_temperature
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights
from models import joint


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_sets(size: int = 20) -> tuple[Data, Data]:
    g = generator(1)
    x, mx = torch.randn(size, 2, generator=g), torch.randn(6, 2, generator=g)
    return Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 0] > 0).long(), name="meta")


def log_factor(prior: SparsityPrior, w: torch.Tensor, batch) -> float:
    return float(poutine.trace(prior.factor).get_trace(w, batch).log_prob_sum())


def test_network_prior_is_a_gaussian_with_a_scale_per_parameter():
    prior = NormalPrior(2.0, {"bias": 0.5})
    weight, bias = torch.randn(3, 2, generator=generator()), torch.ones(3)
    normal = torch.distributions.Normal
    found = prior("weight", weight).log_prob(weight)
    assert found.shape == () and torch.allclose(found, normal(0, 2.0).log_prob(weight).sum())
    assert torch.allclose(prior("bias", bias).log_prob(bias), normal(0, 0.5).log_prob(bias).sum())


@pytest.mark.parametrize(
    ("size", "sparsity", "points"),
    [(100, 0.29, 29), (5000, 0.005, 25), (20, 0.05, 1), (7, 0.5, 3), (10, 0.999, 9)],
)
def test_target_is_the_whole_number_of_points(size, sparsity, points):
    assert SparsityPrior(sparsity).target(size) == points


@pytest.mark.parametrize("total", ["exact", "running_mean"])
def test_factor_on_all_data_is_8(total):
    train, _ = two_sets(20)
    w = torch.rand(20, generator=generator(2))
    wanted = -0.5 * (float(w.sum()) - 5) ** 2
    assert log_factor(SparsityPrior(0.25, 1.0, total), w, train.full()) == pytest.approx(wanted)
    scaled = log_factor(SparsityPrior(0.25, 2.0, total), w, train.full())
    assert scaled == pytest.approx(wanted / 4)


@pytest.mark.parametrize(("size", "scale"), [(20, 0.5), (100, 1.0)])
def test_default_scale_is_a_fiftieth_of_the_target_and_half_a_point_at_least(size, scale):
    train, _ = two_sets(size)
    w = torch.full((size,), 0.6)  # a tenth of the size above the target
    assert log_factor(SparsityPrior(0.5), w, train.full()) == pytest.approx(
        -0.5 * (0.1 * size / scale) ** 2, rel=1e-3
    )


def test_running_total_is_9_with_the_last_ten_batch_means():
    """sum w = own rows + (N - B) * mean of the last ten batches' means, taken up after the step."""
    train, meta = two_sets(20)
    prior = SparsityPrior(0.5, scale=3.0, total="running_mean")
    made = SGLD(
        bind(joint, Parts(nn.Linear(2, 2), InstanceWeights(), prior)),
        step_size={"theta": 0.01, "w": 1.0},
        generator=generator(),
        train_batch=5,
    )
    made.setup(0, train, meta)
    made.latents.tables["w"].value.normal_(generator=generator(3))
    means: list[float] = []
    for step in range(25):
        before = made.site_values().clone()
        made.step()
        w = before[made.latents.tables["w"].index]
        recent = means[-10:] or [float(w.mean())]
        total = float(w.sum()) + 15 * sum(recent) / len(recent)
        found = float(made.latents.terms["sparsity"])
        assert found == pytest.approx(-0.5 * ((total - 10) / 3) ** 2, abs=1e-4), step
        means.append(float(w.mean()))


def test_running_total_is_exact_where_the_batch_is_the_whole_set():
    train, meta = two_sets(20)
    prior = SparsityPrior(0.5, scale=3.0, total="running_mean")
    made = SGLD(
        bind(joint, Parts(nn.Linear(2, 2), InstanceWeights(), prior)),
        step_size={"theta": 0.01, "w": 1.0},
        generator=generator(),
        train_batch=20,
    )
    made.setup(0, train, meta)
    for _ in range(12):
        total = float(made.site_values().sum())
        made.step()
        found = float(made.latents.terms["sparsity"])
        assert found == pytest.approx(-0.5 * ((total - 10) / 3) ** 2, abs=1e-4)


def test_batch_means_of_9_are_corrected_under_importance_minibatches():
    """Half of the rows are drawn in proportion to w: their plain mean would be far too high."""
    train, meta = two_sets(400)
    prior = SparsityPrior(0.1, scale=3.0, total="running_mean")
    made = SGLD(
        bind(joint, Parts(nn.Linear(2, 2), InstanceWeights(), prior)),
        step_size={"theta": 1e-9, "w": 1e-9},
        temperature=0.0,
        generator=generator(),
        train_batch=40,
        minibatches="importance",
    )
    made.setup(0, train, meta)
    table = made.latents.tables["w"]
    table.value.fill_(-4.0)
    table.value[:20] = 4.0
    found = []
    for _ in range(200):
        made.step()
        found.append(float(made.latents.means["mean_weight"].mean()))
    exact = float(made.site_values().mean())
    assert sum(found) / len(found) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("total", ["exact", "running_mean"])
def test_gradient_of_a_row_is_that_of_its_own_conditional(total):
    """The step on a row sees d/dw_i of (8) once, not N / B times."""
    train, meta = two_sets(20)
    prior = SparsityPrior(0.3, scale=2.0, total=total)
    made = SGLD(
        bind(joint, Parts(nn.Linear(2, 2), InstanceWeights(), prior)),
        step_size={"theta": 1e-9, "w": 1e-3},
        temperature=0.0,
        generator=generator(),
        train_batch=5,
    )
    made.setup(0, train, meta)
    before = made.latents.tables["w"].value.clone()
    network = made.latents.networks["theta"].module
    loss = nn.functional.cross_entropy(network(train.input), train.target, reduction="none")
    made.step()
    table = made.latents.tables["w"]
    score = (10 - 6) / 2.0**2 + loss.detach()[table.index]  # all w are 0.5, the prior is flat
    moved = (table.value - before)[table.index]
    assert torch.allclose(moved, -1e-3 / 2 * score * 0.25, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormalPrior(0.0), "a prior scale must be a positive number, got 0.0"),
        (lambda: NormalPrior(1.0, {"bias": math.inf}), "positive number, got inf"),
        (lambda: SparsityPrior(5), r"sparsity must be in \(0, 1\), got 5 .*5 / len\(train\)"),
        (lambda: SparsityPrior(0.0), r"in \(0, 1\), got 0.0"),
        (lambda: SparsityPrior(math.nan), r"in \(0, 1\), got nan"),
        (lambda: SparsityPrior(0.5, scale=0.0), "sparsity_scale must be a positive.*got 0.0"),
        (lambda: SparsityPrior(0.5, scale=math.inf), "sparsity_scale must be.*got inf"),
        (lambda: SparsityPrior(0.5, total="sum"), "'exact' or 'running_mean', got 'sum'"),
        (lambda: SparsityPrior(0.05).target(19), "less than one point: use at least 0.053"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_default_scale_keeps_the_decay_per_point_where_many_points_count():
    assert default_scale(10_000) == pytest.approx(0.1)  # decay 100 over 10,000 points
    assert default_scale(40_000) == pytest.approx(0.05)
    assert default_scale(100) == default_scale(60) == 0.5


def test_the_default_temperature_grows_with_the_points_from_a_thousandth_on():
    assert default_temperature(60) == default_temperature(300) == 1e-3
    assert default_temperature(10_000) == pytest.approx(0.03)
