"""Benchmark scores of a causal language model: `python -m inference.benchmarks RUN_DIR`.

MMLU, ARC-easy, ARC-challenge and HellaSwag, asked and scored by lm-eval. What a run may have been
shown as a meta or validation question is never asked. Writes benchmarks.json beside the run's
results.json. Exit codes as of `inference.run`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bads_ppl.atomic import atomic_path, make_folder
from bads_ppl.device import resolve_device
from bads_ppl.errors import InputError
from inference.benchmark_files import BENCHMARKS
from inference.benchmark_scores import Scores, evaluate
from inference.embeddings import folder_version
from inference.folder import MODEL, RESULTS, SCORES
from inference.named_values import read_options
from inference.outcome import versions
from inference.run import exit_codes
from models.lora import CONFIG

OPTIONS = f"""options (name=value):
  benchmarks  some of {",".join(BENCHMARKS)}; default: all
  source      auto (default: files, or else hub) | files | hub
  root        the data folder; default $BADS_DATA or data
  limit       most questions of each benchmark, evenly spaced; default: all
  shots       right answers to show before each question; default 0
  chat        true lays questions out by the tokenizer's chat template; default false
  batch       prompts that go through the model together; default 8; more: more memory
  adapter     folder of an adapter to put on the model
  device      auto (default) | cpu | cuda | mps
  out         folder for {SCORES}; default: the run's; without a run: none, scores are printed
  overwrite   true replaces scores of a benchmark that was asked otherwise; default false
"""


@dataclass
class Options:
    """The command's options, as text."""

    benchmarks: str = ",".join(BENCHMARKS)
    source: str = "auto"
    root: str = ""
    limit: str = ""
    shots: str = "0"
    chat: str = "false"
    batch: str = "8"
    adapter: str = ""
    device: str = "auto"
    out: str = ""
    overwrite: str = "false"


@dataclass(frozen=True)
class Request:
    """What the command is asked for.

    Attributes:
        asked: arguments of `evaluate`.
        out: folder for scores, if one is named.
        overwrite: whether scores that were asked otherwise may be replaced.
    """

    asked: dict[str, Any]
    out: Path | None
    overwrite: bool


def parse(arguments: Sequence[str]) -> Request:
    """What is asked for, from name=value.

    Raises:
        InputError: for another form, a name that there is not, or a value that is none.
    """
    options = read_options(Options, arguments)
    for name in ("chat", "overwrite"):
        if getattr(options, name) not in ("true", "false"):
            raise InputError(f"{name} must be one of true, false, got {getattr(options, name)!r}")
    asked = {
        "benchmarks": [name for name in options.benchmarks.split(",") if name],
        "source": options.source,
        "root": Path(options.root or os.environ.get("BADS_DATA", "data")),
        "limit": _whole("limit", options.limit) if options.limit else None,
        "shots": _whole("shots", options.shots),
        "chat": options.chat == "true",
        "batch": _whole("batch", options.batch),
        "adapter": Path(options.adapter) if options.adapter else None,
        "device": resolve_device(options.device),
    }
    out = Path(options.out) if options.out else None
    return Request(asked, out, options.overwrite == "true")


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InputError(f"{name} must be a whole number, got {text!r}") from error


def places(name: str) -> tuple[str, Path | None]:
    """The model that the command is given, and the folder of its run, if it is a run's.

    Args:
        name: folder of a run of task=llm or of a model, or a model's id.

    Raises:
        InputError: if it is a folder without a model.
    """
    given = Path(name)
    if not given.exists() and not given.is_absolute() and name.count("/") <= 1:
        return name, None
    for folder in (given, given / MODEL):
        if any((folder / file).is_file() for file in (CONFIG, "config.json")):
            run = folder.parent
            return str(folder), run if (run / RESULTS).is_file() else None
    raise InputError(
        f"{name} holds no model: give the folder of a finished run of task=llm, or a folder with "
        f"config.json and *.safetensors, or with {CONFIG}"
    )


def table(scores: Mapping[str, Scores]) -> str:
    """The scores as text."""
    columns = ("accuracy", "stderr", "acc_norm", "stderr", "questions")
    lines = ["benchmark".ljust(15) + "".join(f"{name:>10}" for name in columns)]
    for name, one in scores.items():
        numbers = (one.accuracy, one.stderr, one.normalised, one.normalised_stderr)
        shown = "".join(f"{'-' if x is None else format(x, '.4f'):>10}" for x in numbers)
        of = "" if one.count == one.of else f" of {one.of:,}, evenly spaced"
        cut = f"; {one.cut} of them cut at the model's length" if one.cut else ""
        lines.append(f"{name:15}{shown}{one.count:>10,}{of}{cut}")
    return "\n".join(lines)


def earlier(folder: Path, model: str, request: Request) -> dict[str, Any]:
    """Scores of the same model that a folder has and that stay: of other benchmarks.

    Raises:
        InputError: if it has scores of one of these benchmarks that was asked otherwise.
    """
    try:
        found = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        same = found["model"] == model and found["model_version"] == _version(model)
        there, how = found["benchmarks"], found["asked"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if not same:
        return {}
    now = _options(request)
    for name in request.asked["benchmarks"]:
        if name in there and how[name] != now and not request.overwrite:
            differ = [f"{key}={value}" for key, value in how[name].items() if value != now[key]]
            raise InputError(
                f"{folder / SCORES} has scores of {name} with {', '.join(differ)}: take "
                "overwrite=true to replace them, or out=<another folder>"
            )
    return {name: (one, how[name]) for name, one in there.items()}


def write(
    folder: Path,
    model: str,
    request: Request,
    scores: Mapping[str, Scores],
    kept: Mapping[str, Any],
) -> Path:
    """Write the scores, with how each benchmark was asked; returns the file.

    Args:
        folder: gets the file.
        model: that was asked.
        request: how.
        scores: by benchmark.
        kept: what `earlier` found.
    """
    names = ("lm-eval", "transformers", "datasets")
    entries = {**kept, **{name: (asdict(one), _options(request)) for name, one in scores.items()}}
    about = {
        "model": model,
        "model_version": _version(model),
        "asked": {name: how for name, (_, how) in entries.items()},
        "benchmarks": {name: one for name, (one, _) in entries.items()},
        "versions": versions() | {name: version(name) for name in names},
    }
    make_folder(folder, "out")
    path = folder / SCORES
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return path


def _version(model: str) -> str | None:
    return folder_version(Path(model)) if Path(model).is_dir() else None


def _options(request: Request) -> dict[str, Any]:
    """What scores depend on, JSON-able."""
    names = ("source", "limit", "shots", "chat", "adapter")
    found = {name: request.asked[name] for name in names}
    return found | {"adapter": None if found["adapter"] is None else str(found["adapter"])}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit codes as of `inference.run`."""
    parser = argparse.ArgumentParser(
        prog="python -m inference.benchmarks",
        description="Benchmark scores of a causal language model.",
        epilog=OPTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder of a run of task=llm or of a model, or a model's id")
    parser.add_argument("options", nargs="*", metavar="name=value", help="see below")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with exit_codes():
        request = parse(given.options)
        model, run = places(given.model)
        folder = request.out or run
        kept = earlier(folder, model, request) if folder else {}
        scores = evaluate(model, **request.asked)
        print(table(scores))
        if folder:
            print(f"in {write(folder, model, request, scores, kept)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
