"""Chains of a few steps that one process runs, or several together; see `test_ranks`.

As a script, with RANK and WORLD_SIZE set: `rank_cases.py MEETING OUT NAME...` runs the named cases
in a process group that meets at a file, and leaves the state of this rank in OUT.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from bads_ppl.data import Data
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.preconditioned import PreconditionedSGLD
from bads_ppl.priors import NormalPrior, SparsityPrior
from bads_ppl.program import Parts, bind
from bads_ppl.ranks import ALONE, Ranks
from bads_ppl.sghmc import SGHMC
from bads_ppl.sgld import SGLD
from bads_ppl.shards import sharded
from bads_ppl.weights import InstanceWeights, WeightNetwork
from models import joint, learned_sparsity, normalised
from models.bilevel import bilevel
from models.causal import Causal
from models.language import IGNORED, token_loss

STEPS = {"normed": 1, "adapted": 12}
"""Of cases that do not take 6; step sizes adapt every tenth step of warm-up."""

CLASSES = 3


def sets(train: int = 39, meta: int = 10) -> tuple[Data, Data]:
    """Points in three classes, more of the first."""
    g = torch.Generator().manual_seed(3)
    x, mx = torch.randn(train, 4, generator=g), torch.randn(meta, 4, generator=g)
    lengths = torch.arange(train) % 5
    return (
        Data(x, (x[:, 0] > 0).long() + (x[:, 1] > 1), lengths=lengths),
        Data(mx, (mx[:, 0] > 0).long() + (mx[:, 1] > 1), name="meta"),
    )


def network(*, norm: bool = False) -> nn.Module:
    layers = [nn.Linear(4, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


def groups(train, meta, parts):
    """A global latent without a closed score, and one latent per class in a plate of its own."""
    theta = parts.sample_network()
    tilt = pyro.sample("tilt", dist.Gamma(torch.tensor(2.0), torch.tensor(3.0)))
    with pyro.plate("classes", CLASSES, subsample=torch.arange(CLASSES)):
        shift = pyro.sample("shift", dist.Normal(torch.zeros(()), torch.ones(())))
    loss = parts.loss(theta(train.input) + tilt * shift, train.target)
    plate = train.plate("train")
    w = parts.weights.sample(train, plate)
    with plate:
        pyro.factor("train_loss", -w * loss)
    parts.observe_meta(theta(meta.input) + shift, meta)


INSTANCE = {"theta": 0.01, "w": 0.2}
NETWORK = {"theta": 0.01, "phi": 0.2}


def made(
    model, *, ranks: Ranks, sampler=SGLD, weights=None, norm=False, total="exact", **options
) -> MinibatchKernel:
    torch.manual_seed(5)
    given = weights() if weights else InstanceWeights(0.4)
    scales = NormalPrior(1.0, {"0.bias": 0.5})
    parts = Parts(
        network(norm=norm), given, SparsityPrior(0.4, scale=3.0, total=total), prior=scales
    )
    step = NETWORK if weights else INSTANCE
    options = {"step_size": step, "train_batch": 8, "meta_batch": 4, **options}
    generator = torch.Generator().manual_seed(7)
    return sampler(bind(model, parts), generator=generator, ranks=ranks, **options)


def phi() -> WeightNetwork:
    return WeightNetwork(8, CLASSES, initial=0.4)


def noisy(input: Tensor, generator: torch.Generator) -> Tensor:
    return input + 0.1 * torch.randn(input.shape, generator=generator)


def conversations(size: int, name: str) -> Data:
    """Rows of numbers of different lengths, of which the last third counts."""
    g = torch.Generator().manual_seed(size)
    ids = torch.randint(1, 30, (size, 12), generator=g)
    length = torch.randint(6, 13, (size, 1), generator=g)
    mask = (torch.arange(12) < length).long()
    labels = ids.masked_fill(torch.arange(12) < length * 2 // 3, IGNORED)
    labels = labels.masked_fill(mask == 0, IGNORED)
    input = {"ids": ids * mask, "mask": mask, "labels": labels}
    return Data(input, labels, name=name, lengths=length[:, 0])


class ByParameter(SGLD):
    """Draws the noise of networks parameter by parameter, as where these are sharded."""

    def _noise(self, group: str, values: list[Tensor], scale: float) -> list[Tensor]:
        if group not in ("theta", "auxiliary") or self.shards(group) is not None:
            return super()._noise(group, values, scale)
        draws = [torch.empty(value.shape) for value in values]
        return [draw.normal_(0, scale, generator=self.generator) for draw in draws]


class PreconditionedByParameter(ByParameter, PreconditionedSGLD):
    """The same with a preconditioner."""


def language_model(
    sampler=SGLD, model=normalised, shard=False, *, ranks: Ranks, **options
) -> MinibatchKernel:
    """A small language model in pieces of two rows, and a weight network."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(5)
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(vocab_size=30, **sizes, **heads).save_pretrained(folder)
        network = Causal(folder, pretrained=False, rank=2, rows=2, **options)
    weights = WeightNetwork(16, initial=0.4)
    parts = Parts(network, weights, SparsityPrior(0.4, scale=3.0), loss=token_loss)
    if shard and not ranks.alone:
        parts.auxiliary = sharded(copy.deepcopy(network), ranks, torch.device("cpu"))
        sharded(network, ranks, torch.device("cpu"))
    return sampler(
        bind(model, parts),
        step_size=NETWORK,
        train_batch=8,
        meta_batch=4,
        bucket=2,
        clip={"theta": 0.05},
        generator=torch.Generator().manual_seed(7),
        ranks=ranks,
    )


CASES = {
    "joint-instance": partial(made, joint, clip={"theta": 0.05, "w": 0.3}),
    "joint-network": partial(made, joint, weights=phi, sampler=SGHMC),
    "reverted-network": partial(
        made, normalised, weights=phi, sampler=PreconditionedSGLD, clip={"theta": 0.05}, bucket=2
    ),
    "restarted-centred": partial(
        made, partial(normalised, auxiliary="restarted", window=3, centre=True), sampler=SGHMC
    ),
    "importance": partial(
        made, joint, minibatches="importance", local_steps=3, sampler=PreconditionedSGLD
    ),
    "paper-total": partial(made, joint, total="running_mean", mode="paper"),
    "adapted": partial(made, joint, target_acceptance=0.8),
    "latent-share": partial(
        made, partial(learned_sparsity, base=joint), step_size={**INSTANCE, "beta": 0.01}
    ),
    "bilevel": partial(made, partial(bilevel, rate=0.1), temperature=0.0),
    "groups": partial(made, groups, step_size={**INSTANCE, "tilt": 0.01, "shift": 0.01}),
    "lora": partial(language_model, tune="lora"),
    "sharded": partial(language_model, ByParameter, joint, shard=True),
    "sharded-lora": partial(
        language_model, PreconditionedByParameter, shard=True, tune="lora", checkpoint=True
    ),
    "sharded-restarted": partial(
        language_model,
        ByParameter,
        partial(normalised, auxiliary="restarted", window=3),
        shard=True,
    ),
    "normed": partial(made, joint, norm=True),
}
"""Chains by name."""


def state(name: str, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """The state of a chain after some steps, with its weights and its report."""
    kernel = CASES[name](ranks=ranks)
    train, meta = sets()
    if name == "lora" or name.startswith("sharded"):
        train, meta = conversations(33, "train"), conversations(9, "meta")
    if name == "restarted-centred":
        train.augment = noisy
    warmup = 10 if name == "adapted" else 4
    kernel.setup(warmup, train, meta)
    for step in range(STEPS.get(name, 6)):
        if step == 3 and not ranks.alone:  # goes on from its state in another kernel
            kept, kernel = kernel.state_dict(), CASES[name](ranks=ranks)
            kernel.setup(warmup, train, meta)
            kernel.load_state_dict(kept)
        kernel.step()
    kernel.check_finite()
    found = {key: value.clone() for key, value in kernel.state_dict().items()}
    kernel.check_together()
    report = torch.tensor(list(kernel.report().values()))
    some = kernel.site_values(rows=torch.tensor([3, 0, 3]))
    return found | {"w": kernel.site_values(chunk=7), "some": some, "report": report}


def meet(meeting: str) -> Ranks:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size
    )
    return Ranks.joined()


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks = meet(sys.argv[1])
    for name in sys.argv[3:]:
        tensors = {key: value.contiguous() for key, value in state(name, ranks).items()}
        save_file(tensors, Path(sys.argv[2]) / f"{name}-{ranks.rank}.safetensors")
    ranks.wait()
