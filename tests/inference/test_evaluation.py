"""Accuracy, the posterior predictive over chains, and what the monitor adds to a chain's rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bads_ppl.data import Data
from bads_ppl.losses import cross_entropy
from inference.evaluation import (
    TaskMonitor,
    accuracy,
    mean_scores,
    predictive,
    predictive_accuracy,
)


class Logits(nn.Module):
    """Gives the inputs back, and remembers the mode that it was called in."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.modes: list[bool] = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        return input * self.scale


def logits(*rows: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def of_sets(train: Data, test: Data, groups: dict[str, torch.Tensor]) -> Any:
    """What a monitor asks of a task of two classes whose meta set is its train set."""
    classes = test.input.shape[1]
    named = {"loss": cross_entropy, "writing": None, "classes": classes}
    return SimpleNamespace(train=train, meta=train, test=test, groups=groups, **named)


def monitor(network: nn.Module, test: Data, weights: list[float]) -> TaskMonitor:
    train = Data(torch.zeros(len(weights), 2), torch.zeros(len(weights), dtype=torch.int64))
    rare = torch.arange(len(weights)) < 1
    w = torch.tensor(weights)
    groups = {"rare": rare, "frequent": ~rare}
    return TaskMonitor(network, of_sets(train, test, groups), train, lambda _: w, density=False)


@pytest.fixture
def test_set() -> Data:
    return Data(logits((2, 0), (0, 1), (3, 0), (0, 4)), torch.tensor([0, 1, 1, 1]), name="test")


def test_accuracy_is_the_share_of_rows_whose_largest_score_is_the_target():
    assert accuracy(logits((2, 0), (0, 1), (3, 0), (0, 4)), torch.tensor([0, 1, 1, 1])) == 0.75


def test_an_evaluation_reports_accuracy_loss_and_mean_weight_by_group(test_set):
    row = monitor(Logits(), test_set, [0.9, 0.1, 0.3]).on_evaluate(None, burnt_in=False)
    assert row["test.accuracy"] == 0.75
    expected = cross_entropy(test_set.input, test_set.target).mean()
    assert row["test.loss"] == pytest.approx(float(expected))
    assert row["groups.rare.mean_weight"] == pytest.approx(0.9)
    assert row["groups.frequent.mean_weight"] == pytest.approx(0.2)


def test_a_draw_has_the_probability_of_the_right_class_for_each_class_of_the_test(test_set):
    test_set = Data(test_set.input, test_set.target * 2, name="test")  # classes 0 and 2 of three
    test_set = Data(torch.nn.functional.pad(test_set.input, (0, 1)), test_set.target, name="test")
    one = monitor(Logits(), test_set, [0.5, 0.5])
    one.probes["train"] = one.probes["meta"] = one.probes["test"]
    kernel = SimpleNamespace(
        latents=SimpleNamespace(joint_potential=lambda train, meta: torch.tensor(7.0))
    )
    row = one.on_draw(kernel)
    chances = test_set.input.softmax(dim=1)
    assert {name for name in row if "probability" in name} == {
        "test_probability.0",
        "test_probability.2",
    }
    assert row["test_probability.0"] == pytest.approx(float(chances[0, 0]))
    assert row["test_probability.2"] == pytest.approx(float(chances[1:, 2].mean()))
    assert row["potential"] == 7.0


def test_the_network_is_evaluated_in_eval_mode_and_left_in_its_own(test_set):
    network = Logits()
    monitor(network, test_set, [0.5, 0.5]).on_evaluate(None, burnt_in=True)
    assert network.training and not any(network.modes)


def test_the_predictive_averages_probabilities_of_all_chains_after_burn_in():
    target = torch.tensor([0, 0])
    chains = []
    # Of the second point one chain is sure and right, the other unsure and wrong.
    for rows in ([(1, 0), (9, 0)], [(1, 0), (0, 1)]):
        one = monitor(Logits(), Data(logits(*rows), target, name="test"), [0.5, 0.5])
        one.on_evaluate(None, burnt_in=False)
        assert int(one.measure.count) == 0 and float(one.measure.sum.sum()) == 0
        one.on_evaluate(None, burnt_in=True)
        chains.append(SimpleNamespace(monitor=one))
    assert predictive_accuracy(chains[1:], target) == 0.5
    assert predictive_accuracy(chains, target) == 1.0
    chances = [chain.monitor.measure.test.input.softmax(dim=1) for chain in chains]
    assert torch.allclose(predictive(chains), (chances[0] + chances[1]) / 2)


def test_the_state_of_a_monitor_continues_its_average(test_set):
    first = monitor(Logits(), test_set, [0.5, 0.5])
    first.on_evaluate(None, burnt_in=True)
    state = {name: value.clone() for name, value in first.state_dict().items()}
    first.on_evaluate(None, burnt_in=True)
    second = monitor(Logits(), test_set, [0.5, 0.5])
    second.load_state_dict(state)
    second.on_evaluate(None, burnt_in=True)
    one, other = first.measure, second.measure
    assert torch.equal(one.sum, other.sum) and int(other.count) == 2


def test_scores_are_averaged_over_the_draws_of_all_chains_and_survive_a_checkpoint(test_set):
    now = torch.tensor([0.0, 1.0])
    train = Data(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))
    potential = SimpleNamespace(joint_potential=lambda train, meta: torch.tensor(7.0))
    kernel = SimpleNamespace(latents=potential)

    def begin() -> TaskMonitor:
        groups: dict[str, torch.Tensor] = {}
        task = of_sets(train, test_set, groups)
        return TaskMonitor(Logits(), task, train, lambda _: now, False, lambda _: now)

    first, resumed = begin(), begin()
    first.on_draw(kernel)
    resumed.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    now = torch.tensor([3.0, 4.0])
    resumed.on_draw(kernel)
    second = begin()
    second.on_draw(kernel)
    chains = [SimpleNamespace(monitor=one) for one in (resumed, second)]
    assert mean_scores(chains).tolist() == pytest.approx([2.0, 3.0])
    assert mean_scores([SimpleNamespace(monitor=monitor(Logits(), test_set, [0.5]))]) is None
