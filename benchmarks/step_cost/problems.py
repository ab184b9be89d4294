"""The two problems that steps are taken on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bads_ppl.data import Data
from models.lenet5 import LeNet5
from models.resnet import ResNet

SPARSITY, SCALE, SEED = 0.05, 0.5, 0
THETA_STEP, THETA_TEMPERATURE = 1e-9, 1e-3  # of networks that nobody has trained: steep
W_STEP, W_TEMPERATURE = 0.005, 0.2
PHI_STEP = 1e-5
WINDOW = 20


@dataclass(frozen=True)
class Problem:
    """A network, its sets, and how many examples of each a step takes.

    Attributes:
        network: builds the network.
        shape: of an image.
        size: number of train points.
        meta_size: number of meta points.
        batches: train and meta examples per step.
        steps: steps of a block, some 0.2 seconds of `base`.
    """

    network: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    size: int
    meta_size: int
    batches: tuple[int, int]
    steps: int

    def build(self, device: torch.device) -> nn.Module:
        """The network, the same for all methods."""
        torch.manual_seed(SEED)
        return self.network().to(device)

    def sets(self, device: torch.device) -> tuple[Data, Data]:
        """Train and meta set, the same for all methods."""
        generator = torch.Generator().manual_seed(SEED)
        train, meta = (
            Data(
                torch.randn(count, *self.shape, generator=generator),
                torch.randint(10, (count,), generator=generator),
                name=name,
            ).to(device)
            for count, name in ((self.size, "train"), (self.meta_size, "meta"))
        )
        return train, meta


PROBLEMS = {
    "lenet5": Problem(LeNet5, (1, 28, 28), 5000, 100, (100, 50), 20),
    "resnet32": Problem(ResNet, (3, 32, 32), 5000, 1000, (60, 60), 2),
}


def passes(size: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows (batch,) of one pass in random order after the other."""
    while True:
        order = torch.randperm(
            size, generator=generator, device=generator.device, dtype=torch.int32
        )
        for start in range(0, size - batch + 1, batch):
            yield order[start : start + batch].long()
