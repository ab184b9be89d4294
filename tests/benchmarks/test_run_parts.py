"""What the benchmarks of whole runs print."""

import importlib
import json
import re

import pytest

from bads_ppl.errors import InputError
from benchmarks import chains_side_by_side, run_cost, scale


def rows(text: str) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) > 2 and not row[0].startswith("-")}


def test_a_runs_parts_are_counted_as_the_run_has_them(monkeypatch, capsys):
    monkeypatch.setattr(run_cost, "ROUNDS", 1)
    monkeypatch.setattr(run_cost, "STEPS", 4)
    options = "task=mnist data.source=digits steps=40 burn_in=20 thinning=5 evaluate_every=8"
    run_cost.main(options.split())
    found = rows(capsys.readouterr().out)
    times = {name: float(row[0]) for name, row in found.items() if name != "part"}
    assert times == {
        "4 steps": 10,
        "weights of a draw": 4,
        "functions of theta at a draw": 4,
        "evaluation": 5,
    }
    seconds = {name: float(found[name][2]) * often for name, often in times.items()}
    for name, spent in seconds.items():
        share = float(found[name][4].rstrip("%")) / 100
        assert share == pytest.approx(spent / sum(seconds.values()), abs=0.05)


def test_options_that_no_run_has_are_refused():
    with pytest.raises(InputError):
        run_cost.main(["task=mnist", "no_such_option=1"])


def test_four_chains_are_compared_with_one(monkeypatch, capsys):
    arguments = "chains_side_by_side --steps 20 --thinning 5 --rounds 1 --device cpu"
    monkeypatch.setattr("sys.argv", arguments.split())
    chains_side_by_side.main()
    found = rows(capsys.readouterr().out)
    assert re.fullmatch(r"\d+\.\d\d", found["one after the other"][1])
    assert float(found["one after the other"][1]) > 1


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("step_cost.__main__", "--rounds"),
        ("step_cost.overhead", "--rounds"),
        ("gpu.__main__", "--rounds"),
        ("scale", "--sizes"),
        ("chains_side_by_side", "--thinning"),
        ("diagnostics_cost", "--draws"),
        ("nuts_agreement", "--seeds"),
    ],
)
@pytest.mark.parametrize(("given", "said"), [("0", "at least 1, got 0"), ("x", "'x'")])
def test_counts_below_one_and_words_are_refused(name, option, given, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, option, given])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_cost_of_many_points_is_told_for_every_size_and_arm(monkeypatch, capsys, tmp_path):
    arguments = "scale --sizes 200 400 --arms uniform importance --chains 1 --steps 2 --rounds 1"
    arguments += f" --draws 2 --folder {tmp_path} --json {tmp_path / 'found.json'}"
    monkeypatch.setattr("sys.argv", arguments.split())
    scale.main()
    found = json.loads((tmp_path / "found.json").read_text())
    arms = [(size, arm) for size in (200, 400) for arm in ("uniform", "importance")]
    assert [(row["size"], row["arm"]) for row in found["steps"]] == arms
    assert [(row["size"], row["arm"]) for row in found["costs"]] == arms
    assert [row["arm"] for row in found["costs"] if "diagnostics_cpu_s" in row] == ["uniform"] * 2
    assert [(row["size"], row["chains"]) for row in found["chains"]] == [(200, 1), (400, 1)]
    assert "| 400 | importance |" in capsys.readouterr().out
