"""Chains: run a kernel for burn-in and draws, write what it makes, and stop and resume cleanly.

Each chain has a folder of its own, `chain-<k>`, with draws, metrics and one checkpoint. A chain
that was stopped, by a signal or a crash, continues from its checkpoint; on the CPU the result is
bit-identical to that of a run without the stop. Where several processes run a chain together
(`bads_ppl.ranks`), the first of them writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from bads_ppl.atomic import atomic_path
from bads_ppl.checkpoint import load_checkpoint, save_checkpoint
from bads_ppl.data import Data, spaced
from bads_ppl.draws import ChainDraws, DrawWriter, read_draws
from bads_ppl.errors import InputError, Stopped
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.monitors import Monitor
from bads_ppl.plan import Plan
from bads_ppl.program import Impact
from bads_ppl.ranks import ALONE, Ranks
from bads_ppl.shards import together
from bads_ppl.snapshots import drop_snapshots, save_snapshot
from bads_ppl.turns import After, Steps, in_turns
from bads_ppl.verdict import collapsed
from bads_ppl.workers import Report, choose_workers, run_side_by_side

log = logging.getLogger(__name__)

TABLES = ("memory", "disk")
"""Where local latents may be held."""

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"


@dataclass(frozen=True)
class ChainResult:
    """A finished chain: its draws, and its kernel and monitor as they ended."""

    draws: ChainDraws
    kernel: MinibatchKernel
    monitor: Monitor
    metrics: list[dict[str, Any]]
    seconds: float


def chain_generator(seed: int, chain: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one chain: distinct chains and seeds give unrelated streams."""
    words = np.random.SeedSequence([seed, chain]).generate_state(3, np.uint32)
    value = (int(words[0]) << 31) ^ int(words[1])
    return torch.Generator(device=device).manual_seed(value)


def global_seed(seed: int, chain: int) -> int:
    """Seed of torch's global generator for one chain: unrelated to the chain's own stream."""
    return int(np.random.SeedSequence([seed, chain]).generate_state(3, np.uint32)[2])


def fingerprint(data: Data, inputs: int | None = 4096) -> str:
    """Hash of a set's ids, targets and inputs in their order: tells data sets apart.

    Of the inputs `inputs` evenly spaced ones count, or all where it is None.
    """
    digest = hashlib.blake2b(digest_size=16)
    rows: Tensor | slice = slice(None)
    if inputs is not None and len(data) > inputs:
        rows = torch.linspace(0, len(data) - 1, inputs, device=data.device).long()
    for tensor in (data.ids, data.target, *(x[rows] for x in tree_leaves(data.input))):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def evidence(chains: Sequence[ChainResult], impact: Impact) -> str:
    """What the draws of all chains may be called: the weakest of `MinibatchKernel.evidence`.

    Impact constants (24), (25) that differ for theta and w make them "approximate" at best.
    """
    found = {chain.kernel.evidence for chain in chains}
    if impact.weight != impact.train:
        found.add("approximate")
    order = ("optimisation path", "approximate", "calibrated")
    return next(name for name in order if name in found)


Make = Callable[[int, torch.Generator], tuple[MinibatchKernel, Monitor]]
"""Builds a chain's kernel and monitor from its number and generator."""

FEW = 64
"""Number of points whose weights are looked at before all are, for a collapse."""


class LookAtWeights(Protocol):
    """The weights (N,) of all points, or (M,) of those at `rows` (M,), given a chain's kernel."""

    def __call__(self, kernel: MinibatchKernel, /, *, rows: Tensor | None = None) -> Tensor: ...


def run_chains(
    make: Make,
    train: Data,
    meta: Data,
    *,
    plan: Plan,
    folder: Path,
    chains: int = 4,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    facts: Mapping[str, str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
    target: float | None = None,
    weights: LookAtWeights = MinibatchKernel.site_values,
    size: int | None = None,
    workers: int | None = 1,
    table: Literal["memory", "disk"] = "memory",
    cuda_graph: bool | None = None,
    ranks: Ranks = ALONE,
    apart: bool = False,
) -> list[ChainResult]:
    """Run chains, one after the other or several at a time.

    Args:
        make: builds a chain's kernel and monitor. It may build and initialise a network: torch's
            global generator is set for it from the chain's own, and is as it was afterwards.
        train: train set, on the device of the networks.
        meta: meta set.
        plan: lengths, in steps.
        folder: gets one folder `chain-<k>` per chain.
        chains: number of chains, at least 1.
        seed: with the chain's number, the source of all randomness.
        settings: JSON-able settings that a checkpoint must share to be resumed.
        facts: what else it must share, by name: hashes of what the program depends on.
        resume: continue from checkpoints where there are any.
        progress: show a progress bar; None: when standard error is a terminal.
        target: beta, shown beside the mean weight, and against which a collapse of the weights is
            told; None: neither.
        weights: gives the weights (N,) to record for a draw.
        size: N, where it is not the size of the train set.
        workers: chains at a time; 1: one after the other. On the CPU each has a process of its own
            with one thread; None: as many as there are cores, where that is of use
            (`bads_ppl.workers`). On CUDA they take turns in this process, where their steps are
            recorded (`bads_ppl.turns`); None: all.
        table: where local latents are held. "disk": in a file in the chain's folder, of which
            memory holds what was looked at last; it needs the CPU. Results are the same.
        cuda_graph: whether steps are recorded as CUDA graphs, see `MinibatchKernel`; None: as each
            kernel says. Results are the same.
        ranks: processes that call this together, with the same arguments. They run every chain
            together; the kernels must have the same `ranks`.
        apart: each of them runs chains of its own instead, and each has all results in the end.

    Raises:
        InputError: if a folder holds draws of another run, or a checkpoint does not fit.
        Diverged: if a chain reaches a non-finite potential; its last good checkpoint stays.
        Stopped: after SIGINT or SIGTERM, once a checkpoint is written.
        RanksError: if one of the processes ends or holds another state.
    """
    if chains < 1:
        raise InputError(f"chains must be at least 1, got {chains}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    if table not in TABLES:
        raise InputError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    about = {
        "settings": settings or {},
        **(facts or {}),
        "seed": seed,
        "burn_in": plan.first,
        "thinning": plan.thinning,
        "train": fingerprint(train),
        "meta": fingerprint(meta),
    }
    hidden = True if not ranks.first else None if progress is None else not progress
    count = choose_workers(workers, chains, train.device) if ranks.alone else 1
    if not ranks.alone and workers not in (None, 1):
        raise InputError(f"workers must be 1 in a run of {ranks.size} processes, got {workers}")
    with (
        catch_signals() as stop,
        tqdm(total=chains * plan.steps, disable=hidden, unit="step") as bar,
    ):
        show = None if bar.disable else _Progress(bar, target)
        runner = _Runner(
            *(make, train, meta, plan, about, resume, weights, size or len(train), target, table),
            cuda_graph=cuda_graph,
            show=show,
            stop=stop,
            ranks=ALONE if apart else ranks,
        )
        folders = [folder / f"chain-{chain}" for chain in range(chains)]
        if count > 1 and train.device.type == "cpu":
            runner.check_new(folders)

            def work(chain: int, report: Report) -> None:
                with suppress(Stopped):  # the parent knows; it has a checkpoint to go on from
                    replace(runner, show=report).run(folders[chain], chain, seed)

            run_side_by_side(work, list(range(chains)), count, show or (lambda *_: None), stop)
            if stop:
                raise Stopped(stop[0])
            runner = replace(runner, resume=True, show=None)  # takes up what the workers ended
        elif apart and not ranks.alone:
            runner.check_new(folders)
            ranks.wait()
            for chain in range(ranks.rank, chains, ranks.size):
                runner.run(folders[chain], chain, seed)
            ranks.wait()
            runner = replace(runner, resume=True, show=None, writes=ranks.first)
        made = [partial(runner.steps, folders[chain], chain, seed) for chain in range(chains)]
        beside = count if train.device.type == "cuda" else 1
        return in_turns(made, beside, train.device, lambda: stop.append(signal.SIGTERM))


class _Progress:
    """Steps of all chains on one bar, with the last report of any."""

    def __init__(self, bar: Any, target: float | None) -> None:
        self.bar = bar
        self.target = target
        self.steps: dict[int, int] = {}

    def __call__(self, chain: int, steps: int, report: dict[str, float]) -> None:
        self.bar.update(steps - self.steps.get(chain, 0))
        self.steps[chain] = steps
        shown = {name: f"{value:.3g}" for name, value in report.items()}
        if self.target is not None and "mean_w" in shown:
            shown["mean_w"] += f" (beta {self.target:g})"
        self.bar.set_description(f"chain {chain}", refresh=False)
        self.bar.set_postfix(shown, refresh=False)


@dataclass(frozen=True)
class _Runner:
    """Runs single chains; holds what they share."""

    make: Make
    train: Data
    meta: Data
    plan: Plan
    about: dict[str, Any]
    resume: bool
    weights: LookAtWeights
    size: int
    target: float | None
    table: str
    cuda_graph: bool | None
    show: Report | None
    stop: list[int]
    ranks: Ranks
    writes: bool = True

    def check_new(self, folders: Sequence[Path]) -> None:
        """Refuse folders that hold a chain, unless it is to be resumed."""
        for folder in folders:
            if (folder / CHECKPOINT).exists() and not self.resume:
                raise InputError(
                    f"{folder} holds a chain already: use resume=true to continue it, "
                    "overwrite=true to replace it, or another run_dir"
                )

    def run(self, folder: Path, chain: int, seed: int) -> ChainResult:
        """One chain to its end."""
        (result,) = in_turns(
            [partial(self.steps, folder, chain, seed)], 1, self.train.device, lambda: None
        )
        return result

    def steps(self, folder: Path, chain: int, seed: int) -> Steps[ChainResult]:
        """One chain, which yields after every step; its generators are torch's global ones."""
        self.check_new([folder])
        generator = chain_generator(seed, chain, self.train.device)
        # Modules that draw from torch's global generator (initialisation, dropout) follow ours.
        torch.manual_seed(global_seed(seed, chain))
        kernel, monitor = self.make(chain, generator)
        kernel.folder = folder if self.table == "disk" else kernel.folder
        if self.cuda_graph is not None:
            kernel.cuda_graph = self.cuda_graph
        if kernel.ranks != self.ranks:
            raise InputError(
                f"a kernel of {kernel.ranks.size} processes cannot run in a chain of "
                f"{self.ranks.size}: give both the same ranks"
            )
        kernel.setup(self.plan.first, self.train, self.meta)
        state = _ChainState(folder / CHECKPOINT, {**self.about, "chain": chain}, kernel, monitor)
        if state.path.exists():
            state.load(self.plan.steps)
        kernel.check_together()
        complete = kernel.steps >= self.plan.steps
        with ExitStack() as stack:
            writer = None
            if self.ranks.first and self.writes:
                drop_snapshots(folder, after=state.draws)
                writer = stack.enter_context(DrawWriter(folder, self.size, keep=state.draws))
            yield from self._loop(chain, state, writer)
        if writer is not None:
            with atomic_path(folder / METRICS) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in state.metrics))
        self.ranks.wait()
        kernel.ranks = ALONE  # what is asked of it from here on, one process may ask
        kernel.drop_graphs()
        if not complete:  # else it is only read back
            log.info("chain %d: %d draws, %.1f s", chain, state.draws, state.seconds)
        draws = read_draws(folder, state.draws)
        return ChainResult(draws, kernel, monitor, state.metrics, state.seconds)

    def _loop(self, chain: int, state: _ChainState, writer: DrawWriter | None) -> Iterator[After]:
        kernel, monitor, plan, draws = state.kernel, state.monitor, self.plan, state.draws
        start, saved = time.monotonic() - state.seconds, time.monotonic()
        draw_at = set(plan.draw_steps(kernel.draws_at))
        snapshots = plan.snapshot_draws(len(draw_at))
        warned = False
        while kernel.steps < plan.steps:
            kernel.step()
            step, last = kernel.steps, kernel.steps == plan.steps
            burnt_in = step > plan.first
            evaluated = step % plan.evaluation_steps == 0 or last
            checked = step % plan.check_every == 0 or last
            waits = step in draw_at or evaluated or checked
            paused = time.monotonic()
            yield After.ALONE if not kernel.recorded else After.WAIT if waits else After.MORE
            start += time.monotonic() - paused  # that was other chains' time
            if step in draw_at:
                w = self.weights(kernel).detach().cpu().numpy()
                values = monitor.on_draw(kernel) | {"step": float(step)}
                draws += 1
                if writer is not None:
                    writer.append(w, values)
                if draws in snapshots and (writer is not None or kernel.sharded):
                    target = None if writer is None else writer.folder
                    save_snapshot(target, draws, kernel.latents.networks)
            if evaluated:
                row = kernel.report() | monitor.on_evaluate(kernel, burnt_in=burnt_in)
                state.metrics.append({"chain": chain, "step": step, **row})
                warned = warned or self._warn_of_collapse(chain, kernel)
            if checked:
                kernel.check_finite()
                report = {} if self.show is None and self.ranks.alone else kernel.report()
                if self.show is not None:
                    self.show(chain, step, report)
            now = time.monotonic()
            late = self.ranks.first and now - saved > plan.checkpoint_seconds
            signum, due = self.ranks.most(self.stop[0] if self.stop else 0, int(late))
            if signum or last or due:
                kernel.check_finite()
                kernel.check_together()
                state.draws, state.seconds, saved = draws, now - start, now
                if writer is not None:
                    writer.flush()
                if writer is not None or kernel.sharded:
                    state.save(write=writer is not None)
            if signum:
                raise Stopped(signum)

    def _warn_of_collapse(self, chain: int, kernel: MinibatchKernel) -> bool:
        """Whether all weights are at one end; says so, as they seldom return (trap 3).

        Looking at all of them may cost many steps, so it takes a few at one end to do it.
        """
        if self.target is None:
            return False
        few = spaced(self.size, FEW, self.train.device)
        end = collapsed(self.weights(kernel, rows=few), self.target)
        if end is not None and len(few) < self.size:
            end = collapsed(self.weights(kernel), self.target)
        if end is not None:
            log.warning(
                "chain %d, step %d: all weights are close to %d, with a target mean of %g; they "
                "seldom return. Stop, and take smaller steps of the weights",
                *(chain, kernel.steps, end == "high", self.target),
            )
        return end is not None


@dataclass
class _ChainState:
    """Everything that a checkpoint of a chain holds."""

    path: Path
    about: dict[str, Any]
    kernel: MinibatchKernel
    monitor: Monitor
    draws: int = 0
    seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def save(self, *, write: bool) -> None:
        tensors = {f"kernel/{k}": v for k, v in self.kernel.state_dict().items()}
        tensors |= {f"monitor/{k}": together(v) for k, v in self.monitor.state_dict().items()}
        tensors["global_generator"] = torch.get_rng_state()
        if self.kernel.train.device.type == "cuda":
            tensors["device_generator"] = torch.cuda.get_rng_state(self.kernel.train.device)
        progress = {"draws": self.draws, "seconds": self.seconds, "metrics": self.metrics}
        if write:
            save_checkpoint(self.path, tensors, {**self.about, **progress})

    def load(self, steps: int) -> None:
        tensors, saved = load_checkpoint(self.path)
        for name, value in json.loads(json.dumps(self.about)).items():
            if saved.get(name) != value:
                raise InputError(
                    f"checkpoint {self.path} belongs to another run: its {name} is "
                    f"{saved.get(name)!r}, expected {value!r}. Resume with the settings and data "
                    "of the first run, or use another run_dir"
                )

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        if int(tensors["kernel/steps"]) > steps:
            raise InputError(
                f"checkpoint {self.path} has {int(tensors['kernel/steps'])} steps already, more "
                f"than the {steps} asked for: raise steps, or use another run_dir"
            )
        self.kernel.load_state_dict(part("kernel/"))
        self.monitor.load_state_dict(part("monitor/"))
        torch.set_rng_state(tensors["global_generator"])
        if "device_generator" in tensors and self.kernel.train.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["device_generator"], self.kernel.train.device)
        self.draws, self.seconds = saved["draws"], saved["seconds"]
        self.metrics = saved["metrics"]


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM is put in; a second signal acts as it would without us."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before: dict[int, Any] = {}

    def catch(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        signal.signal(signum, before[signum])

    for signum in (signal.SIGINT, signal.SIGTERM):
        before[signum] = signal.signal(signum, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
