"""Point estimates of networks: of proxies, and of models that are trained on the spot.

The joint program with fixed weights under the same kernels and chains as everything else, at
temperature 0 unless told otherwise. A fit that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bads_ppl.chains import CHECKPOINT, ChainResult, run_chains
from bads_ppl.checks import check_network
from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.losses import Loss
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.plan import Plan
from bads_ppl.preconditioned import PreconditionedSGLD
from bads_ppl.priors import NormalPrior, default_scale
from bads_ppl.program import Parts, bind
from bads_ppl.schedules import named
from bads_ppl.sgld import SGLD
from bads_ppl.weights import FixedWeights
from inference.options import ProxyOptions
from inference.scores import locked
from models.joint import joint


def fit(
    network: Callable[[], nn.Module],
    loss: Loss,
    data: Data,
    also: Data | None = None,
    *,
    options: ProxyOptions,
    batches: tuple[int, int],
    folder: Path,
    about: Mapping[str, Any],
    seed: int,
    what: str = "proxy",
    checkpoint_seconds: float = 60.0,
) -> ChainResult:
    """Train a network on a set, and on another beside it, every point once.

    Args:
        network: builds it, on the device of the data.
        loss: per-example loss.
        data: the set.
        also: the other; None: none.
        options: how: `steps`; `learning_rate` of the mean loss; `temperature`; `prior_scale`, None:
            by the number of points; `clip`; `schedule` of the steps, None: constant; whether they
            are `preconditioned`; `bucket` of the minibatches.
        batches: points of `data` and of `also` per step, cut to the sizes of the sets.
        folder: gets the checkpoint, and is locked meanwhile.
        about: JSON-able: what a checkpoint must share to be gone on from.
        seed: source of all randomness.
        what: the network to the reader of an error.
        checkpoint_seconds: seconds between checkpoints.

    Returns:
        The chain; its network is `fitted(chain)`.

    Raises:
        InputError: if the folder is damaged or holds another fit.
        Diverged: if the step size is too large.
        Stopped: after SIGINT or SIGTERM, with a checkpoint to go on from.
    """
    train = data.subset(torch.tensor([0])) if also is None else also
    weights = torch.ones(len(train), device=data.target.device) * (also is not None)
    points = float(weights.sum()) + len(data)
    scale = options.prior_scale
    prior = NormalPrior(default_scale(points) if scale is None else scale)
    eta = 2 * options.learning_rate / points
    steps = options.steps

    def make(chain: int, generator: torch.Generator) -> tuple[MinibatchKernel, ThetaMonitor]:
        made = network()
        check_network(made, loss, train, data)
        parts = Parts(made, FixedWeights(weights), loss=loss, prior=prior)
        sampler = PreconditionedSGLD if options.preconditioned else SGLD
        kernel = sampler(
            bind(joint, parts),
            step_size={"theta": named(options.schedule or "constant", eta, steps - 1)},
            temperature=options.temperature,
            clip=options.clip,
            meta_batch=min(batches[0], len(data)),
            train_batch=min(batches[1], len(train)),
            bucket=options.bucket,
            generator=generator,
        )
        return kernel, ThetaMonitor(made, loss, train, data, density=False)

    plan = Plan(
        steps, burn_in=steps - 1, thinning=1, snapshots=0, checkpoint_seconds=checkpoint_seconds
    )
    with locked(folder), _with_remedy(folder, what):
        (chain,) = run_chains(
            make,
            train,
            data,
            plan=plan,
            folder=folder,
            chains=1,
            seed=seed,
            settings=dict(about),
            resume=True,
            weights=lambda kernel, rows=None: weights[:1],
            size=1,
        )
    return chain


def fitted(chain: ChainResult) -> nn.Module:
    """The network of a fit, in eval mode."""
    return chain.kernel.latents.networks["theta"].module.eval()


@contextmanager
def _with_remedy(folder: Path, what: str) -> Iterator[None]:
    """Says what to do about a fit in the cache that is damaged or not the one it should be."""
    there = (folder / "chain-0" / CHECKPOINT).exists()
    try:
        yield
    except InputError as error:
        if not there:
            raise
        raise InputError(
            f"the {what} in {folder} cannot be used: {error}. Remove that folder to have it "
            "trained anew"
        ) from error
