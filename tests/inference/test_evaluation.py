"""Accuracy, the posterior predictive over chains, and what the monitor adds to a chain's rows."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bads_ppl.chains import LookAtWeights
from bads_ppl.data import Data
from bads_ppl.losses import cross_entropy
from inference.evaluation import LOOK, TaskMonitor, mean_scores, measures, on_test_set
from inference.outcome import versions
from inference.scoring import Classes, accuracy, predictive
from inference.tasks import Task


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
    named = {"loss": cross_entropy, "scoring": Classes(), "classes": classes, "probe": 512}
    return SimpleNamespace(train=train, meta=train, test=test, groups=groups, **named)


def looking(w: torch.Tensor) -> LookAtWeights:
    return lambda _, *, rows=None: w if rows is None else w[rows]


def monitor(network: nn.Module, test: Data, weights: list[float]) -> TaskMonitor:
    train = Data(torch.zeros(len(weights), 2), torch.zeros(len(weights), dtype=torch.int64))
    rare = torch.arange(len(weights)) < 1
    w = torch.tensor(weights)
    groups = {"rare": rare, "frequent": ~rare}
    return TaskMonitor(network, of_sets(train, test, groups), train, looking(w), density=False)


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


def test_between_draws_a_large_group_is_told_of_by_evenly_spaced_points(test_set):
    half = LOOK // 2  # of two groups
    w = torch.linspace(0, 1, 2 * LOOK + 1)
    looked = []

    def look(_, *, rows=None):
        looked.append(rows)
        return w[rows]

    one = monitor(Logits(), test_set, w.tolist())
    one.weights = look
    row = one.on_evaluate(None, burnt_in=False)
    assert [rows.tolist() for rows in looked] == [
        [0, *(torch.arange(half) * (2 * LOOK - 1) // (half - 1) + 1)]
    ]
    assert row["groups.rare.mean_weight"] == 0
    assert row["groups.frequent.mean_weight"] == pytest.approx(0.5, abs=1e-3)


def test_a_task_says_how_many_points_functions_of_theta_are_taken_at(test_set):
    task = of_sets(test_set, test_set, {})
    task.probe = 3
    one = TaskMonitor(Logits(), task, test_set, looking(torch.ones(4)), density=False)
    assert {name: len(batch) for name, batch in one.probes.items()} == dict.fromkeys(
        ("train", "meta", "test"), 3
    )


def kernel_of_potential_7():
    latents = SimpleNamespace(joint_potential=lambda train, meta: torch.tensor(7.0))
    return SimpleNamespace(look=lambda function: function(latents))


def test_a_draw_has_the_probability_of_the_right_class_for_each_class_of_the_test(test_set):
    test_set = Data(test_set.input, test_set.target * 2, name="test")  # classes 0 and 2 of three
    test_set = Data(torch.nn.functional.pad(test_set.input, (0, 1)), test_set.target, name="test")
    one = monitor(Logits(), test_set, [0.5, 0.5])
    one.probes["train"] = one.probes["meta"] = one.probes["test"]
    row = one.on_draw(kernel_of_potential_7())
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
    assert accuracy(predictive(measures(chains[1:])), target) == 0.5
    assert accuracy(predictive(measures(chains)), target) == 1.0
    chances = [chain.monitor.measure.test.input.softmax(dim=1) for chain in chains]
    assert torch.allclose(predictive(measures(chains)), (chances[0] + chances[1]) / 2)


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
    kernel = kernel_of_potential_7()

    def begin() -> TaskMonitor:
        groups: dict[str, torch.Tensor] = {}
        task = of_sets(train, test_set, groups)
        return TaskMonitor(Logits(), task, train, looking(now), False, lambda _: now)

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


# tasks of texts


class Shifted(nn.Module):
    """Writes each number of its sources plus its shift; half of the numbers with a second one."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([shift, shift]))
        self.frozen = nn.Parameter(torch.tensor(float("nan")), requires_grad=False)

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = input["ids"]
        return ids + self.shift[torch.arange(ids.shape[1]) % 2]

    def generate(self, ids, mask, *, beams: int, max_tokens: int) -> torch.Tensor:
        return self({"ids": ids}).round().long() * mask

    def becomes(self, *shift: float) -> None:
        with torch.no_grad():
            self.shift.copy_(torch.tensor(shift))


def writer(network: nn.Module, task: Task) -> TaskMonitor:
    w = torch.full((len(task.train),), 0.5)
    return TaskMonitor(network, task, task.train, looking(w), density=False)


def chain_of(task: Task, *shifts: float) -> Any:
    """A chain that is at these shifts when it is evaluated after burn-in."""
    network = Shifted()
    one = writer(network, task)
    for shift in shifts:
        network.becomes(shift, shift)
        one.on_evaluate(None, burnt_in=True)
    return SimpleNamespace(monitor=one, metrics=[{}])


def test_an_evaluation_reports_the_loss_and_the_scores_of_some_texts(writing_task):
    task = writing_task((6, 4, 5), curve=2)
    row = writer(Shifted(), task).on_evaluate(None, burnt_in=False)
    assert row == {"test.loss": 0, "test.bleu": pytest.approx(100), "test.chrf": pytest.approx(100)}
    network = Shifted()
    network.becomes(0, 3)  # of every other number
    row = writer(network, task).on_evaluate(None, burnt_in=False)
    assert row["test.loss"] == pytest.approx(1.5)
    rows = torch.tensor([0, 2])
    wanted = task.scoring.score(task.scoring.write(network, task.test, rows), rows)
    assert {name: row[f"test.{name}"] for name in wanted} == wanted and 0 < wanted["chrf"] < 99


def test_an_evaluation_without_texts_reports_the_loss_alone(writing_task):
    row = writer(Shifted(2.0), writing_task(curve=0)).on_evaluate(None, burnt_in=True)
    assert row == {"test.loss": pytest.approx(2.0)}


def test_a_draw_of_a_task_of_texts_has_no_probabilities(writing_task):
    one = writer(Shifted(2.0), writing_task())
    row = one.on_draw(kernel_of_potential_7())
    assert row.keys() == {"potential", "train_loss", "meta_loss", "test_loss", "norm.shift"}
    assert row["test_loss"] == pytest.approx(2.0)


def test_the_mean_of_theta_is_that_of_the_evaluations_after_burn_in(writing_task):
    network = Shifted()
    one = writer(network, writing_task(curve=1))
    network.becomes(1000.0, 1000.0)
    one.on_evaluate(None, burnt_in=False)
    values = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    for value in values:
        network.becomes(*value)
        one.on_evaluate(None, burnt_in=True)
    averaged = one.measure.theta.put(network)
    assert torch.allclose(averaged.shift, values.mean(0), atol=1e-6)
    assert averaged.frozen.isnan()  # its own
    assert torch.equal(network.shift, values[-1])
    averaged.becomes(9.0, 9.0)
    assert torch.allclose(one.measure.theta.put(network).shift, values.mean(0), atol=1e-6)


def test_the_mean_of_theta_goes_on_from_its_state(writing_task):
    task, values = writing_task(curve=1), (1.0, 2.0, 6.0)
    first = chain_of(task, *values[:2]).monitor
    state = {name: value.clone() for name, value in first.state_dict().items()}
    resumed = writer(Shifted(values[2]), task)
    resumed.load_state_dict(state)
    assert resumed.state_dict().keys() == state.keys() == {"count", "mean.shift"}  # none frozen
    resumed.on_evaluate(None, burnt_in=True)
    assert resumed.measure.theta.put(Shifted()).shift.tolist() == [3.0, 3.0]
    assert first.measure.theta.put(Shifted()).shift.tolist() == [1.5, 1.5]


def test_texts_are_written_by_the_mean_of_each_chain_and_by_its_last_iterate(writing_task):
    task = writing_task((6, 4, 5))
    mean_right, last_right = chain_of(task, -2.0, 2.0), chain_of(task, 2.0, 0.0)
    scored = on_test_set(task, [mean_right, last_right])
    rows = task.scoring.every()

    def of(shift: float) -> dict[str, float]:
        texts = task.scoring.write(Shifted(shift), task.test, rows)
        return task.scoring.score(texts, rows)

    assert list(scored.numbers) == ["bleu", "chrf", "bleu_last", "chrf_last", "count"]
    for name in ("bleu", "chrf"):
        assert of(0.0)[name] == pytest.approx(100) and 10 < of(1.0)[name] < 99
        assert of(2.0)[name] < of(1.0)[name] - 1
        assert scored.numbers[name] == pytest.approx((100 + of(1.0)[name]) / 2)
        assert scored.numbers[f"{name}_last"] == pytest.approx((of(2.0)[name] + 100) / 2)
    assert scored.numbers["count"] == 3
    assert [row["source"] for row in scored.samples] == ["source 0", "source 1", "source 2"]
    assert scored.samples[1]["written"] == scored.samples[1]["reference"] == "w20 w21 w22 w23"
    assert mean_right.monitor.network.shift.tolist() == [2.0, 2.0]


def test_samples_are_evenly_spaced_and_those_of_the_first_chain(writing_task):
    task = writing_task([4] * 58)
    scored = on_test_set(task, [chain_of(task, 1.0), chain_of(task, 0.0)])
    assert [row["source"] for row in scored.samples] == [f"source {3 * k}" for k in range(20)]
    assert scored.samples[2]["written"] == "w71 w72 w73 w74"
    assert scored.samples[2]["reference"] == "w70 w71 w72 w73"


def test_a_task_with_classes_has_no_samples(test_set):
    one = monitor(Logits(), test_set, [0.5, 0.5])
    rows = [{"test.accuracy": 0.25}, one.on_evaluate(None, burnt_in=True)]
    scored = on_test_set(
        of_sets(test_set, test_set, {}), [SimpleNamespace(monitor=one, metrics=rows)]
    )
    assert scored.numbers == {"accuracy": 0.75, "accuracy_last": 0.75, "count": 4}
    assert next(iter(scored.numbers)) == "accuracy" and scored.samples == ()


def test_code_that_is_not_installed_has_no_version_and_results_all_the_same(monkeypatch):
    known = importlib.metadata.version

    def version(name):
        if name == "bads-ppl":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = versions()
    assert found["bads-ppl"] == "not installed"
    assert found["torch"] == known("torch")
