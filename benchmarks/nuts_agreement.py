"""SGLD against NUTS on one program: `python -m benchmarks.nuts_agreement`.

Logistic regression with 20 train points (6 labels flipped) and 10 meta points, model `joint`,
instance weights, temperature 1. Prints, for each kind of minibatch and step size, how far the means
of w and theta are from those of NUTS (in NUTS's standard deviations: largest over sites) and the
range of the ratios of standard deviations. Takes about five minutes on one core.
"""

from __future__ import annotations

import argparse
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

from bads_ppl import SGLD, Data, InstanceWeights, Parts, SparsityPrior, bind
from models import joint


def problem() -> tuple[Data, Data]:
    generator = torch.Generator().manual_seed(0)
    x, mx = torch.randn(20, 2, generator=generator), torch.randn(10, 2, generator=generator)
    y, my = ((z[:, 0] + 0.5 * z[:, 1] > 0).long() for z in (x, mx))
    y[:6] = 1 - y[:6]
    return Data(x, y), Data(mx, my, name="meta")


def parts() -> Parts:
    return Parts(nn.Linear(2, 2), InstanceWeights(), SparsityPrior(0.5, scale=1.0))


def sgld(train: Data, meta: Data, steps: int, **options: Any) -> dict[str, Tensor]:
    kernel = SGLD(bind(joint, parts()), generator=torch.Generator().manual_seed(1), **options)
    kernel.setup(0, train, meta)
    w, theta = [], []
    for step in range(steps):
        kernel.step()
        if step > steps // 20 and step % 10 == 0:
            w.append(kernel.site_values().clone())
            theta.append(kernel.latents.networks["theta"].parameters[0].detach().flatten().clone())
    return {"w": torch.stack(w).double(), "theta": torch.stack(theta).double()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=3000, help="NUTS draws")
    parser.add_argument("--steps", type=int, default=40_000, help="SGLD steps at eta = 0.02")
    arguments = parser.parse_args()
    train, meta = problem()
    pyro.set_rng_seed(0)
    nuts = MCMC(
        NUTS(bind(joint, parts())),
        num_samples=arguments.samples,
        warmup_steps=500,
        disable_progbar=True,
    )
    nuts.run(train.full(), meta.full())
    draws = nuts.get_samples()
    wanted = {"w": draws["w"].double(), "theta": draws["theta.weight"].flatten(1).double()}
    print("| minibatches | eta theta, w | site | largest mean shift / sd | sd ratio, min to max |")
    print("|---|---|---|---|---|")
    for eta in (0.08, 0.02):
        for kind, size in (("uniform", 20), ("uniform", 5), ("importance", 6)):
            found = sgld(
                train,
                meta,
                int(arguments.steps * 0.02 / eta),
                minibatches=kind,
                train_batch=size,
                meta_batch=10,
                step_size={"theta": eta, "w": 10 * eta},
            )
            for site, reference in wanted.items():
                shift = (found[site].mean(0) - reference.mean(0)).abs() / reference.std(0)
                ratio = found[site].std(0) / reference.std(0)
                print(
                    f"| {kind}, {size} of 20 | {eta}, {10 * eta:g} | {site} | {shift.max():.2f} "
                    f"| {ratio.min():.2f} to {ratio.max():.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
