"""The result that users take away: a weight per train point, with its uncertainty.

A `Selection` is made from the draws of all chains, which may be larger than memory, and can be
sliced, sorted, tabled, saved, and used to train on the right points.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import WeightedRandomSampler

from bads_ppl.atomic import atomic_path
from bads_ppl.errors import InputError
from bads_ppl.moments import moments

FORMAT = "bads-ppl selection 1"

_METADATA = b"bads_ppl"
_TABLE = {
    "mean": np.float32,
    "sd": np.float32,
    "probability": np.float32,
    "rank_low": np.int32,
    "rank_high": np.int32,
}
_RESERVED = ("id", "position", *_TABLE)
_IN_MEMORY = 64 * 2**20
"""Bytes of ranks above which they go to a temporary file, and that are read in one piece."""


class Point(NamedTuple):
    """One row of a `Selection`; the fields are those of the selection."""

    id: int
    mean: float
    sd: float
    probability: float
    rank_low: int
    rank_high: int
    columns: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """Posterior summaries of the weights of K train points, out of the N that were weighted.

    `selection[5]` is one point, `selection[2:9]`, `selection[mask]` and `selection[[3, 1]]` are
    selections; ranks go on to refer to all N points. Arrays are read-only.

    Attributes:
        ids: (K,) int64, the points' stable ids, unique.
        mean: (K,) posterior mean of the weight, in [0, 1].
        sd: (K,) posterior standard deviation; 0 for fixed weights.
        probability: (K,) share of draws with a weight above 0.5, in [0, 1].
        rank_low: (K,) int32, lower end of the interval of ranks; rank 1 has the highest weight of
            a draw. Points with equal weights share a range of ranks, and the interval covers it.
        rank_high: (K,) int32, its upper end, rank_low to N.
        chains: number of chains.
        draws: number of draws, of all chains together.
        interval: probability that the interval of ranks covers, in (0, 1).
        evidence: what the draws are: "calibrated" posterior draws, "approximate", an "optimisation
            path" (`bads_ppl.chains.evidence`), or "fixed" weights that were given. Only for the
            first are sd, probability and ranks posterior evidence.
        columns: name to (K,): more about each point, such as its group, label or source.
        positions: (K,) int64, rows in the train set, 0 to N - 1; default 0 to K - 1.
        size: N, points of the train set; default K.

    Raises:
        InputError: if lengths differ, ids repeat, or a column has a name that is taken.

    See Also:
        `from_draws`, which makes one from what chains wrote.
    """

    ids: NDArray[np.int64]
    mean: NDArray[np.float32]
    sd: NDArray[np.float32]
    probability: NDArray[np.float32]
    rank_low: NDArray[np.int32]
    rank_high: NDArray[np.int32]
    chains: int
    draws: int
    interval: float = 0.9
    evidence: str = "calibrated"
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    # None is replaced at once, so readers never see it.
    positions: NDArray[np.int64] = None  # type: ignore[assignment]
    size: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self._set("ids", _frozen(self.ids, np.int64))
        defaults = {"positions": np.arange(len(self.ids)), "size": len(self.ids)}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                self._set(name, value)
        for name, dtype in {**_TABLE, "positions": np.int64}.items():
            self._set(name, _frozen(getattr(self, name), dtype))
            self._check_length(name, getattr(self, name))
        columns = {str(name): _frozen(values) for name, values in self.columns.items()}
        for name, values in columns.items():
            if name in _RESERVED:
                raise InputError(
                    f"columns must not have the names {', '.join(_RESERVED)}, got {name!r}: "
                    "rename that column"
                )
            self._check_length(f"column {name!r}", values)
        self._set("columns", columns)
        if len(np.unique(self.ids)) < len(self.ids):
            values, counts = np.unique(self.ids, return_counts=True)
            raise InputError(
                f"ids must be unique, got repeated ids {values[counts > 1][:5].tolist()}: give "
                "every point an id of its own"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_length(self, name: str, values: NDArray[Any]) -> None:
        if values.shape != self.ids.shape or values.ndim != 1:
            raise InputError(
                f"{name} must have one value per point, got shape {values.shape} for ids of shape "
                f"{self.ids.shape}"
            )

    # making one

    @classmethod
    def from_draws(
        cls,
        ids: ArrayLike,
        draws: Sequence[NDArray[Any]],
        *,
        interval: float = 0.9,
        evidence: str = "calibrated",
        columns: Mapping[str, ArrayLike] | None = None,
        scratch: Path | None = None,
    ) -> Selection:
        """Summarise the draws of all chains, pooled.

        Draws are read in pieces, so they may be memory-mapped and larger than memory; their ranks
        then go to a temporary file of twice their size.

        Args:
            ids: (N,) the points' ids, in the order of the draws' columns and of the train set.
            draws: one array (D_c, N) of weights per chain. Fixed weights are one chain of one row.
            interval: probability that the intervals of ranks cover, in (0, 1).
            evidence: how the draws were made, see `Selection`.
            columns: name to (N,): more about each point.
            scratch: folder for the temporary file; default the system's.

        Raises:
            InputError: if there are no draws, chains differ in N, or a draw is NaN or infinite.
        """
        ids = _frozen(ids, np.int64)
        chains = [np.asarray(chain) for chain in draws]
        _check_chains(chains, ids)
        if not 0 < interval < 1:
            raise InputError(f"interval must be in (0, 1), got {interval} (90 % is 0.9)")
        mean, sd, probability = moments(chains, ids)
        rank_low, rank_high = _rank_intervals(chains, interval, scratch)
        given = {name: np.asarray(values) for name, values in (columns or {}).items()}
        count = sum(len(chain) for chain in chains)
        return cls(
            ids,
            mean,
            sd,
            probability,
            rank_low,
            rank_high,
            len(chains),
            count,
            interval,
            evidence,
            given,
        )

    @classmethod
    def from_parquet(cls, path: str | os.PathLike[str]) -> Selection:
        """Read what `to_parquet` wrote.

        Raises:
            InputError: if the file is missing, damaged, or another program's.
        """
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"selection {path} cannot be read ({error}): give a file that to_parquet wrote"
            ) from error
        about = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
        if about.pop("format", None) != FORMAT:
            raise InputError(
                f"{path} is a parquet file but holds no selection: expected {FORMAT!r} in its "
                "metadata, as to_parquet writes it"
            )
        read = {name: table[name].to_numpy() for name in table.column_names if name in _RESERVED}
        columns = {
            name: table[name].to_pandas().to_numpy()
            for name in table.column_names
            if name not in _RESERVED
        }
        ids, positions = read.pop("id"), read.pop("position")
        return cls(ids, **read, positions=positions, columns=columns, **about)

    # looking at it

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, key: SupportsIndex) -> Point: ...

    @overload
    def __getitem__(self, key: slice | ArrayLike) -> Selection: ...

    def __getitem__(self, key: Any) -> Point | Selection:
        """One point by its place (an integer), or the selection of several.

        Raises:
            InputError: if a mask has another length, or the key is of another kind.
            IndexError: if a place is outside of the selection.
        """
        if isinstance(key, int | np.integer):
            return self._point(int(key))
        if not isinstance(key, slice):
            key = np.asarray(key)
            if key.size == 0:
                key = key.astype(np.int64)
            if key.ndim != 1 or key.dtype.kind not in "biu":
                raise InputError(
                    "a selection takes an integer, a slice, a mask or integers, got an array of "
                    f"shape {key.shape} and type {key.dtype}"
                )
            if key.dtype == np.bool_ and len(key) != len(self):
                raise InputError(
                    f"a mask must have one value per point, got {len(key)} for {len(self)} points"
                )
        return self._take(key)

    def __iter__(self) -> Iterator[Point]:
        return (self._point(place) for place in range(len(self)))

    def _point(self, place: int) -> Point:
        if not -len(self) <= place < len(self):
            raise IndexError(f"place must be below {len(self)}, the number of points, got {place}")
        row = {name: getattr(self, name)[place].item() for name in _TABLE}
        columns = {name: values[place] for name, values in self.columns.items()}
        return Point(id=int(self.ids[place]), columns=columns, **row)

    def _take(self, key: slice | NDArray[Any]) -> Selection:
        row = {name: getattr(self, name)[key] for name in ("ids", "positions", *_TABLE)}
        columns = {name: values[key] for name, values in self.columns.items()}
        return Selection(
            **row,
            columns=columns,
            size=self.size,
            chains=self.chains,
            draws=self.draws,
            interval=self.interval,
            evidence=self.evidence,
        )

    def sorted(self) -> Selection:
        """All points from the highest mean weight to the lowest; ties stay in order."""
        return self._take(np.argsort(-self.mean, kind="stable"))

    def top(self, k: int) -> Selection:
        """The k points with the highest mean weight, highest first.

        Raises:
            InputError: if k is not from 1 to the number of points.
        """
        self._check_count(k)
        return self._take(np.argsort(-self.mean, kind="stable")[:k])

    def bottom(self, k: int) -> Selection:
        """The k points with the lowest mean weight, lowest first.

        Raises:
            InputError: if k is not from 1 to the number of points.
        """
        self._check_count(k)
        return self._take(np.argsort(self.mean, kind="stable")[:k])

    def _check_count(self, k: int) -> None:
        if not 1 <= k <= len(self):
            raise InputError(
                f"k must be from 1 to {len(self)}, the number of points, got {k}: ask for fewer "
                "points"
                if k > 0
                else f"k must be at least 1 point, got {k}"
            )

    def __repr__(self) -> str:
        parts = [f"{len(self):,} points"]
        if len(self) != self.size:
            parts[0] += f" of {self.size:,}"
        if len(self):
            total = float(self.mean.sum(dtype=np.float64))
            parts.append(f"total weight {total:,.4g}, mean {total / len(self):.3g}")
        origin = f"{self.chains} chain{'s' * (self.chains != 1)}, "
        origin += f"{self.draws:,} draw{'s' * (self.draws != 1)}, {self.evidence}"
        head = f"Selection of {'; '.join(parts)} ({origin})"
        if not len(self):
            return head
        highest = self.top(min(5, len(self)))
        frame = highest.to_frame().reset_index()
        ranks = [f"{p.rank_low:,} to {p.rank_high:,}" for p in highest]
        frame.insert(4, f"rank ({100 * self.interval:g} %)", ranks)
        frame = frame.drop(columns=["rank_low", "rank_high"])
        frame = frame.rename(columns={"probability": "P(w > 0.5)"})
        rows: str = frame.to_string(index=False, float_format=lambda x: f"{x:.3f}")
        more = f"\n  ... and {len(self) - 5:,} more" if len(self) > 5 else ""
        return head + "\n  " + rows.replace("\n", "\n  ") + more

    # taking it elsewhere

    def to_frame(self) -> pd.DataFrame:
        """A data frame with one row per point: index `id`, then the summaries and `columns`."""
        data = {name: getattr(self, name) for name in _TABLE} | dict(self.columns)
        return pd.DataFrame(data, index=pd.Index(self.ids, name="id"))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `to_frame` as CSV, atomically.

        Raises:
            OSError: if the file cannot be written.
        """
        with atomic_path(path) as temporary:
            self.to_frame().to_csv(temporary)

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write everything as parquet, atomically; `from_parquet` reads it again.

        The columns are those of `to_frame` and `position`, the row in the train set; the rest
        stands in the file's metadata.

        Raises:
            OSError: if the file cannot be written.
        """
        frame = self.to_frame().assign(position=self.positions)
        table = pa.Table.from_pandas(frame, preserve_index=True)
        about = {
            "format": FORMAT,
            "chains": self.chains,
            "draws": self.draws,
            "interval": self.interval,
            "evidence": self.evidence,
            "size": self.size,
        }
        metadata = {**(table.schema.metadata or {}), _METADATA: json.dumps(about).encode()}
        with atomic_path(path) as temporary:
            pq.write_table(table.replace_schema_metadata(metadata), temporary)

    def sampler(
        self, num_samples: int | None = None, generator: torch.Generator | None = None
    ) -> WeightedRandomSampler:
        """A sampler for a `DataLoader` over the train set: points in proportion to their weight.

        It yields positions in the train set as it was given to the run, with replacement. That of
        `selection.top(k)` yields the positions of those k points only.

        Args:
            num_samples: positions per epoch; default the number of points in this selection.
            generator: source of randomness; default torch's global one.

        Raises:
            InputError: if no weight is positive, or num_samples is not.
        """
        if not (self.mean > 0).any() or (self.mean < 0).any():
            raise InputError(
                "weights to sample with must be at least 0 and not all 0, got "
                + (f"weights down to {self.mean.min():.3g}" if len(self) else "no point")
                + f" and {int((self.mean > 0).sum())} positive ones: select points with weight"
            )
        count = len(self) if num_samples is None else num_samples
        if count < 1:
            raise InputError(f"num_samples must be at least 1, got {count}")
        weights = np.zeros(self.size)
        weights[self.positions] = self.mean
        # torch's annotation asks for a list, its code for anything that makes a tensor.
        tensor: Any = torch.from_numpy(weights)
        return WeightedRandomSampler(tensor, count, replacement=True, generator=generator)

    def add_to(self, dataset: Any, column: str = "weight") -> Any:
        """A Hugging Face dataset with the weights' means and sds as columns.

        Args:
            dataset: the train set as it was given to the run, a `datasets.Dataset` of N rows.
            column: name of the column of means; that of sds gets the suffix "_sd".

        Returns:
            A new dataset; this one is not changed.

        Raises:
            InputError: if the sizes differ, this is not the whole selection, or the dataset has
                such a column already.
        """
        if len(dataset) != self.size or len(self) != self.size:
            raise InputError(
                f"the dataset must be the train set of {self.size} points and the selection whole, "
                f"got {len(dataset)} rows and a selection of {len(self)}: add the whole selection "
                "to the train set, then filter that"
            )
        for name, values in ((column, self.mean), (f"{column}_sd", self.sd)):
            if name in dataset.column_names:
                raise InputError(
                    f"the dataset already has a column {name!r}: remove it or choose another name "
                    "with column="
                )
            placed = np.empty(len(self))
            placed[self.positions] = values
            dataset = dataset.add_column(name, placed)
        return dataset


def _frozen(values: Any, dtype: Any = None) -> NDArray[Any]:
    """A read-only copy, or the array itself where it is read-only already."""
    array = np.asarray(values, dtype=dtype)
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


def _check_chains(chains: Sequence[NDArray[Any]], ids: NDArray[np.int64]) -> None:
    if not chains or any(len(chain) == 0 for chain in chains if chain.ndim):
        lengths = [len(chain) for chain in chains if chain.ndim]
        raise InputError(
            f"every chain must have at least one draw, got {lengths} draws: run more steps, or "
            "less burn-in or thinning"
        )
    shapes = [chain.shape for chain in chains]
    if any(chain.ndim != 2 for chain in chains):
        raise InputError(
            f"draws of a chain must be (draws, points), got shapes {shapes}: for fixed weights (N,)"
            " give [weights[None]]"
        )
    if any(shape[1] != len(ids) for shape in shapes):
        raise InputError(
            f"all chains must have one weight per id, got {[shape[1] for shape in shapes]} weights "
            f"per draw for {len(ids)} ids: give chains of one run, and its ids"
        )
    if len(ids) == 0:
        raise InputError("a selection must have at least one point, got no ids: give the train set")


def ranks(weights: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Lowest and highest rank (N,) that each of the weights (N,) shares; rank 1 is the highest."""
    order = np.argsort(-weights, kind="stable")
    ordered = weights[order]
    changes = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts = np.concatenate([[0], changes])
    ends = np.concatenate([changes, [len(weights)]])
    counts = ends - starts
    low, high = np.empty((2, len(weights)), dtype=np.int32)
    low[order] = np.repeat(starts + 1, counts)
    high[order] = np.repeat(ends, counts)
    return low, high


def _rank_intervals(
    chains: Sequence[NDArray[Any]], interval: float, scratch: Path | None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Ends (N,) of the central interval of each point's ranks over all draws."""
    size, count = chains[0].shape[1], sum(len(chain) for chain in chains)
    tail = (1 - interval) / 2
    # Whole ranks that are sure to cover: the observed rank at or outside of the quantile.
    # The margin keeps a rank where rounding would miss it: (1 - 0.9) / 2 is below 0.05.
    first = int(np.floor(tail * (count - 1) + 1e-9))
    last = count - 1 - first
    result = np.empty((2, size), dtype=np.int32)
    with _rank_table(chains, count, size, scratch) as table:
        step = max(1, _IN_MEMORY // (4 * count))
        for start in range(0, size, step):
            part = slice(start, start + step)
            result[0, part] = np.partition(table[:, 0, part], first, axis=0)[first]
            result[1, part] = np.partition(table[:, 1, part], last, axis=0)[last]
    result.flags.writeable = False
    return result[0], result[1]


@contextmanager
def _rank_table(
    chains: Sequence[NDArray[Any]], count: int, size: int, scratch: Path | None
) -> Iterator[NDArray[np.int32]]:
    """Ranks (D, 2, N) of all draws: in memory if small, else in a file while the context lasts."""
    rows = (ranks(np.asarray(row)) for chain in chains for row in chain)
    if 8 * count * size <= _IN_MEMORY:
        yield np.array([np.stack(row) for row in rows])
        return
    with ExitStack() as stack:
        # Written row by row, not through a memory map: a full disk is an error there, not a crash.
        try:
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=scratch))
            for low, high in rows:
                file.write(low.tobytes())
                file.write(high.tobytes())
            file.flush()
        except OSError as error:
            gib = 8 * count * size / 2**30
            raise OSError(
                error.errno or errno.EIO,
                f"ranks of {count} draws of {size} weights need {gib:.1f} GiB of temporary space "
                f"({error.strerror}): free some, or name another folder with scratch=",
                error.filename,
            ) from error
        yield np.memmap(file, dtype=np.int32, mode="r", shape=(count, 2, size))
