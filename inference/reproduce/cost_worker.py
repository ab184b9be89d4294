"""Steps of one method, timed on demand: the process that `inference.reproduce.cost` starts.

`inference.reproduce.steps` says what it reads and answers; memory is less what was in use before
there was a network.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence

import torch

from bads_ppl.chains import chain_generator
from bads_ppl.errors import Diverged, InputError
from bads_ppl.joining import join, step_batches
from bads_ppl.minibatches import UniformMinibatches
from inference.experiment import Experiment, first_chain, prepare
from inference.options import build
from inference.reproduce.cost import PLAIN
from inference.reproduce.steps import Memory, Step, take_steps
from inference.run import compose_run


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
        rows = train_rows.next().index, meta_rows.next().index
        first, second = step_batches(train, rows[0], meta, rows[1], generator)
        optimiser.zero_grad()
        output = network(join(first.input, second.input))
        loss(output, join(first.target, second.target)).mean().backward()
        optimiser.step()

    return step


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
        step = plain_step(experiment) if kind == PLAIN else first_chain(experiment)[0].step
    about = {
        "preparation_s": time.perf_counter() - start,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(about), flush=True)
    take_steps(step, memory, device)


if __name__ == "__main__":
    main()
