"""Reading the folders of runs, as far as they can be read.

Runs that are unfinished or damaged say so in their `problems`; they are no error.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from bads_ppl.errors import InputError
from inference.folder import CONFIG, METRICS, RESULTS, SAMPLES, TEXTS

SHOWN = 12
"""Texts that are shown of either end."""

SAMPLE = ("source", "written", "reference")
"""The columns of a file of written texts."""


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
        texts: the train texts with the lowest and the highest weights, by end, the most extreme
            first: their columns in the file.
        samples: texts that it wrote, by the names in `SAMPLE`.
        problems: what could not be read, one sentence each.
    """

    name: str
    results: dict[str, Any] | None
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, Any]]
    plots: list[tuple[str, str]]
    problems: list[str]
    texts: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)

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


def find_runs(root: Path) -> list[Run]:
    """All runs in and below a folder, by path; hidden folders are left out, and so are runs that
    were scored on a fold of the meta set, not on a test set.

    Raises:
        InputError: if the folder does not exist or holds no run.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: give the folder that holds the runs")
    runs = []
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if RESULTS in files or CONFIG in files:
            run = read_run(Path(folder), root)
            if run.config.get("fold") is None:
                runs.append(run)
            below.clear()  # a run's own folders hold no runs
    if not runs:
        raise InputError(
            f"no runs in {root}: expected folders with {RESULTS} or {CONFIG}, as "
            "`python -m inference.run` writes them"
        )
    return runs


def read_run(folder: Path, root: Path, *, plots: bool = True) -> Run:
    """One run, with its plots or without; what is damaged becomes a problem, not an error."""
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
    try:
        run.texts = _read_texts(folder / TEXTS)
    except FileNotFoundError:
        pass  # a task without texts
    except (OSError, ValueError, KeyError) as error:
        run.problems.append(f"{TEXTS} is damaged ({_first_line(error)})")
    try:
        run.samples = _read_samples(folder / SAMPLES)
    except FileNotFoundError:
        pass  # a task that writes none
    except (OSError, ValueError, KeyError) as error:
        run.problems.append(f"{SAMPLES} is damaged ({_first_line(error)})")
    for path in sorted((folder / "plots").glob("*.png")) if plots else ():
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
    if judged_by(results) is None:
        raise ValueError("its 'test' has no number")
    return results


def _read_texts(path: Path) -> dict[str, list[dict[str, str]]]:
    rows = [
        {**row, "mean": f"{float(row['mean']):.3f}", "sd": f"{float(row['sd']):.3f}"}
        for row in _read_rows(path)
    ]
    low = [row for row in rows if row["end"] == "lowest"]
    high = [row for row in rows if row["end"] == "highest"]
    return {"lowest": low[:SHOWN], "highest": high[::-1][:SHOWN]}


def _read_samples(path: Path) -> list[dict[str, str]]:
    return [{name: row[name] for name in SAMPLE} for row in _read_rows(path)]


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, by column; a ValueError if one of them is not whole."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has more or fewer columns than there are names")
    return rows


def judged_by(results: Mapping[str, Any]) -> str | None:
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


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _plot_uri(path: Path) -> str:
    """A PNG in 64 colours, which is plenty for a plot and a third of the size."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        flat = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
        flat.save(buffer, format="png", optimize=True)
    return data_uri(buffer.getvalue(), "image/png")


def data_uri(content: bytes, kind: str) -> str:
    """A file of a MIME type as a URI that needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
