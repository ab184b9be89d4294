"""What steps are taken on: images of the CPU's benchmark, and two language models."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from bads_ppl import (
    SGLD,
    Data,
    NormalPrior,
    Parts,
    SparsityPrior,
    WeightNetwork,
    bind,
)
from bads_ppl.program import embedding_layer, join
from benchmarks.step_cost import by_hand, ours, problems
from benchmarks.step_cost.by_hand import Loop, batched
from benchmarks.step_cost.problems import SCALE, SEED, SPARSITY
from inference.reproduce.steps import Step
from models import joint
from models.language import IGNORED, token_loss

CUDA = torch.device("cuda")
GRAPH = ", as a graph"
JOINT = "by hand: joint, instance"
BILEVEL = "by hand: one-step bi-level"


@dataclass(frozen=True)
class Problem:
    """A network and its sets.

    Attributes:
        base: the step that ratios are to.
        precision: the arithmetic of its products, as `floors.Rates` calls it.
        arms: builds each step.
        loss: a plain loss (), for the count of operations.
        network: the network of that.
    """

    base: str
    precision: str
    arms: dict[str, Callable[[], Step]]
    loss: Callable[[], Tensor]
    network: nn.Module


def generator(chain: int = 0) -> torch.Generator:
    return torch.Generator(device=CUDA).manual_seed(SEED + chain)


# ------------------------------------------------------------------------------------- images


def images(name: str, batches: tuple[int, int]) -> Problem:
    """LeNet5 or ResNet32 at so many train and meta examples a step."""
    problem = replace(problems.PROBLEMS[name], batches=batches)
    train, meta = problem.sets(CUDA)

    def loop() -> Loop:
        return Loop(problem.build(CUDA), train, meta, batches, generator())

    def kernel(method: str, cuda_graph: bool | None = None) -> Step:
        network = problem.build(CUDA)
        step: Step = ours.kernel(method, problem, network, train, meta, cuda_graph=cuda_graph).step
        return step

    arms: dict[str, Callable[[], Step]] = {}
    for method in ("base", JOINT, "by hand: joint, network"):
        arms[method] = lambda method=method: by_hand.BY_HAND[method](loop())
        arms[method + GRAPH] = lambda method=method: recorded(
            [loop()], lambda each, method=method: by_hand.BY_HAND[method](each[0])
        )
    arms[BILEVEL] = lambda: by_hand.BY_HAND[BILEVEL](loop())
    arms["joint, instance, without graphs"] = lambda: kernel("joint, instance", False)
    for method in (
        "joint, instance",
        "joint, network",
        "normalised reverted, instance",
        "normalised restarted, instance",
    ):
        arms[method] = lambda method=method: kernel(method)
    plain = loop()
    _, input, target = plain.batch()
    return Problem(
        JOINT + GRAPH,
        "tf32" if torch.backends.cudnn.allow_tf32 else "float32",
        arms,
        lambda: functional.cross_entropy(plain.network(input), target),
        plain.network,
    )


def recorded(loops: list[Loop], make: Callable[[list[Loop]], Step]) -> Step:
    """A hand-written step as a CUDA graph that reads its rows from the same places every time."""
    fresh = [rows for loop in loops for rows in loop.rows]
    own = [next(rows).clone() for rows in fresh]
    for loop, start in zip(loops, range(0, len(own), 2), strict=True):
        loop.rows = tuple(itertools.repeat(rows) for rows in own[start : start + 2])
    step = make(loops)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for loop in loops:
        graph.register_generator_state(loop.generator)
    with torch.cuda.graph(graph, stream=stream):  # graphs of a stream share a workspace
        step()

    def replay(recorded: Step = step) -> None:  # its tensors live as long as the step
        torch._foreach_copy_(own, [next(rows) for rows in fresh])
        graph.replay()

    return replay


# ------------------------------------------------------------------------------------- chains


def chains(name: str, batches: tuple[int, int], count: int) -> Problem:
    """Hand-written steps of so many chains, in every way that lets a device run them together.

    A step is one of every chain, so that as many times the base would be no gain; the floors are of
    one chain.
    """
    one = images(name, batches)
    problem = replace(problems.PROBLEMS[name], batches=batches)
    sets = problem.sets(CUDA)

    def loops() -> list[Loop]:
        return [Loop(problem.build(CUDA), *sets, batches, generator(k)) for k in range(count)]

    make = by_hand.BY_HAND[JOINT]
    arms = {
        JOINT + GRAPH: one.arms[JOINT + GRAPH],
        f"{count} chains, a graph and a stream each": lambda: beside(loops(), make),
        f"{count} chains, branches of one graph": lambda: recorded(
            loops(), lambda each: branches([make(loop) for loop in each])
        ),
        f"{count} chains, one batch of kernels as a graph": lambda: recorded(loops(), batched),
    }
    return replace(one, arms=arms)


def beside(loops: list[Loop], make: Callable[[Loop], Step]) -> Step:
    """A step of each, on a stream of its own, without waiting for one another."""
    streams = [torch.cuda.Stream() for _ in loops]
    steps = [recorded([loop], lambda each: make(each[0])) for loop in loops]
    torch.cuda.synchronize()

    def step() -> None:
        for stream, one in zip(streams, steps, strict=True):
            with torch.cuda.stream(stream):
                one()
            torch.cuda.current_stream().wait_stream(stream)

    return step


def branches(steps: list[Step]) -> Step:
    """All steps, between one point and another, on a stream each."""
    streams = [torch.cuda.Stream() for _ in steps]

    def step() -> None:
        for stream, one in zip(streams, steps, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                one()
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)

    return step


# ----------------------------------------------------------------------------------- language

T5_SMALL = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
LLAMA_1B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokens(count: int, source: int, target: int, *, shared: bool, seed: int) -> tuple[Any, Tensor]:
    """Rows without padding, `source` tokens read and `target` tokens to say.

    `shared`: both are one sequence, of which the last `target` tokens count, as a causal model has
    them.
    """
    source_of = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 32000, (count, source), generator=source_of)
    labels = torch.randint(3, 32000, (count, target), generator=source_of)
    if shared:
        labels = ids.clone()
        labels[:, : source - target] = IGNORED
    return {"ids": ids, "mask": torch.ones_like(ids), "labels": labels}, labels


def language(
    build: Callable[[Path], nn.Module],
    config: dict[str, Any],
    batches: tuple[int, int],
    lengths: tuple[int, int],
    *,
    shared: bool,
    precision: str,
) -> Problem:
    """A language model at so many train and meta rows a step."""
    with tempfile.TemporaryDirectory() as folder, CUDA:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        torch.manual_seed(SEED)
        network = build(Path(folder))
    made = [
        tokens(count, *lengths, shared=shared, seed=seed) for seed, count in enumerate((256, 64))
    ]
    train, meta = (
        Data(*each, name=name).to(CUDA) for each, name in zip(made, ("train", "meta"), strict=True)
    )
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    drawn = generator()

    def loss() -> Tensor:
        rows = [
            torch.randint(len(data), (batch,), generator=drawn, device=CUDA)
            for data, batch in zip((train, meta), batches, strict=True)
        ]
        first, second = train.batch(rows[0]), meta.batch(rows[1])
        output = network(join(first.input, second.input))
        return token_loss(output, torch.cat([first.target, second.target])).mean()

    def plain() -> Step:
        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            loss().backward()
            with torch.no_grad():
                torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-1e-6)

        return step

    def joint_network() -> Step:
        weights = WeightNetwork(embedding_layer(network).in_features, 0, initial=SPARSITY)
        parts = Parts(
            network,
            weights.to(CUDA),
            SparsityPrior(SPARSITY),
            loss=token_loss,
            prior=NormalPrior(SCALE),
        )
        kernel = SGLD(
            bind(joint, parts),
            step_size={"theta": 1e-12, "phi": problems.PHI_STEP},
            temperature={"theta": 1e-3},
            train_batch=batches[0],
            meta_batch=batches[1],
            clip={"theta": 0.3},
            generator=generator(),
        )
        kernel.setup(0, train, meta)
        return kernel.step

    arms = {"plain fine-tuning": plain, "joint, network": joint_network}
    return Problem("plain fine-tuning", precision, arms, loss, network)


def t5_small() -> Problem:
    from models.seq2seq import Seq2Seq

    def build(folder: Path) -> nn.Module:
        return Seq2Seq(folder, pretrained=False)

    return language(build, T5_SMALL, (100, 50), (64, 48), shared=False, precision="float32")


def llama_1b() -> Problem:
    from models.causal import Causal

    def build(folder: Path) -> nn.Module:
        return Causal(folder, pretrained=False, tune="lora", precision="bfloat16")

    return language(build, LLAMA_1B, (16, 8), (512, 256), shared=True, precision="bfloat16")


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "lenet5": lambda: images("lenet5", (100, 50)),
    "lenet5-chains": lambda: chains("lenet5", (100, 50), 4),
    "resnet32": lambda: images("resnet32", (60, 60)),
    "resnet32-1024": lambda: images("resnet32", (512, 512)),
    "t5-small": t5_small,
    "llama-1b-lora": llama_1b,
}
