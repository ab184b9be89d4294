"""The numbers behind a target's figure, as data frames that are written beside it."""

from __future__ import annotations

import pandas as pd

from inference.report_figures import over_steps
from inference.reproduce.cost import PLAIN
from inference.reproduce.results import Results, groups
from inference.reproduce.settings import Setting
from inference.runs import Run


def by_step(results: Results) -> pd.DataFrame:
    """A row per run and evaluation: means over chains, accuracies and weights in [0, 1]."""
    rows = []
    for key, arm in results.arms.items():
        score = results.settings[key.setting].score.name
        names = {f"test_{score}": f"test.{score}"}
        names |= {f"mean_weight_{group}": f"groups.{group}.mean_weight" for group in groups(arm)}
        for run in arm.runs:
            found = {column: over_steps(run, name) for column, name in names.items()}
            for step in sorted({step for curve in found.values() for step in curve}):
                values = {column: curve.get(step) for column, curve in found.items()}
                rows.append({**key._asdict(), "seed": run.value("seed"), "step": step, **values})
    return pd.DataFrame(rows)


def at_the_end(results: Results) -> pd.DataFrame:
    """A row per run: what its results say, and where they are."""
    rows = []
    for key, arm in results.arms.items():
        for run in arm.runs:
            weights = {
                f"mean_weight_{group}": run.number(f"groups.{group}.mean_weight")
                for group in groups(arm)
            }
            rows.append(
                {
                    **key._asdict(),
                    "seed": run.value("seed"),
                    "dataset": run.value("dataset"),
                    "steps": run.value("steps"),
                    **_scores(run, results.settings[key.setting]),
                    **weights,
                    "auc_right": run.number("right.auc"),
                    "ms_per_step": run.number("cost.ms_per_step"),
                    "run": run.name,
                }
            )
    return pd.DataFrame(rows)


def _scores(run: Run, setting: Setting) -> dict[str, float]:
    """Test scores of a run by column: of the last iterate and averaged, or of the network kept."""
    found: dict[str, float] = {}
    for score in (setting.score, *setting.also):
        entry = f"test.{score.name}"
        columns = {"": entry} if score.kept else {"_last": score.final, "_averaged": entry}
        found |= {f"test_{score.name}{end}": run.number(name) for end, name in columns.items()}
    return found


def by_round(results: Results) -> pd.DataFrame:
    """A row per setting, method and round of a measurement of cost."""
    rows = []
    for setting, found in results.costs.items():
        for method, values in found.seconds.items():
            ratios = found.time_ratios(method)
            for number, (seconds, ratio) in enumerate(zip(values, ratios, strict=True)):
                rows.append(
                    {
                        "setting": setting,
                        "method": method,
                        "device": found.device,
                        "round": number,
                        "steps": found.steps,
                        "seconds": seconds,
                        "time_over_plain": ratio,
                        "peak_mib": found.peak_mib[method],
                        "memory_over_plain": found.memory_ratio(method),
                        "preparation_s": found.preparation_s[method],
                    }
                )
    return pd.DataFrame(rows)


def cost_rows(results: Results) -> dict[str, list[dict[str, object]]]:
    """By setting's title a row per method, plain training first, for the page."""
    tables: dict[str, list[dict[str, object]]] = {}
    for setting, found in results.costs.items():
        rows: list[dict[str, object]] = []
        for method, values in found.seconds.items():
            ratios = sorted(found.time_ratios(method))
            rows.append(
                {
                    "method": "plain training" if method == PLAIN else method,
                    "ms": 1000 * min(values) / found.steps,
                    "least": ratios[0],
                    "median": ratios[len(ratios) // 2],
                    "most": ratios[-1],
                    "peak_mib": found.peak_mib[method] or float("nan"),
                    "memory": found.memory_ratio(method),
                    "preparation_s": found.preparation_s[method],
                }
            )
        tables[f"{results.settings[setting].title} ({found.device})"] = rows
    return tables
