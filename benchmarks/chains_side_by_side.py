"""What four chains cost beside four single ones: `python -m benchmarks.chains_side_by_side`.

LeNet5 on 5,000 made-up images, default model and sampler, 100 + 50 rows a step. A round runs one
chain alone, four one after the other, and four at a time: in one process per core, or on CUDA in
turns in one process; the ratios are to the round's single chain (4 would be no gain). What a draw
and an evaluation look at is part of it; a chain's diagnostics are left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bads_ppl import Data, Parts, Plan, SparsityPrior, bind
from bads_ppl.chains import run_chains
from bads_ppl.device import resolve_device
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.select import CLIP
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights
from benchmarks.arguments import positive_integer
from models import normalised
from models.lenet5 import LeNet5


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(10, (count,), generator=generator)
    return torch.randn(count, 1, 28, 28, generator=generator) + target[:, None, None, None], target


def seconds(train: Data, meta: Data, chains: int, workers: int, plan: Plan) -> float:
    device = train.device
    prior = SparsityPrior(0.05)

    def build(chain: int, generator: torch.Generator) -> tuple[MinibatchKernel, ThetaMonitor]:
        network = LeNet5().to(device)
        parts = Parts(network, InstanceWeights(mean=0.05), prior)
        kernel = SGLD(
            bind(normalised, parts),
            step_size={"theta": 1e-4, "w": 0.2},
            temperature={"theta": 1e-3},
            clip=CLIP,
            minibatches="importance",
            generator=generator,
        )
        return kernel, ThetaMonitor(network, parts.loss, train, meta)

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run_chains(
            build,
            train,
            meta,
            plan=plan,
            folder=Path(folder),
            chains=chains,
            seed=0,
            settings={},
            workers=workers,
            progress=False,
        )
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=positive_integer, default=300, help="of each chain")
    parser.add_argument("--thinning", type=positive_integer, default=10, help="steps between draws")
    parser.add_argument("--rounds", type=positive_integer, default=5)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = resolve_device(options.device)
    train = Data(*images(5000, 0)).to(device)
    meta = Data(*images(100, 1), name="meta").to(device)
    plan = Plan(options.steps, thinning=options.thinning)
    cores = min(4, len(os.sched_getaffinity(0)))
    arms = {"one after the other": 1}
    if device.type == "cuda":
        arms["in turns"] = 4
    elif device.type == "cpu" and cores > 1:
        arms[f"{cores} processes"] = cores
    seconds(train, meta, 1, 1, Plan(30))  # warm-up
    ratios: dict[str, list[float]] = {name: [] for name in arms}
    alone: list[float] = []
    for _ in range(options.rounds):
        alone.append(seconds(train, meta, 1, 1, plan))
        for name, workers in arms.items():
            found = seconds(train, meta, 4, workers, plan)
            ratios[name].append(found / alone[-1])
    per_step = 1000 * statistics.median(alone) / options.steps
    print(f"One chain: {per_step:.1f} ms per step ({torch.get_num_threads()} threads, {device})\n")
    print("| four chains | time over one chain's: min | median | max |\n|---|---|---|---|")
    for name, values in ratios.items():
        print(
            f"| {name} | {min(values):.2f} | {statistics.median(values):.2f} | {max(values):.2f} |"
        )


if __name__ == "__main__":
    main()
