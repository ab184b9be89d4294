"""Steps of one method, timed on demand: the process that `inference.reproduce.cost` starts.

Reads numbers of steps from standard input, a line each, takes them, and answers with a line of
JSON: seconds, and the peak of the memory meanwhile less what was in use before there was a network.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from bads_ppl.chains import chain_generator
from bads_ppl.data import Data
from bads_ppl.errors import Diverged, InputError
from bads_ppl.minibatches import UniformMinibatches
from bads_ppl.program import join
from inference.experiment import Experiment, first_kernel, prepare
from inference.options import build
from inference.reproduce.cost import PLAIN
from inference.run import compose_run

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

Step = Callable[[], None]


def plain_step(experiment: Experiment) -> Step:
    """Plain SGD on the mean loss of a batch of train points and a batch of meta points."""
    config, device = experiment.config, experiment.device
    network = build(config.backbone, "backbone")(**experiment.task.shape).to(device)
    loss = experiment.task.loss
    optimiser = torch.optim.SGD(network.parameters(), lr=config.method.learning_rate)
    generator = chain_generator(config.seed, 0, device)
    train, meta = experiment.task.train.to(device), experiment.task.meta.to(device)
    bucket = config.sampler.bucket or 1
    train_rows, meta_rows = (
        UniformMinibatches(len(data), size or min(most, len(data)), generator, data.lengths, bucket)
        for data, size, most in (
            (train, config.sampler.train_batch, 100),
            (meta, config.sampler.meta_batch, 50),
        )
    )

    def step() -> None:
        first = train.view(train_rows.next().index, generator)
        second = meta.view(meta_rows.next().index, generator)
        optimiser.zero_grad()
        output = network(join(first.input, second.input))
        loss(output, torch.cat([first.target, second.target])).mean().backward()
        optimiser.step()

    return step


class Memory:
    """Peak of the memory in MiB above what was in use at the start, the data included.

    None where nobody can tell: on a CPU it is Linux that does, for the process.

    Args:
        device: where steps are taken.
        data: sets that will be moved there.
    """

    def __init__(self, device: torch.device, data: Sequence[Data]) -> None:
        self.device = device
        self.start = 0.0
        gc.collect()
        self.reset()
        self.start = self.peak() or 0.0
        if device.type != "cpu":
            tensors = [leaf for one in data for leaf in (*tree_leaves(one.input), one.target)]
            self.start += sum(leaf.numel() * leaf.element_size() for leaf in tensors) / 2**20

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError, AttributeError):  # where there is no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            CLEAR.write_text("5")

    def peak(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.start
        if self.device.type != "cpu" or not CLEAR.exists():
            return None
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
        return int(found[1]) / 2**10 - self.start if found else None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: the kind ("plain" or "method") and the options of a run, as JSON."""
    kind, options = sys.argv[1:] if arguments is None else arguments
    try:
        serve(kind, json.loads(options))
    except (InputError, Diverged) as error:
        print(json.dumps({"error": str(error)}), flush=True)


def serve(kind: str, options: Sequence[str]) -> None:
    """Prepare, say so, and take steps until standard input ends."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # nothing of what was prepared before is used
        where = [f"run_dir={folder}/run", f"cache={folder}/cache"]
        experiment = prepare(*compose_run([*options, *where], kind)).prepared()
    device = experiment.device
    memory = Memory(device, [experiment.setup.train, experiment.task.meta])
    step = plain_step(experiment) if kind == PLAIN else first_kernel(experiment).step
    about = {
        "preparation_s": time.perf_counter() - start,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        memory.reset()
        finish(device)
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        finish(device)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak_mib": memory.peak()}), flush=True)


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
