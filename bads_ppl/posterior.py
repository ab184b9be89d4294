"""The posterior of a run as ArviZ data: the one module that knows ArviZ and its versions.

ArviZ 0.23 keeps its groups in an `InferenceData`, ArviZ 1.x in an xarray `DataTree`. Here both are
made from, and taken apart into, the same xarray datasets; files are the same as well, so a run made
with one version opens with the other.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from bads_ppl.atomic import atomic_path
from bads_ppl.draws import ChainDraws, Draws, check_chains
from bads_ppl.errors import InputError

with warnings.catch_warnings():
    # 0.23 announces 1.x at every import; both work here.
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

Posterior = Any
"""`arviz.InferenceData` with ArviZ 0.23, `xarray.DataTree` with ArviZ 1.x."""

GROUPS = ("posterior", "sample_stats", "constant_data")

_IS_TREE = int(arviz.__version__.split(".")[0]) >= 1
_SAMPLE_STATS = ("potential", "step")
_IN_MEMORY = 256 * 2**20
"""Bytes of weights above which they are held in a temporary file instead of memory."""


def to_arviz(
    draws: Sequence[Draws],
    *,
    ids: ArrayLike,
    functions: Sequence[str] | None = None,
    constant_data: Mapping[str, ArrayLike] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Posterior:
    """The ArviZ data of a run.

    Groups: `posterior` has the weights `w` (chain, draw, point), with the ids as coordinates of
    `point`, and each function of theta (chain, draw) under its own name, "norm.conv1.weight", say.
    `sample_stats` has `potential`, `lp` (its negative) and `step`. `constant_data` has what is
    known of each point (point).

    Args:
        draws: one entry per chain, all of D draws of N weights.
        ids: (N,) the points' ids.
        functions: names of the functions of theta to keep; default all.
        constant_data: name to (N,), such as group and label.
        attrs: settings of the run, kept as attributes; what netCDF cannot hold becomes JSON.

    Raises:
        InputError: if there is no draw, chains differ in length, weights or names, or `ids` and
            `constant_data` do not have one entry per weight.
    """
    ids = np.asarray(ids, dtype=np.int64)
    check_chains(draws)
    if draws[0].w.shape[1:] != ids.shape:
        raise InputError(
            f"every draw must have one weight per id, got {draws[0].w.shape[1]} weights and "
            f"{ids.shape} ids: give chains of one run, and its ids"
        )
    names = [name for name in draws[0].values if name not in _SAMPLE_STATS]
    for name in functions or ():
        if name not in names:
            raise InputError(f"functions must be among {names}, got {name!r}")
    chain = np.arange(len(draws))
    coords: dict[str, Any] = {"chain": chain, "draw": np.arange(len(draws[0].w))}
    points = {"point": ids}

    def stacked(name: str) -> tuple[tuple[str, str], NDArray[np.float64]]:
        return ("chain", "draw"), np.stack([np.asarray(one.values[name]) for one in draws])

    posterior = {"w": (("chain", "draw", "point"), _stack_weights(draws))} | {
        name.replace("/", "."): stacked(name)  # a slash would open a group
        for name in (names if functions is None else functions)
    }
    stats = {name: stacked(name) for name in _SAMPLE_STATS if name in draws[0].values}
    if "potential" in stats:
        dims, potential = stats["potential"]
        stats["lp"] = (dims, -potential)
    if "step" in stats:
        dims, step = stats["step"]
        stats["step"] = (dims, step.astype(np.int64))
    constant = {}
    for name, given in (constant_data or {}).items():
        value = np.asarray(given)
        if value.shape != ids.shape:
            raise InputError(
                f"constant_data must have one value per point, got shape {value.shape} for "
                f"{name!r} and {len(ids)} ids"
            )
        constant[name] = (("point",), value.astype(str) if value.dtype == object else value)
    about = {name: _attribute(value) for name, value in (attrs or {}).items()}
    about = {"inference_library": "bads-ppl", **about}
    return _assemble(
        {
            "posterior": xr.Dataset(posterior, {**coords, **points}, about),
            "sample_stats": xr.Dataset(stats, coords),
            "constant_data": xr.Dataset(constant, points),
        },
        about,
    )


def dataset(data: Posterior, group: str) -> xr.Dataset:
    """One group of ArviZ data as an xarray dataset, whatever ArviZ's version.

    Raises:
        InputError: if there is no such group.
    """
    groups = _groups(data)
    if group not in groups:
        raise InputError(f"the data have no group {group!r}: they have {sorted(groups)}")
    return groups[group]


def save(data: Posterior, path: str | os.PathLike[str]) -> None:
    """Write ArviZ data as netCDF, atomically.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_path(path) as temporary:
        root = xr.Dataset(attrs=dict(data.attrs))
        root.to_netcdf(temporary, mode="w", engine="h5netcdf")
        for name, group in _groups(data).items():
            # Draws hold no missing values to mark; to look for them would copy all weights.
            encoding: dict[str, dict[str, Any]] = {
                str(variable): {"_FillValue": None}
                for variable in group.variables
                if group[variable].dtype.kind == "f"
            }
            group.to_netcdf(temporary, mode="a", group=name, engine="h5netcdf", encoding=encoding)


def load(path: str | os.PathLike[str]) -> Posterior:
    """Read what `save` wrote; arrays are read from the file when they are used.

    Raises:
        InputError: if the file is missing, damaged, or holds no weights.
    """
    if not Path(path).is_file():
        raise InputError(
            f"posterior {path} does not exist: give the posterior.nc of a finished run"
        )
    try:
        data = arviz.from_netcdf(os.fspath(path), engine="h5netcdf")
    except Exception as error:  # HDF5, its two wrappers and xarray share no base class
        if not isinstance(error, OSError | ValueError | KeyError | RuntimeError | TypeError):
            raise
        raise InputError(
            f"posterior {path} cannot be read ({error}): it is damaged or no netCDF file; run "
            "again, or load another"
        ) from error
    groups = _groups(data)
    if "posterior" not in groups or "w" not in groups["posterior"]:
        raise InputError(
            f"{path} holds no posterior of weights: expected the variable 'w' in the group "
            f"'posterior', got groups {sorted(groups)}. Give the posterior.nc of a run"
        )
    return data


def read_chains(data: Posterior) -> list[ChainDraws]:
    """The draws of each chain, as `to_arviz` took them (weights are read into memory).

    Raises:
        InputError: if there are no weights of dimensions (chain, draw, point).
    """
    posterior, stats = dataset(data, "posterior"), _groups(data).get("sample_stats", xr.Dataset())
    w = posterior.get("w")
    if w is None or w.dims != ("chain", "draw", "point"):
        raise InputError(
            "the data hold no weights: expected the variable 'w' with dimensions (chain, draw, "
            f"point), got {None if w is None else w.dims}. Give the posterior.nc of a run"
        )
    functions = {
        str(name): variable
        for name, variable in {**stats, **posterior}.items()
        if variable.dims == ("chain", "draw") and name != "lp"
    }
    return [
        ChainDraws(
            w[chain].to_numpy(),
            {name: value[chain].to_numpy().astype(float) for name, value in functions.items()},
        )
        for chain in range(len(w))
    ]


def _stack_weights(draws: Sequence[Draws]) -> NDArray[np.float32]:
    """Weights (C, D, N) of all chains, in a temporary file where memory might not hold them."""
    shape = (len(draws), *draws[0].w.shape)
    if 4 * np.prod(shape, dtype=np.int64) <= _IN_MEMORY:
        return np.stack([np.asarray(chain.w, dtype=np.float32) for chain in draws])
    with tempfile.TemporaryFile() as file:  # lives as long as it is mapped
        for chain in draws:
            for row in chain.w:
                file.write(np.ascontiguousarray(row, dtype=np.float32).tobytes())
        file.flush()
        return np.memmap(file, dtype=np.float32, mode="r", shape=shape)


def _attribute(value: Any) -> str | int | float:
    """A value that netCDF can hold as an attribute."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return value
    return json.dumps(value, default=str)


def _assemble(groups: dict[str, xr.Dataset], attrs: dict[str, Any]) -> Posterior:
    if _IS_TREE:
        tree = xr.DataTree.from_dict(groups)
        tree.attrs.update(attrs)
        return tree
    return arviz.InferenceData(attrs=attrs, **groups)


def _groups(data: Posterior) -> dict[str, xr.Dataset]:
    """The groups by name."""
    if isinstance(data, xr.DataTree):
        return {str(name): node.to_dataset(inherit=False) for name, node in data.children.items()}
    return {name: data[name] for name in data.groups()}
