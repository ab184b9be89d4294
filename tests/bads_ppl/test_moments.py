import numpy as np
import pytest

from bads_ppl import moments as module
from bads_ppl.errors import InputError
from bads_ppl.moments import moments

IDS = np.arange(100, 137)


def two_chains(kind=np.float32):
    random = np.random.default_rng(1)
    return [random.random((draws, len(IDS)), dtype=np.float32).astype(kind) for draws in (20, 31)]


def test_moments_are_those_of_the_pooled_draws_in_12_bytes_a_point():
    pooled = np.concatenate(two_chains(np.float64))
    found = moments(two_chains(), IDS)
    assert sum(values.nbytes for values in found) == 12 * len(IDS)
    np.testing.assert_allclose(found.mean, pooled.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.sd, pooled.std(axis=0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(found.above, (pooled > 0.5).mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("piece", [1, 100, 31 * 36])
def test_pieces_of_points_give_what_the_whole_gives(piece, monkeypatch):
    whole = moments(two_chains(), IDS)
    monkeypatch.setattr(module, "PIECE", piece)
    for values, expected in zip(moments(two_chains(), IDS), whole, strict=True):
        np.testing.assert_array_equal(values, expected)


def test_small_spreads_around_large_weights_do_not_cancel():
    random = np.random.default_rng(2)
    draws = (0.999 + 1e-5 * random.standard_normal((500, 37))).astype(np.float32)
    found = moments([draws], IDS)
    np.testing.assert_allclose(found.sd, draws.astype(float).std(axis=0, ddof=1), rtol=1e-5)


def test_one_draw_has_no_spread():
    found = moments([two_chains()[0][:1]], IDS)
    assert (found.sd == 0).all() and np.array_equal(found.mean, two_chains()[0][0])


@pytest.mark.parametrize("piece", [1, 2**20])
def test_a_draw_that_is_not_finite_is_named_by_its_id(piece, monkeypatch):
    monkeypatch.setattr(module, "PIECE", piece)
    draws = two_chains()
    draws[1][3, 7] = np.inf
    with pytest.raises(InputError, match="got inf for id 107 in draw 3 of chain 1"):
        moments(draws, IDS)
