"""A target's folder has the figure, the numbers behind it and a page that says what agrees."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest

from inference.reproduce import figures
from inference.reproduce.cases import METHODS, Case, Key, every_method, network, sigma
from inference.reproduce.claims import Claim, ahead, right_way, score
from inference.reproduce.jobs import CostJob, Place, RunJob
from inference.reproduce.page import Missing, write_index, write_target
from inference.reproduce.results import collect
from inference.reproduce.settings import mnist
from inference.reproduce.target import Target

SETTING = mnist(25)
BADS, BLO = (Case(SETTING, METHODS[name]) for name in ("bads", "blo"))
TARGET = Target(
    "fig2",
    "Accuracy <over> steps",
    (BADS, BLO),
    figures.curves,
    (
        Claim("BADS ends ahead of BLO.", ahead(BADS.key, [BLO.key])),
        Claim("BLO ends above 90 %.", score(BLO.key, low=0.9), "a note"),
        Claim("CDS ends above 90 %.", score(Key("mnist-25", "cds"), low=0.9)),
    ),
    ("A sentence on what differs.",),
)


def text_of(path):
    page = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


@pytest.fixture
def written(write_run, place):
    """The folder of a target with three seeds of each method but one run."""
    jobs = [
        write_run(case, seed, place, accuracy + 0.01 * seed)
        for case, accuracy in ((BADS, 0.9), (BLO, 0.8))
        for seed in range(3)
    ]
    missing = [Missing("mnist-25/cds/seed0", "exit 3")]
    verdicts = write_target(TARGET, place, jobs, missing)
    return place.root.parent / "fig2", verdicts


def test_each_sentence_is_marked_with_the_numbers_that_decide(written):
    folder, verdicts = written
    outcomes = [verdict.outcome for _, verdict in verdicts]
    assert outcomes == ["agrees", "disagrees", "cannot tell"]
    text = text_of(folder / "index.html")
    for expected in (
        "BADS ends ahead of BLO. agrees bads − blo +10.0 [+10.0, +10.0]",
        "BLO ends above 90 %. a note disagrees blo 81.0 % [78.5 %, 83.5 %]",
        "CDS ends above 90 %. cannot tell cds: no runs",
    ):
        assert expected in text
    summary = json.loads((folder / "verdicts.json").read_text())
    assert [claim["outcome"] for claim in summary["claims"]] == outcomes


def test_page_has_the_figure_the_table_what_is_missing_and_what_differs(written):
    folder, _ = written
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert '<img src="fig2.png"' in page and (folder / "fig2.png").read_bytes()[:4] == b"\x89PNG"
    text = text_of(folder / "index.html")
    for expected in (
        "Accuracy &lt;over&gt; steps",  # markup is escaped
        "91.0 [88.5, 93.5]",  # last iterate
        "92.0 [89.5, 94.5]",  # averaged over draws
        "0.800 [0.800, 0.800]",  # weights of rare points
        "mnist-25/cds/seed0 : exit 3",
        "1 run of 7",
        "A sentence on what differs.",
        "Ten times fewer steps than the paper",
        "-m inference.run task=mnist task.meta_per_class=25",
    ):
        assert expected in text, expected
    for link in re.findall(r'(?:src|href)="([^"#]+)"', page):
        assert (folder / link).exists() or link == "../index.html", link


def test_csv_files_have_the_numbers_of_every_run(written):
    folder, _ = written
    curves = pd.read_csv(folder / "fig2.csv")
    assert len(curves) == 2 * 3 * 2  # methods, seeds, evaluations
    (row,) = curves.query("method == 'blo' and seed == 2 and step == 200").to_dict("records")
    assert row["test_accuracy"] == pytest.approx(0.82 - 1 / 200)
    assert row["mean_weight_rare"] == 0.8 and row["mean_weight_frequent"] == 0.2
    end = pd.read_csv(folder / "fig2_end.csv")
    (row,) = end.query("method == 'bads' and seed == 1").to_dict("records")
    assert row["test_accuracy_last"] == 0.91 and row["run"] == "small/mnist-25/bads/seed1"


def test_other_data_than_the_papers_are_named_and_decide_nothing(write_run, place):
    jobs = [write_run(BADS, seed, place, dataset="digits") for seed in range(3)]
    target = Target("x", "X", [BADS], figures.curves, [Claim("So.", right_way(BADS.key))])
    ((_, verdict),) = write_target(target, place, jobs, [])
    assert verdict.outcome == "cannot tell"
    assert "Measured on digits" in text_of(place.root.parent / "x" / "index.html")


def test_sizes_and_stand_ins_have_pages_of_their_own_and_the_index_links_all(place):
    target = Target("fig13", "Weights", every_method(SETTING), figures.weights, ())
    for size, source in (("small", "files"), ("paper", "files"), ("trial", "stand-in")):
        write_target(target, Place(place.root, size, source), [], [])
    write_target(TARGET, place, [], [Missing("mnist-25/bads/seed0", "missing")])
    root = place.root.parent
    page = write_index(root).read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]+/index.html)"', page)
    assert [link.partition("/")[0] for link in links] == [
        "fig13-paper",
        "fig2",
        "fig13",
        "fig13-trial-stand-in",
    ]
    assert all((root / link).exists() for link in links)
    assert "0 of 1" in text_of(root / "index.html")


@pytest.mark.parametrize("draw", [figures.weights, figures.over_meta_sizes, figures.curves])
def test_figures_show_every_arm(draw, write_run, place):
    turned = Case(SETTING, METHODS["bads"], sigma(0.5))
    cases = (BADS, turned) if draw is figures.weights else (BADS, BLO)
    jobs = [write_run(case, 0, place) for case in cases]
    shown = []
    target = Target("x", "X", cases, lambda results: shown.append(draw(results)) or shown[0], ())
    write_target(target, place, jobs, [])
    (figure,) = shown
    if draw is figures.weights:
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert titles == ["bads · joint · instance\nas it is", "bads · joint · instance\nsigma 0.5"]
    else:
        (axes,) = figure.axes
        assert len({line.get_color() for line in axes.lines}) == 2


def test_a_method_looks_the_same_on_all_figures_and_its_variants_differ(write_run, place):
    turned = [Case(SETTING, METHODS["bads"], variant) for variant in (sigma(0.05), network())]
    alone = collect([write_run(BLO, 0, place)], "small").arms
    jobs = [write_run(one, 0, place) for one in (BADS, *turned)]
    arms = collect([*jobs, RunJob(BLO, 0, place)], "small").arms
    look = {key: (arm.colour, arm.style) for key, arm in arms.items()}
    assert len(set(look.values())) == 4
    assert look[BLO.key] == (alone[BLO.key].colour, alone[BLO.key].style)


def test_costs_are_shown_beside_plain_training(place):
    job = CostJob(SETTING, [BADS], place)
    job.folder.mkdir(parents=True)
    content = {
        "methods": job.specification(),
        "steps": 100,
        "seconds": {"plain": [1.0, 2.0, 1.0], "bads": [1.5, 2.4, 1.4]},
        "peak_mib": {"plain": 100.0, "bads": 150.0},
        "about": {name: {"preparation_s": 2.5, "device": "cpu"} for name in ("plain", "bads")},
        "failed": {},
    }
    job.path.write_text(json.dumps(content))
    target = Target("table1", "Cost", [BADS], figures.costs, (), measures_cost=True)
    write_target(target, place, [job], [])
    folder = place.root.parent / "table1"
    text = text_of(folder / "index.html")
    assert "bads 14.0 1.20 | 1.40 | 1.50 150 1.50 2.50" in text
    rounds = pd.read_csv(folder / "table1.csv").query("method == 'bads'")
    assert rounds["time_over_plain"].tolist() == pytest.approx([1.5, 1.2, 1.4])
