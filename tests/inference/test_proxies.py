"""Proxies: what they are trained on, that they are made once, resumed, and never mistaken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError, Stopped
from bads_ppl.losses import cross_entropy
from inference import fitting as module
from inference.options import ProxyOptions
from inference.proxies import Proxies, Proxy, embeddings, losses
from inference.tasks import Task

TRAIN, META = 60, 8


def task(flip: bool = True, seed: int = 0) -> Task:
    """Two classes apart in the first coordinate; those of the train set are exchanged."""
    g = torch.Generator().manual_seed(seed)

    def data(count: int, first: int, name: str) -> Data:
        label = torch.arange(count) % 2
        x = torch.randn(count, 2, generator=g)
        x[:, 0] += 4.0 * label - 2.0
        if flip and name == "train":
            label = 1 - label
        return Data(x, label, torch.arange(first, first + count), name=name)

    sets = data(TRAIN, 100, "train"), data(META, 500, "meta"), data(6, 900, "test")
    half = torch.arange(TRAIN) < 30
    return Task("t", "t", *sets, 2, {"a": half, "b": ~half}, ("a",), 0.5)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2))


def made(folder: Path, **changes) -> Proxies:
    given = {"steps": 80, "learning_rate": 0.3, "prior_scale": 3.0, **changes.pop("options", {})}
    options = ProxyOptions(**given)
    base = Proxies(task(), network, {"net": 1}, options, folder, torch.device("cpu"), 0)
    return replace(base, **{"spent": [], **changes})


def mean_loss(proxy: Proxy, data: Data) -> float:
    return float(cross_entropy(proxy.network(data.input), data.target).mean().detach())


def steps_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the steps that proxies' kernels take."""
    count = [0]

    class Counting(module.SGLD):
        def step(self) -> None:
            count[0] += 1
            super().step()

    monkeypatch.setattr(module, "SGLD", Counting)

    def taken() -> int:
        found, count[0] = count[0], 0
        return found

    return taken


def test_a_proxy_fits_what_it_was_trained_on_and_nothing_else(tmp_path):
    there = made(tmp_path)
    sets = there.task.train, there.task.meta
    train, meta, both = (there.trained(on) for on in ("train", "meta", "both"))
    assert [mean_loss(train, s) < 0.2 for s in sets] == [True, False]
    assert [mean_loss(meta, s) < 0.2 for s in sets] == [False, True]
    assert mean_loss(train, sets[0]) < mean_loss(both, sets[0]) < mean_loss(meta, sets[0])
    assert not train.network.training
    assert len(there.spent) == 3 and min(there.spent) > 0


def test_tuning_starts_at_the_other_proxy_and_goes_towards_the_meta_set(tmp_path):
    there = made(tmp_path)
    start = there.trained("train")
    before = [p.detach().clone() for p in start.network.parameters()]
    near = there.tuned(start, steps=1, learning_rate=1e-6)
    for p, q in zip(near.network.parameters(), before, strict=True):
        assert torch.allclose(p, q, atol=1e-4)
    far = there.tuned(start, steps=20, learning_rate=0.1)
    assert mean_loss(far, there.task.meta) < mean_loss(near, there.task.meta) - 0.1
    assert far.about["start"] == start.about


def test_preconditioned_proxies_go_their_own_way(tmp_path):
    plain, other = (
        made(tmp_path, options={"preconditioned": preconditioned, "schedule": "warmdown"})
        for preconditioned in (None, True)
    )
    proxies = [there.trained("meta") for there in (plain, other)]
    assert [mean_loss(proxy, plain.task.meta) < 0.2 for proxy in proxies] == [True, True]
    first, second = ([*proxy.network.parameters()] for proxy in proxies)
    assert not torch.allclose(first[0], second[0], atol=1e-2)


def test_a_proxy_is_trained_once_and_shared_by_whoever_wants_the_same(tmp_path, monkeypatch):
    taken = steps_of(monkeypatch)
    first = made(tmp_path).trained("meta")
    assert taken() == 80
    again = made(tmp_path).trained("meta")
    assert taken() == 0
    for p, q in zip(first.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"task": task(seed=1)},
        {"task": replace(task(), depends={"model": "another"})},
        {"shape": {"net": 2}},
        {"options": {"temperature": 0.1}},
        {"options": {"prior_scale": 0.3}},
    ],
)
def test_another_seed_set_network_or_setting_is_another_proxy(changes, tmp_path, monkeypatch):
    made(tmp_path).trained("meta")
    taken = steps_of(monkeypatch)
    made(tmp_path, **changes).trained("meta")
    assert taken() == 80 and len(list(tmp_path.glob("proxy-meta-*"))) == 2


def test_a_proxy_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    straight = made(tmp_path / "a").trained("meta")

    class Stopping(module.SGLD):
        def step(self) -> None:
            super().step()
            if self.steps == 50:
                raise Stopped(15)

    with monkeypatch.context() as patch:
        patch.setattr(module, "SGLD", Stopping)
        with pytest.raises(Stopped):
            made(tmp_path / "b", checkpoint_seconds=0.0).trained("meta")
    taken = steps_of(monkeypatch)
    resumed = made(tmp_path / "b").trained("meta")
    assert taken() == 80 - 49
    for p, q in zip(straight.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(p, q)


def folder_of(cache: Path, on: str) -> Path:
    (folder,) = cache.glob(f"proxy-{on}-*")
    return folder


def test_a_damaged_proxy_is_named_with_the_remedy_which_helps(tmp_path):
    first = made(tmp_path).trained("meta")
    path = folder_of(tmp_path, "meta") / "chain-0" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"proxy-meta-.* cannot be used: .*damaged.* Remove that"):
        made(tmp_path).trained("meta")
    path.unlink()
    again = made(tmp_path).trained("meta")
    for p, q in zip(first.network.parameters(), again.network.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (task(seed=1), "its train is"),
        (
            replace(task(), meta=task().meta.subset(torch.arange(META).flip(0))),
            "its (train|meta) is",
        ),
    ],
)
def test_a_proxy_of_another_set_or_order_is_refused_wherever_it_lies(other, message, tmp_path):
    made(tmp_path / "a").trained("meta")
    made(tmp_path / "b", task=other).trained("meta")
    right, wrong = folder_of(tmp_path / "a", "meta"), folder_of(tmp_path / "b", "meta")
    assert right.name != wrong.name
    shutil.rmtree(right)
    shutil.copytree(wrong, right)
    with pytest.raises(InputError, match=f"proxy in .* cannot be used: .*{message}.*Remove that"):
        made(tmp_path / "a").trained("meta")


def test_tables_hold_losses_and_embeddings_under_the_proxy(tmp_path):
    there = made(tmp_path)
    proxy = there.trained("both")
    train = there.task.train
    found = there.table("loss", lambda data, rows: losses(proxy, data, rows), proxy)
    assert torch.allclose(found, cross_entropy(proxy.network(train.input), train.target))
    seen = there.table("seen", lambda data, rows: embeddings(proxy, data, rows), proxy)
    assert torch.allclose(seen, proxy.network[1](proxy.network[0](train.input)))
    with pytest.raises(AssertionError):  # of another proxy it is another table
        there.table("loss", refuse, there.trained("meta"))
    assert torch.equal(there.table("loss", refuse, proxy), found)
    with pytest.raises(AssertionError):
        there.table("loss", refuse, proxy, rule={"k": 1})
    other = replace(there.task, meta=there.task.meta.subset(torch.arange(META - 1)))
    with pytest.raises(AssertionError):
        replace(there, task=other).table("loss", refuse, proxy)


def refuse(data: Data, rows: torch.Tensor) -> torch.Tensor:
    raise AssertionError("these are to be found in the cache")
