"""Methods take turns with plain training, each in a process; a method that fails is named."""

from __future__ import annotations

import io
import json

import pytest

from inference.reproduce import cost, cost_worker
from inference.reproduce.cost import WARM_UP, WorkerError, measure


@pytest.fixture
def blocks(monkeypatch):
    """The blocks of steps that made-up workers are asked for, in order."""
    asked = []

    class Fake:
        def __init__(self, name, options):
            if name == "broken":
                raise WorkerError("broken: no such option")
            self.name, self.ready = name, {"preparation_s": 1.0, "device": options[-1]}

        def block(self, steps):
            asked.append((self.name, steps))
            if self.name == "diverges" and steps != WARM_UP:
                raise WorkerError("diverges: at step 7")
            return {"seconds": len(asked), "peak_mib": 10.0 * len(asked)}

        def close(self):
            asked.append((self.name, "closed"))

    monkeypatch.setattr(cost, "Worker", Fake)
    return asked


def test_after_a_warm_up_methods_take_turns(blocks):
    found = measure({"plain": [], "bads": []}, "cpu", 100, 2)
    warm = [("plain", WARM_UP), ("bads", WARM_UP)]
    turns = [("plain", 100), ("bads", 100)] * 2
    assert blocks == [*warm, *turns, ("plain", "closed"), ("bads", "closed")]
    assert found["seconds"] == {"plain": [3, 5], "bads": [4, 6]}
    assert found["peak_mib"] == {"plain": 50.0, "bads": 60.0}
    assert found["about"]["bads"]["device"] == "device=cpu" and found["failed"] == {}


def test_a_method_that_fails_is_named_and_the_others_go_on(blocks, tmp_path, capsys):
    methods = {"plain": [], "broken": [], "diverges": [], "bads": []}
    path = tmp_path / "cost" / "cost.json"
    assert cost.main(["trial", "cpu", str(path), json.dumps(methods)]) == 1
    found = json.loads(path.read_text())
    assert set(found["failed"]) == {"broken", "diverges"}
    assert set(found["seconds"]) == {"plain", "bads"} and found["methods"] == methods
    assert "error: diverges: at step 7" in capsys.readouterr().err


BUILT = ("task=webnlg", "data.source=generated", "task.model=built", "task.data.vocabulary=300")


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("plain", ("task=mnist", "data.source=digits")),
        ("method", ("task=mnist", "data.source=digits")),
        ("plain", (*BUILT, "task.data.pretraining=0")),  # the network is in a folder made for it
    ],
)
def test_a_worker_takes_the_steps_it_is_asked_for(kind, task, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("2\n1\n"))
    cost_worker.main([kind, json.dumps([*task, "method=mixing"])])
    ready, *answers = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready["device"] == "cpu" and ready["preparation_s"] > 0
    assert len(answers) == 2 and all(answer["seconds"] > 0 for answer in answers)


def test_a_worker_says_what_is_wrong_with_its_options(capsys):
    options = ["task=mnist", "data.source=digits", "method.learning_rate=-1"]
    cost_worker.main(["method", json.dumps(options)])
    assert "must be a positive number" in json.loads(capsys.readouterr().out)["error"]
