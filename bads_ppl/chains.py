"""Chains: run a kernel for burn-in and draws, write what it makes, and stop and resume cleanly.

Each chain has a folder of its own, `chain-<k>`, with draws, metrics and one checkpoint. A chain
that was stopped, by a signal or a crash, continues from its checkpoint; on the CPU the result is
bit-identical to that of a run without the stop.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from bads_ppl.atomic import atomic_path
from bads_ppl.checkpoint import load_checkpoint, save_checkpoint
from bads_ppl.data import Batch, Data
from bads_ppl.draws import ChainDraws, DrawWriter, read_draws
from bads_ppl.errors import InputError
from bads_ppl.losses import Loss
from bads_ppl.program import Impact
from bads_ppl.sgld import SGLD
from bads_ppl.sites import evaluation_mode
from bads_ppl.snapshots import drop_snapshots, save_snapshot
from bads_ppl.verdict import collapsed

log = logging.getLogger(__name__)

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"


class Stopped(Exception):
    """A signal ended the run after a checkpoint. `signum` is the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} with a checkpoint: run again with "
            "resume=true to continue"
        )
        self.signum = signum


@dataclass(frozen=True)
class Plan:
    """How long a chain runs and what it keeps, all in steps.

    Attributes:
        steps: length of the chain.
        burn_in: steps before the first draw; default half of `steps`.
        thinning: steps between draws.
        snapshots: networks to keep per chain, at draws evenly spaced; 0 keeps none.
        evaluate_every: steps between evaluations (rows of metrics.jsonl); default steps / 10.
        check_every: steps between looks at the state: finite values, progress bar, signals apart.
        checkpoint_seconds: seconds between checkpoints.
    """

    steps: int = 3000
    burn_in: int | None = None
    thinning: int = 10
    snapshots: int = 5
    evaluate_every: int | None = None
    check_every: int = 50
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("steps", "thinning", "evaluate_every", "check_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.snapshots < 0:
            raise InputError(f"snapshots must be 0 or more, got {self.snapshots}")
        if not 0 <= self.first < self.steps:
            raise InputError(
                f"burn_in must be from 0 to steps - 1 = {self.steps - 1}, got {self.burn_in}: "
                "a chain needs steps left for its draws"
            )
        if self.draws < 1:
            raise InputError(
                f"thinning must be at most steps - burn_in = {self.steps - self.first}, got "
                f"{self.thinning}: the chain would make no draw"
            )

    @property
    def first(self) -> int:
        """Steps of burn-in."""
        return self.steps // 2 if self.burn_in is None else self.burn_in

    @property
    def draws(self) -> int:
        """Draws that a chain makes."""
        return (self.steps - self.first) // self.thinning

    @property
    def snapshot_draws(self) -> set[int]:
        """Numbers of the draws, from 1, at which networks are kept."""
        count = min(self.snapshots, self.draws)
        return {self.draws * (k + 1) // count for k in range(count)}

    @property
    def evaluation_steps(self) -> int:
        return max(1, self.steps // 10) if self.evaluate_every is None else self.evaluate_every


class Monitor(Protocol):
    """What is computed along a chain. One per chain; its state is saved with the chain."""

    def on_draw(self, kernel: SGLD) -> dict[str, float]:
        """Functions of theta for a draw: the same names every time."""
        ...

    def on_evaluate(self, kernel: SGLD, *, burnt_in: bool) -> dict[str, float]:
        """Metrics of one row of metrics.jsonl."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class ThetaMonitor:
    """The default monitor: losses on fixed probes, norms per parameter tensor, the potential.

    Raw theta is no use for diagnosis (symmetries); these functions of it are (trap 4). The
    potential is that of the probes, scaled by their plates: the full sum where the sets are no
    larger than `probe`.

    Args:
        network: the chain's network.
        loss: per-example loss.
        train: train set.
        meta: meta set.
        others: further sets whose mean loss is a function of theta to record, by name.
        probe: largest number of points per set to look at, evenly spaced.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        train: Data,
        meta: Data,
        others: Mapping[str, Data] | None = None,
        probe: int = 512,
    ) -> None:
        self.network = network
        self.loss = loss
        sets = {"train": train, "meta": meta, **(others or {})}
        self.probes = {name: _probe(data, probe) for name, data in sets.items()}

    @torch.no_grad()
    def on_draw(self, kernel: SGLD) -> dict[str, float]:
        with evaluation_mode(self.network):
            train, meta = self.probes["train"], self.probes["meta"]
            named = {"potential": kernel.latents.joint_potential(train, meta)}
            for name, batch in self.probes.items():
                named[f"{name}_loss"] = self.loss(self.network(batch.input), batch.target).mean()
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                named[f"norm.{name}"] = torch.linalg.vector_norm(parameter)
        values = torch.stack([value.cpu().double() for value in named.values()])
        return dict(zip(named, values.tolist(), strict=True))

    def on_evaluate(self, kernel: SGLD, *, burnt_in: bool) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


def _probe(data: Data, count: int) -> Batch:
    count = min(count, len(data))
    return data.batch(torch.linspace(0, len(data) - 1, count, device=data.device).long())


@dataclass(frozen=True)
class ChainResult:
    """A finished chain: its draws, and its kernel and monitor as they ended."""

    draws: ChainDraws
    kernel: SGLD
    monitor: Monitor
    metrics: list[dict[str, Any]]
    seconds: float


def chain_generator(seed: int, chain: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one chain: distinct chains and seeds give unrelated streams."""
    words = np.random.SeedSequence([seed, chain]).generate_state(2, np.uint32)
    value = (int(words[0]) << 31) ^ int(words[1])
    return torch.Generator(device=device).manual_seed(value)


def fingerprint(data: Data) -> str:
    """Hash of a set's ids, targets and (some 4,096 of its) inputs: tells data sets apart."""
    digest = hashlib.blake2b(digest_size=16)
    rows = torch.linspace(0, len(data) - 1, min(4096, len(data)), device=data.device).long()
    for tensor in (data.ids, data.target, *(x[rows] for x in tree_leaves(data.input))):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def evidence(chains: Sequence[ChainResult], impact: Impact) -> str:
    """What the draws of all chains may be called: the weakest of `SGLD.evidence`.

    Impact constants (24), (25) that differ for theta and w make them "approximate" at best.
    """
    found = {chain.kernel.evidence for chain in chains}
    if impact.weight != impact.train:
        found.add("approximate")
    order = ("optimisation path", "approximate", "calibrated")
    return next(name for name in order if name in found)


Make = Callable[[int, torch.Generator], tuple[SGLD, Monitor]]
"""Builds a chain's kernel and monitor from its number and generator."""


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
    resume: bool = False,
    progress: bool | None = None,
    target: float | None = None,
    weights: Callable[[SGLD], Tensor] = SGLD.site_values,
    size: int | None = None,
) -> list[ChainResult]:
    """Run chains one after the other.

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
        resume: continue from checkpoints where there are any.
        progress: show a progress bar; None: when standard error is a terminal.
        target: beta, shown beside the mean weight, and against which a collapse of the weights is
            told; None: neither.
        weights: the weights (N,) to record for a draw, given the kernel.
        size: N, where it is not the size of the train set.

    Raises:
        InputError: if a folder holds draws of another run, or a checkpoint does not fit.
        Diverged: if a chain reaches a non-finite potential; its last good checkpoint stays.
        Stopped: after SIGINT or SIGTERM, once a checkpoint is written.
    """
    if chains < 1:
        raise InputError(f"chains must be at least 1, got {chains}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    about = {
        "settings": settings or {},
        "seed": seed,
        "burn_in": plan.first,
        "thinning": plan.thinning,
        "train": fingerprint(train),
        "meta": fingerprint(meta),
    }
    hidden = None if progress is None else not progress
    with (
        _catch_signals() as stop,
        tqdm(total=chains * plan.steps, disable=hidden, unit="step") as bar,
    ):
        runner = _Runner(
            make, train, meta, plan, about, resume, weights, size or len(train), target, bar, stop
        )
        return [runner.run(folder / f"chain-{chain}", chain, seed) for chain in range(chains)]


@dataclass(frozen=True)
class _Runner:
    """Runs single chains; holds what they share."""

    make: Make
    train: Data
    meta: Data
    plan: Plan
    about: dict[str, Any]
    resume: bool
    weights: Callable[[SGLD], Tensor]
    size: int
    target: float | None
    bar: Any
    stop: list[int]

    def run(self, folder: Path, chain: int, seed: int) -> ChainResult:
        if (folder / CHECKPOINT).exists() and not self.resume:
            raise InputError(
                f"{folder} holds a chain already: use resume=true to continue it, overwrite=true "
                "to replace it, or another run_dir"
            )
        device = self.train.device
        generator = chain_generator(seed, chain, device)
        # Modules that draw from torch's global generator (initialisation, dropout) follow ours.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(generator.initial_seed())
            kernel, monitor = self.make(chain, generator)
            kernel.setup(self.plan.first, self.train, self.meta)
            state = _ChainState(
                folder / CHECKPOINT, {**self.about, "chain": chain}, kernel, monitor
            )
            if state.path.exists():
                state.load(self.plan.steps)
            drop_snapshots(folder, after=state.draws)
            with DrawWriter(folder, self.size, keep=state.draws) as writer:
                self._loop(chain, state, writer)
        with atomic_path(folder / METRICS) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in state.metrics))
        log.info("chain %d: %d draws, %.1f s", chain, state.draws, state.seconds)
        draws = read_draws(folder, state.draws)
        return ChainResult(draws, kernel, monitor, state.metrics, state.seconds)

    def _loop(self, chain: int, state: _ChainState, writer: DrawWriter) -> None:
        kernel, monitor, plan = state.kernel, state.monitor, self.plan
        start, saved = time.monotonic() - state.seconds, time.monotonic()
        warned = False
        self.bar.set_description(f"chain {chain}", refresh=False)
        self.bar.update(kernel.steps)
        while kernel.steps < plan.steps:
            kernel.step()
            step, last = kernel.steps, kernel.steps == plan.steps
            burnt_in = step > plan.first
            if burnt_in and (step - plan.first) % plan.thinning == 0:
                w = self.weights(kernel).detach().cpu().numpy()
                writer.append(w, monitor.on_draw(kernel) | {"step": float(step)})
                if writer.count in plan.snapshot_draws:
                    save_snapshot(writer.folder, writer.count, kernel.latents.networks)
            if step % plan.evaluation_steps == 0 or last:
                row = kernel.report() | monitor.on_evaluate(kernel, burnt_in=burnt_in)
                state.metrics.append({"chain": chain, "step": step, **row})
                warned = warned or self._warn_of_collapse(chain, kernel)
            if step % plan.check_every == 0 or last:
                kernel.check_finite()
                self._show(kernel, step % plan.check_every or plan.check_every)
            now = time.monotonic()
            if self.stop or last or now - saved > plan.checkpoint_seconds:
                kernel.check_finite()
                writer.flush()
                state.draws, state.seconds, saved = writer.count, now - start, now
                state.save()
            if self.stop:
                raise Stopped(self.stop[0])

    def _warn_of_collapse(self, chain: int, kernel: SGLD) -> bool:
        """Whether all weights are at one end; says so, as they seldom return (trap 3)."""
        if self.target is None:
            return False
        end = collapsed(self.weights(kernel), self.target)
        if end is not None:
            log.warning(
                "chain %d, step %d: all weights are close to %d, with a target mean of %g; they "
                "seldom return. Stop, and take smaller steps of the weights",
                *(chain, kernel.steps, end == "high", self.target),
            )
        return end is not None

    def _show(self, kernel: SGLD, steps: int) -> None:
        if self.bar.disable:
            return
        self.bar.update(steps)
        shown = {name: f"{value:.3g}" for name, value in kernel.report().items()}
        if self.target is not None and "mean_w" in shown:
            shown["mean_w"] += f" (beta {self.target:g})"
        self.bar.set_postfix(shown, refresh=False)


@dataclass
class _ChainState:
    """Everything that a checkpoint of a chain holds."""

    path: Path
    about: dict[str, Any]
    kernel: SGLD
    monitor: Monitor
    draws: int = 0
    seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def save(self) -> None:
        tensors = {f"kernel/{k}": v for k, v in self.kernel.state_dict().items()}
        tensors |= {f"monitor/{k}": v for k, v in self.monitor.state_dict().items()}
        tensors["global_generator"] = torch.get_rng_state()
        progress = {"draws": self.draws, "seconds": self.seconds, "metrics": self.metrics}
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
        self.draws, self.seconds = saved["draws"], saved["seconds"]
        self.metrics = saved["metrics"]


@contextmanager
def _catch_signals() -> Iterator[list[int]]:
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
