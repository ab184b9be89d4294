"""Diagnostics of a stored run: `python -m inference.diagnose RUN_DIR`, or its posterior.nc."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bads_ppl.diagnostics import FUNCTION_COLUMNS, Diagnostics, diagnose
from bads_ppl.draws import read_draws
from bads_ppl.errors import InputError
from bads_ppl.posterior import load, read_chains

_WEIGHTS = {
    "rhat_max": "R-hat, largest",
    "rhat_99pct": "R-hat, 99 % at most",
    "ess_bulk_min": "bulk ESS, smallest",
    "ess_bulk_median": "bulk ESS, median",
    "ess_tail_min": "tail ESS, smallest",
    "constant": "weights that never moved",
    "total": "total weight",
}


def diagnose_run(path: Path) -> Diagnostics:
    """Diagnostics of a finished run from its folder, or from its posterior.nc alone.

    Raises:
        InputError: if there is no finished run, chains are missing or damaged, or what the draws
            are by their settings was not recorded.
    """
    if path.is_file():
        data = load(path)
        if "evidence" not in data.attrs:
            raise InputError(f"{path} does not say how its draws were made: give a run's folder")
        chains = read_chains(data)
        return diagnose(chains, evidence=data.attrs["evidence"], target=data.attrs.get("sparsity"))
    try:
        results = json.loads((path / "results.json").read_text(encoding="utf-8"))
        evidence, target, count = (results[name] for name in ("evidence", "sparsity", "chains"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no finished run ({error}): give the folder with its results.json, or "
            "finish the run with resume=true"
        ) from error
    folders = [path / f"chain-{chain}" for chain in range(count)]
    missing = [folder.name for folder in folders if not folder.is_dir()]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)} of its {count} chains: give its posterior.nc, or "
            "run it again with overwrite=true"
        )
    return diagnose([read_draws(folder) for folder in folders], evidence=evidence, target=target)


def table(diagnostics: Diagnostics) -> str:
    """The numbers as text: over all weights, then per function of theta."""
    lines = [f"{text:26}{_show(getattr(diagnostics, name)):>12}" for name, text in _WEIGHTS.items()]
    names = diagnostics.functions
    width = max([len(name) for name in names] + [8]) + 2
    lines += ["", "function".ljust(width) + "".join(f"{name:>11}" for name in FUNCTION_COLUMNS)]
    lines += [
        name.ljust(width) + "".join(f"{_show(row[column]):>11}" for column in FUNCTION_COLUMNS)
        for name, row in names.items()
    ]
    return "\n".join(lines)


def _show(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.4g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when done, 2 for wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.diagnose", description="Do the chains of a stored run agree?"
    )
    parser.add_argument("run", type=Path, help="a run's folder, or its posterior.nc")
    options = parser.parse_args(arguments)
    try:
        found = diagnose_run(options.run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{found.verdict}: {found.sentence}\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
