"""Figures show the numbers they were given, and are written whole."""

import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from bads_ppl import plots
from bads_ppl.errors import InputError

GROUPS = {"rare": True, "frequent": False}


def make_metrics(chains=3):
    return [
        {
            "chain": chain,
            "step": step,
            "test.accuracy": 0.5 + 0.001 * step + 0.01 * chain,
            "groups.rare.mean_weight": 0.1 * (chain + 1),
            "groups.frequent.mean_weight": 0.05,
        }
        for chain in range(chains)
        for step in (100, 200, 300)
    ]


def test_weights_by_group_shows_the_mean_and_the_band_over_chains():
    (axes,) = plots.weights_by_group_over_steps(make_metrics(), GROUPS).axes
    rare, frequent = axes.lines
    np.testing.assert_allclose(rare.get_xdata(), [100, 200, 300])
    np.testing.assert_allclose(rare.get_ydata(), 0.2)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.1) and band.max() == pytest.approx(0.3)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        "rare (should be high)",
        "frequent (should be low)",
    ]
    red, _, blue = to_rgb(rare.get_color())
    assert blue > red
    red, _, blue = to_rgb(frequent.get_color())
    assert red > blue


def test_groups_of_a_kind_differ_in_shade_and_in_style():
    metrics = [{"chain": 0, "step": 1, "groups.a.mean_weight": 0.1, "groups.b.mean_weight": 0.2}]
    (axes,) = plots.weights_by_group_over_steps(metrics, {"a": False, "b": False}).axes
    first, second = axes.lines
    assert first.get_color() != second.get_color()
    assert first.get_linestyle() != second.get_linestyle()


def test_accuracy_shows_each_chain_and_their_mean():
    (axes,) = plots.accuracy_over_steps(make_metrics()).axes
    *chains, mean = axes.lines
    assert len(chains) == 3
    np.testing.assert_allclose(chains[2].get_ydata(), [0.62, 0.72, 0.82])
    np.testing.assert_allclose(mean.get_ydata(), [0.61, 0.71, 0.81])
    (axes,) = plots.accuracy_over_steps(make_metrics(1)).axes
    assert len(axes.lines) == 1


def test_a_score_is_drawn_as_accuracy_is_in_its_own_unit():
    metrics = [row | {"test.bleu": 20 + row["step"] / 10 + row["chain"]} for row in make_metrics()]
    (axes,) = plots.score_over_steps(metrics, "test.bleu", "BLEU").axes
    *chains, mean = axes.lines
    assert len(chains) == 3
    np.testing.assert_allclose(chains[0].get_ydata(), [30, 40, 50])
    np.testing.assert_allclose(mean.get_xdata(), [100, 200, 300])
    np.testing.assert_allclose(mean.get_ydata(), [31, 41, 51])
    assert axes.get_title(loc="left") == "Test BLEU"
    assert axes.get_ylabel() == "test BLEU"
    (accuracy,) = plots.accuracy_over_steps(metrics).axes
    ends = [[text.get_text() for text in one.texts] for one in (axes, accuracy)]
    assert "51" in ends[0] and "81.0 %" in ends[1]
    assert not any("%" in text for text in ends[0])
    labels = [one.yaxis.get_major_formatter()(0.5, 0) for one in (axes, accuracy)]
    assert "%" not in labels[0] and "50" in labels[1]


def test_chain_that_was_stopped_early_counts_where_it_has_values():
    metrics = [row for row in make_metrics(2) if (row["chain"], row["step"]) != (1, 300)]
    (axes,) = plots.accuracy_over_steps(metrics).axes
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), [0.605, 0.705, 0.8])


def test_histogram_shows_the_share_of_each_group():
    w = np.array([0.05, 0.05, 0.95, 0.95, 0.95, 0.05])
    members = {"rare": np.array([0, 0, 1, 1, 0, 0], bool)}
    members["frequent"] = ~members["rare"]
    (axes,) = plots.weight_histogram(w, members, GROUPS, bins=10).axes
    shares = [patch.get_data().values for patch in axes.patches[1::2]]
    np.testing.assert_allclose(shares[0][[0, 9]], [0, 1])
    np.testing.assert_allclose(shares[1][[0, 9]], [0.75, 0.25])
    assert "rare (2 points)" in axes.get_legend().get_texts()[0].get_text()


def test_histogram_refuses_masks_that_do_not_fit():
    with pytest.raises(InputError, match=r"shape \(2,\) for 'rare' and 3 points"):
        plots.weight_histogram(np.ones(3), {"rare": [True, False]}, {"rare": True})
    with pytest.raises(InputError, match="none for 'rare'"):
        plots.weight_histogram(np.ones(3), {}, {"rare": True})


def test_metric_that_is_absent_is_named_with_those_there():
    with pytest.raises(InputError, match=r"'test.accuracy', got rows with \['chain', 'step'\]"):
        plots.accuracy_over_steps([{"chain": 0, "step": 1}])
    with pytest.raises(InputError, match=r"'test.bleu', got rows with"):
        plots.score_over_steps(make_metrics(), "test.bleu", "BLEU")


def test_save_writes_a_png_and_needs_no_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    plots.save(plots.accuracy_over_steps(make_metrics()), tmp_path / "a.png", dpi=40)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    source = sys.modules["bads_ppl.plots"]
    assert not hasattr(source, "plt") and not hasattr(source, "pyplot")
