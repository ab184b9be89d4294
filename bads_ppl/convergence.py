"""Convergence of draws in numbers: R-hat, effective sample sizes, Monte-Carlo errors.

The definitions are those of Vehtari, Gelman, Simpson, Carpenter and Bürkner ("Rank-normalization,
folding, and localization: an improved R-hat", Bayesian Analysis, 2021), and the tests hold them to
ArviZ's numbers. They are computed for all columns at once, in pieces of bounded size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtri

Array = NDArray[np.float64]

MIN_DRAWS = 4
"""Draws per chain below which the halves of a chain have no variance."""

_PIECE = 2**20
"""Draws (of all chains) that are worked on at a time: some 100 MiB with all copies."""

_READ = 16
"""Pieces that are read from disk in one go, as rows are long and columns are not contiguous."""


@dataclass(frozen=True)
class Estimates:
    """Numbers per column, each (N,); NaN where draws cannot tell.

    Attributes:
        mean: mean of all draws.
        sd: their standard deviation (divisor: draws - 1).
        still: bool, columns that did not move within any half of any chain, so that nothing of what
            follows is known.
        rhat: rank-normalised split R-hat, the larger of that of the draws and that of their
            distances to the median; 1 where chains agree. NaN for one chain.
        ess_bulk: independent draws that would tell as much of the centre of the distribution.
        ess_tail: the same of its 5 % and 95 % quantiles, the smaller of the two.
        mcse_mean: standard error of `mean`.
        mcse_sd: standard error of `sd`.
    """

    mean: Array
    sd: Array
    still: NDArray[np.bool_]
    rhat: Array
    ess_bulk: Array
    ess_tail: Array
    mcse_mean: Array
    mcse_sd: Array


def estimate(chains: Sequence[NDArray[np.floating]]) -> Estimates:
    """Estimates for every column of the draws.

    Args:
        chains: one array (D, N) per chain, all of one shape; may be memory-mapped. Columns with a
            draw that is not finite get NaN throughout, also as their mean.
    """
    draws, size = chains[0].shape
    step = max(1, _PIECE // (len(chains) * draws))
    kinds = {field.name: np.float64 for field in fields(Estimates)} | {"still": np.bool_}
    found: dict[str, Any] = {name: np.empty(size, dtype=kind) for name, kind in kinds.items()}
    for first in range(0, size, _READ * step):
        read = [np.array(chain[:, first : first + _READ * step]) for chain in chains]
        for start in range(0, read[0].shape[1], step):
            block = [one[:, start : start + step].T for one in read]
            piece = _estimate(np.stack(block, axis=1).astype(np.float64, order="C"))
            for name, values in found.items():
                values[first + start : first + start + step] = getattr(piece, name)
    return Estimates(**found)


def _estimate(x: Array) -> Estimates:
    """Estimates of draws (n, C, D): columns, chains, draws."""
    size, chains, draws = x.shape
    count = chains * draws
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean = x.mean(axis=(1, 2))
        mean[~np.isfinite(x).all(axis=(1, 2))] = np.nan
        departure = x - mean[:, None, None]
        square = departure**2
        sd = np.sqrt(square.sum(axis=(1, 2)) / (count - 1)) if count > 1 else np.full(size, np.nan)
        unknown = np.full(size, np.nan)
        if draws < MIN_DRAWS:
            still = (np.ptp(x, axis=2) == 0).all(axis=1)
            return Estimates(mean, sd, still, *[unknown] * 5)
        split = _split(x)
        still = (np.ptp(split, axis=2) == 0).all(axis=1)
        known = ~still & np.isfinite(mean)
        order, ordered = _sort(split.reshape(size, -1))
        bulk, folded = (
            _unsort(z, order).reshape(split.shape)
            for z in (_normal_scores(ordered), _folded_scores(ordered))
        )
        rhat = np.fmax(_rhat(bulk), _rhat(folded)) if chains > 1 else unknown
        del folded
        if draws % 2:  # the halves lack the middle draw, quantiles do not
            ordered = np.sort(x.reshape(size, -1), axis=1)
        tails = [_ess(_split(x <= _quantile(ordered, p)[:, None, None])) for p in (0.05, 0.95)]
        # Where ties put a quantile at the end of the range, only the other tail can tell.
        tail = np.min([np.where(np.isnan(ess), bulk[0].size, ess) for ess in tails], axis=0)
        tail[np.isnan(tails).all(axis=0)] = np.nan
        mcse_mean = sd / np.sqrt(_ess(split))
        # Delta method: var(sd) = var(sd^2) / (4 sd^2), for the sd with divisor `count`.
        variance = square.mean(axis=(1, 2))
        spread = (square**2).mean(axis=(1, 2)) - variance**2
        mcse_sd = np.sqrt(spread / _ess(_split(square)) / variance / 4)
        found = (rhat, _ess(bulk), tail, mcse_mean, mcse_sd)
    rest = [np.where(known, value, np.nan) for value in found]
    return Estimates(mean, sd, still, *rest)


def _split(x: NDArray[np.generic]) -> Array:
    """First and last halves (n, 2 C, D // 2) of all chains; of an odd number the middle is left."""
    half = x.shape[2] // 2
    return np.concatenate([x[..., :half], x[..., -half:]], axis=1, dtype=np.float64)


def _sort(x: Array) -> tuple[NDArray[np.intp], Array]:
    """Order of the rows' values, and the values in that order."""
    order = np.argsort(x, axis=1)
    return order, np.take_along_axis(x, order, axis=1)


def _unsort(ordered: Array, order: NDArray[np.intp]) -> Array:
    """The inverse of `_sort`."""
    x = np.empty_like(ordered)
    np.put_along_axis(x, order, ordered, axis=1)
    return x


def _normal_scores(ordered: Array) -> Array:
    """Standard normal quantiles of the ranks of ordered rows (n, S), ties at their mean rank."""
    count = ordered.shape[1]
    place = np.arange(count, dtype=np.int32)
    new = np.ones(ordered.shape, dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=new[:, 1:])
    first = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    new[:, :-1] = new[:, 1:]  # from here on: the last of its run
    new[:, -1] = True
    last = np.where(new, place, count)[:, ::-1]
    last = np.minimum.accumulate(last, axis=1)[:, ::-1]
    ranks = 1 + np.arange(2 * count - 1) / 2  # mean ranks are whole or half
    scores: Array = ndtri((ranks - 3 / 8) / (count + 1 / 4))[first + last]
    return scores


def _folded_scores(ordered: Array) -> Array:
    """Normal scores of the distances to the median, in the order of the values."""
    count = ordered.shape[1]
    median = (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2
    order, distances = _sort(np.abs(ordered - median[:, None]))
    return _unsort(_normal_scores(distances), order)


def _quantile(ordered: Array, share: float) -> Array:
    """Quantile (n,) of ordered rows, by linear interpolation; exact among ties."""
    place = share * (ordered.shape[1] - 1)
    below = int(place)
    low, high = ordered[:, below], ordered[:, min(below + 1, ordered.shape[1] - 1)]
    quantile: Array = low + (place - below) * (high - low)
    return quantile


def _rhat(split: Array) -> Array:
    """R-hat (n,) of chains (n, M, H): total over mean within-chain standard deviation."""
    length = split.shape[2]
    within = split.var(axis=2, ddof=1).mean(axis=1)
    between = split.mean(axis=2).var(axis=1, ddof=1)
    rhat: Array = np.sqrt((length - 1) / length + between / within)
    return rhat


def _ess(split: Array) -> Array:
    """Effective number of draws (n,) of chains (n, M, H); NaN for columns that are constant.

    The autocorrelations are summed up to where the sum of two neighbours turns negative, and those
    sums are kept from growing (Geyer's initial monotone sequence, 1992).
    """
    size, chains, length = split.shape
    count = chains * length
    means = split.mean(axis=2, keepdims=True)
    padded = next_fast_len(2 * length, real=True)
    spectrum = rfft(split - means, padded, axis=2)
    power = (spectrum.real**2 + spectrum.imag**2).mean(axis=1)
    covariance = irfft(power, padded, axis=1)[:, :length] / length
    within = covariance[:, 0] * length / (length - 1)
    total = covariance[:, 0] + means[:, :, 0].var(axis=1, ddof=1) * (chains > 1)
    correlation = 1 - (within[:, None] - covariance) / total[:, None]
    correlation[:, 0] = 1
    pairs = max(1, (length - 1) // 2)
    sums = correlation[:, 0 : 2 * pairs : 2] + correlation[:, 1 : 2 * pairs : 2]
    stops = sums <= 0
    stops[:, -1] = True
    stop = stops.argmax(axis=1)
    counted = np.arange(pairs) < stop[:, None]
    summed = np.where(counted, np.minimum.accumulate(sums, axis=1), 0).sum(axis=1)
    # Of the pair at which the sum stops, the first may still be positive.
    edge = correlation[np.arange(size), 2 * stop]
    edge = np.where((edge > 0) | (sums[np.arange(size), stop] >= 0), edge, 0)
    time = np.maximum(2 * summed + edge - 1, 1 / np.log10(count))
    constant = np.ptp(split.reshape(size, -1), axis=1) == 0
    return np.where(constant | np.isnan(time), np.nan, count / time)
