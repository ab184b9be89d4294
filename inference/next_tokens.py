"""How well a language model tells the next tokens of test responses, and which states to keep.

Accuracy is the share of counted tokens that are the likeliest, loss the mean over examples of their
mean negative log-likelihood per token, in nats. The network to keep is the one that tells the
tokens of a validation set best: an iterate after burn-in, or the mean of theta over those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bads_ppl import plots
from bads_ppl.data import Batch, Data
from bads_ppl.errors import InputError
from bads_ppl.losses import Loss
from bads_ppl.plots import Metrics
from bads_ppl.sites import evaluation_mode
from inference.scoring import Ended, MeanOfTheta, Measure, Scored, mean_over_chains
from models.language import IGNORED, token_loss

Ask = Callable[[Any], dict[str, float]]
"""What else is to be said of the network that is kept: numbers by name."""


class Told(NamedTuple):
    """Next-token accuracy in [0, 1] and loss in nats per token."""

    accuracy: float
    loss: float


@torch.no_grad()
def tell(network: Any, data: Data, batch: int) -> Told:
    """How well a network tells the next tokens of a set, `batch` examples at a time."""
    right, counted, losses = 0, 0, []
    with evaluation_mode(network):
        for some in data.batches(batch):
            log_probs, hits = network.read(some.input)
            right += int(hits.sum())
            counted += int((some.target != IGNORED).sum())
            losses.append(token_loss(log_probs, some.target))
    return Told(right / counted, float(torch.cat(losses).mean()))


@dataclass(frozen=True)
class NextTokens:
    """Scoring by next tokens.

    Attributes:
        validation: examples that the network to keep is chosen by.
        batch: examples that go through the network together.
        ask: asks the network that is kept something else; None: nothing.

    Raises:
        InputError: if the batch is empty.
    """

    validation: Data
    batch: int = 32
    ask: Ask | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise InputError(f"examples per pass must be at least 1, got {self.batch}")

    def check(self, test: Data, meta: Data) -> None:
        for name, data in (("test", test), ("meta", meta), ("validation", self.validation)):
            empty = int(((data.target != IGNORED).sum(1) == 0).sum())
            if empty:
                raise InputError(
                    f"{empty} of {len(data)} {name} examples have no token of a response: leave "
                    "them out, or let the network see longer ones"
                )

    def measure(self, test: Data, probe: Batch, loss: Loss, network: nn.Module) -> Measure:
        return TokenMeasure(test, self.validation.to(test.device), self.batch, network)

    def scored(self, test: Data, ended: Sequence[Ended]) -> Scored:
        """Numbers of the networks that are kept, and of the last iterates; means over chains."""
        found = []
        for one in ended:
            kept, (chosen, _) = one.measure.kept(one.network)
            own, last = tell(kept, test, self.batch), tell(one.network, test, self.batch)
            found.append(
                {
                    "accuracy": own.accuracy,
                    "loss": own.loss,
                    "accuracy_last": last.accuracy,
                    "loss_last": last.loss,
                    "validation_accuracy": chosen,
                }
            )
        asked = self.ask(best_kept(ended)[0]) if self.ask else {}
        return Scored({**mean_over_chains(found), **asked, "count": len(test)})

    def figures(self, metrics: Metrics) -> dict[str, Figure]:
        return {"test_accuracy": plots.accuracy_over_steps(metrics)}


def best_kept(ended: Sequence[Ended]) -> tuple[Any, Told]:
    """The network to keep of all chains, and how well it tells the validation set."""
    kept = [one.measure.kept(one.network) for one in ended]
    return max(kept, key=lambda pair: float(pair[1].accuracy))


class TokenMeasure:
    """Next tokens over steps, the best iterate after burn-in by validation, and the mean of theta.

    Args:
        test: test set.
        validation: validation set, on the same device.
        batch: examples that go through the network together.
        network: the chain's, for the shapes of its parameters.
    """

    def __init__(self, test: Data, validation: Data, batch: int, network: nn.Module) -> None:
        self.test = test
        self.validation = validation
        self.batch = batch
        self.theta = MeanOfTheta(network)
        self.best = MeanOfTheta(network)  # of one iterate
        self.reached = torch.tensor(-1.0, dtype=torch.float64)

    def on_draw(self, network: nn.Module) -> dict[str, float]:
        return {}

    def on_evaluate(self, network: nn.Module, *, burnt_in: bool) -> dict[str, float]:
        test = tell(network, self.test, self.batch)
        validation = tell(network, self.validation, self.batch)
        if burnt_in:
            self.theta.add(network)
            if validation.accuracy > float(self.reached):
                self.reached.fill_(validation.accuracy)
                self.best.set(network)
        return {
            "test.accuracy": test.accuracy,
            "test.loss": test.loss,
            "validation.accuracy": validation.accuracy,
            "validation.loss": validation.loss,
        }

    def kept(self, network: nn.Module) -> tuple[nn.Module, Told]:
        """The network to keep, and how well it tells the validation set."""
        mean, best = self.theta.put(network), self.best.put(network)
        of_mean, of_best = (tell(one, self.validation, self.batch) for one in (mean, best))
        return (mean, of_mean) if of_mean.accuracy >= of_best.accuracy else (best, of_best)

    def state_dict(self) -> dict[str, Tensor]:
        parts = {"theta": self.theta, "best": self.best}
        own = [(k, one.state_dict()) for k, one in parts.items()]
        return {
            "reached": self.reached,
            **{f"{k}.{name}": x for k, state in own for name, x in state.items()},
        }
