"""`python -m inference.reproduce`: what it lists, runs, keeps, draws and refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bads_ppl.errors import InputError
from inference.named_values import read_options
from inference.reproduce import __main__ as command
from inference.reproduce import queue
from inference.reproduce.__main__ import main
from inference.reproduce.cases import METHODS, Case
from inference.reproduce.settings import mnist
from inference.reproduce.targets import TARGETS

WHERE = ("source=stand-in", "seeds=0,1", "methods=bads,blo")


@pytest.fixture
def arguments(tmp_path):
    return ["target=fig13", f"out={tmp_path / 'out'}", *WHERE, "jobs=1"]


@pytest.fixture
def started(monkeypatch, write_run):
    """Jobs that were started; each leaves a finished run, but that of blo with seed 0 fails."""
    found = []

    class Ended:
        def __init__(self, code):
            self.code = code

        def poll(self):
            return self.code

        def wait(self):
            return self.code

    def start(job, overwrite, shares):
        found.append((job.name, overwrite))
        if job.name == "mnist-25/blo/seed0" and len(found) < 4:
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            queue.log_path(job).write_text("error: the chain diverged\n")
            return Ended(1)
        if job.folder.exists():
            (job.folder / "config.yaml").unlink()
            job.folder.rmdir()
        write_run(job.case, job.seed, job.place, dataset="digits")
        return Ended(0)

    monkeypatch.setattr(queue, "start_process", start)
    return found


def test_a_failing_run_is_named_at_the_end_and_stops_nobody_else(arguments, started, capsys):
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert len(started) == 4
    assert "error: mnist-25/blo/seed0: the chain diverged" in err
    assert "0 of 4 runs are done, 4 to go" in out and "[4/4] mnist-25/blo/seed1" in out
    assert "fig13: agrees 0, disagrees 0, cannot tell 2" in out


def test_what_is_done_is_kept_and_what_failed_runs_again(arguments, started, tmp_path, capsys):
    main(arguments)
    first = len(started)
    assert main(arguments) == 0
    assert started[first:] == [("mnist-25/blo/seed0", False)]
    assert "3 of 4 runs are done, 1 to go" in capsys.readouterr().out
    assert main(arguments) == 0 and len(started) == first + 1
    summary = json.loads((tmp_path / "out/fig13-stand-in/verdicts.json").read_text())
    assert summary["runs"] == 4 and summary["missing"] == 0


def test_runs_with_other_settings_are_neither_used_nor_replaced_unasked(
    arguments, started, write_run, tmp_path, capsys
):
    options = [*arguments, "seeds=0", "methods=bads"]
    request = command.check(read_options(command.Options, options))
    case = Case(mnist(25), METHODS["bads"])
    write_run(case, 0, request.place, finished=False, changed=["model.window=7"])
    assert main(options) == 1 and started == []
    err = capsys.readouterr().err
    assert "model.window was 7, now 20; overwrite=true replaces it" in err
    assert main([*options, "overwrite=true"]) == 0
    assert started == [("mnist-25/bads/seed0", True)]


def test_listing_runs_nothing_and_tells_the_state_of_each_run(arguments, started, capsys, tmp_path):
    main([*arguments, "seeds=1"])
    before = len(started)
    assert main([*arguments, "do=list"]) == 0 and len(started) == before
    out = capsys.readouterr().out
    assert "missing       mnist-25/bads/seed0" in out and "done          mnist-25/bads/seed1" in out
    assert "2 of 4 runs are done; 2 to go: about" in out


def test_drawing_runs_nothing(arguments, started, tmp_path):
    assert main([*arguments, "do=draw"]) == 0 and started == []
    assert "4 runs of 4" in (tmp_path / "out/fig13-stand-in/index.html").read_text()


def test_without_a_target_the_targets_are_listed(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in TARGETS)
    assert "60 runs" in out and " min " in out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("target=fig99", "there is no target 'fig99'"),
        ("target=fig13,fig99", "there is no target 'fig99'"),
        ("traget=fig2", "did you mean target=...?"),
        ("fig2", "options are name=value, got 'fig2'"),
        ("size=big", "size must be one of trial, small, paper, got 'big'"),
        ("seeds=a", "seeds must be whole numbers such as 0,1,2, got 'a'"),
        ("seeds=-1", "seeds must be at least 0, got '-1'"),
        ("jobs=0", "jobs must be at least 1, got '0'"),
        ("methods=best", "methods must be one of bads,"),
        ("do=nothing", "do must be one of run, list, draw, got 'nothing'"),
        ("source=web", "source must be one of torchvision, files, stand-in, got 'web'"),
        ("language_model=mine", "language_model=mine goes with size=paper, got small"),
        ("overwrite=yes", "overwrite must be one of true, false, got 'yes'"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_expected(argument, message, tmp_path, capsys):
    assert main(["target=fig2", f"out={tmp_path / 'out'}", argument]) == 2
    err = capsys.readouterr().err
    assert message in err and not (tmp_path / "out").exists()
    if "fig99" in argument:
        assert all(f"\n{name} " in err for name in TARGETS)


def test_data_that_cannot_be_had_are_named_before_anything_runs(
    tmp_path, monkeypatch, started, capsys
):
    monkeypatch.setenv("BADS_DATA", str(tmp_path / "none"))
    assert main(["target=fig13", "source=files", f"out={tmp_path / 'out'}"]) == 2
    assert "there are no MNIST files in" in capsys.readouterr().err and started == []


def test_a_target_from_end_to_end(tmp_path, capsys):
    options = ["target=fig13", "size=trial", "source=stand-in", "methods=bads", "jobs=1"]
    code = main([*options, f"out={tmp_path / 'out'}"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "[1/1] mnist-25/bads/seed0: " in out
    folder = tmp_path / "out" / "fig13-trial-stand-in"
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.html", "fig13.png", "fig13.csv", "fig13_end.csv", "verdicts.json"}
    assert "Measured on digits" in (folder / "index.html").read_text()
    assert (tmp_path / "out" / "index.html").exists()


def test_runs_whose_data_cannot_be_had_are_named_and_stop_nobody_else(
    tmp_path, started, monkeypatch, capsys
):
    def nothing(root, source):
        raise InputError("there is no such data")

    there = replace(mnist(25), find=lambda root, source: None)
    lacking = replace(mnist(5), find=nothing)
    cases = [Case(setting, METHODS["bads"]) for setting in (there, lacking)]
    monkeypatch.setitem(TARGETS, "fig13", replace(TARGETS["fig13"], cases=cases))
    options = [f"out={tmp_path / 'out'}", "seeds=0", "jobs=1"]
    assert main(["target=fig13", *options]) == 1
    assert [name for name, _ in started] == ["mnist-25/bads/seed0"]
    assert "error: mnist-5/bads/seed0: there is no such data" in capsys.readouterr().err
    monkeypatch.setitem(TARGETS, "fig13", replace(TARGETS["fig13"], cases=cases[1:]))
    assert main(["target=fig13", *options]) == 2
    assert "error: there is no such data" in capsys.readouterr().err
