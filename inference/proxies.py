"""Proxy networks: trained once on a task's sets, kept in a cache, and asked about its points.

A proxy is a point estimate (`inference.fitting`). Its folder in the cache is named by a hash of all
that it depends on, so that runs which want the same proxy share it, and one that was stopped goes
on from its checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bads_ppl.chains import fingerprint
from bads_ppl.data import Data
from bads_ppl.losses import Loss
from bads_ppl.program import capture_features
from inference.fitting import fit, fitted
from inference.options import ProxyOptions
from inference.scores import Points, content_key, score_table
from inference.tasks import Task

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
        return self._train(on, on, self.options, None)

    def tuned(self, proxy: Proxy, *, steps: int, learning_rate: float) -> Proxy:
        """A proxy that starts at another one and is trained on the meta set; raises likewise."""
        options = dataclasses.replace(self.options, steps=steps, learning_rate=learning_rate)
        return self._train("tuned", "meta", options, proxy)

    def _train(self, name: str, on: On, options: ProxyOptions, start: Proxy | None) -> Proxy:
        train, meta = self._sets
        about = {
            "network": dict(self.shape),
            "options": {k: v for k, v in dataclasses.asdict(options).items() if v is not None},
            "on": on,
            "start": None if start is None else start.about,
            **({"task": dict(self.task.depends)} if self.task.depends else {}),
        }
        data, also = (train if on == "train" else meta), (train if on == "both" else None)
        sets = [fingerprint(one, inputs=None) for one in (data, also) if one is not None]
        whole = {**about, "seed": self.seed, "sets": sets}

        def network() -> nn.Module:
            made = self.network()
            if start is not None:
                made.load_state_dict(start.network.state_dict())
            return made

        chain = fit(
            network,
            self.task.loss,
            data,
            also,
            options=options,
            batches=(
                options.train_batch if on == "train" else options.meta_batch,
                options.train_batch,
            ),
            folder=self.cache / f"proxy-{name}-{content_key(whole)}",
            about=about,
            seed=self.seed,
            checkpoint_seconds=self.checkpoint_seconds,
        )
        self.spent.append(chain.seconds)
        return Proxy(fitted(chain), self.task.loss, whole)

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
