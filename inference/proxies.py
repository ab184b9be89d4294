"""Proxy networks: trained once on a task's sets, kept in a cache, and asked about its points.

A proxy is the joint program with fixed weights under the same kernel and chains as everything else,
at temperature 0 unless told otherwise: a point estimate. Its folder in the cache is named by a hash
of all that it depends on, so that runs which want the same proxy share it, and one that was stopped
goes on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bads_ppl.chains import CHECKPOINT, fingerprint, run_chains
from bads_ppl.checks import check_network
from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.kernel import MinibatchKernel
from bads_ppl.losses import Loss
from bads_ppl.monitors import ThetaMonitor
from bads_ppl.plan import Plan
from bads_ppl.priors import NormalPrior, default_scale
from bads_ppl.program import Parts, bind, capture_features
from bads_ppl.sgld import SGLD
from bads_ppl.weights import FixedWeights
from inference.options import ProxyOptions
from inference.scores import Points, content_key, locked, score_table
from inference.tasks import Task
from models.joint import joint

On = Literal["train", "meta", "both"]
"""What a proxy is trained on: D_t, D_m, or the two together, every point once."""


@dataclass(frozen=True)
class Proxy:
    """A trained network, and what it depends on.

    Attributes:
        network: in eval mode.
        loss: per-example loss of its outputs.
        about: JSON-able: data, settings, seed, and the proxy that it started from.
    """

    network: nn.Module
    loss: Loss
    about: dict[str, Any]


@dataclass(frozen=True)
class Proxies:
    """The proxies of a task, and the scores that they give to its train points.

    Attributes:
        task: the task.
        network: builds a new network of the proxies' shape, on the device.
        shape: JSON-able: what that network is.
        options: how proxies are trained.
        cache: folder of proxies and score tables.
        device: where they are.
        seed: source of their randomness.
        scores: a score table to take in place of those in the cache.
        checkpoint_seconds: seconds between checkpoints.
    """

    task: Task
    network: Callable[[], nn.Module]
    shape: Mapping[str, Any]
    options: ProxyOptions
    cache: Path
    device: torch.device
    seed: int
    scores: Path | None = None
    checkpoint_seconds: float = 60.0
    spent: list[float] = field(default_factory=list)  # seconds of the proxies that were asked for

    @cached_property
    def _sets(self) -> tuple[Data, Data]:
        return self.task.train.to(self.device), self.task.meta.to(self.device)

    def trained(self, on: On) -> Proxy:
        """A proxy trained from scratch.

        Raises:
            InputError: if its folder in the cache is damaged or holds another proxy.
            Diverged: if its step size is too large.
            Stopped: after SIGINT or SIGTERM, with a checkpoint to go on from.
        """
        options = dataclasses.asdict(self.options)
        return self._train(on, on, options, None)

    def tuned(self, proxy: Proxy, *, steps: int, learning_rate: float) -> Proxy:
        """A proxy that starts at another one and is trained on the meta set; raises likewise."""
        changed = {"steps": steps, "learning_rate": learning_rate}
        return self._train("tuned", "meta", dataclasses.asdict(self.options) | changed, proxy)

    def _train(self, name: str, on: On, options: dict[str, Any], start: Proxy | None) -> Proxy:
        train, meta = self._sets
        weights = torch.ones(len(train), device=self.device)
        if on != "both":  # the set is observed; of train one point with weight 0 is left
            meta = train if on == "train" else meta
            train, weights = train.subset(torch.tensor([0])), weights[:1] * 0
        about = {
            "network": dict(self.shape),
            "options": options,
            "on": on,
            "start": None if start is None else start.about,
            **({"task": dict(self.task.depends)} if self.task.depends else {}),
        }
        sets = [fingerprint(one, inputs=None) for one in (train, meta)]
        whole = {**about, "seed": self.seed, "sets": sets}
        points = float(weights.sum()) + len(meta)
        scale = options["prior_scale"]
        prior = NormalPrior(default_scale(points) if scale is None else scale)

        def make(chain: int, generator: torch.Generator) -> tuple[MinibatchKernel, ThetaMonitor]:
            network = self.network()
            if start is not None:
                network.load_state_dict(start.network.state_dict())
            check_network(network, self.task.loss, train, meta)
            parts = Parts(network, FixedWeights(weights), loss=self.task.loss, prior=prior)
            kernel = SGLD(
                bind(joint, parts),
                step_size={"theta": 2 * options["learning_rate"] / points},
                temperature=options["temperature"],
                clip=options["clip"],
                train_batch=min(options["train_batch"], len(train)),
                meta_batch=min(
                    options["train_batch" if on == "train" else "meta_batch"], len(meta)
                ),
                generator=generator,
            )
            return kernel, ThetaMonitor(network, self.task.loss, train, meta, density=False)

        steps = options["steps"]
        folder = self.cache / f"proxy-{name}-{content_key(whole)}"
        with locked(folder), _with_remedy(folder):
            (chain,) = run_chains(
                make,
                train,
                meta,
                plan=Plan(
                    steps,
                    burn_in=steps - 1,
                    thinning=1,
                    snapshots=0,
                    checkpoint_seconds=self.checkpoint_seconds,
                ),
                folder=folder,
                chains=1,
                seed=self.seed,
                settings=about,
                resume=True,
                weights=lambda kernel: weights[:1],
                size=1,
            )
        network = chain.kernel.latents.networks["theta"].module.eval()
        self.spent.append(chain.seconds)
        return Proxy(network, self.task.loss, whole)

    def table(
        self,
        name: str,
        compute: Callable[[Data, Tensor], Tensor],
        *used: Proxy,
        rule: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Values (N_t, ...) of all train points under proxies, from the cache or computed.

        Args:
            name: what they are.
            compute: from the train set, on the device, and rows (B,) to their values.
            used: the proxies that the values depend on.
            rule: JSON-able: what else they depend on, beside the meta set.
        """
        train, meta = self._sets
        about = {
            "proxies": [proxy.about for proxy in used],
            "meta": fingerprint(meta, inputs=None),
            "rule": dict(rule or {}),
        }
        return score_table(
            self.cache,
            name,
            Points.of(self.task.train),
            lambda rows: compute(train, rows.to(self.device)),
            about,
        )


@contextmanager
def _with_remedy(folder: Path) -> Iterator[None]:
    """Says what to do about a proxy in the cache that is damaged or not the one it should be."""
    there = (folder / "chain-0" / CHECKPOINT).exists()
    try:
        yield
    except InputError as error:
        if not there:
            raise
        raise InputError(
            f"the proxy in {folder} cannot be used: {error}. Remove that folder to have it trained "
            "anew"
        ) from error


@torch.no_grad()
def losses(proxy: Proxy, data: Data, rows: Tensor) -> Tensor:
    """Losses (B,) in nats of a set's rows (B,) under a proxy."""
    batch = data.batch(rows)
    return proxy.loss(proxy.network(batch.input), batch.target)


@torch.no_grad()
def embeddings(proxy: Proxy, data: Data, rows: Tensor) -> Tensor:
    """Embeddings (B, D), the input of the embedding layer, of a set's rows (B,) under a proxy."""
    with capture_features(proxy.network) as found:
        proxy.network(data.batch(rows).input)
    return found[0]
