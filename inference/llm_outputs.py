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

from bads_ppl.atomic import atomic_path
from bads_ppl.selection import Selection
from inference.embeddings import folder_version
from inference.folder import MODEL, SCORES, SELECTED, WEIGHTED
from inference.instructions import Conversation
from inference.next_tokens import best_kept
from inference.scoring import Ended
from inference.text_sources import generator
from models.pretrained import read_tokenizer
from models.tokens import new_folder

Selected = Literal["top", "sample"]
"""How examples are selected by their weights."""

Row = tuple[str, str, Conversation]
"""Source, id in the source, and conversation."""

CARD = """---
library_name: transformers
tags: [bads-ppl]
---
Fine-tuned by bads-ppl ({method}) for {target}.

- Base: {base}
- Data: {data}
- Mean weight by source: {weights}
- Settings: {settings}
- Next-token accuracy on validation examples: {accuracy:.4f}
"""


@dataclass(frozen=True)
class Delivery:
    """Writes what a user takes away from a run.

    Attributes:
        rows: the N_t train examples.
        base: folder of the model that was fine-tuned.
        selected: how the share `sparsity` is selected: "top", those with the highest weights, or
            "sample", drawn in proportion to weight, none twice.
        seed: draws them.
    """

    rows: Sequence[Row]
    base: Path
    selected: Selected = "top"
    seed: int = 0

    def __call__(
        self, folder: Path, selection: Selection, ended: Sequence[Ended], about: Mapping[str, Any]
    ) -> None:
        """Write `weighted.jsonl`, `selected.jsonl` and the folder `model` into the run's folder.

        Args:
            folder: the run's.
            selection: weights of the train examples.
            ended: the chains; the network that is kept is that of the best one by validation.
            about: the run's results so far.
        """
        count = max(1, round(about["sparsity"] * len(selection)))
        chosen = self._chosen(selection, count)
        lines = list(self._lines(selection, chosen))
        for name, some in ((WEIGHTED, lines), (SELECTED, [lines[k] for k in chosen])):
            with atomic_path(folder / name) as path:
                path.write_text("".join(f"{json.dumps(one)}\n" for one in some), encoding="utf-8")
        self._model(folder / MODEL, selection, ended, about)

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
        self, target: Path, selection: Selection, ended: Sequence[Ended], about: Mapping[str, Any]
    ) -> None:
        network, told = best_kept(ended)
        sources = np.array([source for source, _, _ in self.rows])
        names = dict.fromkeys(sources.tolist())
        means = {name: float(selection.mean[sources == name].mean()) for name in names}
        before = folder_version(target) if target.is_dir() else None
        with new_folder(target) as temporary:
            read_tokenizer(self.base).save_pretrained(temporary)
            network.save(temporary)
            card = CARD.format(
                method=about["method"],
                target=about["data"]["target"],
                base=about["data"]["model"],
                data=", ".join(f"{name} ({int((sources == name).sum()):,})" for name in names),
                weights=", ".join(f"{name} {mean:.3f}" for name, mean in means.items()),
                settings=json.dumps(about["settings"]),
                accuracy=told.accuracy,
            )
            (temporary / "README.md").write_text(card, encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)  # of a run that was summed up before
        if folder_version(target) != before:  # what was asked before is of another model
            (target.parent / SCORES).unlink(missing_ok=True)
