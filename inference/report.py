"""One self-contained HTML page about all runs below a folder: `python -m inference.report runs/`.

Runs are grouped by task, and within a task by method and settings; what is left differs by seed
only, and is summarised by a mean, a 95 % t interval and a median over seeds. Runs that are
unfinished or damaged are named on the page and left out of its numbers.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image
from scipy import stats

from bads_ppl.atomic import atomic_path
from bads_ppl.errors import InputError

RESULTS, CONFIG, METRICS = "results.json", "config.yaml", "metrics.jsonl"
TEMPLATE = Path(__file__).with_name("report.html.jinja")
CONFIDENCE = 0.95

_NO_SETTING = {"run_dir", "resume", "overwrite", "device", "data", "checkpoint_seconds", "hydra"}
"""Options by which runs of one experiment may differ: where and how, not what."""
_NO_TASK_SETTING = {"label", "sparsity", "seed", "_target_"}
"""Options of a task's configuration that do not make it another task."""
# Okabe and Ito's colours, which all readers can tell apart, without the yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
_STYLES = ("solid", "dashed", "dotted", "dashdot")


@dataclass
class Run:
    """One run's folder, as far as it can be read.

    Attributes:
        name: its path below the folder of all runs.
        results: results.json; None if there is none, or it is damaged.
        config: config.yaml as nested dicts.
        config_text: the same as it stands in the file.
        metrics: rows of metrics.jsonl.
        plots: title and data URI of each plot.
        problems: what could not be read, one sentence each.
    """

    name: str
    results: dict[str, Any] | None
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    plots: list[tuple[str, str]]
    problems: list[str]

    def value(self, name: str) -> Any:
        """An entry of the results by its dotted name, None if absent."""
        found: Any = self.results
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def number(self, name: str) -> float:
        """A finite number of the results by its dotted name, else NaN."""
        found = self.value(name)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return float(found) if is_number and math.isfinite(found) else math.nan


@dataclass(frozen=True)
class Estimate:
    """Mean, t interval and median of one value per seed.

    Attributes:
        mean: mean over seeds; NaN without values.
        low: lower end of the 95 % t interval; NaN for fewer than two values.
        high: its upper end.
        median: median over seeds.
        count: number of seeds with a value.
    """

    mean: float
    low: float
    high: float
    median: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float], bounds: tuple[float, float] | None = None) -> Estimate:
        """The estimate from values, of which NaN are left out; the interval is cut at `bounds`."""
        x = np.array([value for value in values if math.isfinite(value)])
        if len(x) == 0:
            return cls(math.nan, math.nan, math.nan, math.nan, 0)
        mean, low, high = float(x.mean()), math.nan, math.nan
        if len(x) > 1:
            quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(x) - 1))
            half = quantile * float(x.std(ddof=1)) / math.sqrt(len(x))
            low, high = mean - half, mean + half
            if bounds is not None:
                low, high = max(low, bounds[0]), min(high, bounds[1])
        return cls(mean, low, high, float(np.median(x)), len(x))

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low)


@dataclass
class Arm:
    """The runs of a task that differ by seed only.

    Attributes:
        runs: the runs, by seed.
        variant: settings by which this arm differs from others of its method, model and weights.
        best: whether its mean is the highest of the task.
        difference: to the best arm, paired by seed; None for the best itself and without pairs.
    """

    runs: list[Run]
    metric: str
    colour: str = _COLOURS[0]
    style: str = _STYLES[0]
    variant: dict[str, Any] = field(default_factory=dict)
    best: bool = False
    difference: Estimate | None = None

    def text(self, name: str) -> str:
        """An entry of the results that all runs share."""
        value = self.runs[0].value(name)
        return "" if value is None else str(value)

    def estimate(self, name: str, bounds: tuple[float, float] | None = None) -> Estimate:
        """Mean and interval over seeds of an entry of the results."""
        return Estimate.of([run.number(name) for run in self.runs], bounds)

    @property
    def score(self) -> Estimate:
        """What the arm is ranked by."""
        return self.estimate(f"test.{self.metric}", _bounds(self.metric))

    @property
    def label(self) -> str:
        """A name for the arm that is unique within its task."""
        parts = [self.text("method"), *self.kind]
        return " · ".join(parts + [f"{name} {value}" for name, value in self.variant.items()])

    @property
    def kind(self) -> list[str]:
        """Model and weights, where the method has any."""
        named = [self.text("model"), self.text("weights")]
        return [name for name in named if name not in ("", "none", "fixed")]

    @property
    def seeds(self) -> dict[Any, Run]:
        return {run.value("seed"): run for run in self.runs}


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
        return _bounds(self.metric) is not None

    @property
    def seed_counts(self) -> list[int]:
        return [len(arm.runs) for arm in self.arms]


# reading


def find_runs(root: Path) -> list[Run]:
    """All runs in and below a folder, by path; hidden folders are left out.

    Raises:
        InputError: if the folder does not exist or holds no run.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give the folder that holds the runs")
    runs = []
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if RESULTS in files or CONFIG in files:
            runs.append(read_run(Path(folder), root))
            below.clear()  # a run's own folders hold no runs
    if not runs:
        raise InputError(
            f"no runs in {root}: expected folders with {RESULTS} or {CONFIG}, as "
            "`python -m inference.run` writes them"
        )
    return runs


def read_run(folder: Path, root: Path) -> Run:
    """One run; what is damaged becomes a problem of the run, not an error."""
    name = folder.relative_to(root).as_posix()
    run = Run(name if name != "." else root.resolve().name, None, {}, "", [], [], [])
    try:
        if (folder / RESULTS).exists():
            run.results = _read_results(folder / RESULTS)
    except (OSError, ValueError) as error:
        run.problems.append(f"{RESULTS} is damaged ({error}): run it again with overwrite=true")
    try:
        run.config_text = (folder / CONFIG).read_text(encoding="utf-8")
        config = yaml.safe_load(run.config_text)
        run.config = config if isinstance(config, dict) else {}
    except FileNotFoundError:
        run.problems.append(f"{CONFIG} is missing: the run's settings are unknown")
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.problems.append(f"{CONFIG} is damaged ({_first_line(error)})")
    if run.results is None:
        return run
    try:
        for line in (folder / METRICS).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            row["step"] = int(row["step"])
            run.metrics.append(row)
    except FileNotFoundError:
        run.problems.append(f"{METRICS} is missing: the run is not in the curves")
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.problems.append(f"{METRICS} is damaged after {len(run.metrics)} rows ({error})")
    for path in sorted((folder / "plots").glob("*.png")):
        try:
            run.plots.append((path.stem.replace("_", " "), _plot_uri(path)))
        except OSError as error:
            run.problems.append(f"plots/{path.name} is damaged ({error})")
    return run


def _read_results(path: Path) -> dict[str, Any]:
    results = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(results, dict):
        raise ValueError(f"expected an object, got {type(results).__name__}")
    for name in ("task", "method", "seed", "test"):
        if name not in results:
            raise ValueError(f"it has no {name!r}")
    for name, kind in (("groups", dict), ("versions", dict), ("warnings", list)):
        if not isinstance(results.get(name, kind()), kind):
            raise ValueError(f"its {name!r} is not a {kind.__name__}")
    if _metric(results) is None:
        raise ValueError("its 'test' has no number")
    return results


def _metric(results: Mapping[str, Any]) -> str | None:
    """The name below "test" that a task is judged by: accuracy, or else its first number."""
    test = results["test"]
    if not isinstance(test, Mapping):
        return None
    names = [
        str(name)
        for name, value in test.items()
        if isinstance(value, int | float) and name != "count" and not str(name).endswith("_last")
    ]
    return "accuracy" if "accuracy" in names else next(iter(names), None)


def _bounds(metric: str) -> tuple[float, float] | None:
    """The range of a metric that is a share."""
    return (0.0, 1.0) if metric == "accuracy" else None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


# grouping


def task_settings(run: Run) -> dict[str, Any]:
    """Settings that make this task another one, by their last name."""
    tree = run.value("settings") or run.config.get("task")
    flat = flatten(tree) if isinstance(tree, Mapping) else {}
    named = {name.rpartition(".")[2]: value for name, value in flat.items()}
    return {name: value for name, value in named.items() if name not in _NO_TASK_SETTING}


def method_settings(run: Run) -> dict[str, Any]:
    """Settings that make this method another one: all but the task's, seeds, and places."""
    flat = flatten({k: v for k, v in run.config.items() if str(k) not in _NO_SETTING})
    return {
        name: value
        for name, value in flat.items()
        if name.rpartition(".")[2] != "seed"
        and (not name.startswith("task.") or name == "task.sparsity")
    } | {name: run.value(name) for name in ("sampler", "preset") if run.value(name) is not None}


def _grouped(runs: Sequence[Run], *keys: Any) -> Iterator[list[Run]]:
    """Runs whose keys are equal, in order of first appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([key(run) for key in keys], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    yield from groups.values()


def make_sections(runs: Sequence[Run]) -> list[Section]:
    """The tasks that finished runs are about. Runs that repeat a seed are left out, and say so."""
    finished = [run for run in runs if run.results is not None]
    tasks = _grouped(
        finished, lambda r: r.value("task"), lambda r: r.value("dataset"), task_settings
    )
    sections = [_section(task) for task in tasks]
    for section in sections:
        same = [other.settings for other in sections if other.title == section.title]
        told = [f"{n} {section.settings.get(n)}" for n in _differing(same)]
        section.short_title = " · ".join([section.title, *told, section.dataset])
    return sections


def _section(runs: list[Run]) -> Section:
    metric = _metric(runs[0].results or {}) or "accuracy"

    def kind(run: Run) -> list[Any]:
        return [run.value(name) for name in ("method", "model", "weights")]

    arms: list[Arm] = []
    for alike in _grouped(runs, kind):
        variants = [Arm(_one_per_seed(same), metric) for same in _grouped(alike, method_settings)]
        differing = _differing([method_settings(arm.runs[0]) for arm in variants])
        for arm in variants:
            own = method_settings(arm.runs[0])
            arm.variant = _short_names({name: own.get(name) for name in differing})
        arms += variants
    arms.sort(key=lambda arm: -arm.score.mean if arm.score.count else math.inf)
    for k, arm in enumerate(arms):
        arm.colour = _COLOURS[k % len(_COLOURS)]
        arm.style = _STYLES[k // len(_COLOURS) % len(_STYLES)]
    arms[0].best = arms[0].score.count > 0
    for arm in arms[1:]:
        arm.difference = paired_difference(arm, arms[0])
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
    over_steps = f"Test {metric} over steps. Line: mean over seeds; band: lowest to highest seed."
    figures = [(by_arm, score_by_arm(arms, metric))]
    if any(_curve(run, metric) for run in runs):
        figures.append((over_steps, score_over_steps(arms, metric)))
    return Section(
        str(runs[0].value("task")),
        str(runs[0].value("dataset") or "unnamed data"),
        task_settings(runs[0]),
        metric,
        arms,
        groups,
        warnings,
        [(title, _figure_uri(figure)) for title, figure in figures],
        _differing([method_settings(arm.runs[0]) for arm in arms]),
    )


def _one_per_seed(runs: list[Run]) -> list[Run]:
    """Runs by seed; of several with one seed the first, with a note on the others."""
    kept: dict[Any, Run] = {}
    for run in runs:
        first = kept.setdefault(run.value("seed"), run)
        if first is not run:
            run.problems.append(
                f"it repeats seed {run.value('seed')} of {first.name} with the same settings: "
                "left out of the numbers"
            )
    return sorted(kept.values(), key=lambda run: str(run.value("seed")).zfill(12))


def _short_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by the last part of their names, where that tells them apart."""
    short = [name.rpartition(".")[2] for name in settings]
    if len(set(short)) < len(short):
        return dict(settings)
    return dict(zip(short, settings.values(), strict=True))


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings that are not the same in all."""
    names = sorted({name for one in settings for name in one})
    return [n for n in names if len({json.dumps(one.get(n), default=str) for one in settings}) > 1]


def paired_difference(arm: Arm, other: Arm) -> Estimate | None:
    """Score of `arm` minus that of `other` over the seeds of both; None if they share none."""
    name = f"test.{arm.metric}"
    shared = arm.seeds.keys() & other.seeds.keys()
    estimate = Estimate.of(
        [arm.seeds[seed].number(name) - other.seeds[seed].number(name) for seed in shared]
    )
    return estimate if estimate.count else None


# figures


def score_by_arm(arms: Sequence[Arm], metric: str) -> Figure:
    """A point per seed, with mean and 95 % interval, one line per arm, the best on top."""
    figure, axes = _figure(1.2 + 0.48 * len(arms))
    for row, arm in enumerate(arms):
        score = arm.score
        if score.has_interval:
            axes.plot(
                [score.low, score.high],
                [row, row],
                color=arm.colour,
                linewidth=10,
                alpha=0.25,
                solid_capstyle="butt",
            )
        values = [run.number(f"test.{metric}") for run in arm.runs]
        axes.plot(values, [row] * len(values), "o", color=arm.colour, markersize=5, alpha=0.75)
        axes.plot([score.mean] * 2, [row - 0.3, row + 0.3], color=arm.colour, linewidth=2.2)
    axes.set_yticks(range(len(arms)), [_broken_label(arm) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    _finish(axes, metric, axes.xaxis)
    axes.set_xlabel(f"test {metric}")
    axes.tick_params(axis="y", length=0)
    return figure


def score_over_steps(arms: Sequence[Arm], metric: str) -> Figure:
    """Mean over seeds (of means over chains) by step, and the band from lowest to highest seed."""
    figure, axes = _figure(3.6 + 0.2 * len(arms))
    for arm in reversed(arms):  # the best on top
        curves = [curve for run in arm.runs if (curve := _curve(run, metric))]
        if not curves:
            continue
        steps = sorted({step for curve in curves for step in curve})
        found = [[c[step] for c in curves if step in c] for step in steps]
        axes.fill_between(
            steps,
            [min(v) for v in found],
            [max(v) for v in found],
            color=arm.colour,
            alpha=0.15,
            linewidth=0,
        )
        axes.plot(
            steps,
            [float(np.mean(v)) for v in found],
            color=arm.colour,
            linestyle=arm.style,
            label=arm.label,
            linewidth=2.4 if arm.best else 1.5,
            marker="o" if len(steps) == 1 else "",
        )
    _finish(axes, metric, axes.yaxis)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_ylabel(f"test {metric}")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], frameon=False, loc="outside lower center")
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    """An empty figure, of a width (inches) that is legible on a phone."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(5.6, height), layout=layout)
    return figure, figure.subplots()


def _broken_label(arm: Arm) -> str:
    """The arm's label, broken where a figure would have no room for it."""
    variant = [f"{name} {value}" for name, value in arm.variant.items()]
    return "\n".join([" · ".join([arm.text("method"), *arm.kind]), *variant])


def _finish(axes: Axes, metric: str, values: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=values.axis_name, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    if _bounds(metric) is not None:
        values.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))


def _curve(run: Run, metric: str) -> dict[int, float]:
    """Mean over chains by step."""
    found: dict[int, list[float]] = {}
    for row in run.metrics:
        value = row.get(f"test.{metric}")
        if isinstance(value, int | float) and math.isfinite(value):
            found.setdefault(row["step"], []).append(float(value))
    return {step: float(np.mean(values)) for step, values in found.items()}


def _figure_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _data_uri(buffer.getvalue(), "image/svg+xml")


def _plot_uri(path: Path) -> str:
    """A PNG in 64 colours, which is plenty for a plot and a third of the size."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        flat = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
        flat.save(buffer, format="png", optimize=True)
    return _data_uri(buffer.getvalue(), "image/png")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


# the page


def render(runs: Sequence[Run]) -> str:
    """The page about these runs, as HTML."""
    sections = make_sections(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "short": _short}
    finished = [run for run in runs if run.results is not None]
    versions = sorted(
        {
            f"{name} {version}"
            for run in finished
            for name, version in (run.value("versions") or {}).items()
        }
    )
    return environment.get_template(TEMPLATE.name).render(
        sections=sections,
        runs=runs,
        finished=finished,
        unfinished=[run for run in runs if run.results is None and not _damaged(run)],
        troubled=[run for run in runs if run.problems],
        versions=versions,
        method_settings=method_settings,
        confidence=CONFIDENCE,
    )


def _damaged(run: Run) -> bool:
    return any(problem.startswith(RESULTS) for problem in run.problems)


def _percent(share: float, digits: int = 1) -> str:
    """A share as percent, "–" for NaN."""
    return f"{100 * share:.{digits}f}".replace("-", "−") if math.isfinite(share) else "–"


def _short(value: float, digits: int = 3) -> str:
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
