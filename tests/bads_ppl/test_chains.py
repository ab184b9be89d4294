import json
import os
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

from bads_ppl.chains import CHECKPOINT, FEW, METRICS, chain_generator, fingerprint, run_chains
from bads_ppl.data import Data, spaced
from bads_ppl.errors import Diverged, InputError, Stopped
from bads_ppl.losses import cross_entropy
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.plan import Plan
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights, WeightNetwork
from models import joint, normalised

PLAN = Plan(40, burn_in=20, thinning=3, snapshots=2, evaluate_every=1)


def two_sets(seed: int = 1) -> tuple[Data, Data]:
    g = torch.Generator().manual_seed(seed)
    x, mx = torch.randn(24, 2, generator=g), torch.randn(8, 2, generator=g)
    return Data(x, (x[:, 0] > 0).long()), Data(mx, (mx[:, 0] > 0).long(), name="meta")


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2))


class Watch(ThetaMonitor):
    """Sends a signal to this process at a step; counts its looks, as a monitor with state."""

    def __init__(self, *args, stop_at=None, signum=signal.SIGTERM):
        super().__init__(*args)
        self.stop_at, self.signum, self.looks = stop_at, signum, 0

    def on_evaluate(self, kernel, *, burnt_in):
        self.looks += 1
        if kernel.steps == self.stop_at:
            os.kill(os.getpid(), self.signum)
        return {"looks": float(self.looks), "burnt_in": float(burnt_in)}

    def state_dict(self):
        return {"looks": torch.tensor(self.looks)}

    def load_state_dict(self, state):
        self.looks = int(state["looks"])


def run(
    folder,
    *,
    plan=PLAN,
    model=normalised,
    network=lambda: nn.Linear(2, 2),
    source=InstanceWeights,
    minibatches="importance",
    step_size=0.01,
    data=None,
    stop_at=None,
    stop_chain=0,
    signum=signal.SIGTERM,
    chains=1,
    **options,
):
    train, meta = data or two_sets()

    def make(chain, generator):
        own = network()
        parts = Parts(own, source(), SparsityPrior(0.25, scale=2.0))
        kernel = SGLD(
            bind(model, parts),
            step_size=step_size,
            generator=generator,
            train_batch=5,
            meta_batch=3,
            minibatches=minibatches,
        )
        at = stop_at if chain == stop_chain else None
        return kernel, Watch(own, cross_entropy, train, meta, stop_at=at, signum=signum)

    return run_chains(make, train, meta, plan=plan, folder=folder, chains=chains, **options)


def same(first, second) -> bool:
    return np.array_equal(first.draws.w, second.draws.w) and all(
        np.array_equal(first.draws.values[name], values)
        for name, values in second.draws.values.items()
    )


# plans


def test_a_plan_counts_its_draws():
    assert Plan(100).first == 50 and Plan(100).draws == 5
    assert PLAN.draws == 6 and PLAN.snapshot_draws(6) == {3, 6}
    assert Plan(100, snapshots=0).snapshot_draws(5) == set()
    assert Plan(100, snapshots=50).snapshot_draws(5) == {1, 2, 3, 4, 5}
    assert Plan(1000).evaluation_steps == 100 and Plan(5, thinning=1).evaluation_steps == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"thinning": 0}, "thinning must be at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"check_every": -1}, "check_every must be at least 1, got -1"),
        ({"snapshots": -1}, "snapshots must be 0 or more, got -1"),
        ({"steps": 10, "burn_in": 10}, "burn_in must be from 0 to steps - 1 = 9, got 10"),
        ({"steps": 10, "burn_in": -1}, "burn_in must be from 0 .*got -1"),
        ({"steps": 10, "burn_in": 4, "thinning": 7}, "at most steps - burn_in = 6, got 7"),
    ],
)
def test_a_plan_that_makes_no_draw_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        Plan(**values)


# what a run makes


def test_draws_go_to_disk_and_carry_the_functions_of_theta(tmp_path):
    (result,) = run(tmp_path)
    folder = tmp_path / "chain-0"
    assert (folder / "w.f32").stat().st_size == PLAN.draws * 24 * 4
    assert isinstance(result.draws.w, np.memmap) and result.draws.w.shape == (6, 24)
    assert result.draws.values["step"].tolist() == [23, 26, 29, 32, 35, 38]
    assert set(result.draws.values) == {
        *("step", "potential", "train_loss", "meta_loss", "norm.weight", "norm.bias")
    }
    assert sorted(p.name for p in folder.glob("snapshot-*")) == [
        "snapshot-000003.safetensors",
        "snapshot-000006.safetensors",
    ]


def test_the_last_draw_describes_the_state_at_its_step(tmp_path):
    train, meta = two_sets()
    plan = Plan(30, burn_in=20, thinning=5)
    (result,) = run(tmp_path, plan=plan)  # the last draw is made at the last step
    kernel, values = result.kernel, result.draws.values
    network = kernel.latents.networks["theta"].module
    loss = cross_entropy(network(meta.input), meta.target).mean().detach()
    assert values["meta_loss"][-1] == pytest.approx(float(loss))
    assert values["norm.weight"][-1] == pytest.approx(float(network.weight.detach().norm()))
    potential = kernel.latents.joint_potential(train.full(), meta.full())
    assert values["potential"][-1] == pytest.approx(float(potential))
    assert np.allclose(result.draws.w[-1], kernel.site_values())


def test_metrics_are_rows_of_json(tmp_path):
    plan = Plan(40, burn_in=20, thinning=3, evaluate_every=15)
    results = run(tmp_path, plan=plan, chains=2)
    for chain, result in enumerate(results):
        text = (tmp_path / f"chain-{chain}" / METRICS).read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert rows == result.metrics
        assert [row["step"] for row in rows] == [15, 30, 40]  # and at the end
        assert [row["burnt_in"] for row in rows] == [0, 1, 1]
        assert {row["chain"] for row in rows} == {chain}
        assert all(0 < row["mean_w"] < 1 and row["meta_loss"] > 0 for row in rows)


def test_given_weights_are_recorded_in_place_of_the_latent_ones(tmp_path):
    (result,) = run(tmp_path, weights=lambda kernel, rows=None: torch.arange(7.0), size=7)
    assert result.draws.w[2].tolist() == list(range(7))


# randomness


def test_one_seed_gives_one_result_and_chains_and_seeds_differ(tmp_path):
    first = run(tmp_path / "a", chains=2, network=dropout, model=joint)
    again = run(tmp_path / "b", chains=2, network=dropout, model=joint)
    other = run(tmp_path / "c", network=dropout, model=joint, seed=1)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not same(first[0], first[1]) and not same(first[0], other[0])
    starts = {float(chain.draws.values["norm.0.weight"][0]) for chain in [*first, *other]}
    assert len(starts) == 3  # networks start apart as well


def test_a_chain_does_not_depend_on_how_many_run(tmp_path):
    one = run(tmp_path / "a")
    three = run(tmp_path / "b", chains=3)
    assert same(one[0], three[0])


def test_the_global_generator_is_neither_relied_on_nor_touched(tmp_path):
    torch.manual_seed(1)
    first = run(tmp_path / "a", network=dropout, model=joint)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = run(tmp_path / "b", network=dropout, model=joint)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first[0], second[0])


def test_generators_of_chains_and_seeds_are_unrelated():
    seeds = {chain_generator(s, c).initial_seed() for s in range(20) for c in range(20)}
    assert len(seeds) == 400
    assert chain_generator(3, 1).initial_seed() == chain_generator(3, 1).initial_seed()


# stop and resume


@pytest.mark.parametrize("stop_at", [1, 20, 23, 31, 39])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": joint, "minibatches": "uniform"},
        {"network": dropout, "model": joint},
        {
            "network": dropout,
            "model": joint,
            "source": lambda: WeightNetwork(6),
            "minibatches": "uniform",
        },
    ],
    ids=["normalised", "joint", "dropout", "weight network"],
)
def test_resumed_chains_equal_chains_that_never_stopped(tmp_path, stop_at, options):
    (straight,) = run(tmp_path / "a", **options)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "b", stop_at=stop_at, **options)
    assert stopped.value.signum == signal.SIGTERM
    (resumed,) = run(tmp_path / "b", resume=True, **options)
    assert same(resumed, straight)
    assert resumed.metrics == straight.metrics
    state, wanted = resumed.kernel.state_dict(), straight.kernel.state_dict()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())
    for name in ("snapshot-000003.safetensors", "snapshot-000006.safetensors"):
        a, b = ((tmp_path / x / "chain-0" / name).read_bytes() for x in "ab")
        assert a == b


def test_ctrl_c_in_the_second_chain_keeps_the_first(tmp_path):
    straight = run(tmp_path / "a", chains=3)
    with pytest.raises(Stopped, match="SIGINT with a checkpoint: run again with resume=true"):
        run(tmp_path / "b", chains=3, stop_chain=1, stop_at=25, signum=signal.SIGINT)
    assert not (tmp_path / "b" / "chain-2").exists()
    resumed = run(tmp_path / "b", chains=3, resume=True)
    assert all(same(a, b) for a, b in zip(resumed, straight, strict=True))


def test_a_crash_goes_on_from_the_checkpoint_before(tmp_path):
    (straight,) = run(tmp_path / "a")
    with pytest.raises(Stopped):
        run(tmp_path / "b", stop_at=25)
    folder = tmp_path / "b" / "chain-0"
    with (folder / "w.f32").open("ab") as file:  # draws after the checkpoint, one of them torn
        file.write(b"x" * (24 * 4 + 10))
    (folder / "snapshot-000004.safetensors").write_bytes(b"")
    (resumed,) = run(tmp_path / "b", resume=True)
    assert same(resumed, straight)
    assert len(list(folder.glob("snapshot-*"))) == 2


def test_networks_of_a_run_without_a_checkpoint_are_not_kept(tmp_path):
    folder = tmp_path / "chain-0"
    folder.mkdir()
    (folder / "snapshot-000001.safetensors").write_bytes(b"of a run that was killed")
    run(tmp_path)
    assert not (folder / "snapshot-000001.safetensors").exists()


def test_a_lengthened_chain_begins_as_the_short_one_and_equals_a_long_one(tmp_path):
    long = Plan(80, burn_in=20, thinning=3, snapshots=2, evaluate_every=1)
    (straight,) = run(tmp_path / "a", plan=long)
    (short,) = run(tmp_path / "b")
    first = short.draws.w.copy()
    (lengthened,) = run(tmp_path / "b", plan=long, resume=True)
    assert len(lengthened.draws) == long.draws == 20
    assert np.array_equal(lengthened.draws.w[:6], first)
    assert same(lengthened, straight) and lengthened.metrics == straight.metrics


def test_a_finished_chain_resumes_to_itself(tmp_path):
    (first,) = run(tmp_path)
    w = first.draws.w.copy()
    (again,) = run(tmp_path, resume=True)
    assert np.array_equal(again.draws.w, w) and again.metrics == first.metrics


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    assert len(run(tmp_path, resume=True)[0].draws) == PLAN.draws


def test_checkpoints_are_written_as_time_goes_by(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(
        "bads_ppl.chains.save_checkpoint",
        lambda path, tensors, about: steps.append(int(tensors["kernel/steps"])),
    )
    plan = Plan(5, burn_in=0, thinning=1, checkpoint_seconds=0.0)
    run(tmp_path, plan=plan)
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("tables", [("disk", "disk"), ("memory", "disk"), ("disk", "memory")])
@pytest.mark.parametrize("minibatches", ["importance", "uniform"])
def test_where_weights_are_held_changes_nothing_even_between_a_stop_and_going_on(
    tmp_path, tables, minibatches
):
    (straight,) = run(tmp_path / "a", minibatches=minibatches)
    with pytest.raises(Stopped):
        run(tmp_path / "b", stop_at=25, minibatches=minibatches, table=tables[0])
    (resumed,) = run(tmp_path / "b", resume=True, minibatches=minibatches, table=tables[1])
    assert (resumed.kernel.folder is not None) == (tables[1] == "disk")
    assert same(resumed, straight) and resumed.metrics == straight.metrics
    names = [{p.name for p in (tmp_path / run / "chain-0").iterdir()} for run in "ab"]
    assert names[0] == names[1]  # nothing is left of a table on disk


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped):
        run(tmp_path, stop_at=3)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_chains_run_outside_of_the_main_thread(tmp_path):
    (wanted,) = run(tmp_path / "a")
    found = []
    thread = threading.Thread(target=lambda: found.extend(run(tmp_path / "b")))
    thread.start()
    thread.join()
    assert same(found[0], wanted)


# refused


def test_a_folder_with_a_chain_is_not_overwritten(tmp_path):
    run(tmp_path)
    before = (tmp_path / "chain-0" / CHECKPOINT).read_bytes()
    with pytest.raises(InputError, match="holds a chain already: use resume=true"):
        run(tmp_path)
    assert (tmp_path / "chain-0" / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "ram"}, "table must be one of memory, disk, got 'ram'"),
        ({"settings": {"sparsity": 0.2}}, "its settings is .*expected .*0.2"),
        ({"seed": 1}, "its seed is 0, expected 1"),
        ({"data": two_sets(5)}, "its train is"),
        ({"data": (two_sets(1)[0], two_sets(5)[1])}, "its meta is"),
        ({"plan": Plan(60, burn_in=30, thinning=3)}, "its burn_in is 20, expected 30"),
        ({"plan": Plan(60, burn_in=20, thinning=2)}, "its thinning is 3, expected 2"),
        ({"plan": Plan(30, burn_in=20, thinning=3)}, "has 40 steps already, more than the 30"),
        ({"network": lambda: nn.Linear(2, 3)}, "has shape"),
        ({"model": joint}, "another program"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_lost(tmp_path, options, message):
    (first,) = run(tmp_path)
    w = first.draws.w.copy()
    with pytest.raises(InputError, match=message):
        run(tmp_path, resume=True, **options)
    assert np.array_equal(run(tmp_path, resume=True)[0].draws.w, w)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run(tmp_path)
    (tmp_path / "chain-0" / CHECKPOINT).write_bytes(b"damaged")
    with pytest.raises(InputError, match="it is damaged; remove it to start that chain anew"):
        run(tmp_path, resume=True)


def test_no_chain_and_no_seed_are_refused(tmp_path):
    with pytest.raises(InputError, match="chains must be at least 1, got 0"):
        run(tmp_path, chains=0)
    with pytest.raises(InputError, match="seed must be 0 or more, got -1"):
        run(tmp_path, seed=-1)


def test_a_chain_that_diverges_stops_with_its_last_good_checkpoint(tmp_path):
    plan = Plan(40, burn_in=20, thinning=3, evaluate_every=1, check_every=1)
    with pytest.raises(Stopped):
        run(tmp_path, plan=plan, stop_at=2)
    before = (tmp_path / "chain-0" / CHECKPOINT).read_bytes()
    with pytest.raises(Diverged, match=r"Try smaller ones: theta="):
        run(tmp_path, plan=plan, resume=True, step_size={"theta": 1e30, "w": 0.01})
    assert (tmp_path / "chain-0" / CHECKPOINT).read_bytes() == before


def test_fingerprints_tell_sets_apart():
    x, y = torch.randn(10, 2, generator=torch.Generator()), torch.arange(10) % 2
    changed = x.clone()
    changed[7, 1] += 1e-6
    sets = [
        Data(x, y),
        Data(changed, y),
        Data(x, 1 - y),
        Data(x, y, torch.arange(10) + 1),
        Data({"a": x, "b": x}, y),
    ]
    assert len({fingerprint(data) for data in sets}) == len(sets)
    assert fingerprint(Data(x.clone(), y.clone())) == fingerprint(sets[0])


def test_probes_are_the_whole_set_where_it_is_small():
    train, meta = two_sets()
    monitor = ThetaMonitor(nn.Linear(2, 2), cross_entropy, train, meta, {"test": meta}, probe=20)
    assert len(monitor.probes["train"]) == 20
    assert len(set(monitor.probes["train"].index.tolist())) == 20
    assert monitor.probes["test"].index.tolist() == list(range(8))


def test_a_collapse_of_the_weights_is_said_once_a_chain(tmp_path, caplog):
    def gone(kernel, *, rows=None):
        return torch.full((24,), 1e-6)

    run(tmp_path / "a", weights=gone, target=0.5, chains=2)  # evaluates at every step
    said = [record.getMessage() for record in caplog.records if "close to 0" in record.message]
    assert [text.split(":")[0] for text in said] == ["chain 0, step 1", "chain 1, step 1"]
    caplog.clear()
    run(tmp_path / "b", target=0.5)
    run(tmp_path / "c", weights=gone)  # weights that are given have no target
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("others", [0.9, 1e-6])
def test_all_weights_are_looked_at_only_where_some_are_at_one_end(tmp_path, caplog, others):
    w = torch.full((3 * FEW,), others)
    w[spaced(len(w), FEW)] = 1e-6
    sizes = []

    def look(kernel, *, rows=None):
        sizes.append(len(w if rows is None else w[rows]))
        return w if rows is None else w[rows]

    plan = Plan(20, burn_in=18, thinning=2, snapshots=0, evaluate_every=10)
    run(tmp_path, plan=plan, weights=look, size=len(w), target=0.5)
    said = [record for record in caplog.records if "close to 0" in record.message]
    gone = others < 0.5
    assert len(said) == gone
    assert sizes == ([FEW, len(w), len(w)] if gone else [FEW, len(w), len(w), FEW, len(w)])
    w[spaced(len(w), FEW)] = 0.5
    sizes.clear()
    run(tmp_path / "again", plan=plan, weights=look, size=len(w), target=0.5)
    assert sizes == [FEW, len(w), FEW]  # a draw has them all
