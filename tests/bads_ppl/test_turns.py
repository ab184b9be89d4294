"""Chains in turns: each is what it would be alone, and no failure or interrupt is lost."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bads_ppl import chains as chains_module
from bads_ppl.chains import run_chains
from bads_ppl.data import Data
from bads_ppl.errors import Diverged, Stopped
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.losses import cross_entropy
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.plan import Plan
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.turns import TURN, After, _next_may_start, in_turns
from bads_ppl.weights import InstanceWeights
from models import joint

CPU = torch.device("cpu")


def nothing():
    raise AssertionError("nobody asked to stop")


def walker(number, steps, seen, after=lambda step: After.MORE):
    """A chain that says when it steps, and draws from torch's global generator."""
    torch.manual_seed(number)
    drawn = []
    for step in range(steps):
        drawn.append(float(torch.rand(())))
        seen.append((number, step))
        yield after(step)
    return drawn


def alone(number, steps):
    generator = torch.Generator().manual_seed(number)
    return [float(torch.rand((), generator=generator)) for _ in range(steps)]


def walk(most, lengths, **options):
    seen = []
    made = [partial(walker, k, steps, seen, **options) for k, steps in enumerate(lengths)]
    return in_turns(made, most, CPU, nothing), [number for number, _ in seen]


def test_every_chain_has_its_own_global_generator_and_the_callers_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    results, order = walk(3, [5 * TURN, TURN, 2 * TURN + 3])
    assert results == [alone(0, 5 * TURN), alone(1, TURN), alone(2, 2 * TURN + 3)]
    assert torch.equal(torch.get_rng_state(), before)
    assert order != sorted(order)


def test_turns_go_round():
    _, order = walk(2, [3 * TURN, 3 * TURN])
    assert order == [k for k in (0, 0, 1, 0, 1, 1) for _ in range(TURN)]


def test_no_more_chains_than_asked_run_at_a_time():
    _, order = walk(2, [3 * TURN] * 4)
    first = [order.index(k) for k in range(4)]
    last = [len(order) - order[::-1].index(k) for k in range(4)]
    together = [
        sum(a <= moment < b for a, b in zip(first, last, strict=True))
        for moment in range(len(order))
    ]
    assert max(together) == 2
    _, order = walk(1, [3 * TURN] * 3)
    assert order == sorted(order)


def test_chains_that_others_would_hold_up_run_one_after_the_other():
    _, order = walk(3, [3 * TURN] * 3, after=lambda step: After.ALONE)
    assert order == sorted(order)


def test_a_turn_ends_where_the_host_would_wait():
    def after(step):
        return After.WAIT if step % 5 == 4 else After.MORE

    _, order = walk(2, [20, 10], after=after)
    assert order == [k for k in (0, 0, 1, 0, 1, 0) for _ in range(5)]


def failing(error, steps=1):
    for _ in range(steps):
        yield After.MORE
    raise error


def stoppable(stopped, number):
    while not stopped:
        yield After.MORE
    stopped.append(number)
    raise Stopped(signal.SIGTERM)


def test_the_first_error_is_raised_once_the_others_have_stopped():
    stopped, started = [], []
    chains = [
        partial(stoppable, stopped, 0),
        partial(failing, Diverged("not finite")),
        lambda: started.append(2),
    ]
    with pytest.raises(Diverged, match="not finite"):
        in_turns(chains, 2, CPU, lambda: stopped.append("asked"))
    assert stopped == ["asked", 0] and not started


def test_a_failure_counts_for_more_than_a_chain_that_was_stopped():
    """One that cannot write its checkpoint must not be taken for one that has."""
    chains = [
        partial(failing, Stopped(15), steps=TURN + 1),
        partial(failing, OSError(28, "No space left")),
    ]
    with pytest.raises(OSError, match="No space left"):
        in_turns(chains, 2, CPU, lambda: None)


@pytest.mark.parametrize(("free", "reserved", "fits"), [(900, 200, True), (390, 200, False)])
def test_the_next_chain_starts_where_the_device_has_room_for_two_like_it(
    free, reserved, fits, monkeypatch
):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free, 1000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: reserved)
    one = SimpleNamespace(after=After.MORE)
    assert _next_may_start([one], 4, torch.device("cuda")) is fits
    assert _next_may_start([one, one], 4, torch.device("cuda"))  # each has half of it
    assert not _next_may_start([one], 1, torch.device("cuda"))


def test_an_interrupt_closes_all_chains_and_waits_for_none():
    closed = []

    def endless(number):
        try:
            while True:
                yield After.MORE
        finally:
            closed.append(number)

    chains = [partial(endless, 0), partial(failing, KeyboardInterrupt())]
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        in_turns(chains, 2, CPU, nothing)
    assert closed == [0]
    assert torch.equal(torch.get_rng_state(), before)


# whole chains


def run(folder, device="cpu", stop_at=None, chains=3, seen=None, **options):
    g = torch.Generator().manual_seed(1)
    x, mx = torch.randn(24, 2, generator=g), torch.randn(8, 2, generator=g)
    train = Data(x, (x[:, 0] > 0).long()).to(device)
    meta = Data(mx, (mx[:, 0] > 0).long(), name="meta").to(device)

    class Watch(ThetaMonitor):
        def on_evaluate(self, kernel, *, burnt_in):
            if seen is not None:
                seen.append(self.network.chain)
            if kernel.steps == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

    def make(chain, generator):
        network = nn.Sequential(nn.Linear(2, 6), nn.Dropout(0.3), nn.Linear(6, 2)).to(device)
        network.chain = chain
        parts = Parts(network, InstanceWeights(), SparsityPrior(0.25, scale=2.0))
        kernel = SGLD(
            bind(joint, parts),
            step_size=0.01,
            generator=generator,
            train_batch=5,
            meta_batch=3,
            minibatches="importance",
        )
        return kernel, Watch(network, cross_entropy, train, meta)

    plan = Plan(50, burn_in=20, thinning=3, evaluate_every=7)
    return run_chains(make, train, meta, plan=plan, folder=folder, chains=chains, **options)


@pytest.fixture
def turns(monkeypatch):
    """Chains take turns on the CPU, too."""

    def three(made, most, device, stop):
        return in_turns(made, 3, device, stop)

    monkeypatch.setattr(chains_module, "in_turns", three)
    monkeypatch.setattr(MinibatchKernel, "recorded", True)
    monkeypatch.setattr(MinibatchKernel, "look", lambda self, function: function(self.latents))


def same(first, second):
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.draws.w, other.draws.w)
        assert one.metrics == other.metrics
        for name, values in other.draws.values.items():
            assert np.array_equal(one.draws.values[name], values)


def test_chains_in_turns_are_those_that_run_one_after_the_other(tmp_path, request):
    plain = run(tmp_path / "plain")
    request.getfixturevalue("turns")
    start = time.monotonic()
    found = run(tmp_path / "turns")
    same(found, plain)
    # Each chain's time is its own, without the turns of the others.
    assert sum(chain.seconds for chain in found) <= time.monotonic() - start


def test_chains_in_turns_stop_together_and_resume(tmp_path, request):
    plain = run(tmp_path / "plain")
    request.getfixturevalue("turns")
    with pytest.raises(Stopped):
        run(tmp_path / "turns", stop_at=35)
    saved = sorted(path.parent.name for path in (tmp_path / "turns").glob("*/checkpoint*"))
    assert saved == ["chain-0", "chain-1", "chain-2"]
    same(run(tmp_path / "turns", resume=True), plain)


@pytest.mark.gpu
def test_chains_that_run_together_on_a_gpu_are_those_that_run_alone(tmp_path):
    plain = run(tmp_path / "plain", "cuda", workers=1)
    together = run(tmp_path / "together", "cuda", seen=(order := []), workers=None)
    assert order != sorted(order)  # they did run together
    for one, other in zip(together, plain, strict=True):
        np.testing.assert_allclose(one.draws.w, other.draws.w, rtol=1e-4, atol=1e-6)
        for name, values in other.draws.values.items():
            np.testing.assert_allclose(one.draws.values[name], values, rtol=1e-3, atol=1e-5)
