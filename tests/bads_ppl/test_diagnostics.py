"""Diagnostics say what the draws show, what cannot be known, and never a wrong number."""

import json
import math

import numpy as np
import pytest

from bads_ppl.convergence import estimate
from bads_ppl.diagnostics import diagnose
from bads_ppl.draws import ChainDraws, DrawWriter, read_draws
from bads_ppl.errors import InputError
from bads_ppl.posterior import load, read_chains, save, to_arviz


def make_chain(seed, draws=120, points=50, mean=0.5, sd=0.05):
    generator = np.random.default_rng(seed)
    w = mean + sd * generator.standard_normal((draws, points))
    values = {
        "potential": generator.standard_normal(draws),
        "test_loss": generator.standard_normal(draws),
        "step": 1000.0 + 5 * np.arange(1, draws + 1),
    }
    return ChainDraws(w.astype(np.float32), values)


def make_chains(count=4, **options):
    return [make_chain(seed, **options) for seed in range(count)]


def strict_json(diagnostics):
    """The block of results.json, read back by a reader that knows no NaN."""
    return json.loads(json.dumps(diagnostics.to_dict(), allow_nan=False))


def test_good_chains_are_converged_and_the_numbers_are_those_of_the_weights():
    chains = make_chains()
    found = diagnose(chains, evidence="calibrated", target=0.5)
    weights = estimate([chain.w for chain in chains])
    assert found.verdict == "converged"
    assert found.rhat_max == weights.rhat.max() and found.ess_bulk_min == weights.ess_bulk.min()
    assert found.ess_tail_min == weights.ess_tail.min()
    assert (weights.ess_bulk <= found.ess_bulk_median).sum() == 25  # the lower of the two middles
    # 99 % of 50 weights are all but none of them, 98 % would be all but one.
    assert found.rhat_99pct == weights.rhat.max()
    assert (found.chains, found.draws, found.points) == (4, 120, 50)
    assert (found.steps, found.thinning, found.constant) == (1600, 5, 0)
    assert found.total == pytest.approx(weights.mean.sum())


def test_functions_and_potential_have_a_row_each_and_the_step_has_none():
    chains = make_chains()
    functions = diagnose(chains, evidence="calibrated").functions
    assert list(functions) == ["potential", "test_loss"]
    table = estimate([chain.values["test_loss"][:, None] for chain in chains])
    for name, value in functions["test_loss"].items():
        assert value == pytest.approx(getattr(table, name)[0])


def test_block_of_results_is_strict_json_with_every_number():
    block = strict_json(diagnose(make_chains(), evidence="approximate", target=0.5))
    numbers = ("rhat_max", "rhat_99pct", "ess_bulk_min", "ess_bulk_median", "ess_tail_min")
    assert all(isinstance(block[name], float) for name in numbers)
    assert block["verdict"] == "approximate" and block["sentence"]
    assert block["functions"]["potential"]["rhat"] > 0 and block["collapsed"] is False


def test_what_one_chain_cannot_tell_is_null():
    found = diagnose(make_chains(1), evidence="calibrated", target=0.5)
    block = strict_json(found)
    assert found.verdict == "unknown" and "chains=4" in found.sentence
    assert block["rhat_max"] is None and block["rhat_99pct"] is None
    assert block["functions"]["potential"]["rhat"] is None
    assert block["ess_bulk_median"] > 0


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_fewer_than_four_draws_tell_nothing(draws):
    found = diagnose(make_chains(draws=draws), evidence="calibrated", target=0.5)
    block = strict_json(found)
    assert found.verdict == "unknown"
    assert f"{draws} draw" in found.sentence and "at least 4" in found.sentence
    numbers = ("rhat_max", "rhat_99pct", "ess_bulk_min", "ess_bulk_median", "ess_tail_min")
    assert [block[name] for name in numbers] == [None] * 5


def test_weights_that_never_move_are_counted_and_count_against_convergence():
    chains = make_chains(points=200)
    for chain in chains:
        chain.w[:, 7:9] = 0.25  # 1 %: still within what is allowed
    found = diagnose(chains, evidence="calibrated", target=0.5)
    assert found.constant == 2 and np.isnan(found.rhat[7:9]).all()
    assert found.verdict == "converged" and "2 of 200 weights never moved" in found.sentence
    for chain in chains:
        chain.w[:, 9] = 0.25
    found = diagnose(chains, evidence="calibrated", target=0.5)
    assert found.verdict == "not converged" and found.rhat_99pct is None
    assert found.agreeing <= 0.985 and found.rhat_max < 1.1
    strict_json(found)


def test_weights_of_which_none_moves_are_not_converged():
    chains = [ChainDraws(np.full((20, 3), 0.5, np.float32), {}) for _ in range(2)]
    found = diagnose(chains, evidence="calibrated", target=0.5)
    assert found.verdict == "not converged" and found.constant == 3
    assert "No weight moved" in found.sentence
    assert strict_json(found)["ess_bulk_min"] is None


def test_a_weight_that_is_not_finite_is_named():
    chains = make_chains(3)
    chains[1].w[17, 4] = np.nan
    with pytest.raises(InputError, match=r"got nan for point 104 in draw 17 of chain 1"):
        diagnose(chains, evidence="calibrated", ids=100 + np.arange(50))
    chains[1].w[17, 4] = np.inf
    with pytest.raises(InputError, match=r"got inf for point 4 in draw 17 of chain 1"):
        diagnose(chains, evidence="calibrated")


def test_a_function_that_is_not_finite_has_no_number_and_is_named():
    chains = make_chains()
    chains[2].values["test_loss"][3] = np.inf
    found = diagnose(chains, evidence="calibrated", target=0.5)
    assert set(found.functions["test_loss"].values()) == {None}
    assert found.verdict == "converged" and "Not finite in some draw: test_loss" in found.sentence
    chains[2].values["potential"][3] = np.nan
    found = diagnose(chains, evidence="calibrated", target=0.5)
    assert found.verdict == "not converged" and "potential" in found.sentence
    strict_json(found)


def test_chains_that_do_not_belong_together_are_refused():
    with pytest.raises(InputError, match=r"got \[120, 120, 90\], fewest in chain 2"):
        diagnose([make_chain(0), make_chain(1), make_chain(2, draws=90)], evidence="calibrated")
    with pytest.raises(InputError, match=r"one shape.*\(120, 50\), \(120, 4\)"):
        diagnose([make_chain(0), make_chain(1, points=4)], evidence="calibrated")
    with pytest.raises(InputError, match="at least one draw"):
        diagnose([], evidence="calibrated")
    with pytest.raises(InputError, match=r"evidence must be one of 'calibrated'.*got 'sure'"):
        diagnose(make_chains(), evidence="sure")


def test_fixed_weights_have_no_posterior_but_their_theta_has_numbers():
    chains = make_chains()
    for chain in chains:
        chain.w[:] = 0.0  # meta_only: not a collapse
    found = diagnose(chains, evidence="fixed", target=0.5)
    block = strict_json(found)
    assert found.verdict == "fixed" and "no posterior" in found.sentence
    assert block["rhat_max"] is None and block["ess_bulk_median"] is None
    assert block["constant"] == 0 and not block["collapsed"]
    assert block["functions"]["potential"]["rhat"] > 0
    assert np.isnan(found.rhat).all()


def test_columns_have_one_number_per_point():
    columns = diagnose(make_chains(), evidence="calibrated").columns()
    assert set(columns) == {"rhat", "ess_bulk", "ess_tail", "mcse_mean", "mcse_sd"}
    assert all(values.shape == (50,) for values in columns.values())


def test_draws_on_disk_and_in_posterior_nc_have_the_same_diagnostics(tmp_path):
    chains = make_chains(2, points=6)
    for number, chain in enumerate(chains):
        with DrawWriter(tmp_path / f"chain-{number}", 6) as writer:
            for draw, w in enumerate(chain.w):
                writer.append(w, {name: value[draw] for name, value in chain.values.items()})
    stored = [read_draws(tmp_path / f"chain-{number}") for number in range(2)]
    save(to_arviz(chains, ids=np.arange(6)), tmp_path / "posterior.nc")
    loaded = read_chains(load(tmp_path / "posterior.nc"))
    wanted = strict_json(diagnose(chains, evidence="calibrated", target=0.5))
    for found in (stored, loaded):
        assert strict_json(diagnose(found, evidence="calibrated", target=0.5)) == wanted


def test_an_infinite_rhat_is_null_and_no_agreement():
    # Each half chain takes one distance to the median, but not the same one: no spread within the
    # folded halves, and some between them.
    w = np.tile([[0.375], [0.625]], (10, 1)) + np.zeros(2)
    wide = np.tile([[0.25], [0.75]], (10, 1)) + np.zeros(2)
    chains = [ChainDraws(x.astype(np.float32), {}) for x in (w, wide)]
    found = diagnose(chains, evidence="calibrated", target=0.5)
    assert math.isinf(found.rhat[0]) and found.rhat_max is None and found.agreeing == 0
    assert found.verdict == "not converged"
