"""One self-contained HTML page about all runs below a folder: `python -m inference.report runs/`.

Runs are grouped by task, and within a task by method and settings. Runs that are unfinished or
damaged are named on the page and left out of its numbers.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from bads_ppl.atomic import atomic_path
from bads_ppl.errors import InputError
from inference.arms import (
    CONFIDENCE,
    Arm,
    bounds,
    differing,
    grouped,
    make_arms,
    method_settings,
    task_settings,
)
from inference.folder import RESULTS
from inference.report_figures import figure_uri, over_steps, score_by_arm, score_over_steps
from inference.runs import Run, find_runs, judged_by

TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass
class Section:
    """One task: its arms, best first, and its figures."""

    title: str
    dataset: str
    settings: dict[str, Any]
    metric: str
    arms: list[Arm]
    groups: dict[str, bool | None]
    warnings: dict[str, int]
    figures: list[tuple[str, str]]
    differing: list[str]
    short_title: str = ""

    @property
    def in_percent(self) -> bool:
        return bounds(self.metric) is not None

    @property
    def detects(self) -> bool:
        """Whether runs tell how well their weights find the points that should be selected."""
        return any(arm.estimate("right.auc").count for arm in self.arms)

    @property
    def right_means(self) -> str:
        """What such a point is, in words."""
        said = [run.value("right.what") for arm in self.arms for run in arm.runs]
        return next((str(one) for one in said if one), "label is right")

    @property
    def seed_counts(self) -> list[int]:
        return [len(arm.runs) for arm in self.arms]


def make_sections(runs: Sequence[Run]) -> list[Section]:
    """The tasks that finished runs are about. Runs that repeat a seed are left out, and say so."""
    finished = [run for run in runs if run.results is not None]
    tasks = grouped(
        finished, lambda r: r.value("task"), lambda r: r.value("dataset"), task_settings
    )
    sections = [_section(task) for task in tasks]
    for section in sections:
        same = [other.settings for other in sections if other.title == section.title]
        told = [f"{n} {section.settings.get(n)}" for n in differing(same)]
        section.short_title = " · ".join([section.title, *told, section.dataset])
    return sections


def _section(runs: list[Run]) -> Section:
    metric = judged_by(runs[0].results or {}) or "accuracy"
    arms = make_arms(runs, metric)
    warnings: dict[str, int] = {}
    for run in runs:
        for warning in run.value("warnings") or ():
            warnings[str(warning)] = warnings.get(str(warning), 0) + 1
    groups = {
        str(name): group.get("high") if isinstance(group, Mapping) else None
        for run in runs
        for name, group in (run.value("groups") or {}).items()
    }
    by_arm = f"Test {metric} by method. Dot: seed; line: mean; bar: its 95 % t interval."
    by_step = f"Test {metric} over steps. Line: mean over seeds; band: lowest to highest seed."
    figures = [(by_arm, score_by_arm(arms, metric))]
    if any(over_steps(run, f"test.{metric}") for run in runs):
        figures.append((by_step, score_over_steps(arms, metric)))
    return Section(
        str(runs[0].value("task")),
        str(runs[0].value("dataset") or "unnamed data"),
        task_settings(runs[0]),
        metric,
        arms,
        groups,
        warnings,
        [(title, figure_uri(figure)) for title, figure in figures],
        differing([method_settings(arm.runs[0]) for arm in arms]),
    )


def render(runs: Sequence[Run]) -> str:
    """The page about these runs, as HTML."""
    sections = make_sections(runs)
    finished = [run for run in runs if run.results is not None]
    versions = sorted(
        {
            f"{name} {version}"
            for run in finished
            for name, version in (run.value("versions") or {}).items()
        }
    )
    return (
        pages()
        .get_template(TEMPLATE.name)
        .render(
            sections=sections,
            runs=runs,
            finished=finished,
            unfinished=[run for run in runs if run.results is None and not _damaged(run)],
            troubled=[run for run in runs if run.problems],
            versions=versions,
            method_settings=method_settings,
            confidence=CONFIDENCE,
        )
    )


def pages(*folders: Path) -> jinja2.Environment:
    """What pages are made with: the templates of these folders, and those that all share."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATE.parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "short": short}
    return environment


def _damaged(run: Run) -> bool:
    return any(problem.startswith(RESULTS) for problem in run.problems)


def percent(share: float, digits: int = 1) -> str:
    """A share as percent, "–" for NaN."""
    return f"{100 * share:.{digits}f}".replace("-", "−") if math.isfinite(share) else "–"


def short(value: float, digits: int = 3) -> str:
    """A number with a few significant digits, "–" for NaN."""
    if not math.isfinite(value):
        return "–"
    size = math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:,.{max(0, digits - 1 - size)}f}" if size > -4 else f"{value:.1e}"
    return text.replace("-", "−", 1) if value < 0 else text


def write_report(root: Path, output: Path | None = None) -> Path:
    """Write the page about all runs below `root`, atomically.

    Args:
        root: folder of runs.
        output: the page; default report.html in `root`.

    Returns:
        Where the page is.

    Raises:
        InputError: if there are no runs.
        OSError: if the page cannot be written.
    """
    page = render(find_runs(root))
    output = root / "report.html" if output is None else output
    with atomic_path(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when done, 2 for wrong input, 1 if the page cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.report", description="One HTML page about all runs in a folder."
    )
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), help="folder of runs")
    parser.add_argument("--output", type=Path, help="the page; default RUNS/report.html")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.runs, options.output))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
