"""Steps of two other libraries, where they are installed.

`pip install 'bads-ppl[benchmarks]'` brings posteriors. pip from 24.1 on refuses betty-ml, for how
it names what it needs: take an older one, `pip install 'pip<24.1'`, and then
`pip install --no-deps betty-ml`.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.func import functional_call

from bads_ppl.data import Data
from benchmarks.step_cost import problems
from benchmarks.step_cost.by_hand import Loop
from benchmarks.step_cost.problems import SCALE, SPARSITY, Problem
from inference.reproduce.steps import Step


def posteriors_sgld(loop: Loop) -> Step:
    """SGLD of posteriors on the loss of `joint` with instance weights.

    Its values are theta and all logits; it has no rows of a minibatch to move alone.
    """
    from posteriors.sgmcmc import sgld

    start = math.log(SPARSITY / (1 - SPARSITY))
    logit = torch.full((len(loop.train),), start, device=loop.train.device)
    values = {name: value.detach() for name, value in loop.network.named_parameters()}
    values["logit"] = logit
    b = (1 - SPARSITY) / SPARSITY
    buffers = dict(loop.network.named_buffers())

    def log_posterior(values: dict[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        rows, input, target = batch
        theta = {name: value for name, value in values.items() if name != "logit"}
        kept = {name: buffer.clone() for name, buffer in buffers.items()}
        output = functional_call(loop.network, theta | kept, (input,))
        losses = functional.cross_entropy(output, target, reduction="none")
        w = torch.sigmoid(values["logit"])
        train = loop.up[0] * (w[rows] @ losses[: loop.batches[0]])
        meta = loop.up[1] * losses[loop.batches[0] :].sum()
        prior = sum(value.square().sum() for value in theta.values()) / (2 * SCALE**2)
        weights = (b * torch.log1p(-w) + torch.log(w)).sum()
        total = 0.5 * loop.strictness * (w.sum() - loop.target) ** 2
        return -(train + meta + prior + total) + weights, losses.detach()

    transform = sgld.build(log_posterior, 0.5 * problems.THETA_STEP, temperature=1e-3)
    state = transform.init(values)

    def step() -> None:
        nonlocal state
        state, _ = transform.update(state, loop.batch())

    return step


def betty_bilevel(loop: Loop) -> Step:
    """One-step bi-level optimisation of betty (its `darts`): weights above, the network below."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.Parameter(torch.zeros(len(loop.train), device=loop.train.device))

        def forward(self, rows: Tensor) -> Tensor:
            return torch.sigmoid(self.values[rows])

    class Lower(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            rows, input, target = batch
            losses = functional.cross_entropy(self.module(input), target, reduction="none")
            loss: Tensor = (self.upper(rows) * losses).mean()
            return loss

        def get_batch(self) -> Any:
            rows = next(loop.rows[0])
            return rows, loop.train.input[rows], loop.train.target[rows]

    class Upper(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            input, target = batch
            return functional.cross_entropy(self.lower.module(input), target)

        def get_batch(self) -> Any:
            rows = next(loop.rows[1])
            return loop.meta.input[rows], loop.meta.target[rows]

    def problem(kind: type, name: str, module: nn.Module, rate: float) -> Any:
        optimiser = torch.optim.SGD(module.parameters(), lr=rate)
        config = Config(type="darts", unroll_steps=1)
        device = str(loop.train.device)
        return kind(name, config, module=module, optimizer=optimiser, device=device)

    logging.disable(logging.INFO)
    lower = problem(Lower, "lower", loop.network, 1e-3)
    upper = problem(Upper, "upper", Logits(), 1.0)
    both = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    engine = Engine([upper, lower], EngineConfig(), dependencies=both)
    engine.train()

    def step() -> None:
        engine.global_step += 1
        engine.train_step()

    return step


PEERS: dict[str, Callable[[Loop], Step]] = {
    "posteriors: SGLD": posteriors_sgld,
    "betty: one-step bi-level": betty_bilevel,
}
MODULES = {
    "posteriors: SGLD": ["posteriors.sgmcmc.sgld"],
    "betty: one-step bi-level": ["betty.engine", "betty.problems"],
}


def load(name: str) -> None:
    """Import what a peer is made of, so that its code does not count as memory of its steps.

    Raises:
        ImportError: if it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for module in MODULES[name]:
            importlib.import_module(module)


def build(name: str, problem: Problem, network: nn.Module, train: Data, meta: Data) -> Step:
    """The step of a peer that is loaded."""
    generator = torch.Generator(device=train.device).manual_seed(problems.SEED)
    return PEERS[name](Loop(network, train, meta, problem.batches, generator))
