"""One run: a task, a method and settings to a folder of results."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from bads_ppl import plots
from bads_ppl.atomic import atomic_path, make_folder
from bads_ppl.chains import ChainResult, chain_generator, evidence, global_seed, run_chains
from bads_ppl.checks import check_network
from bads_ppl.device import resolve_device
from bads_ppl.diagnostic_plots import diagnostic_figures
from bads_ppl.diagnostics import diagnose
from bads_ppl.errors import Diverged, InputError
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.losses import cross_entropy
from bads_ppl.plan import Plan
from bads_ppl.posterior import save, to_arviz
from bads_ppl.priors import NormalPrior, SparsityPrior, default_scale, default_temperature
from bads_ppl.program import Impact, Model, Parts, bind
from bads_ppl.schedules import Rescaled, named
from bads_ppl.selection import Selection
from bads_ppl.stiffness import check_stiffness
from inference.evaluation import TaskMonitor, mean_scores, predictive_accuracy
from inference.extremes import FILE as TEXTS
from inference.extremes import write_extremes
from inference.folds import held_out
from inference.methods import Given, Setup, method
from inference.options import ProxyOptions, build, check_options, taken
from inference.proxies import Proxies
from inference.tasks import Task
from models.selective import LEARNER

log = logging.getLogger(__name__)

RESULTS, CONFIG = "results.json", "config.yaml"

NOT_SETTINGS = (
    "run_dir",
    "resume",
    "overwrite",
    "steps",
    "chains",
    "device",
    "data",
    "cache",
    "checkpoint_seconds",
    "workers",
)
"""Top-level options that a resumed run may change: longer or more chains, or another machine."""

WRITTEN = (
    "chain-[0-9]*",
    "plots",
    "metrics.jsonl",
    "weights.parquet",
    "posterior.nc",
    TEXTS,
    "removal*",
    RESULTS,
    CONFIG,
)
"""What a run writes into its folder, and all that overwrite=true removes."""


@dataclass(frozen=True)
class Choices:
    """Names of the configuration groups' members in use."""

    task: str
    method: str
    model: str
    weights: str
    sampler: str
    backbone: str
    preset: str


@dataclass(frozen=True)
class Experiment:
    """A run that fits together and has not begun.

    Attributes:
        config: all settings.
        choices: what they were chosen by.
        task: the data, on the CPU.
        setup: what the method does with them.
        plan: length of the chains.
        device: where they run.
        folder: the run's.
        proxies: what trains the method's proxies.
    """

    config: DictConfig
    choices: Choices
    task: Task
    setup: Setup
    plan: Plan
    device: torch.device
    folder: Path
    proxies: Proxies

    def prepared(self) -> Experiment:
        """The experiment with the scores that its method selects by; trains proxies."""
        return replace(self, setup=self.setup.prepared())

    def weights(self, kernel: MinibatchKernel) -> Tensor:
        """The weights (N_t,) of all points of the task, given a chain's kernel."""
        if self.setup.membership is not None:
            return self.setup.membership(kernel)
        fixed = self.setup.fixed
        return kernel.site_values() if fixed is None else fixed.to(self.device)


def run(config: DictConfig, choices: Choices) -> dict[str, Any]:
    """Run one experiment and write its folder; returns what stands in results.json.

    Raises:
        InputError: for wrong settings or data, or a folder that holds another run.
        Diverged: if a chain diverges.
        Stopped: after SIGINT or SIGTERM, with a checkpoint.
    """
    experiment = prepare(config, choices).prepared()
    chains = sample(experiment)
    return _report(experiment, chains)


def check_settings(config: DictConfig) -> None:
    """Refuse unknown options, and numbers below their least.

    Raises:
        InputError: naming the option.
    """
    check_options(config)
    for name, least in (("seed", 0), ("chains", 1)):
        if config[name] < least:
            raise InputError(f"{name} must be at least {least}, got {config[name]}")


def load_task(config: DictConfig) -> Task:
    """The task of the settings, or a fold of its meta set.

    Raises:
        InputError: for wrong settings or data.
    """
    data = {"root": config.data.root, "source": config.data.source}
    where = {"cache": Path(config.cache), "device": resolve_device(config.device)}
    given = {**data, **taken(config.task.data, where), "seed": config.seed, "split": config.split}
    task: Task = build(config.task.data, "task.data", **given)
    return task if config.fold is None else held_out(task, config.fold, config.seed)


def prepare(config: DictConfig, choices: Choices, task: Task | None = None) -> Experiment:
    """The experiment of a configuration, which it completes; writes nothing.

    Args:
        config: all settings.
        choices: what they were chosen by.
        task: the task of these settings, where it has been read before.

    Raises:
        InputError: for settings that do not fit each other or the data, or a folder that holds
            another run; `Unstable` for steps that are too large.
    """
    check_settings(config)
    device = resolve_device(config.device)
    plan = Plan(
        config.steps,
        config.burn_in,
        config.thinning,
        config.snapshots,
        config.evaluate_every,
        checkpoint_seconds=config.checkpoint_seconds,
    )
    task = load_task(config) if task is None else task
    if config.sparsity is None:
        config.sparsity = task.sparsity
    sparsity = SparsityPrior(config.sparsity, config.prior.sparsity_scale, config.prior.total)
    given = Given(
        model=_model(config),
        weights=build(config.weights.build, "weights.build", classes=task.classes),
        sparsity=sparsity,
        impact=Impact(**config.impact),
        names=(choices.model, choices.weights),
        seed=config.seed,
        proxies=make_proxies(config, task, device),
    )
    setup = method(choices.method, config.method.rule)(task, given)
    if config.method.prior_scale is None:
        config.method.prior_scale = default_scale(setup.points)
    if config.method.temperature is None:
        config.method.temperature = default_temperature(setup.points)
    folder = Path(run_dir(config, choices, setup))
    check_folder(folder, config)
    experiment = Experiment(config, choices, task, setup, plan, device, folder, given.proxies)
    _check_fit(experiment)
    return experiment


def make_proxies(config: DictConfig, task: Task, device: torch.device) -> Proxies:
    """What trains the proxies of a method and scores the task's points; does nothing yet.

    Raises:
        InputError: if their backbone has no such options.
    """
    given: Any = OmegaConf.to_container(config.method, resolve=True)
    options = ProxyOptions(**(given["proxy"] or {}))
    shape: Any = OmegaConf.to_container(config.backbone, resolve=True)
    shape |= options.backbone or {}
    backbone = build(OmegaConf.create(shape), "method.proxy.backbone")
    return Proxies(
        task,
        lambda: backbone(classes=task.classes).to(device),
        shape,
        options,
        Path(config.cache),
        device,
        config.seed,
        None if config.method.scores is None else Path(config.method.scores),
        config.checkpoint_seconds,
    )


def _model(config: DictConfig) -> Model:
    """The Pyro program: that of the method, where it has one of its own, else the one chosen."""
    own = config.method.model
    program: Model = build(config.model, "model") if own is None else build(own, "method.model")
    return program


def run_dir(config: DictConfig, choices: Choices, setup: Setup) -> str:
    """The run's folder: as given, or runs/<task>/<method>/<model>-<weights>/seed<k>.

    Runs for tuning are kept apart, in runs/<task>-validation.
    """
    if config.run_dir is not None:
        return str(config.run_dir)
    model, weights = setup.names
    task = config.task.label + ("" if config.split == "test" else f"-{config.split}")
    if config.fold is not None:
        task += f"-fold{config.fold.replace('/', 'of')}"
    name = f"runs/{task}/{choices.method}/{model}-{weights}/seed{config.seed}"
    return name if choices.preset == "default" else name.replace("/seed", f"-{choices.preset}/seed")


def check_folder(folder: Path, config: DictConfig) -> None:
    """Refuse a folder that this run must not write into; changes nothing.

    Raises:
        InputError: if it holds another run and neither resume nor overwrite is set, or resume is
            set with other settings, or if it holds something else.
    """
    path = folder / CONFIG
    if folder.is_dir() and any(folder.iterdir()):
        if not path.exists():
            raise InputError(
                f"run_dir {folder} is not empty and holds no run: choose an empty folder"
            )
        if config.overwrite:
            return
        if not config.resume:
            raise InputError(
                f"run_dir {folder} already holds a run: use resume=true to continue it, "
                "overwrite=true to replace it, or another run_dir"
            )
        _check_same_settings(path, config)
    elif folder.exists() and not folder.is_dir():
        raise InputError(f"run_dir {folder} is a file: choose a folder")


def prepare_folder(folder: Path, config: DictConfig) -> None:
    """Make the run's folder, remove the run that overwrite=true replaces, and write the settings.

    Raises:
        OSError: if it cannot be written.
    """
    make_folder(folder, "run_dir")
    if config.overwrite:
        for path in [path for pattern in WRITTEN for path in folder.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not (folder / CONFIG).exists():
        save_config(folder, config)


def save_config(folder: Path, config: DictConfig) -> None:
    """Write the settings; on resuming only once the chains are as long as these say."""
    with atomic_path(folder / CONFIG) as temporary:
        OmegaConf.save(config, temporary, resolve=True)


def settings(config: DictConfig) -> dict[str, Any]:
    """What must stay the same when a run is resumed."""
    found = OmegaConf.to_container(config, resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items() if k not in NOT_SETTINGS}


def changed_settings(path: Path, config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Settings of a stored config.yaml that differ from those of `config`: before and now.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        before = _flat(settings(OmegaConf.load(path)))  # type: ignore[arg-type]
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({reason}): the run cannot be resumed") from error
    now = _flat(settings(config))
    return {
        name: (before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }


def _check_same_settings(path: Path, config: DictConfig) -> None:
    changed = changed_settings(path, config)
    differ = [f"{name} was {before}, now {now}" for name, (before, now) in changed.items()]
    if differ:
        raise InputError(
            f"run_dir {path.parent} holds a run with other settings: {'; '.join(differ)}. Resume "
            "with the same settings, or use another run_dir"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by their dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, dict)
        leaves |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return leaves


def _maker(
    experiment: Experiment,
) -> Callable[[int, torch.Generator], tuple[MinibatchKernel, TaskMonitor]]:
    """What builds the kernel and the monitor of each chain."""
    config, task, setup = experiment.config, experiment.task, experiment.setup
    device = experiment.device
    train, meta, test = setup.train.to(device), task.meta.to(device), task.test.to(device)
    backbone = build(config.backbone, "backbone")
    prior = NormalPrior(config.method.prior_scale)
    scores = None if setup.membership is None else setup.membership.scores
    sampler = make_sampler(config, task, setup, experiment.plan)

    def make(chain: int, generator: torch.Generator) -> tuple[MinibatchKernel, TaskMonitor]:
        network = backbone(classes=task.classes).to(device)
        parts = Parts(
            network, setup.weights(network), setup.sparsity, cross_entropy, prior, setup.impact
        )
        if setup.learner is not None:
            parts.learner = setup.learner()
        kernel = sampler(bind(setup.model, parts), generator=generator)
        density = setup.impact.weight == setup.impact.train
        monitor = TaskMonitor(
            network,
            cross_entropy,
            train,
            meta,
            test,
            task.groups,
            experiment.weights,
            task.classes,
            density,
            scores,
        )
        return kernel, monitor

    return make


def first_kernel(experiment: Experiment) -> MinibatchKernel:
    """The kernel of the first chain, ready for its first step."""
    generator = chain_generator(experiment.config.seed, 0, experiment.device)
    kernel, _ = _maker(experiment)(0, generator)
    train, meta = experiment.setup.train, experiment.task.meta
    kernel.setup(experiment.plan.first, train.to(experiment.device), meta.to(experiment.device))
    return kernel


def _check_fit(experiment: Experiment) -> None:
    """Begin the first chain, without a step: what does not fit shows before anything is written."""
    task, setup, device = experiment.task, experiment.setup, experiment.device
    train, meta = setup.train.to(device), task.meta.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(global_seed(experiment.config.seed, 0))  # the network that it will have
        generator = chain_generator(experiment.config.seed, 0, device)
        kernel, monitor = _maker(experiment)(0, generator)
        check_network(monitor.network, cross_entropy, train, meta, task.test.to(device))
        kernel.setup(experiment.plan.first, train, meta)
        check_stiffness(kernel)


def sample(experiment: Experiment) -> list[ChainResult]:
    """Run the chains of an experiment in its folder, or as much of them as is missing.

    Raises:
        InputError: if the folder holds chains of another run.
        Diverged: if a chain diverges.
        Stopped: after SIGINT or SIGTERM, with a checkpoint.
    """
    config, setup, device = experiment.config, experiment.setup, experiment.device
    prepare_folder(experiment.folder, config)
    try:
        chains = run_chains(
            _maker(experiment),
            setup.train.to(device),
            experiment.task.meta.to(device),
            plan=experiment.plan,
            folder=experiment.folder,
            chains=config.chains,
            seed=config.seed,
            settings=settings(config),
            facts=None if setup.digest is None else {"scores": setup.digest},
            resume=config.resume,
            target=config.sparsity if setup.latent else None,
            weights=experiment.weights,
            size=len(experiment.task.train),
            workers=config.workers,
        )
    except Diverged as error:
        options = [f"method.learning_rate={config.method.learning_rate / 4:.2g}"]
        if setup.latent:
            options.append(f"weights.step_size={config.weights.step_size / 4:.2g}")
        raise Diverged(f"{error} (options {' '.join(options)})") from error
    save_config(experiment.folder, config)
    return chains


def make_sampler(
    config: DictConfig, task: Task, setup: Setup, plan: Plan
) -> partial[MinibatchKernel]:
    """The sampler of the configuration, with the step sizes that the method and weights need.

    theta: eta = 2 learning_rate / points is plain SGD with that learning rate on the mean loss.
    """
    networks = ["theta"] if setup.learner is None else ["theta", LEARNER]
    step_size = dict.fromkeys(networks, 2 * config.method.learning_rate / setup.points)
    temperature = dict.fromkeys(networks, config.method.temperature)
    clip = dict.fromkeys(networks, config.method.clip)
    sampler: partial[MinibatchKernel] = build(config.sampler, "sampler")
    minibatches, train_batch = "uniform", config.sampler.train_batch
    if train_batch is None:
        train_batch = setup.train_batch
    if setup.latent:
        step_size[config.weights.group] = config.weights.step_size
        temperature[config.weights.group] = 0 if setup.optimises else config.weights.temperature
        clip[config.weights.group] = config.weights.clip
        minibatches = config.weights.minibatches
        for group, eta in config.step_sizes.items():
            step_size[str(group)] = eta / len(setup.train)
    elif train_batch is not None and len(setup.train) < len(task.train):
        train_batch = min(train_batch, len(setup.train))  # a baseline may train on fewer points
    return partial(
        sampler,
        train_batch=train_batch,
        step_size={
            group: Rescaled(named(config.schedule, eta, plan.first), setup.step_factor)
            for group, eta in step_size.items()
        },
        temperature=temperature,
        clip=clip,
        minibatches=minibatches,
    )


def _report(experiment: Experiment, chains: list[ChainResult]) -> dict[str, Any]:
    config, choices, setup = experiment.config, experiment.choices, experiment.setup
    task, plan, folder = experiment.task, experiment.plan, experiment.folder
    metrics = [row for chain in chains for row in chain.metrics]
    with atomic_path(folder / "metrics.jsonl") as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    label = task.train.target.numpy()
    group = np.full(len(task.train), "", dtype=object)
    for name, mask in task.groups.items():
        group[mask.numpy()] = name
    found = "fixed" if setup.fixed is not None else evidence(chains, setup.impact)
    scores = setup.scores if setup.membership is None else mean_scores(chains)
    chosen_by = {} if scores is None else {"score": scores.numpy()}
    draws = [chain.draws for chain in chains]
    diagnostics = diagnose(
        draws,
        evidence=found,
        target=config.sparsity if setup.latent else None,
        ids=task.train.ids.numpy(),
    )
    selection = Selection.from_draws(
        task.train.ids.numpy(),
        [chain.draws.w for chain in chains],
        evidence=found,
        columns={"group": group, "label": label, **chosen_by, **diagnostics.columns()},
    )
    selection.to_parquet(folder / "weights.parquet")
    if task.texts is not None and (setup.latent or scores is not None):
        decided = selection.mean if scores is None else scores.numpy()
        write_extremes(folder, task, selection, decided)
    model, weights = setup.names
    about = {
        "task": choices.task,
        "dataset": task.dataset if config.split == "test" else f"{task.dataset}, {config.split}",
        "method": choices.method,
        "model": model,
        "weights": weights,
        "sampler": choices.sampler,
        "preset": choices.preset,
        "mode": config.sampler.mode,
        "evidence": found,
        "temperature": config.method.temperature,
        "seed": config.seed,
        "sparsity": config.sparsity,
    }
    save(
        to_arviz(
            draws,
            ids=task.train.ids.numpy(),
            constant_data={"group": group.astype(str), "label": label},
            attrs=about,
        ),
        folder / "posterior.nc",
    )
    _draw_plots(folder / "plots", metrics, selection, task)
    for name, figure in diagnostic_figures(draws, diagnostics).items():
        plots.save(figure, folder / "plots" / f"diagnostics_{name}.png")
    steps = sum(chain.kernel.steps for chain in chains)
    seconds = sum(chain.seconds for chain in chains)
    results = {
        **about,
        "run_dir": str(folder),
        "steps": config.steps,
        "chains": config.chains,
        "settings": OmegaConf.to_container(config.task, resolve=True),
        "test": {
            "accuracy": predictive_accuracy(chains, task.test.target),
            "accuracy_last": float(
                np.mean([chain.metrics[-1]["test.accuracy"] for chain in chains])
            ),
            "count": len(task.test),
        },
        "groups": {
            name: {
                "mean_weight": float(selection.mean[mask.numpy()].mean()),
                "count": int(mask.sum()),
                "high": name in task.high,
            }
            for name, mask in task.groups.items()
        },
        **right_labels(task, setup, selection, scores),
        "diagnostics": diagnostics.to_dict(),
        "acceptance": mean_acceptance(metrics, plan.first),
        "cost": {
            "seconds": seconds,
            "proxy_seconds": sum(experiment.proxies.spent),
            "ms_per_step": 1000 * seconds / steps,
            "peak_memory_mib": peak_memory_mib(chains[0].kernel.train.device),
        },
        "data": dict(task.facts),
        "versions": versions(),
        "warnings": list(task.warnings),
    }
    with atomic_path(folder / RESULTS) as path:
        path.write_text(json.dumps(results, indent=2) + "\n")
    return results


def right_labels(
    task: Task, setup: Setup, selection: Selection, scores: Tensor | None
) -> dict[str, Any]:
    """How well mean w tells right labels from wrong ones, where both are known to occur.

    Of methods that select by scores, whose w is 0 or 1, it is the mean score over draws that tells.
    "auc" is the area under the ROC curve (0.5: not at all), "average_precision" that under the
    curve of precision over recall (the share of right labels: not at all).
    """
    if task.right is None or bool(task.right.all()):
        return {}
    if scores is None and not setup.latent:
        return {}
    right = task.right.numpy()
    value = selection.mean if scores is None else scores.numpy()
    return {
        "right": {
            "auc": float(roc_auc_score(right, value)),
            "average_precision": float(average_precision_score(right, value)),
        }
    }


def mean_acceptance(metrics: list[dict[str, Any]], burn_in: int) -> dict[str, float]:
    """Mean acceptance rate in [0, 1] by group over the evaluations after burn-in (chains, steps).

    Empty where the program has no density (`bads_ppl.acceptance`).
    """
    rows = [row for row in metrics if row["step"] > burn_in]
    names = [name for name in (rows[0] if rows else {}) if name.startswith("acceptance.")]
    return {
        name.removeprefix("acceptance."): float(np.mean([row[name] for row in rows]))
        for name in names
    }


def _draw_plots(
    folder: Path, metrics: list[dict[str, Any]], selection: Selection, task: Task
) -> None:
    folder.mkdir(exist_ok=True)
    groups = {name: name in task.high for name in task.groups}
    masks = {name: mask.numpy() for name, mask in task.groups.items()}
    plots.save(plots.accuracy_over_steps(metrics), folder / "test_accuracy.png")
    if groups:
        by_group = plots.weights_by_group_over_steps(metrics, groups)
        plots.save(by_group, folder / "weights_by_group.png")
    else:  # nothing is known about any of them
        groups, masks = {"train": True}, {"train": np.ones(len(task.train), dtype=bool)}
    plots.save(
        plots.weight_histogram(selection.mean, masks, groups), folder / "weight_histogram.png"
    )


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory in use so far: of the device's allocator on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("bads-ppl", "torch", "pyro-ppl", "numpy", "arviz")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version()}
