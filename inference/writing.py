"""Texts that a network writes for the points of a test set, and how near they are to references.

Scores are those of a whole test set, from 0 to 100, by sacrebleu with its defaults: BLEU (Papineni
et al., 2002) counts shared runs of words, chrF (Popović, 2015) shared runs of letters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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

SHOWN = 20
"""Written texts that a run keeps for its reader."""


@dataclass(frozen=True)
class Writing:
    """How a task's texts are written and scored.

    Attributes:
        text: token ids (B, L) to B texts.
        sources: what each of the M test points is written from.
        references: for each, the texts that would be right, one at least.
        beams: of the search; 1: always the likeliest token.
        max_tokens: of a text, at most.
        batch: test points that go through the network together.
        curve: test points that are written for at each evaluation along a chain; 0: none.

    Raises:
        InputError: for numbers out of range, or a point without reference.
    """

    text: Callable[[Tensor], list[str]]
    sources: Sequence[str]
    references: Sequence[Sequence[str]]
    beams: int = 1
    max_tokens: int = 64
    batch: int = 64
    curve: int = 100

    def __post_init__(self) -> None:
        for name, least in (("beams", 1), ("max_tokens", 2), ("batch", 1), ("curve", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        lacking = [k for k, several in enumerate(self.references) if not several]
        if lacking or len(self.references) != len(self.sources):
            raise InputError(
                f"every test point must have a reference, got {len(self.references)} lists for "
                f"{len(self.sources)} points, empty at {lacking[:5]}: leave out what has none"
            )

    def some(self) -> Tensor:
        """Rows of the test points that are looked at along a chain, evenly spaced."""
        count = min(self.curve, len(self.sources))
        return torch.arange(count) * (len(self.sources) - 1) // max(count - 1, 1)

    def every(self) -> Tensor:
        """Rows of all test points."""
        return torch.arange(len(self.sources))

    @torch.no_grad()
    def write(self, network: Any, test: Data, rows: Tensor) -> list[str]:
        """Texts for rows (B,) of the test set; sources of like length go through together."""
        if not len(rows):
            return []
        lengths = test.input["mask"].sum(1)[rows.to(test.device)].cpu()
        order = lengths.argsort(stable=True)
        found = [""] * len(rows)
        with evaluation_mode(network):
            for places in order.split(self.batch):
                batch = test.batch(rows[places].to(test.device))
                ids = network.generate(
                    batch.input["ids"],
                    batch.input["mask"],
                    beams=self.beams,
                    max_tokens=self.max_tokens,
                )
                for place, text in zip(places.tolist(), self.text(ids), strict=True):
                    found[place] = text
        return found

    def score(self, texts: Sequence[str], rows: Tensor) -> dict[str, float]:
        """BLEU and chrF of texts written for rows (B,), from 0 to 100; empty for no rows."""
        if not len(rows):
            return {}
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        several = [self.references[row] for row in rows.tolist()]
        most = max(map(len, several))
        streams: Any = [[one[k] if k < len(one) else None for one in several] for k in range(most)]
        return {
            "bleu": float(BLEU().corpus_score(list(texts), streams).score),
            "chrf": float(CHRF().corpus_score(list(texts), streams).score),
        }

    def check(self, test: Data, meta: Data) -> None:
        if len(self.sources) != len(test):
            raise InputError(
                f"a task that writes must have one source per test point, got {len(self.sources)} "
                f"for {len(test)} points"
            )

    def measure(self, test: Data, probe: Batch, loss: Loss, network: nn.Module) -> Measure:
        return TextMeasure(test, self, loss, network)

    def scored(self, test: Data, ended: Sequence[Ended]) -> Scored:
        """BLEU and chrF of what each chain writes with the mean of its theta and at its end."""
        rows, found, written = self.every(), [], []
        for one in ended:
            both = {"": one.measure.theta.put(one.network), "_last": one.network}
            texts = {end: self.write(network, test, rows) for end, network in both.items()}
            written.append(texts[""])
            scores = {end: self.score(several, rows) for end, several in texts.items()}
            found.append(
                {f"{k}{end}": v for end, score in scores.items() for k, v in score.items()}
            )
        shown = torch.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).long().tolist()
        samples = [
            {
                "source": self.sources[row],
                "written": written[0][row],
                "reference": self.references[row][0],
            }
            for row in shown
        ]
        return Scored({**mean_over_chains(found), "count": len(test)}, samples)

    def figures(self, metrics: Metrics) -> dict[str, Figure]:
        if not self.curve:
            return {}
        return {"test_bleu": plots.score_over_steps(metrics, "test.bleu", "BLEU")}


class TextMeasure:
    """Loss over steps, BLEU over steps on some test entries, and the mean of theta after burn-in.

    Args:
        test: test set.
        writing: how texts are written and scored.
        loss: per-example loss.
        network: the chain's, for the shapes of its parameters.
    """

    def __init__(self, test: Data, writing: Writing, loss: Loss, network: nn.Module) -> None:
        self.test = test
        self.writing = writing
        self.loss = loss
        self.theta = MeanOfTheta(network)

    def on_draw(self, network: nn.Module) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def on_evaluate(self, network: nn.Module, *, burnt_in: bool) -> dict[str, float]:
        if burnt_in:
            self.theta.add(network)
        with evaluation_mode(network):
            losses = [
                self.loss(network(batch.input), batch.target)
                for batch in self.test.batches(self.writing.batch)
            ]
        rows = self.writing.some()
        found = self.writing.score(self.writing.write(network, self.test, rows), rows)
        return {
            "test.loss": float(torch.cat(losses).mean()),
            **{f"test.{name}": value for name, value in found.items()},
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.theta.state_dict()
