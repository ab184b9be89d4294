"""Figures show the diagnostics that they were given, and only those that are known."""

import numpy as np
import pytest

from bads_ppl import plots
from bads_ppl.convergence import estimate
from bads_ppl.diagnostic_plots import (
    diagnostic_figures,
    ess_over_draws,
    rank_histogram,
    rhat_histogram,
    traces,
)
from bads_ppl.diagnostics import diagnose
from bads_ppl.draws import ChainDraws


def make_chains(count=3, draws=40, points=30):
    found = []
    for seed in range(count):
        generator = np.random.default_rng(seed)
        w = 0.5 + 0.01 * generator.standard_normal((draws, points))
        values = {name: generator.normal(size=draws) for name in ("potential", "norm.a", "loss")}
        found.append(ChainDraws(w.astype(np.float32), values))
    return found


def test_rhat_histogram_counts_every_known_value_and_says_what_is_unknown():
    rhat = np.array([1.0, 1.01, 1.2, np.nan, 1.04])
    (axes,) = rhat_histogram(rhat).axes
    assert axes.patches[0].get_data().values.sum() == 4
    assert axes.lines[0].get_xdata()[0] == 1.05
    assert axes.get_title(loc="right") == "60.0% within the limit; 1 unknown"


def test_ess_over_draws_ends_at_the_ess_of_all_draws():
    weights = [chain.w for chain in make_chains()]
    (axes,) = ess_over_draws(weights).axes
    median, wanted = axes.lines
    assert median.get_xdata()[-1] == 120 and len(median.get_xdata()) == 10
    assert median.get_ydata()[-1] == pytest.approx(np.median(estimate(weights).ess_bulk))
    assert wanted.get_ydata()[0] == 300


def test_traces_have_a_row_per_function_and_a_line_per_chain():
    values = {"potential": np.arange(8.0).reshape(2, 4), "test_loss": np.ones((2, 4))}
    first, second = traces(values).axes
    assert [line.get_ydata().tolist() for line in first.lines] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert second.get_title(loc="left") == "test loss"


def test_ranks_are_among_the_draws_of_all_chains():
    low_and_high = np.arange(40.0).reshape(2, 20)
    (axes,) = rank_histogram(low_and_high, "potential", bins=4).axes
    first, second = (patch.get_data().values for patch in axes.patches)
    np.testing.assert_array_equal(first, [10, 10, 0, 0])
    np.testing.assert_array_equal(second, [0, 0, 10, 10])


@pytest.mark.parametrize(
    ("count", "draws", "evidence", "names"),
    [
        (3, 40, "calibrated", ["ess", "ranks", "rhat", "traces"]),
        (1, 40, "calibrated", ["ess", "traces"]),
        (3, 2, "calibrated", ["ranks", "traces"]),
        (1, 1, "calibrated", ["traces"]),
        (3, 40, "fixed", ["ranks", "traces"]),
    ],
)
def test_only_what_is_known_is_drawn(count, draws, evidence, names, tmp_path):
    chains = make_chains(count, draws)
    figures = diagnostic_figures(chains, diagnose(chains, evidence=evidence))
    assert sorted(figures) == names
    for name, figure in figures.items():
        plots.save(figure, tmp_path / name, dpi=30)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title(loc="left") for axes in figures["traces"].axes] == ["loss", "potential"]


def test_functions_that_are_not_finite_are_left_out():
    chains = make_chains()
    chains[0].values["potential"][3] = np.nan
    figures = diagnostic_figures(chains, diagnose(chains, evidence="calibrated"))
    assert "ranks" not in figures and len(figures["traces"].axes) == 1
