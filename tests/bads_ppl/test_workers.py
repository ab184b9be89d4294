"""Chains in processes of their own: all run, all that they say arrives, no failure is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bads_ppl.chains import run_chains
from bads_ppl.data import Data
from bads_ppl.errors import Diverged, InputError
from bads_ppl.losses import cross_entropy
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.plan import Plan
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights
from bads_ppl.workers import available_cores, choose_workers, run_side_by_side
from models import joint

CPU = torch.device("cpu")
forks = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="chains are not forked here"
)


@forks
@pytest.mark.parametrize(
    ("asked", "chains", "cores", "expected"),
    [
        (None, 4, 2, 2),
        (None, 4, 16, 1),  # one chain can use more cores than four processes of one
        (None, 2, 4, 1),
        (None, 1, 1, 1),
        (3, 4, 2, 3),
        (8, 4, 2, 4),
        (1, 4, 2, 1),
    ],
)
def test_as_many_workers_as_cores_unless_asked(asked, chains, cores, expected, monkeypatch):
    monkeypatch.setattr("bads_ppl.workers.available_cores", lambda: cores)
    assert choose_workers(asked, chains, CPU) == expected


def test_there_is_a_core_at_least():
    assert available_cores() >= 1


def test_workers_that_cannot_be_are_refused(monkeypatch):
    with pytest.raises(InputError, match="workers must be at least 1, got 0"):
        choose_workers(0, 4, CPU)
    with pytest.raises(InputError, match="workers must be 1 on device mps"):
        choose_workers(2, 4, torch.device("mps"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_workers(None, 4, CPU) == 1
    with pytest.raises(InputError, match="workers must be 1 on device cpu of this machine"):
        choose_workers(2, 4, CPU)


@pytest.mark.parametrize(("asked", "expected"), [(None, 4), (1, 1), (3, 3), (8, 4)])
def test_all_chains_take_turns_on_a_gpu_unless_asked(asked, expected):
    assert choose_workers(asked, 4, torch.device("cuda")) == expected


@forks
def test_every_chain_runs_no_more_than_asked_at_a_time_and_reports(tmp_path):
    seen = []

    def task(chain, report):
        (tmp_path / f"start-{chain}").touch()
        report(chain, 10, {"loss": 0.5})
        time.sleep(0.3)
        together = len(list(tmp_path.glob("start-*"))) - len(list(tmp_path.glob("end-*")))
        (tmp_path / f"end-{chain}").write_text(f"{together} {os.getpid()}")

    run_side_by_side(task, [0, 1, 2, 3], 2, lambda *content: seen.append(content), [])
    ends = [(tmp_path / f"end-{chain}").read_text().split() for chain in range(4)]
    assert all(int(together) <= 2 for together, _ in ends)
    assert len({pid for _, pid in ends} | {str(os.getpid())}) == 5
    assert sorted(seen) == [(chain, 10, {"loss": 0.5}) for chain in range(4)]


@forks
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (InputError("no such thing"), InputError, "no such thing"),
        (Diverged("not finite"), Diverged, "not finite"),
        (OSError(28, "No space left"), OSError, "No space left"),
        (ValueError("surprise"), RuntimeError, "ValueError: surprise"),
    ],
)
def test_the_error_of_a_chain_is_raised_and_the_others_are_asked_to_stop(
    error, kind, message, tmp_path, capfd
):
    def task(chain, report):
        if chain == 0:
            time.sleep(0.3)
            raise error
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        stopped.wait(20)
        (tmp_path / f"stopped-{chain}-{stopped.is_set()}").touch()

    with pytest.raises(kind, match=message):
        run_side_by_side(task, [0, 1, 2], 2, lambda *_: None, [])
    # chain 1 ran beside it and ended in order; chain 2 was never started
    assert [path.name for path in tmp_path.iterdir()] == ["stopped-1-True"]


@forks
def test_a_process_that_dies_is_named(tmp_path):
    def task(chain, report):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"chain 3 died \(SIGKILL\).*resume=true"):
        run_side_by_side(task, [3], 2, lambda *_: None, [])


@forks
def test_a_signal_stops_all_chains_without_an_error(tmp_path):
    stop: list[int] = []

    def task(chain, report):
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        stopped.wait(20)
        (tmp_path / f"{chain}-{stopped.is_set()}").touch()

    threading.Timer(0.5, stop.append, (signal.SIGINT,)).start()
    start = time.monotonic()
    run_side_by_side(task, [0, 1, 2, 3], 2, lambda *_: None, stop)
    assert time.monotonic() - start < 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-True", "1-True"]


def chains(folder: Path, workers: int) -> list[np.ndarray]:
    g = torch.Generator().manual_seed(0)
    x, mx = torch.randn(30, 2, generator=g), torch.randn(6, 2, generator=g)
    train, meta = Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 0] > 0).long(), name="meta")

    def build(chain, generator):
        network = nn.Linear(2, 2)
        parts = Parts(network, InstanceWeights(), SparsityPrior(0.5, scale=3.0))
        kernel = SGLD(bind(joint, parts), step_size=0.01, generator=generator)
        return kernel, ThetaMonitor(network, cross_entropy, train, meta)

    results = run_chains(
        build, train, meta, plan=Plan(40), folder=folder, chains=3, workers=workers, progress=False
    )
    return [np.asarray(result.draws.w) for result in results]


@forks
def test_draws_do_not_depend_on_the_number_of_workers(tmp_path):
    alone, beside = chains(tmp_path / "1", 1), chains(tmp_path / "2", 2)
    assert all(np.array_equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert not np.array_equal(alone[0], alone[1])
