"""What the task `llm` leaves for its user: the data with weights, those selected, and the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from bads_ppl.atomic import atomic_path
from bads_ppl.selection import Selection
from inference.embeddings import folder_version
from inference.folder import MODEL, SCORES, SELECTED, WEIGHTED
from inference.instructions import Conversation
from inference.next_tokens import best_kept
from inference.scoring import Ended
from inference.text_sources import generator
from models.chat import Chat
from models.lora import BASE
from models.tokens import new_folder

Selected = Literal["top", "sample"]
"""How examples are selected by their weights."""

Row = tuple[str, str, Conversation]
"""Source, id in the source, and conversation."""

CARD = """---
library_name: transformers
{base_model}tags: [bads-ppl]
---
Fine-tuned by bads-ppl ({method}) for {target}.

- Base: {base}
- Data: {data}
- Mean weight by source, with its 95 % interval: {weights}
- Next-token accuracy on validation examples: {accuracy:.4f}
- Chosen: {chosen}

```yaml
{settings}```
"""
CHOSEN = ("method", "model", "weights", "sampler", "preset")
"""What the settings on a card were chosen by."""


@dataclass(frozen=True)
class Delivery:
    """Writes what a user takes away from a run.

    Attributes:
        rows: the N_t train examples.
        chat: layout of what the network is shown.
        base: id or absolute folder of the model that is fine-tuned; None: it was made on the spot,
            so that an adapter takes it along.
        selected: how the share `sparsity` is selected: "top", those with the highest weights, or
            "sample", drawn in proportion to weight, none twice.
        seed: draws them.
    """

    rows: Sequence[Row]
    chat: Chat
    base: str | None = None
    selected: Selected = "top"
    seed: int = 0

    def __call__(
        self,
        folder: Path,
        selection: Selection,
        ended: Sequence[Ended],
        about: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> list[str]:
        """Write `weighted.jsonl`, `selected.jsonl` and the folder `model` into the run's folder.

        Where all weights are equal, as with mixing, nothing is selected by them: there is no
        `selected.jsonl`, and a warning says so.

        Args:
            folder: the run's.
            selection: weights of the train examples.
            ended: the chains; the network that is kept is that of the best one by validation.
            about: the run's results so far.
            settings: the run's.
        """
        equal = bool((selection.mean == selection.mean[0]).all())
        count = max(1, round(about["sparsity"] * len(selection)))
        chosen = np.arange(0) if equal else self._chosen(selection, count)
        lines = list(self._lines(selection, chosen))
        written = {WEIGHTED: lines} | ({} if equal else {SELECTED: [lines[k] for k in chosen]})
        for name, some in written.items():
            with atomic_path(folder / name) as path:
                path.write_text("".join(f"{json.dumps(one)}\n" for one in some), encoding="utf-8")
        self._model(folder / MODEL, ended, about, settings)
        return [f"all weights are equal: no examples are selected ({SELECTED})"] if equal else []

    def _chosen(self, selection: Selection, count: int) -> NDArray[np.int64]:
        """Positions of the selected examples, in the order of the data.

        A sample has no example of weight 0, so that it may have fewer.
        """
        if self.selected == "top":
            return np.sort(selection.top(count).positions)
        count = min(count, int((selection.mean > 0).sum()))
        # The k largest log w + Gumbel noise are k draws without replacement (Vieira, 2014).
        with np.errstate(divide="ignore"):
            keys = np.log(selection.mean) + generator(self.seed, "selected").gumbel(
                size=len(selection)
            )
        return np.sort(np.argsort(-keys, kind="stable")[:count])

    def _lines(self, selection: Selection, chosen: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
        selected = np.zeros(len(selection), dtype=bool)
        selected[chosen] = True
        for k, (source, own, one) in enumerate(self.rows):
            yield {
                "source": source,
                "id": own,
                "messages": [message._asdict() for message in one],
                "weight": float(selection.mean[k]),
                "weight_sd": float(selection.sd[k]),
                "selected": bool(selected[k]),
            }

    def _model(
        self,
        target: Path,
        ended: Sequence[Ended],
        about: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        network, told = best_kept(ended)
        before = folder_version(target) if target.is_dir() else None
        with new_folder(target) as temporary:
            self.chat.save_tokenizer(temporary)
            if network.tune == "lora" and self.base is None:
                (temporary / BASE).mkdir()
                self.chat.save_tokenizer(temporary / BASE)
                network.save_base(temporary / BASE)
            network.save(temporary, self.base or str(target.absolute() / BASE))
            card = self._card(about, settings, told.accuracy)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)  # of a run that was summed up before
        if folder_version(target) != before:  # what was asked before is of another model
            (target.parent / SCORES).unlink(missing_ok=True)

    def _card(self, about: Mapping[str, Any], settings: Mapping[str, Any], accuracy: float) -> str:
        groups = about["groups"].items()
        from_hub = self.base is not None and not Path(self.base).is_absolute()
        return CARD.format(
            base_model=f"base_model: {self.base}\n" if from_hub else "",
            method=about["method"],
            target=about["data"]["target"],
            base=about["data"]["model"],
            data=", ".join(f"{name} ({one['count']:,})" for name, one in groups),
            weights=", ".join(
                "{} {:.3f} ({:.3f} to {:.3f})".format(name, one["mean_weight"], *one["interval"])
                for name, one in groups
            ),
            accuracy=accuracy,
            chosen=", ".join(f"{name} {about[name]}" for name in CHOSEN),
            settings=OmegaConf.to_yaml(OmegaConf.create(dict(settings))),
        )
