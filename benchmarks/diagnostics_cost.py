"""Time and memory of `diagnose`: `python -m benchmarks.diagnostics_cost --points 10000`.

Draws are autoregressive, with 30 % that repeat the one before, as those of weights that were not in
a minibatch do. Set OMP_NUM_THREADS=1 for the time of one thread.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from bads_ppl.diagnostics import diagnose
from bads_ppl.draws import DrawWriter, read_draws
from benchmarks.arguments import positive_integer


def write_chain(folder: Path, draws: int, points: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logit = generator.standard_normal(points).astype(np.float32)
    with DrawWriter(folder, points) as writer:
        for _ in range(draws):
            moves = generator.random(points) > 0.3
            noise = generator.standard_normal(points, dtype=np.float32)
            logit[moves] = (0.8 * logit + 0.6 * noise)[moves]
            writer.append(1 / (1 + np.exp(-logit)), {"potential": float(generator.normal())})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=positive_integer, default=4)
    parser.add_argument("--draws", type=positive_integer, default=400)
    parser.add_argument("--points", type=positive_integer, nargs="+", default=[10_000, 100_000])
    options = parser.parse_args()
    print("| points | seconds | peak memory, MiB |\n|---|---|---|")
    for points in sorted(options.points):
        with tempfile.TemporaryDirectory() as root:
            folders = [Path(root) / f"chain-{chain}" for chain in range(options.chains)]
            for seed, folder in enumerate(folders):
                write_chain(folder, options.draws, points, seed)
            chains = [read_draws(folder) for folder in folders]
            start = time.perf_counter()
            diagnose(chains, evidence="calibrated")
            seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux: KiB
        print(f"| {points:,} | {seconds:.1f} | {peak:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
