"""What targets declare fits together: options that compose, and claims about what is run."""

import math

import pytest

from inference.reproduce import figures
from inference.reproduce.cases import METHODS, Key, Method, every_method
from inference.reproduce.jobs import Place
from inference.reproduce.results import Costs, Results
from inference.reproduce.settings import SIZES, SOURCES, cifar10, llm, mnist
from inference.reproduce.tables import at_the_end
from inference.reproduce.targets import TARGETS
from inference.run import compose_run

NOT_YET = ("cds", "classact")
"""Methods that the paper's sentences are about, whether we have them or not."""


def test_all_options_that_targets_declare_compose(tmp_path):
    options = {
        tuple(case.options(size))
        for size in ("small", "paper")
        for name in ("fig13", "fig14", "fig11", "fig2_webnlg", "fig12", "fig13_webnlg", "table2")
        for case in TARGETS[name].cases
        if size in case.method.sizes
    }
    variants = [case for name in ("fig8", "fig10", "fig9_webnlg") for case in TARGETS[name].cases]
    options |= {tuple(case.options("small")) for case in variants if case.method.name == "bads"}
    for some in sorted(options):
        config, _ = compose_run(some, "a target")
        assert f"steps={config.steps}" in some


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_claims_are_about_cases_of_their_target(target, results):
    keys = [case.key for case in target.cases]
    settings = {case.setting.name: case.setting for case in target.cases}
    keys += [Key(setting, method) for setting in settings for method in NOT_YET]
    made = Results("paper", settings=settings)
    some = results(bads=[0.9, 0.8, 0.7]).arms.popitem()[1]
    for run in some.runs:
        run.results["groups"] |= {key: {"mean_weight": 0.1, "count": 5} for key in SOURCES}
    made.arms = dict.fromkeys(keys, some)
    made.costs = {
        setting: Costs(
            {name: [1.0, 1.0] for name in ("plain", *METHODS, *NOT_YET)},
            {name: 1.0 for name in ("plain", *METHODS, *NOT_YET)},
            100,
            {},
            "cpu",
        )
        for setting in settings
    }
    assert target.claims
    for claim in target.claims:
        numbers = claim.judge(made).numbers
        assert "no runs" not in numbers and "not measured" not in numbers, claim.sentence
        nothing = claim.judge(Results("paper", settings=settings))
        assert nothing.outcome == "cannot tell", claim.sentence


def test_targets_share_runs(tmp_path):
    def folders(name):
        jobs = TARGETS[name].jobs(Place(tmp_path, "small"), SIZES["small"].seeds, list(METHODS))
        return {job.folder for job in jobs}

    more = (folders("fig13") | folders("fig14")) - folders("fig2")
    assert {folder.parent.name for folder in more} == {"bads_joint"}
    assert folders("fig3") & folders("fig2") and folders("fig8") & folders("fig13")


def test_a_new_method_is_in_every_figure_of_all_methods(monkeypatch):
    before = len(every_method(mnist(25)))
    monkeypatch.setitem(METHODS, "new", Method("new", ("method=new",), weighs=True))
    assert len(every_method(mnist(25))) == before + 1
    assert "new" in [case.method.name for case in every_method(mnist(25), weighs=True)]


def test_nothing_to_draw_is_drawn_as_such():
    for draw in (
        figures.curves,
        figures.weights,
        figures.over_meta_sizes,
        figures.ends,
        figures.sources,
        figures.costs,
    ):
        assert draw(Results("small")).axes


@pytest.fixture
def tuned(results):
    """Instruction tuning for two benchmarks, two methods and three seeds."""
    settings = [llm("arc_easy"), llm("mmlu")]
    made = Results("small", settings={one.name: one for one in settings})
    given = results(bads=[0.9, 0.8, 0.7], mixing=[0.5, 0.5, 0.5])
    for setting in settings:
        for key, arm in given.arms.items():
            made.arms[key._replace(setting=setting.name)] = arm
    return made


def test_scores_at_the_end_are_drawn_by_benchmark_and_score(tuned):
    axes = figures.ends(tuned).axes
    assert [one.get_title(loc="left").split("\n") for one in axes] == [
        [name, score]
        for score in ("right answers", "next tokens of answers")
        for name in ("ARC-easy", "MMLU")
    ]
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    assert labels == ["bads", "mixing"]  # and of the others, which share them
    for one, means in zip(axes, [(40, 25)] * 2 + [(81, 51)] * 2, strict=True):
        dots = [line.get_xdata()[0] for line in one.lines if len(line.get_xdata()) == 1]
        assert dots == pytest.approx(means)
        bars = [line.get_xdata() for line in one.lines if len(line.get_xdata()) == 2]
        half = 4.303 * (5 if means == (40, 25) else 10) / 3**0.5
        assert bars[0] == pytest.approx([means[0] - half, min(100, means[0] + half)], abs=0.01)


def test_axes_that_share_their_lines_show_each_method_on_its_own(tuned):
    """Runs that are there already come first, which differs by setting; others are missing."""
    key = next(key for key in tuned.arms if key.setting == "llm-arc_easy" and key.method == "bads")
    tuned.arms[key] = tuned.arms.pop(key)
    del tuned.arms[key._replace(setting="llm-mmlu", method="mixing")]
    easy, mmlu, *_ = figures.ends(tuned).axes
    labels = [label.get_text() for label in easy.get_yticklabels()]
    dots = [
        {
            labels[round(line.get_ydata()[0])]: line.get_xdata()[0]
            for line in axes.lines
            if len(line.get_xdata()) == 1
        }
        for axes in (easy, mmlu)
    ]
    assert dots == [pytest.approx({"bads": 40, "mixing": 25}), pytest.approx({"bads": 40})]


def test_time_and_memory_show_each_method_on_its_own_line():
    seconds = {"plain": [1.0], "bads": [2.0], "blo": [3.0]}
    peaks = {"plain": 1.0, "bads": math.nan, "blo": 5.0}
    fewer = {"plain": [1.0], "blo": [4.0]}
    made = Results(
        "small",
        settings={one.name: one for one in (mnist(25), cifar10(0.5))},
        costs={
            mnist(25).name: Costs(seconds, peaks, 100, {}, "cpu"),
            cifar10(0.5).name: Costs(fewer, {"plain": 1.0, "blo": 6.0}, 100, {}, "cpu"),
        },
    )
    axes = figures.costs(made).axes
    labels = [label.get_text() for label in axes[0].get_yticklabels()]
    found = [
        {
            labels[round(line.get_ydata()[0])]: line.get_xdata()[0]
            for line in one.lines
            if len(line.get_xdata()) == 1
        }
        for one in axes
    ]
    assert found == [{"bads": 2, "blo": 3}, {"blo": 5}, {"blo": 4}, {"blo": 6}]


def test_numbers_of_the_network_kept_stand_in_one_column_a_score(tuned):
    end = at_the_end(tuned)
    assert [name for name in end if name.startswith("test_")] == ["test_benchmark", "test_accuracy"]
    (row,) = end.query("setting == 'llm-mmlu' and method == 'bads'")[1:2].to_dict("records")
    assert (row["test_benchmark"], row["test_accuracy"]) == pytest.approx((0.4, 0.81))


def test_mean_weights_are_drawn_by_source(tuned):
    one, *rest = figures.sources(tuned).axes
    assert len(rest) == 3
    assert [label.get_text() for label in one.get_yticklabels()] == ["rare", "frequent"]
    dots = [line.get_xdata()[0] for line in one.lines if len(line.get_xdata()) == 1]
    assert dots == pytest.approx([0.8, 0.2])


def test_a_model_that_answers_is_asked_where_points_are_texts_and_machines_large(tmp_path):
    def methods(name, size):
        jobs = TARGETS[name].jobs(Place(tmp_path, size), [0], list(METHODS))
        return {job.case.method.name for job in jobs}

    assert "askllm" in methods("table2", "paper") and "askllm" not in methods("table2", "small")
    assert "askllm" in methods("fig12", "paper") and "askllm" not in methods("fig2", "paper")
