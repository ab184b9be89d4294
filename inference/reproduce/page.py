"""A target's folder: its figure, the numbers behind it, and a page that says what agrees."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bads_ppl import plots
from bads_ppl.atomic import atomic_path
from inference.arms import CONFIDENCE
from inference.report import pages
from inference.reproduce.claims import FLAT, LEAST_SEEDS, Claim, Verdict
from inference.reproduce.jobs import Job, Place
from inference.reproduce.results import Results, collect, groups
from inference.reproduce.settings import SIZES
from inference.reproduce.tables import at_the_end, by_round, by_step, cost_rows
from inference.reproduce.target import Target, order
from inference.reproduce.targets import DIFFERS

TEMPLATES = Path(__file__).parent
PAGE, SUMMARY = "index.html", "verdicts.json"
OUTCOMES = ("agrees", "disagrees", "cannot tell")


@dataclass(frozen=True)
class Missing:
    """A job that a page does without: its name, and why."""

    name: str
    reason: str


def folder_of(target: Target, place: Place) -> Path:
    """Of a target's page: the size and stand-in data are in its name unless they are the usual."""
    parts = [target.name]
    parts += [place.size] if place.size != "small" else []
    parts += ["stand-in"] if place.source == "stand-in" else []
    return place.root.parent / "-".join(parts)


def write_target(
    target: Target, place: Place, jobs: Sequence[Job], missing: Sequence[Missing]
) -> list[tuple[Claim, Verdict]]:
    """Write the folder of a target from what is there; returns its claims with their verdicts.

    Args:
        target: what it is about.
        place: where its runs are.
        jobs: those that are done.
        missing: those that are not.

    Raises:
        OSError: if a file cannot be written.
    """
    results = collect(jobs, place.size)
    settings = {key.setting: results.settings[key.setting] for key in results.arms}
    folder = folder_of(target, place)
    folder.mkdir(parents=True, exist_ok=True)
    figure = f"{target.name}.png"
    plots.save(target.draw(results), folder / figure)
    frames = (
        {target.name: by_round(results)}
        if target.measures_cost
        else {target.name: by_step(results), f"{target.name}_end": at_the_end(results)}
    )
    for name, frame in frames.items():
        _write_csv(frame, folder / f"{name}.csv")
    verdicts = [(claim, claim.judge(results)) for claim in target.claims]
    _write(
        folder / PAGE,
        _render(
            "page.html.jinja",
            target=target,
            results=results,
            size=SIZES[place.size],
            differs=[DIFFERS[place.size], *target.differs],
            figure=figure,
            files=[f"{name}.csv" for name in frames],
            verdicts=verdicts,
            missing=missing,
            commands={job.name: shlex.join(job.command(overwrite=False)[1:]) for job in jobs},
            groups={setting: _groups(results, setting) for setting in settings},
            right={setting: _right(results, setting) for setting in settings},
            differences=list(dict.fromkeys(one.score.difference for one in settings.values())),
            costs=cost_rows(results),
            contrast=any("contrast" in found.numbers for _, found in verdicts),
            flat=FLAT,
            least_seeds=LEAST_SEEDS,
            confidence=CONFIDENCE,
        ),
    )
    summary = {
        "target": target.name,
        "title": target.title,
        "size": place.size,
        "stand_ins": sorted(results.stand_ins),
        "runs": len(jobs),
        "missing": len(missing),
        "claims": [
            {"sentence": claim.sentence, "outcome": found.outcome, "numbers": found.numbers}
            for claim, found in verdicts
        ],
    }
    _write(folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return verdicts


def _groups(results: Results, setting: str) -> dict[str, bool | None]:
    found: dict[str, bool | None] = {}
    for arm in results.of(setting).values():
        found |= groups(arm)
    return found


def _right(results: Results, setting: str) -> str:
    """What the points are whose weights should be high, in a word or two."""
    said = [arm.text("right.what") for arm in results.of(setting).values()]
    return next(filter(None, said), "label is right")


def write_index(root: Path) -> Path:
    """Write the page that links those of all targets below `root`; returns where it is.

    Raises:
        OSError: if it cannot be written.
    """
    found: list[Mapping[str, Any]] = []
    for path in sorted(root.glob(f"*/{SUMMARY}")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        outcomes = [claim["outcome"] for claim in summary["claims"]]
        counts = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
        found.append({**summary, "folder": path.parent.name, "counts": counts})
    found.sort(key=lambda one: (one["size"], order(one["target"]), one["folder"]))
    _write(root / PAGE, _render("index.html.jinja", found=found, outcomes=OUTCOMES))
    return root / PAGE


def _render(template: str, **content: Any) -> str:
    return pages(TEMPLATES).get_template(template).render(**content)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False)
