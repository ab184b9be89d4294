import gc
import random
import re
import weakref
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from bads_ppl import (
    SGHMC,
    SGLD,
    CyclicalSGLD,
    Data,
    InstanceWeights,
    NormalPrior,
    Parts,
    PreconditionedSGLD,
    SparsityPrior,
    WeightNetwork,
    bind,
)
from bads_ppl.errors import InputError
from bads_ppl.graphs import MOST, Graphs, Outcome, garbage_kept, waits
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.losses import cross_entropy
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.primitives import running_mean, steps_taken
from bads_ppl.schedules import Warmdown
from bads_ppl.tracing import Told
from models import joint, normalised
from models.bilevel import bilevel
from models.learned_sparsity import learned_sparsity
from models.lenet5 import LeNet5

CLIP = {"theta": 0.3, "w": 3.0}


@pytest.fixture(autouse=True)
def gradients_are_the_same_every_time(monkeypatch):
    """Else those of convolutions on CUDA differ by rounding, which adapted steps make more of."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def simple_mean(train, meta, parts):
    joint(train, meta, parts)
    running_mean("mean", train.total(train.target.float()), window=4, kind="simple")


CASES = {
    "joint": (joint, "instance", SGLD, {"minibatches": "importance", "clip": CLIP}),
    "local steps": (joint, "instance", SGLD, {"local_steps": 3}),
    "network": (joint, "network", SGLD, {}),
    "reverted": (normalised, "instance", SGLD, {"minibatches": "importance"}),
    "restarted": (
        partial(normalised, auxiliary="restarted", window=7),
        "network",
        partial(SGHMC, friction={"theta": 0.3, "phi": 1.0}),
        {},
    ),
    "preconditioned": (normalised, "instance", PreconditionedSGLD, {}),
    "preconditioned in warm-up": (joint, "instance", PreconditionedSGLD, {}),
    "cyclical": (joint, "instance", partial(CyclicalSGLD, cycle=8), {}),
    "simple mean": (simple_mean, "instance", SGLD, {}),
    "persistent": (partial(normalised, auxiliary="persistent"), "instance", SGLD, {}),
    "scales": (joint, "network", SGLD, {"prior": NormalPrior(0.3, {"head.bias": 1.0})}),
    "running total": (joint, "instance", SGLD, {"total": "running_mean"}),
    "momentum of rows": (joint, "instance", partial(SGHMC, friction=0.3), {}),
    "bilevel": (partial(bilevel, rate=0.1), "instance", SGLD, {"temperature": 0.0}),
    "learned sparsity": (learned_sparsity, "instance", SGLD, {"step_size": 1e-6}),
    "adapted": (joint, "network", SGLD, {"target_acceptance": 0.8}),
    "warmdown": (joint, "network", SGLD, {"step_size": Warmdown(1e-4, 1e-5, 25)}),
}


def made(name, device="cpu", **options):
    model, kind, sampler, given = CASES[name]
    given = dict(given)
    sparsity = SparsityPrior(0.2, total=given.pop("total", "exact"))
    prior = given.pop("prior", NormalPrior(0.3))
    g = torch.Generator().manual_seed(1)
    train, meta = (
        Data(
            torch.randn(count, 1, 28, 28, generator=g),
            torch.randint(10, (count,), generator=g),
            name=what,
        ).to(device)
        for count, what in ((90, "train"), (30, "meta"))
    )
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = LeNet5(width=2)
        weights = InstanceWeights(mean=0.2)
        if kind == "network":
            weights = WeightNetwork(network.head.in_features, 10, initial=0.2).to(device)
    parts = Parts(network.to(device), weights, sparsity, prior=prior)
    group = "w" if kind == "instance" else "phi"
    kernel = sampler(
        bind(model, parts),
        **{
            "step_size": {"theta": 1e-5, group: 1e-3},
            "temperature": {"theta": 1e-3},
            "train_batch": 20,
            "meta_batch": 10,
            "generator": torch.Generator(device=device).manual_seed(3),
            **given,
            **options,
        },
    )
    kernel.setup(30, train, meta)
    return kernel


def copy_told(found, outcome):
    for term, value in found.told.terms.items():
        outcome.told.terms[term].copy_(value)
    for term, scale in found.told.scales.items():
        if isinstance(scale, torch.Tensor):
            outcome.told.scales[term].copy_(scale)


def recorder(kernel, copy=copy_told):
    """Records as CUDA does: nothing happens but at a replay, and then with the constants of old.

    `copy` puts what a replay gives where the recorded step left it.
    """

    def host():
        return kernel.steps, kernel.latents.steps, [m.count for m in kernel.latents.means.values()]

    def put(values):
        kernel.steps, kernel.latents.steps, counts = values
        for mean, count in zip(kernel.latents.means.values(), counts, strict=True):
            mean.count = count

    def record(body):
        then = host()
        state, drawn = kernel._tensors(), kernel.generator.get_state()
        kept = {name: tensor.detach().clone() for name, tensor in state.items()}
        clipped = {name: count.clone() for name, count in kernel.clipped.items()}
        outcome = body()
        with torch.no_grad():
            for name, tensor in kept.items():
                state[name].copy_(tensor)
            for name, count in clipped.items():
                kernel.clipped[name].copy_(count)
        kernel.generator.set_state(drawn)

        def replay():
            now = host()
            put(then)
            found = body()
            put(now)
            copy(found, outcome)

        return replay, outcome

    return record


@pytest.mark.parametrize("name", CASES)
def test_steps_from_graphs_are_the_steps_themselves(name):
    plain, other = made(name), made(name)
    graphs = Graphs(
        *(other._update, other.generator, other._tensors, torch.device("cpu")),
        record=recorder(other),
        watch=lambda: nullcontext([]),
    )
    other.graphs = graphs
    for _ in range(50):
        plain.step()
        other.step()
        assert float(plain.potential) == float(other.potential)
        assert plain.report() == other.report()
    first, second = plain.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert graphs.graphs


def watched(kernel):
    """The default monitor of a kernel, on a part of its points."""
    module = kernel.latents.networks["theta"].module
    return ThetaMonitor(module, cross_entropy, kernel.train, kernel.meta, probe=40)


@pytest.mark.parametrize("name", CASES)
def test_draws_from_graphs_are_the_draws_themselves(name, monkeypatch):
    kernel = made(name)
    monitor = watched(kernel)
    options = {
        "record": recorder(kernel, lambda found, outcome: outcome[1].copy_(found[1])),
        "watch": lambda: nullcontext([]),
    }
    monkeypatch.setattr("bads_ppl.kernel.Graphs", partial(Graphs, **options))
    for _ in range(14):  # more than a mean of the last 10 takes
        kernel.step()
        with monkeypatch.context() as patch:
            patch.setattr(MinibatchKernel, "recorded", True)
            found = monitor.on_draw(kernel)
        assert monitor.on_draw(kernel) == found
    (graphs,) = kernel.looks.values()
    assert graphs.graphs
    kernel.drop_graphs()
    assert not kernel.looks


def fill(change=lambda state: state["x"].add_(1), **options):
    """Graphs of a body that changes a state, the rows it ran on, and its state."""
    ran, state = [], {"x": torch.zeros(())}

    def body(rows):
        ran.append(rows.tolist())
        change(state)
        return Outcome(Told({}, {}), [])

    def record(body):
        return body, Outcome(Told({}, {}), [])

    options = {"record": record, "watch": lambda: nullcontext([]), **options}
    graphs = Graphs(body, torch.Generator(), lambda: state, torch.device("cpu"), **options)
    return graphs, ran, state


def test_a_graph_reads_the_rows_of_its_step():
    graphs, ran, _ = fill()
    for k in range(6):
        graphs.run("a", torch.tensor([k, k + 1]))
    assert ran == [[k, k + 1] for k in range(6)]
    assert len(graphs.graphs) == 1


def test_steps_whose_constants_do_not_come_back_are_not_recorded():
    graphs, ran, _ = fill()
    for k in range(50):
        graphs.run(k, torch.tensor([k]))
    assert not graphs.graphs
    assert len(ran) == 50


def test_constants_that_will_not_come_back_leave_room_for_others():
    graphs, _, _ = fill()
    for _ in range(3):
        for k in range(MOST):
            graphs.run(k, torch.tensor([k]))
    assert len(graphs.graphs) == MOST
    for _ in range(2):
        graphs.run("after", torch.tensor([1]))
    assert "after" not in graphs.graphs
    graphs.forget()
    for _ in range(2):
        graphs.run("after", torch.tensor([1]))
    assert "after" in graphs.graphs


def test_graphs_that_follow_others_have_memory_of_their_own(monkeypatch):
    monkeypatch.setattr("bads_ppl.graphs.Recorder", lambda *_: object())
    graphs = Graphs(lambda *_: None, torch.Generator(), dict, torch.device("cpu"))
    first = graphs.record
    graphs.forget()
    assert graphs.record is not first


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_kept_for_a_while_and_then_collected_as_before(collects):
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(KeyboardInterrupt), garbage_kept():
            assert not gc.isenabled()
            raise KeyboardInterrupt
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


def draws(state):
    torch.randn(())
    state["x"].add_(1)


def chooses(state):
    random.random()
    state["x"].add_(1)


def chooses_by_numpy(state):
    np.random.random()
    state["x"].add_(1)


def rebinds(state):
    state["x"] = state["x"] + 1


UNFIT = {
    "waits": ({"watch": lambda: nullcontext(["program.py:7"])}, "waits .* at program.py:7"),
    "draws": ({"change": draws}, "draws random numbers on the host"),
    "chooses": ({"change": chooses}, "draws random numbers on the host"),
    "chooses by numpy": ({"change": chooses_by_numpy}, "draws random numbers on the host"),
    "rebinds": ({"change": rebinds}, "puts a new tensor in the place of x"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_steps_that_a_graph_would_change_are_not_recorded(name, caplog):
    options, reason = UNFIT[name]
    caplog.set_level("INFO")
    graphs, ran, state = fill(**options)
    for _ in range(5):
        graphs.run("a", torch.tensor([1]))
    assert len(ran) == 5
    assert float(state["x"]) == 5
    assert not graphs.graphs
    assert re.search(reason, caplog.text)


@pytest.mark.parametrize("name", UNFIT)
def test_such_steps_are_refused_where_graphs_are_asked_for(name):
    options, reason = UNFIT[name]
    graphs, _, _ = fill(**options, needed=True)
    graphs.run("a", torch.tensor([1]))
    with pytest.raises(InputError, match=rf"{reason}.*Leave cuda_graph=true out"):
        graphs.run("a", torch.tensor([1]))


def test_a_step_that_cannot_be_recorded_is_refused_with_the_remedy():
    def record(body):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs, _, _ = fill(record=record)
    graphs.run("a", torch.tensor([1]))
    graphs.run("a", torch.tensor([1]))
    with pytest.raises(InputError, match=r"not permitted.*take cuda_graph=false"):
        graphs.run("a", torch.tensor([1]))


def test_graphs_are_refused_without_cuda():
    with pytest.raises(InputError, match="cuda_graph=true needs device=cuda, got cpu"):
        made("joint", cuda_graph=True)


def test_there_are_none_where_they_are_not_possible():
    assert made("joint").graphs is None


# ------------------------------------------------------------------------------ on a GPU


def close(first, second):
    for key, value in first.state_dict().items():
        other = second.state_dict()[key]
        if value.is_floating_point():
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=key)
        else:
            assert torch.equal(value, other), key


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_recorded_steps_are_the_steps_themselves(name):
    plain, other = made(name, "cuda", cuda_graph=False), made(name, "cuda")
    for _ in range(50):
        plain.step()
        other.step()
    assert other.graphs.graphs
    close(plain, other)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CASES if name != "adapted"])
def test_the_host_waits_for_nothing_in_a_step(name):
    kernel = made(name, "cuda", cuda_graph=False)
    kernel.step()
    for _ in range(12):
        with waits() as found:
            kernel.step()
        assert not found


@pytest.mark.gpu
def test_a_recording_outlives_the_graphs_of_a_kernel_that_is_gone():
    """Such a kernel is garbage in a cycle, and is collected whenever Python sees fit."""
    threshold = gc.get_threshold()
    gc.set_threshold(1_000_000)
    try:
        gone, kernel = made("joint", "cuda"), made("joint", "cuda")
        for _ in range(6):
            gone.step()
        assert gone.graphs.graphs
        record = kernel.graphs.record

        def eager(body):
            def collected():
                gc.set_threshold(1, 1, 1)  # at the next object
                return body()

            return record(collected)

        kernel.graphs.record = eager
        gone.itself, alive = gone, weakref.ref(gone)
        del gone
        assert alive() is not None
        for _ in range(6):
            kernel.step()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert alive() is None
    assert kernel.graphs.graphs


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_recorded_draws_are_the_draws_themselves(name):
    kernel = made(name, "cuda")
    monitor = watched(kernel)
    for step in range(1, 61):
        kernel.step()
        if step % 3:
            continue
        potential = float(kernel.potential)
        found = monitor.on_draw(kernel)
        names, values = monitor._functions(kernel.latents)
        assert found == pytest.approx(dict(zip(names, values.tolist(), strict=True)), rel=1e-5)
        assert float(kernel.potential) == potential  # the memory of steps is not that of draws
    (graphs,) = kernel.looks.values()
    assert graphs.graphs


@pytest.mark.gpu
def test_what_waits_is_found():
    value = torch.ones((), device="cuda")
    with waits() as found:
        float(value)
    assert found
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.gpu
def test_a_recorded_chain_resumes_where_it_was():
    whole, first = made("reverted", "cuda"), made("reverted", "cuda")
    for _ in range(140):
        whole.step()
    for _ in range(120):
        first.step()
    state = first.state_dict()
    second = made("reverted", "cuda")
    second.load_state_dict(state)
    for _ in range(20):
        second.step()
    assert whole.graphs.graphs
    close(whole, second)


@pytest.mark.gpu
def test_a_program_that_waits_steps_without_graphs():
    kernel = made("joint", "cuda")
    program = kernel.program

    def waiting(train, meta):
        assert float(train.target.sum()) >= 0
        program(train, meta)

    kernel.program = kernel.latents.program = waiting
    for _ in range(5):
        kernel.step()
    assert kernel.graphs.works is False
    assert kernel.steps == 5


@pytest.mark.gpu
def test_a_program_that_changes_with_the_steps_has_no_graphs():
    def changing(train, meta, parts):
        steps_taken()
        joint(train, meta, parts)

    CASES["changing"] = (changing, "instance", SGLD, {})
    try:
        assert made("changing", "cuda").graphs is None
    finally:
        del CASES["changing"]


@pytest.mark.gpu
def test_augmented_steps_draw_other_views_every_time():
    kernel = made("joint", "cuda")
    seen = torch.zeros(8, device="cuda")
    count = torch.zeros((), dtype=torch.long, device="cuda")

    def noisy(images, generator):
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        seen.index_copy_(0, count.remainder(8).view(1), noise.sum().view(1))
        count.add_(1)
        return images + noise

    kernel.train.augment = noisy
    for _ in range(8):
        kernel.step()
    assert kernel.graphs.graphs
    assert len(set(seen.tolist())) == 8
