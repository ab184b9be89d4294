"""One run: from a task, a method and settings to chains."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from bads_ppl.chains import TABLES, ChainResult, chain_generator, global_seed, run_chains
from bads_ppl.checks import check_network
from bads_ppl.device import resolve_device
from bads_ppl.errors import Diverged, InputError
from bads_ppl.graphs import obstacle
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.plan import Plan
from bads_ppl.priors import NormalPrior, SparsityPrior, default_scale, default_temperature
from bads_ppl.program import Impact, Model, Parts, bind
from bads_ppl.ranks import ALONE, Ranks
from bads_ppl.schedules import Rescaled, named
from bads_ppl.shards import check_shardable, sharded
from bads_ppl.stiffness import check_stiffness
from bads_ppl.workers import choose_workers
from inference.evaluation import TaskMonitor
from inference.folder import (
    Choices,
    check_folder,
    prepare_folder,
    run_dir,
    save_config,
    settings,
)
from inference.folds import held_out
from inference.methods import method
from inference.options import ProxyOptions, build, check_options, taken
from inference.proxies import Proxies
from inference.setups import Given, Setup
from inference.tasks import Task
from models.selective import LEARNER

log = logging.getLogger(__name__)


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
        ranks: the processes that run it together.
    """

    config: DictConfig
    choices: Choices
    task: Task
    setup: Setup
    plan: Plan
    device: torch.device
    folder: Path
    proxies: Proxies
    ranks: Ranks = ALONE

    @property
    def together(self) -> Ranks:
        """The processes that run each chain together."""
        return ALONE if self.apart else self.ranks

    @property
    def shards(self) -> bool:
        """Whether networks are shared out between them."""
        return bool(self.config.parallel == "fsdp") and not self.ranks.alone

    @property
    def apart(self) -> bool:
        """Whether the processes run chains of their own."""
        return bool(self.config.parallel == "chains")

    def prepared(self) -> Experiment:
        """The experiment with the scores that its method selects by; trains proxies."""
        return replace(self, setup=self.setup.prepared())

    def weights(self, kernel: MinibatchKernel, *, rows: Tensor | None = None) -> Tensor:
        """The weights (N_t,) of all points of the task, or (M,) of those at `rows`."""
        if self.setup.membership is not None:
            w = self.setup.membership(kernel)
        elif self.setup.fixed is not None:
            w = self.setup.fixed.to(self.device)
        else:
            return kernel.site_values(rows=rows)
        return w if rows is None else w[rows]


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
    files = {name: config.data[name] for name in ("train", "meta", "test")}
    if any(files.values()) and not taken(config.task.data, files):
        named = ", ".join(f"data.{name}={path}" for name, path in files.items() if path)
        raise InputError(f"this task takes no files, got {named}: use task=text, or leave them out")
    where = {"cache": Path(config.cache), "device": resolve_device(config.device)}
    given = {**data, **taken(config.task.data, where), "seed": config.seed, "split": config.split}
    task: Task = build(config.task.data, "task.data", **given)
    return task if config.fold is None else held_out(task, config.fold, config.seed)


def prepare(
    config: DictConfig, choices: Choices, task: Task | None = None, ranks: Ranks = ALONE
) -> Experiment:
    """The experiment of a configuration, which it completes; writes nothing.

    Args:
        config: all settings.
        choices: what they were chosen by.
        task: the task of these settings, where it has been read before.
        ranks: the processes that will run it together.

    Raises:
        InputError: for settings that do not fit each other or the data, or a folder that holds
            another run; `Unstable` for steps that are too large.
    """
    check_settings(config)
    device = resolve_device(config.device)
    _check_machine(config, device, ranks)
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
        train_batch=config.sampler.train_batch,
    )
    setup = method(choices.method, config.method.rule)(task, given)
    if config.method.prior_scale is None:
        config.method.prior_scale = default_scale(setup.points)
    if config.method.temperature is None:
        config.method.temperature = default_temperature(setup.points)
    folder = Path(run_dir(config, choices, setup))
    check_folder(folder, config)
    experiment = Experiment(
        config, choices, task, setup, plan, device, folder, given.proxies, ranks
    )
    if not experiment.together.alone and setup.membership is not None:
        raise InputError(
            f"method={choices.method} chooses points within each batch, which {ranks.size} "
            "processes cannot share: take parallel=chains, or run it in one process"
        )
    if experiment.shards and choices.method == "blo":
        raise InputError("method=blo cannot use sharded networks: take parallel=data")
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
        lambda: backbone(**task.shape).to(device),
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


def _check_machine(config: DictConfig, device: torch.device, ranks: Ranks) -> None:
    if config.table not in TABLES:
        raise InputError(f"table must be one of {', '.join(TABLES)}, got {config.table!r}")
    if config.table == "disk" and device.type != "cpu":
        raise InputError(f"table=disk needs the CPU, got device={device}: take table=memory")
    needed = obstacle(device, ranks)
    if config.cuda_graph and needed is not None:
        raise InputError(f"cuda_graph=true needs {needed}: leave the option out")
    if ranks.alone:
        choose_workers(config.workers, config.chains, device)
    elif config.workers not in (None, 1):
        raise InputError(
            f"workers must be 1 in a run of {ranks.size} processes, got {config.workers}: leave "
            "them out"
        )


def _maker(
    experiment: Experiment, ranks: Ranks = ALONE, *, shard: bool = False
) -> Callable[[int, torch.Generator], tuple[MinibatchKernel, TaskMonitor]]:
    """What builds the kernel and the monitor of each chain; `shard`: of parts of networks."""
    config, setup, device = experiment.config, experiment.setup, experiment.device
    task, train = experiment.task.to(device), setup.train.to(device)
    backbone = build(config.backbone, "backbone")
    prior = NormalPrior(config.method.prior_scale)
    scores = None if setup.membership is None else setup.membership.scores
    sampler = make_sampler(config, task, setup, experiment.plan)

    def make(chain: int, generator: torch.Generator) -> tuple[MinibatchKernel, TaskMonitor]:
        network = backbone(**task.shape).to(device)
        parts = Parts(
            network, setup.weights(network), setup.sparsity, task.loss, prior, setup.impact
        )
        if setup.learner is not None:
            parts.learner = setup.learner()
        if shard:
            parts.auxiliary = sharded(copy.deepcopy(network), ranks, device)
            sharded(network, ranks, device)
        kernel = sampler(bind(setup.model, parts), generator=generator, ranks=ranks)
        density = setup.impact.weight == setup.impact.train
        return kernel, TaskMonitor(network, task, train, experiment.weights, density, scores)

    return make


def first_chain(experiment: Experiment) -> tuple[MinibatchKernel, TaskMonitor]:
    """The kernel of the first chain, ready for its first step, and its monitor."""
    generator = chain_generator(experiment.config.seed, 0, experiment.device)
    kernel, monitor = _maker(experiment)(0, generator)
    train, meta = experiment.setup.train, experiment.task.meta
    kernel.setup(experiment.plan.first, train.to(experiment.device), meta.to(experiment.device))
    return kernel, monitor


def _check_fit(experiment: Experiment) -> None:
    """Begin the first chain, without a step: what does not fit shows before anything is written."""
    task, setup, device = experiment.task, experiment.setup, experiment.device
    train, meta = setup.train.to(device), task.meta.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(global_seed(experiment.config.seed, 0))  # the network that it will have
        generator = chain_generator(experiment.config.seed, 0, device)
        kernel, monitor = _maker(experiment, experiment.together)(0, generator)
        if experiment.shards:
            check_shardable(monitor.network)
        check_network(monitor.network, task.loss, train, meta, task.test.to(device))
        kernel.setup(experiment.plan.first, train, meta)
        check_stiffness(kernel)


def sample(experiment: Experiment) -> list[ChainResult]:
    """Run the chains of an experiment in its folder, or as much of them as is missing.

    Raises:
        InputError: if the folder holds chains of another run.
        Diverged: if a chain diverges.
        Stopped: after SIGINT or SIGTERM, with a checkpoint.
        RanksError: if another of the processes ends.
    """
    config, setup, device = experiment.config, experiment.setup, experiment.device
    ranks = experiment.ranks
    if ranks.first:
        prepare_folder(experiment.folder, config)
    ranks.wait()
    try:
        run = partial(
            run_chains,
            train=setup.train.to(device),
            meta=experiment.task.meta.to(device),
            plan=experiment.plan,
            folder=experiment.folder,
            chains=config.chains,
            seed=config.seed,
            settings=settings(config),
            facts=None if setup.digest is None else {"scores": setup.digest},
            target=config.sparsity if setup.latent else None,
            weights=experiment.weights,
            size=len(experiment.task.train),
            workers=config.workers,
            table=config.table,
            cuda_graph=config.cuda_graph,
        )
        make = _maker(experiment, experiment.together, shard=experiment.shards)
        chains = run(make, resume=config.resume, ranks=ranks, apart=experiment.apart)
        if experiment.shards:  # the first process takes them up, with whole networks
            chains = run(_maker(experiment), resume=True, progress=False) if ranks.first else []
    except Diverged as error:
        options = [f"method.learning_rate={config.method.learning_rate / 4:.2g}"]
        if setup.latent:
            options.append(f"weights.step_size={config.weights.step_size / 4:.2g}")
        raise Diverged(f"{error} (options {' '.join(options)})") from error
    if ranks.first:
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
    schedule = dict.fromkeys(networks, config.schedule)
    minibatches, train_batch = "uniform", config.sampler.train_batch
    if setup.membership is not None:
        train_batch = setup.train_batch
    if setup.latent:
        step_size[config.weights.group] = config.weights.step_size
        temperature[config.weights.group] = 0 if setup.optimises else config.weights.temperature
        clip[config.weights.group] = config.weights.clip
        minibatches = config.weights.minibatches
        schedule[config.weights.group] = config.weights.schedule or config.schedule
        for group, eta in config.step_sizes.items():
            step_size[str(group)] = eta / len(setup.train)
    elif train_batch is not None and len(setup.train) < len(task.train):
        train_batch = min(train_batch, len(setup.train))  # a baseline may train on fewer points
    return partial(
        sampler,
        train_batch=train_batch,
        step_size={
            group: Rescaled(
                named(schedule.get(group, config.schedule), eta, plan.first), setup.step_factor
            )
            for group, eta in step_size.items()
        },
        temperature=temperature,
        clip=clip,
        minibatches=minibatches,
    )
