"""Steps in plain torch: `base`, and the same mathematics as ours without the house around them.

The twins draw the same numbers from the same seed as the kernels and end where those do
(tests/benchmarks/test_step_cost.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from bads_ppl.data import Data
from benchmarks.step_cost import problems
from benchmarks.step_cost.problems import SCALE, SPARSITY, Problem, passes
from inference.reproduce.steps import Step
from models.normalised import ROUNDING


@dataclass
class Loop:
    """What all hand-written loops share: network, parameters, sets, rows."""

    network: nn.Module
    train: Data
    meta: Data
    batches: tuple[int, int]
    generator: torch.Generator
    parameters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.network.parameters())
        pairs = zip((self.train, self.meta), self.batches, strict=True)
        self.rows = tuple(passes(len(data), batch, self.generator) for data, batch in pairs)
        self.up = [len(s) / b for s, b in zip((self.train, self.meta), self.batches, strict=True)]
        self.target = math.floor(len(self.train) * SPARSITY + 1e-9)
        self.strictness = 1 / max(0.02 * self.target, 0.5) ** 2

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Train rows, and inputs and targets of the train and the meta rows, joined."""
        rows, others = (next(each) for each in self.rows)
        input = torch.cat([self.train.input[rows], self.meta.input[others]])
        return rows, input, torch.cat([self.train.target[rows], self.meta.target[others]])

    def losses(
        self, input: Tensor, target: Tensor, *, apart: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Of train and meta rows, in one pass or in two."""
        count = self.batches[0]
        parts = [input[:count], input[count:]] if apart else [input]
        output = torch.cat([self.network(part) for part in parts])
        losses = functional.cross_entropy(output, target, reduction="none")
        return losses[:count], losses[count:]

    def langevin(self, values: list[Tensor], eta: float, temperature: float, scale: float) -> None:
        """A step of SGLD on `values`, under the prior Normal(0, scale)."""
        sizes = [value.numel() for value in values]
        noise = torch.randn(sum(sizes), generator=self.generator, device=values[0].device)
        parts = [
            n.as_strided(v.shape, v.stride())  # channels_last would otherwise differ from it
            for n, v in zip(noise.split(sizes), values, strict=True)
        ]
        with torch.no_grad():
            grads = [value.grad for value in values]
            torch._foreach_mul_(values, 1 - 0.5 * eta / scale**2)
            torch._foreach_add_(values, grads, alpha=-0.5 * eta)
            torch._foreach_add_(values, parts, alpha=math.sqrt(eta * temperature))

    def theta_step(self, values: list[Tensor] | None = None) -> None:
        self.langevin(
            self.parameters if values is None else values,
            problems.THETA_STEP,
            problems.THETA_TEMPERATURE,
            SCALE,
        )

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def base(loop: Loop) -> Step:
    """Plain SGD on the mean loss."""

    def step() -> None:
        _, input, target = loop.batch()
        loop.zero_grad()
        functional.cross_entropy(loop.network(input), target).backward()
        with torch.no_grad():
            torch._foreach_add_(loop.parameters, [p.grad for p in loop.parameters], alpha=-1e-3)

    return step


class InstanceTable:
    """A logit per train point and its SGLD step, with the gradient written out.

    Args:
        loop: whose points.
        chains: chains whose tables are one, in front of the points: () or (chains,).
    """

    def __init__(self, loop: Loop, chains: tuple[int, ...] = ()) -> None:
        self.loop = loop
        start = math.log(SPARSITY / (1 - SPARSITY))
        self.logit = torch.full((*chains, len(loop.train)), start, device=loop.train.device)
        self.total = torch.sigmoid(self.logit).sum(-1, keepdim=True, dtype=torch.float64)
        self.b = (1 - SPARSITY) / SPARSITY

    def move(self, rows: Tensor, u: Tensor, w: Tensor, slope: Tensor) -> None:
        """The rows' step; `slope` (*chains, B) is the data's part of dU/dw."""
        heat, eta = problems.W_TEMPERATURE, problems.W_STEP
        prior = heat * (1 - 2 * w) - (self.b - 1) * w  # Beta(1, b) and the Jacobian, in u
        excess = (self.total - self.loop.target).float() * self.loop.strictness
        grad = (slope + excess) * w * (1 - w) - prior
        noise = torch.randn(u.shape, generator=self.loop.generator, device=u.device)
        new = u.sub(grad, alpha=0.5 * eta).add_(noise, alpha=math.sqrt(eta * heat))
        self.logit.scatter_(-1, rows, new)
        self.total += (torch.sigmoid(new) - w).sum(-1, keepdim=True, dtype=torch.float64)


def joint_instance(loop: Loop) -> Step:
    """Model `joint`, one latent weight per point."""
    table = InstanceTable(loop)

    def step() -> None:
        rows, input, target = loop.batch()
        u = table.logit.gather(-1, rows)
        w = torch.sigmoid(u)
        loop.zero_grad()
        train, meta = loop.losses(input, target)
        (loop.up[0] * (w @ train) + loop.up[1] * meta.sum()).backward()
        loop.theta_step()
        table.move(rows, u, w, train.detach())

    return step


def batched(loops: list[Loop]) -> Step:
    """A step of `joint_instance` of every loop, in one batch of kernels (`torch.vmap`).

    The loops share their sets; networks are without running means, which they would share, too.
    """
    first = loops[0]
    table = InstanceTable(first, (len(loops),))
    stacked, _ = stack_module_state([loop.network for loop in loops])
    values = list(stacked.values())
    for number, loop in enumerate(loops):
        for parameter, value in zip(loop.parameters, values, strict=True):
            parameter.data = value.detach()[number]

    def losses(parameters: dict[str, Tensor], input: Tensor, target: Tensor) -> Tensor:
        output = functional_call(first.network, parameters, (input,))
        return functional.cross_entropy(output, target, reduction="none")

    def step() -> None:
        rows, others = (torch.stack([next(loop.rows[k]) for loop in loops]) for k in (0, 1))
        input = torch.cat([first.train.input[rows], first.meta.input[others]], dim=1)
        target = torch.cat([first.train.target[rows], first.meta.target[others]], dim=1)
        u = table.logit.gather(-1, rows)
        w = torch.sigmoid(u)
        for value in values:
            value.grad = None
        train, meta = torch.vmap(losses)(stacked, input, target).split(first.batches, dim=1)
        (first.up[0] * (w * train).sum() + first.up[1] * meta.sum()).backward()
        first.theta_step(values)
        table.move(rows, u, w, train.detach())

    return step


def joint_network(loop: Loop) -> Step:
    """Model `joint`, weights from a linear layer on the embedding and the label."""
    head = loop.network.head
    linear = nn.Linear(head.in_features + 10, 1).to(loop.train.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    phi, offset = list(linear.parameters()), math.log(SPARSITY / (1 - SPARSITY))
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    memory = torch.full((len(loop.train),), SPARSITY, device=loop.train.device)
    total = memory.sum(dtype=torch.float64)

    def step() -> None:
        rows, input, target = loop.batch()
        loop.zero_grad()
        for value in phi:
            value.grad = None
        seen.clear()
        train, meta = loop.losses(input, target)
        count = loop.batches[0]
        h = functional.normalize(seen[0][:count], dim=1)
        labels = functional.one_hot(target[:count], 10).to(h.dtype)
        w = torch.sigmoid(linear(torch.cat([h, labels], dim=1)).squeeze(1) + offset)
        change = w - memory[rows]
        excess = total.float() + loop.up[0] * change.sum() - loop.target
        (
            loop.up[0] * (w @ train) + loop.up[1] * meta.sum() + 0.5 * loop.strictness * excess**2
        ).backward()
        loop.theta_step()
        loop.langevin(phi, problems.PHI_STEP, 1.0, 3.0)
        with torch.no_grad():
            total.add_(change.sum(dtype=torch.float64))
            memory[rows] = w

    return step


def normalised_instance(loop: Loop) -> Step:
    """Model `normalised` with a restarted companion, one latent weight per point."""
    table = InstanceTable(loop)
    other = copy.deepcopy(loop.network)
    companion = list(other.parameters())
    count = loop.batches[0]
    layers = loop.network.modules()
    normed = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in layers)
    averages: dict[str, Tensor] = {}
    steps = 0

    def average(name: str, value: Tensor) -> Tensor:
        """The running mean before `value` enters it; the first time `value` itself."""
        before = averages.get(name)
        share = max(0.01, 1 / (steps + 1))
        averages[name] = value if before is None else before.lerp(value, share)
        return value if before is None else before

    def gain(loss: Tensor, others: Tensor) -> Tensor:
        """The scaled difference of losses less the scaled loss (B,), over beta."""
        difference = others - loss
        size = average("gain", difference.abs().mean())
        known = size > ROUNDING * loss.mean()
        scaled = 3 * known * (difference / (size + 1e-12)).clamp(-3, 3)
        apart = loss - average("loss", loss.mean())
        spread = average("spread", apart.abs().mean()) + 1e-12
        return (scaled - 2 * (apart / spread).clamp(-3, 3)) / SPARSITY

    def step() -> None:
        nonlocal steps
        rows, input, target = loop.batch()
        u = table.logit.gather(-1, rows)
        w = torch.sigmoid(u)
        loop.zero_grad()
        for value in companion:
            value.grad = None
        train, meta = loop.losses(input, target, apart=normed)  # as the companion sees them
        (loop.up[0] * (w @ train) + loop.up[1] * meta.sum()).backward()
        # A pass whose activations need not stand beside those of the first one.
        others = functional.cross_entropy(other(input[:count]), target[:count], reduction="none")
        (loop.up[0] * (w @ others)).backward()
        loop.theta_step()
        loop.theta_step(companion)
        table.move(rows, u, w, -gain(train.detach(), others.detach()))
        steps += 1
        if steps % problems.WINDOW == 0:
            with torch.no_grad():
                torch._foreach_copy_(companion, loop.parameters)
                for mine, theirs in zip(other.buffers(), loop.network.buffers(), strict=True):
                    mine.copy_(theirs)

    return step


def bilevel(loop: Loop) -> Step:
    """One-step bi-level optimisation by differentiating through the step (Ren et al., 2018).

    A virtual step of theta on the weighted train loss, the meta loss after it and its gradient in
    w, a step of w, and theta's step on the weighted train and the meta loss.
    """
    names = [name for name, _ in loop.network.named_parameters()]
    logit = torch.zeros(len(loop.train), device=loop.train.device)
    count = loop.batches[0]

    def step() -> None:
        rows, input, target = loop.batch()
        u = logit[rows].requires_grad_()
        train = functional.cross_entropy(
            loop.network(input[:count]), target[:count], reduction="none"
        )
        inner = (torch.sigmoid(u) * train).mean()
        slopes = torch.autograd.grad(inner, loop.parameters, create_graph=True)
        ahead = {
            name: value - 1e-2 * slope
            for name, value, slope in zip(names, loop.parameters, slopes, strict=True)
        }
        output = functional_call(loop.network, ahead, (input[count:],))
        (slope,) = torch.autograd.grad(functional.cross_entropy(output, target[count:]), u)
        new = u.detach() - slope
        logit[rows] = new
        loop.zero_grad()
        train, meta = loop.losses(input, target)
        (torch.sigmoid(new) @ train + meta.sum()).div(len(target)).backward()
        with torch.no_grad():
            torch._foreach_add_(loop.parameters, [p.grad for p in loop.parameters], alpha=-1e-3)

    return step


BY_HAND: dict[str, Callable[[Loop], Step]] = {
    "base": base,
    "by hand: joint, instance": joint_instance,
    "by hand: joint, network": joint_network,
    "by hand: normalised restarted, instance": normalised_instance,
    "by hand: one-step bi-level": bilevel,
}


def build(name: str, problem: Problem, network: nn.Module, train: Data, meta: Data) -> Step:
    """The step of a hand-written loop."""
    generator = torch.Generator(device=train.device).manual_seed(problems.SEED)
    return BY_HAND[name](Loop(network, train, meta, problem.batches, generator))
