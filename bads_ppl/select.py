"""The short way: a network, a train set and a meta set to a `Selection`."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset

from bads_ppl.chains import evidence, run_chains
from bads_ppl.checks import check_network
from bads_ppl.data import Data, check_disjoint
from bads_ppl.device import resolve_device
from bads_ppl.diagnostics import diagnose
from bads_ppl.errors import InputError
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.losses import Loss, cross_entropy
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.plan import Plan
from bads_ppl.priors import NormalPrior, SparsityPrior, default_scale, default_temperature
from bads_ppl.program import Impact, Model, Parts, bind, embedding_layer
from bads_ppl.schedules import Schedule
from bads_ppl.selection import Selection
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights, WeightNetwork, Weights

log = logging.getLogger(__name__)

LEARNING_RATE = 0.3
"""Default learning rate on the mean loss; theta's step is eta = 2 LEARNING_RATE / points."""

WEIGHT_STEP = {"w": 0.2, "phi": 1e-5}
"""Default steps eta of the weights."""

WEIGHT_TEMPERATURE = {"w": 0.2, "phi": 1.0}
"""Default temperatures of the weights."""

CLIP = {"theta": 0.3, "w": 3.0}
"""Longest drifts in a step: of theta, and of a weight's logit."""


def select(
    network: nn.Module | Callable[[], nn.Module],
    train: Dataset[Any] | Data,
    meta: Dataset[Any] | Data,
    *,
    loss: Loss = cross_entropy,
    sparsity: float = 0.05,
    model: str | Model = "normalised",
    weights: Literal["instance", "network"] = "instance",
    chains: int = 4,
    seed: int = 0,
    plan: Plan | None = None,
    step_size: Mapping[str, float | Schedule] | None = None,
    temperature: float | None = None,
    weight_temperature: float | None = None,
    sparsity_scale: float | None = None,
    prior_scale: float | None = None,
    impact: Impact | None = None,
    train_batch: int | None = None,
    meta_batch: int | None = None,
    device: str = "auto",
    run_dir: str | Path | None = None,
    resume: bool = False,
    workers: int | None = None,
    cuda_graph: bool | None = None,
    progress: bool | None = None,
) -> Selection:
    """Weigh the points of `train` by how well they serve `meta`, and train `network` on them.

    Args:
        network: module from inputs (B, ...) to outputs (B, ...), with which every chain starts
            and which ends with the last state of the first chain; or a function that makes a new
            one per chain, which starts the chains apart.
        train: map-style dataset of (input, target) or (index, input, target); index is the id by
            which results are keyed, by default the position.
        meta: a small dataset of the same form that looks like the test.
        loss: per-example loss, (outputs, targets) to (B,).
        sparsity: beta in (0, 1), the share of train points to select.
        model: "normalised" (rare classes and wrong labels), "joint" (the paper's), the name of
            an installed entry point in group "bads_ppl.models", or a callable with the signature
            of `bads_ppl.program.Model`.
        weights: "instance", one latent per point, or "network", a function of the embedding.
        chains: independent chains, at least 1; fewer than 2 cannot tell convergence.
        seed: source of all randomness.
        plan: length of the chains; default 1,500 steps, half of them burn-in.
        step_size: eta by group, in place of the defaults: "theta", and "w" or "phi".
        temperature: T of theta; 1 samples the posterior, less stays closer to its mode; default
            `default_temperature`.
        weight_temperature: T of the weights; 1 is their full spread. Default 1 for a weight network
            and 0.2 for instance weights: a point is visited rarely, and less noise tells right from
            wrong labels better in chains of the default length (docs/results.md). A calibrated
            posterior takes model="joint" and 1 for both.
        sparsity_scale: sigma of (8) in points; default 2 % of the target, at least 0.5.
        prior_scale: sd of every network parameter; default `default_scale`.
        impact: impact constants (24), (25), default 1. With model="joint" a point's own loss then
            hardly moves its weight (trap 10): to tell wrong labels apart take Impact(weight=5) or
            more, which makes the draws approximate.
        train_batch: train points per step; default min(100, N_t).
        meta_batch: meta points per step; default min(50, N_m).
        device: auto, cpu, cuda or mps.
        run_dir: folder for draws and checkpoints; default a temporary one.
        resume: continue the run in `run_dir`.
        workers: chains at a time, see `run_chains`; default: on a CPU one per core, on CUDA all.
        cuda_graph: record steps on CUDA and replay them, see `MinibatchKernel`; default: where it
            is possible; False: never, for a network that draws from other generators than torch's
            or keeps numbers of its own.
        progress: show a progress bar; default: where standard error is a terminal.

    Returns:
        The selection, one entry per train point, with R-hat, effective draws and Monte-Carlo errors
        as columns. The verdict is logged: as a warning, unless chains agree.

    Raises:
        InputError: for data, network, loss or settings that do not fit.
        Diverged: if a chain diverges.
    """
    place = resolve_device(device)
    prior = SparsityPrior(sparsity, sparsity_scale)
    train_data = Data.from_dataset(train, name="train")
    meta_data = Data.from_dataset(meta, name="meta")
    check_disjoint(train_data, meta_data)
    train_data, meta_data = train_data.to(place), meta_data.to(place)
    points = prior.target(len(train_data)) + len(meta_data)
    temperature = default_temperature(points) if temperature is None else temperature
    prior_scale = default_scale(points) if prior_scale is None else prior_scale
    program_model = find_model(model) if isinstance(model, str) else model
    if weights not in ("instance", "network"):
        raise InputError(f"weights must be 'instance' or 'network', got {weights!r}")
    impact = impact if impact is not None else Impact()
    group = "w" if weights == "instance" else "phi"
    steps = {"theta": 2 * LEARNING_RATE / points, group: WEIGHT_STEP[group], **(step_size or {})}
    if weight_temperature is None:
        weight_temperature = WEIGHT_TEMPERATURE[group]
    plan = plan if plan is not None else Plan(1500)
    first: list[nn.Module] = []

    def build(chain: int, generator: torch.Generator) -> tuple[MinibatchKernel, ThetaMonitor]:
        own = copy.deepcopy(network) if isinstance(network, nn.Module) else network()
        own = own.to(place)
        if not first:
            check_network(own, loss, train_data, meta_data)
            first.append(own)
        source: Weights = InstanceWeights(mean=sparsity)
        if weights == "network":
            width = embedding_layer(own).in_features
            source = WeightNetwork(width, initial=sparsity).to(place)
        parts = Parts(own, source, prior, loss, NormalPrior(prior_scale), impact)
        kernel = SGLD(
            bind(program_model, parts),
            step_size=steps,
            generator=generator,
            temperature={"theta": temperature, group: weight_temperature},
            clip={name: bound for name, bound in CLIP.items() if name in ("theta", group)},
            train_batch=train_batch,
            meta_batch=meta_batch,
            minibatches="importance" if weights == "instance" else "uniform",
        )
        density = impact.weight == impact.train
        return kernel, ThetaMonitor(own, loss, train_data, meta_data, density=density)

    with ExitStack() as stack:
        if run_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bads-ppl-")))
        else:
            folder = Path(run_dir)
        results = run_chains(
            build,
            train_data,
            meta_data,
            plan=plan,
            folder=folder,
            chains=chains,
            seed=seed,
            settings={
                "sparsity": sparsity,
                "model": describe(model),
                "weights": weights,
                "loss": describe(loss),
                "step_size": {name: describe(value) for name, value in steps.items()},
                "temperature": {"theta": temperature, group: weight_temperature},
                "sparsity_scale": sparsity_scale,
                "prior_scale": prior_scale,
                "impact": describe(impact),
                "batches": [train_batch, meta_batch],
            },
            resume=resume,
            workers=workers,
            cuda_graph=cuda_graph,
            progress=progress,
            target=sparsity,
        )
        draws, found = [result.draws for result in results], evidence(results, impact)
        ids = train_data.ids.numpy()
        diagnostics = diagnose(draws, evidence=found, target=sparsity, ids=ids)
        selection = Selection.from_draws(
            ids, [chain.w for chain in draws], evidence=found, columns=diagnostics.columns()
        )
    good = diagnostics.verdict in ("converged", "approximate")
    level = logging.INFO if good else logging.WARNING
    log.log(level, "%s: %s", diagnostics.verdict, diagnostics.sentence)
    if isinstance(network, nn.Module):
        network.load_state_dict(first[0].state_dict())
    return selection


def describe(value: Any) -> str:
    """A setting as text that is the same in every process (no memory addresses)."""
    if isinstance(value, partial):
        given = [describe(x) for x in value.args]
        given += [f"{name}={describe(x)}" for name, x in sorted(value.keywords.items())]
        return f"{describe(value.func)}({', '.join(given)})"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    return describe(type(value)) if " at 0x" in text else text


def find_model(name: str) -> Model:
    """The Pyro program installed under `name` in the entry-point group "bads_ppl.models".

    Raises:
        InputError: listing the names there are.
    """
    found = {entry.name: entry for entry in entry_points(group="bads_ppl.models")}
    if name not in found:
        raise InputError(
            f"model must be a callable or one of {sorted(found)}, got {name!r}: a package makes "
            "its own models known in entry-point group 'bads_ppl.models'"
        )
    model: Model = found[name].load()
    return model
