"""Cost of a step, of memory and of results as the train set grows: `python -m benchmarks.scale`.

Logistic regression on synthetic points with 8 features, program `joint`, instance weights, 100 + 50
rows a step: so small a network that what grows with the set shows. Steps of all sizes are timed in
turns, in CPU time of one thread, which other programs on the machine disturb little; ratios are to
the smallest set of the same turn. Memory is that of a fresh process per size: "state" are the bytes
of the sampler's tensors (table of the weights and order of the rows), "peak" what the process took
at most on top of the data from set-up over steps to a draw. Start-up is from tensors to the end of
the first step. Statistics are of `--draws` draws of one chain, diagnostics of two such chains.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bads_ppl import SGLD, Data, InstanceWeights, Parts, Plan, SparsityPrior, bind
from bads_ppl.atomic import atomic_path
from bads_ppl.chains import fingerprint, run_chains
from bads_ppl.checkpoint import save_checkpoint
from bads_ppl.diagnostics import diagnose
from bads_ppl.draws import DrawWriter, read_draws
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.moments import moments
from bads_ppl.monitors import ThetaMonitor
from benchmarks.arguments import positive_integer
from models import joint

SIZES = (10**4, 10**5, 10**6, 10**7)
ARMS = {"uniform": (), "importance": ("importance",), "uniform, on disk": ("disk",)}
"""Kinds of minibatches, and where the table is."""


def points(size: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(size, 8, generator=generator)
    return input, (input[:, 0] > 0).long()


def network_and_parts() -> tuple[nn.Module, Parts]:
    network = nn.Linear(8, 2)
    return network, Parts(network, InstanceWeights(mean=0.05), SparsityPrior(0.05))


def sampler(parts: Parts, size: int, generator: torch.Generator, arm: str, folder: Path) -> SGLD:
    return SGLD(
        bind(joint, parts),
        step_size={"theta": 1 / size, "w": 0.2},
        clip={"theta": 0.3, "w": 3.0},
        minibatches="importance" if "importance" in ARMS[arm] else "uniform",
        folder=folder if "disk" in ARMS[arm] else None,
        generator=generator,
    )


def ready(train: Data, meta: Data, arm: str, folder: Path) -> SGLD:
    _, parts = network_and_parts()
    made = sampler(parts, len(train), torch.Generator().manual_seed(1), arm, folder)
    made.setup(0, train, meta)
    return made


def measured(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def step_times(
    sizes: list[int], arms: list[str], steps: int, rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """CPU ms per step of every size and arm, turn by turn."""
    meta = Data(*points(1000, 1), name="meta")
    made: dict[tuple[int, str], MinibatchKernel] = {}
    for size in sizes:
        train = Data(*points(size, 0))
        for arm in arms:
            made[size, arm] = ready(train, meta, arm, folder)
    found: dict[tuple[int, str], list[float]] = {key: [] for key in made}
    for turn in tqdm(range(rounds + 1), desc="turns", disable=not sys.stderr.isatty()):
        for key, kernel in made.items():
            seconds, _ = measured(lambda kernel=kernel: [kernel.step() for _ in range(steps)])
            if turn:  # the first warms up
                found[key].append(1000 * seconds / steps)
    return [
        {
            "size": size,
            "arm": arm,
            "ms": statistics.median(times),
            "ratio": statistics.median(
                mine / base for mine, base in zip(times, found[sizes[0], arm], strict=True)
            ),
        }
        for (size, arm), times in found.items()
    ]


def state_bytes(kernel: MinibatchKernel) -> int:
    """Bytes that the sampler holds in memory for the points."""
    rows = kernel.train_rows
    held = [getattr(rows, name, None) for name in ("order", "index", "importance")]
    if kernel.folder is None:
        held += [table.value for table in kernel.latents.tables.values()]
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def process_bytes(name: str) -> int:
    """What Linux says of this process: "VmRSS", memory now, or "VmHWM", at most since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def forget() -> int:
    """Memory now, with which the most begins anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return process_bytes("VmRSS")


def cpu_seconds() -> float:
    """Of this process and of those that it started and that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def one_size(size: int, arm: str, draws: int, folder: Path) -> dict[str, Any]:
    """Costs of one size in this process, which should be a fresh one."""
    small = Data(*points(1000, 1), name="meta")
    warm = ready(small, small, "uniform", folder)  # what a first step loads is no cost of the size
    for _ in range(3):
        warm.step()
    tensors = points(size, 0)
    before = forget()
    found: dict[str, Any] = {"size": size, "arm": arm}

    def start() -> SGLD:
        train = Data(*tensors)
        fingerprint(train)
        kernel = ready(train, small, arm, folder)
        kernel.step()
        return kernel

    wall = time.perf_counter()
    found["startup_cpu_s"], kernel = measured(start)
    found["startup_s"] = time.perf_counter() - wall
    for _ in range(100):
        kernel.step()
    random = np.random.default_rng(0)
    with DrawWriter(folder / "chain", size) as writer:
        seconds, _ = measured(lambda: writer.append(kernel.site_values().numpy(), {"step": 1.0}))
        found["draw_bytes"] = (folder / "chain" / "w.f32").stat().st_size / size
        found["draws_per_cpu_s"] = 1 / seconds
        found["state_bytes"] = state_bytes(kernel) / size
        ids = kernel.train.ids.nbytes  # that the set makes, on top of the tensors
        found["peak_bytes"] = (process_bytes("VmHWM") - before - ids) / size
        path = folder / "checkpoint.safetensors"
        found["checkpoint_cpu_s"], _ = measured(
            lambda: save_checkpoint(path, kernel.state_dict(), {})
        )
        found["checkpoint_bytes"] = path.stat().st_size / size
        if not draws:
            return found
        for step in range(2, draws + 1):
            writer.append(random.random(size, dtype=np.float32), {"step": float(step)})
    chain = read_draws(folder / "chain")
    ids = kernel.train.ids.numpy()
    before = forget()
    found["statistics_cpu_s"], kept = measured(lambda: moments([chain.w], ids))
    found["statistics_bytes"] = sum(values.nbytes for values in kept) / size
    found["statistics_peak_bytes"] = (process_bytes("VmHWM") - before) / size
    found["diagnostics_cpu_s"], _ = measured(
        lambda: diagnose([chain, chain], evidence="calibrated")
    )
    return found


def chain_times(size: int, chains: list[int], steps: int, folder: Path) -> list[dict[str, Any]]:
    """One set with several chains: ms per step of a chain, with what runs beside it; seconds."""
    train, meta = Data(*points(size, 0)), Data(*points(1000, 1), name="meta")

    def build(chain: int, generator: torch.Generator) -> tuple[MinibatchKernel, ThetaMonitor]:
        network, parts = network_and_parts()
        kernel = sampler(parts, size, generator, "uniform", folder)
        return kernel, ThetaMonitor(network, parts.loss, train, meta)

    found = []
    for count in chains:
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            start, used = time.perf_counter(), cpu_seconds()
            results = run_chains(
                build,
                train,
                meta,
                plan=Plan(steps, burn_in=steps - 1, thinning=1, snapshots=0),
                folder=Path(inside),
                chains=count,
                workers=None,
                progress=False,
            )
            wall = time.perf_counter() - start
        found.append(
            {
                "size": size,
                "chains": count,
                "ms": 1000 * statistics.median(chain.seconds for chain in results) / steps,
                "cpu_s": (cpu_seconds() - used) / count,
                "s": wall,
            }
        )
    return found


def fresh(task: str, size: int, options: argparse.Namespace, **given: str) -> Any:
    """What `task` measures of one size, in a process of its own."""
    call = [sys.executable, "-m", "benchmarks.scale", "--worker", task, "--sizes", str(size)]
    call += ["--steps", str(options.steps)]
    call += ["--chains", *map(str, options.chains), "--folder", str(options.folder)]
    for name, value in given.items():
        call += [f"--{name}", value]
    return json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE).stdout)


def table(rows: list[dict[str, Any]], **columns: str) -> str:
    """A table of what stands under each name, with the format `columns` gives it."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [form.format(row[name]) if name in row else "" for name, form in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=positive_integer, nargs="+", default=SIZES)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--chains", type=positive_integer, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--steps", type=positive_integer, default=100, help="of a turn and of a chain"
    )
    parser.add_argument("--rounds", type=positive_integer, default=9)
    parser.add_argument("--draws", type=positive_integer, default=8, help="of a chain")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=["size", "bare", "chains"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = sorted(options.sizes)
    with tempfile.TemporaryDirectory(dir=options.folder) as inside:
        folder = Path(inside)
        if options.worker in ("size", "bare"):
            draws = options.draws if options.worker == "size" else 0
            print(json.dumps(one_size(sizes[0], options.arms[0], draws, folder)))
            return
        if options.worker == "chains":
            print(json.dumps(chain_times(sizes[0], options.chains, options.steps, folder)))
            return
        steps = step_times(sizes, options.arms, options.steps, options.rounds, folder)
    print(table(steps, size="{:,}", arm="{}", ms="{:.2f}", ratio="{:.3f}"), flush=True)
    costs = []
    for size in tqdm(sizes, desc="sizes", disable=not sys.stderr.isatty()):
        for arm in options.arms:  # draws are the same of all
            task = "size" if arm == options.arms[0] else "bare"
            costs.append(fresh(task, size, options, arms=arm, draws=str(options.draws)))
    form = dict.fromkeys(("state_bytes", "peak_bytes", "draw_bytes", "checkpoint_bytes"), "{:.1f}")
    print(table(costs, size="{:,}", arm="{}", startup_cpu_s="{:.2f}", startup_s="{:.2f}", **form))
    form = {"statistics_bytes": "{:.0f}", "statistics_peak_bytes": "{:.1f}"}
    names = ("draws_per_cpu_s", "checkpoint_cpu_s", "statistics_cpu_s", "diagnostics_cpu_s")
    form |= dict.fromkeys(names, "{:.2f}")
    print(table([row for row in costs if names[-1] in row], size="{:,}", **form), flush=True)
    chains = [row for size in sizes for row in fresh("chains", size, options)]
    print(table(chains, size="{:,}", chains="{}", ms="{:.2f}", cpu_s="{:.2f}", s="{:.1f}"))
    if options.json is not None:
        about = {"cores": os.cpu_count(), "torch": torch.__version__, "draws": options.draws}
        with atomic_path(options.json) as path:
            path.write_text(
                json.dumps({**about, "steps": steps, "costs": costs, "chains": chains}, indent=2)
            )


if __name__ == "__main__":
    main()
