"""SGLD against NUTS on one program: `python -m benchmarks.nuts_agreement --out FOLDER`.

Logistic regression with 20 train points (6 labels flipped) and 10 meta points, model `joint`,
temperature 1, once with instance weights and once with a weight network. For each kind of minibatch
and step size: how far the means of w and theta are from those of NUTS (root mean square over the
site, in NUTS's standard deviations), and the mean ratio of standard deviations. What is known of
these numbers at best is the first line of the table: two independent halves of NUTS's own draws.

Writes nuts_agreement.csv, one row per seed, and nuts_agreement.png; rows that are there already are
kept, so that an interrupted run continues. About an hour on one core.
"""

from __future__ import annotations

import argparse
import math
from functools import cache, partial
from pathlib import Path

import pandas as pd
import pyro
import torch
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

from bads_ppl import (
    SGLD,
    Data,
    InstanceWeights,
    NormalPrior,
    Parts,
    SparsityPrior,
    WeightNetwork,
    bind,
)
from bads_ppl.atomic import atomic_path
from bads_ppl.plots import save
from benchmarks.arguments import positive_integer
from models import joint

TRAIN, META = 20, 10
ETAS = {"instance": (0.16, 0.08, 0.04, 0.02, 0.01), "network": (0.64, 0.32, 0.16, 0.08, 0.04, 0.02)}
"""The largest is near the limit beyond which the kernel refuses a step."""

WEIGHT_STEP = {"instance": ("w", 10.0), "network": ("phi", 1.0)}
"""Group of the weights, and its step in units of theta's."""

MINIBATCHES = {
    "instance": (("uniform", 20), ("uniform", 5), ("importance", 6)),
    "network": (("uniform", 20), ("uniform", 5)),
}
COLOUR = {("uniform", 20): "#333333", ("uniform", 5): "#0b559f", ("importance", 6): "#b11218"}
KEY = ["weights", "minibatches", "train_batch", "eta", "site", "seed"]


def problem() -> tuple[Data, Data]:
    generator = torch.Generator().manual_seed(0)
    x, mx = (torch.randn(count, 2, generator=generator) for count in (TRAIN, META))
    y, my = ((z[:, 0] + 0.5 * z[:, 1] > 0).long() for z in (x, mx))
    y[:6] = 1 - y[:6]
    return Data(x, y), Data(mx, my, name="meta")


def parts(weights: str) -> Parts:
    """Scales at which no direction of the posterior is much narrower than the others."""
    if weights == "instance":
        return Parts(nn.Linear(2, 2), InstanceWeights(), SparsityPrior(0.5, scale=1.0))
    source = WeightNetwork(2, classes=2, prior=NormalPrior(1.0))
    return Parts(nn.Linear(2, 2), source, SparsityPrior(0.5, scale=3.0))


@cache
def nuts(weights: str, samples: int) -> dict[str, Tensor]:
    """Draws (samples, ...) of w and theta."""
    train, meta = (data.full() for data in problem())
    program = bind(joint, parts(weights))
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(program), num_samples=samples, warmup_steps=500, disable_progbar=True)
    mcmc.run(train, meta)
    draws = mcmc.get_samples()
    theta = torch.cat([draws["theta.weight"].flatten(1), draws["theta.bias"]], dim=1)
    w = []
    for number in range(samples):
        values = {name: value[number] for name, value in draws.items()}
        trace = poutine.trace(poutine.condition(program, values)).get_trace(train, meta)
        w.append(trace.nodes["w"]["value"].detach())
    return {"w": torch.stack(w).double(), "theta": theta.double()}


def sgld(
    weights: str, kind: str, train_batch: int, eta: float, steps: int, seed: int
) -> dict[str, Tensor]:
    """Draws of w and theta, every 10 steps after a tenth of them."""
    group, times = WEIGHT_STEP[weights]
    kernel = SGLD(
        bind(joint, parts(weights)),
        step_size={"theta": eta, group: times * eta},
        minibatches=kind,
        train_batch=train_batch,
        meta_batch=META,
        generator=torch.Generator().manual_seed(seed),
    )
    kernel.setup(0, *problem())
    network = kernel.latents.networks["theta"]
    w, theta = [], []
    for step in range(steps):
        kernel.step()
        if step > steps // 10 and step % 10 == 0:
            w.append(kernel.site_values().clone())
            theta.append(torch.cat([p.detach().flatten() for p in network.parameters]))
    return {"w": torch.stack(w).double(), "theta": torch.stack(theta).double()}


def compare(found: Tensor, wanted: Tensor) -> dict[str, float]:
    shift = (found.mean(0) - wanted.mean(0)) / wanted.std(0)
    return {
        "shift": float(shift.square().mean().sqrt()),
        "sd_ratio": float((found.std(0) / wanted.std(0)).mean()),
    }


def plot(table: pd.DataFrame) -> Figure:
    """Bias over the step size: one panel per kind of weights and site."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex="row", sharey="row")
    for row, weights in enumerate(MINIBATCHES):
        for column, site in enumerate(("w", "theta")):
            panel = axes[row, column]
            part = table[(table.weights == weights) & (table.site == site)]
            for (kind, size), one in part.groupby(["minibatches", "train_batch"]):
                grouped = one.groupby("eta").sd_ratio
                mean, low, high = grouped.mean(), grouped.min(), grouped.max()
                colour = COLOUR[kind, size]
                label = f"{kind}, {size} of {TRAIN}"
                panel.plot(mean.index, mean, marker="o", color=colour, label=label)
                panel.fill_between(mean.index, low, high, alpha=0.2, color=colour, lw=0)
            panel.axhline(1, color="#333333", lw=0.8)
            panel.set(xscale="log", title=f"{site}, {weights} weights")
            panel.set_xticks(ETAS[weights], [f"{eta:g}" for eta in ETAS[weights]])
            panel.minorticks_off()
            panel.legend(frameon=False)
    figure.supxlabel("step size eta of theta")
    figure.supylabel("sd / sd of NUTS: mean over the site, band over seeds")
    return figure


def markdown(table: pd.DataFrame) -> str:
    lines = ["| weights | minibatches | eta | site | shift of means, sd | ratio of sds |"]
    lines.append("|---|---|---|---|---|---|")
    for key, one in table.groupby(KEY[:-1], sort=False):
        weights, kind, size, eta, site = key
        shift, ratio = one["shift"], one["sd_ratio"]
        lines.append(
            f"| {weights} | {kind}, {size} of {TRAIN} | {eta:g} | {site} | {shift.mean():.3f} "
            f"| {ratio.mean():.3f} ({ratio.min():.3f} to {ratio.max():.3f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/nuts_agreement"))
    parser.add_argument("--samples", type=positive_integer, default=4000, help="NUTS draws")
    parser.add_argument(
        "--steps", type=positive_integer, default=20_000, help="SGLD steps; more below eta = 0.02"
    )
    parser.add_argument("--seeds", type=positive_integer, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "nuts_agreement.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {tuple(row[name] for name in KEY) for row in rows}

    def record(found: dict[str, Tensor], wanted: dict[str, Tensor], *key: object) -> None:
        for site in ("w", "theta"):
            about = dict(zip(KEY, (*key[:4], site, key[4]), strict=True))
            rows.append(about | compare(found[site], wanted[site]))
        with atomic_path(path) as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False)

    for weights, kinds in MINIBATCHES.items():
        reference = partial(nuts, weights, options.samples)
        key = (weights, "NUTS, half against half", TRAIN, 0.0)
        if (*key, "w", 0) not in done:
            halves = [{n: v[k::2] for n, v in reference().items()} for k in (0, 1)]
            record(halves[0], halves[1], *key, 0)
        for kind, size in kinds:
            for eta in ETAS[weights]:
                for seed in range(options.seeds):
                    if (weights, kind, size, eta, "w", seed) in done:
                        continue
                    steps = math.ceil(options.steps * max(1.0, 0.02 / eta))
                    found = sgld(weights, kind, size, eta, steps, seed)
                    record(found, reference(), weights, kind, size, eta, seed)
                    print(f"{weights}, {kind} {size}, eta {eta}, seed {seed}", flush=True)
    table = pd.DataFrame(rows)
    save(plot(table[table.eta > 0]), options.out / "nuts_agreement.png")
    print(markdown(table))


if __name__ == "__main__":
    main()
