"""The hand-written twins take our steps; blocks take turns, and ratios are within a round."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json

import pytest
import torch
from torch import nn

from benchmarks.step_cost import __main__ as command
from benchmarks.step_cost import by_hand, ours, overhead, peers, problems, worker
from benchmarks.step_cost.problems import Problem
from inference.reproduce.cost import WorkerError


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 4, 2))
        self.first, self.norm, self.head = nn.Linear(36, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.to(memory_format=torch.channels_last)  # noise is drawn in that order

    def forward(self, images):
        return self.head(self.norm(self.first(self.maps(images).flatten(1))).relu())


SMALL = Problem(Small, (1, 6, 6), 64, 24, (16, 8), 3)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def steps_that_show(monkeypatch):
    """Steps as long as they can be, so that whatever differs is seen after a few."""
    monkeypatch.setitem(problems.PROBLEMS, "small", SMALL)
    monkeypatch.setattr(problems, "THETA_STEP", 1e-3)
    monkeypatch.setattr(problems, "PHI_STEP", 1e-3)
    monkeypatch.setattr(problems, "W_STEP", 0.2)


@pytest.fixture
def tables(monkeypatch):
    """The hand-written tables of weights, in the order in which they are made."""
    made = []
    make = by_hand.InstanceTable

    def kept(*arguments):
        made.append(make(*arguments))
        return made[-1]

    monkeypatch.setattr(by_hand, "InstanceTable", kept)
    return made


@pytest.mark.parametrize(
    "name", ["joint, instance", "joint, network", "normalised restarted, instance"]
)
def test_a_twin_draws_what_the_kernel_draws(name):
    networks = [SMALL.build(CPU) for _ in range(2)]
    start = [p.detach().clone() for p in networks[0].parameters()]
    kernel = ours.kernel(name, SMALL, networks[0], *SMALL.sets(CPU))
    step = by_hand.build(f"by hand: {name}", SMALL, networks[1], *SMALL.sets(CPU))
    for _ in range(3 * problems.WINDOW):  # past restarts
        kernel.step()
        step()
    pairs = zip(start, *(network.parameters() for network in networks), strict=True)
    for before, mine, twin in pairs:
        assert (mine - before).abs().max() > 1e-3
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-5)


def test_chains_in_one_batch_take_the_steps_of_chains_apart(monkeypatch, tables):
    """Within a pass and without noise, which chains in one batch draw from one generator."""
    monkeypatch.setattr(problems, "THETA_TEMPERATURE", 0.0)
    monkeypatch.setattr(problems, "W_TEMPERATURE", 0.0)
    train, meta = SMALL.sets(CPU)

    def loops():
        torch.manual_seed(0)
        return [
            by_hand.Loop(
                nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)),
                *(train, meta, SMALL.batches, torch.Generator().manual_seed(seed)),
            )
            for seed in range(2)
        ]

    apart, together = loops(), loops()
    start = [p.detach().clone() for loop in apart for p in loop.parameters]
    steps = [by_hand.joint_instance(loop) for loop in apart]
    batch = by_hand.batched(together)
    *singles, both = tables
    both.logit.copy_(torch.randn(both.logit.shape))  # what chains have in common is told apart
    for table, logit in zip(singles, both.logit, strict=True):
        table.logit.copy_(logit)
    for _ in range(3):
        batch()
        for step in steps:
            step()
    ends = ([p.detach() for loop in each for p in loop.parameters] for each in (apart, together))
    for before, one, other in zip(start, *ends, strict=True):
        assert (one - before).abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name in ("logit", "total"):
        expected = torch.stack([getattr(each, name) for each in singles])
        torch.testing.assert_close(getattr(both, name), expected, rtol=1e-4, atol=1e-5)


def test_the_twin_of_weights_moves_them_alike(tables):
    network = SMALL.build(CPU)
    kernel = ours.kernel("joint, instance", SMALL, network, *SMALL.sets(CPU))
    generator = torch.Generator().manual_seed(problems.SEED)
    loop = by_hand.Loop(SMALL.build(CPU), *SMALL.sets(CPU), SMALL.batches, generator)
    step = by_hand.joint_instance(loop)
    for _ in range(10):
        kernel.step()
        step()
    table, (twin,) = kernel.latents.tables["w"], tables
    assert table.value.std() > 0.1
    torch.testing.assert_close(table.value, twin.logit, rtol=1e-4, atol=1e-4)
    (total,) = (plate_sum.total for plate_sum in kernel.latents.sums.values())
    torch.testing.assert_close(total, twin.total[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*by_hand.BY_HAND, *ours.OURS])
def test_every_method_takes_steps_that_stay_finite(name):
    network = SMALL.build(CPU)
    build = ours.kernel if name in ours.OURS else by_hand.build
    made = build(name, SMALL, network, *SMALL.sets(CPU))
    step = made.step if name in ours.OURS else made
    for _ in range(3):
        step()
    assert all(bool(p.isfinite().all()) for p in network.parameters())


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_takes_steps_where_it_is_installed(name):
    if importlib.util.find_spec(name.partition(":")[0]) is None:
        pytest.skip("not installed")
    peers.load(name)
    step = peers.build(name, SMALL, SMALL.build(CPU), *SMALL.sets(CPU))
    for _ in range(3):
        step()


def test_a_worker_says_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(peers.MODULES, "betty: one-step bi-level", ["betty_that_is_not_there"])
    worker.main(["betty: one-step bi-level", "small", "cpu"])
    assert "not installed" in json.loads(capsys.readouterr().out)["error"]


def test_a_worker_answers_with_time_and_memory(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n0\n"))
    worker.main(["base", "small", "cpu"])
    _, answer, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert last["held_mib"] > 0
    assert answer["processor_s"] > 0 and answer["seconds"] > 0


def test_methods_take_turns_and_one_that_fails_is_named(monkeypatch):
    asked = []

    class Fake:
        def __init__(self, name, module, *arguments):
            if name == "broken":
                raise WorkerError("broken: not installed")
            self.name = name

        def block(self, steps):
            asked.append((self.name, steps))
            if steps == 0:
                return {"held_mib": 2.0 if self.name == "base" else 3.0}
            seconds = len(asked) * (2.0 if self.name == "ours" else 1.0)
            return {"seconds": seconds, "processor_s": seconds, "peak_mib": 8.0}

        def close(self):
            asked.append((self.name, "closed"))

    monkeypatch.setattr(command, "StepProcess", Fake)
    monkeypatch.setattr(command, "WARM_UP", 1)
    found = command.measure("small", ["base", "ours", "broken"], 2, "cpu")
    turns = [("base", 3), ("ours", 3)] * 3
    last = [("base", 0), ("ours", 0), ("base", "closed"), ("ours", "closed")]
    assert asked == [*turns, *last]
    assert set(found.failed) == {"broken"} and set(found.blocks) == {"base", "ours"}
    row = command.summary(found, 3, "processor_s")["ours"]
    assert row["time"] == [12 / 5, (8 / 3 + 12 / 5) / 2, 8 / 3]
    assert row["memory"] == 1.0 and row["held"] == 1.5
    assert "| broken | broken: not installed" in command.table({}, found.failed)


def test_operations_are_those_that_compute_and_calls_are_counted():
    x = torch.ones(3, requires_grad=True)

    def step():
        x.grad = None
        torch.empty(2)
        (x.view(3, 1) * 2).sum().backward()  # the product, the sum, 1, and the product's gradient

    assert overhead.operations(step) == 4
    assert overhead.calls(lambda: None) < overhead.calls(lambda: [abs(k) for k in range(90)]) - 80


def test_the_work_around_the_passes_is_measured_for_every_method(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["overhead", "--rounds", "1"])
    monkeypatch.setattr(overhead, "PROBLEM", dataclasses.replace(overhead.PROBLEM, steps=2))
    overhead.main()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == list(overhead.METHODS)
    assert all(0 < float(row[2]) <= float(row[3]) <= float(row[4]) for row in rows)
    operations = {row[1].strip(): int(row[5]) for row in rows}
    assert operations["base"] < operations["by hand: joint, instance"]
