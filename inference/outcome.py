"""What a run writes once its chains are done: tables, draws, plots and results.json."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from bads_ppl import plots
from bads_ppl.atomic import atomic_path
from bads_ppl.chains import ChainResult, evidence
from bads_ppl.diagnostic_plots import diagnostic_figures
from bads_ppl.diagnostics import diagnose
from bads_ppl.groups import group_means
from bads_ppl.posterior import save, to_arviz
from bads_ppl.selection import Selection
from inference.evaluation import ends, mean_scores, on_test_set
from inference.experiment import Experiment
from inference.extremes import write_extremes, write_samples
from inference.folder import METRICS, RESULTS, settings
from inference.setups import Setup
from inference.tasks import Task


def report(experiment: Experiment, chains: list[ChainResult]) -> dict[str, Any]:
    """Write what came out of an experiment's chains; returns what stands in results.json."""
    config, choices, setup = experiment.config, experiment.choices, experiment.setup
    task, plan, folder = experiment.task, experiment.plan, experiment.folder
    metrics = [row for chain in chains for row in chain.metrics]
    with atomic_path(folder / METRICS) as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    label = {"label": task.train.target.numpy()} if task.classes else {}
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
        columns={"group": group, **label, **task.columns, **chosen_by, **diagnostics.columns()},
    )
    selection.to_parquet(folder / "weights.parquet")
    means = group_means(draws, {name: mask.numpy() for name, mask in task.groups.items()})
    scored = on_test_set(task, chains)
    if scored.samples:
        write_samples(folder, scored.samples)
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
            constant_data={"group": group.astype(str), **label},
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
        "test": scored.numbers,
        "groups": {
            name: {
                "mean_weight": group.mean,
                "interval": [group.low, group.high],  # 95 % of the draws
                "count": int(task.groups[name].sum()),
                "high": name in task.high if task.high else None,
            }
            for name, group in means.items()
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
    if task.delivery is not None:
        length = {"steps": config.steps, "chains": config.chains}
        results["warnings"] += task.delivery(
            folder, selection, ends(chains), results, {**length, **settings(config)}
        )
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
    from sklearn.metrics import average_precision_score, roc_auc_score

    right = task.right.numpy()
    value = selection.mean if scores is None else scores.numpy()
    return {
        "right": {
            "what": task.right_means,
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
    for name, figure in task.scoring.figures(metrics).items():
        plots.save(figure, folder / f"{name}.png")
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
    """Versions of what the numbers depend on; "not installed" where code runs from its folder."""
    found = {"python": platform.python_version()}
    for name in ("bads-ppl", "torch", "pyro-ppl", "numpy", "arviz"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
