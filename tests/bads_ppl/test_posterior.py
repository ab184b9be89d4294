"""The ArviZ data of a run, and its file."""

import json
import os
from dataclasses import dataclass

import numpy as np
import pytest

from bads_ppl import posterior as module
from bads_ppl.errors import InputError
from bads_ppl.posterior import arviz, dataset, load, save, to_arviz

IDS = np.array([10, 20, 30])


@dataclass
class Draws:
    w: np.ndarray
    values: dict


def make_chain(seed, draws=6, size=3):
    random = np.random.default_rng(seed)
    values = {
        "potential": random.normal(size=draws),
        "step": 10.0 * np.arange(1, draws + 1),
        "norm.conv1.weight": random.normal(size=draws),
    }
    return Draws(random.random((draws, size), dtype=np.float32), values)


def make_chains():
    return [make_chain(0), make_chain(1)]


def make_posterior(**settings):
    constant = {"group": np.array(["rare", "", "often"], dtype=object), "label": [0, 1, 1]}
    attrs = {
        "mode": "calibrated",
        "seed": 3,
        "temperature": np.float64(0.5),
        "versions": {"torch": "2"},
        "resumed": True,
        "auxiliary": None,
    }
    return to_arviz(make_chains(), ids=IDS, constant_data=constant, attrs=attrs, **settings)


def check_content(data):
    chains = make_chains()
    w = dataset(data, "posterior")["w"]
    assert w.dims == ("chain", "draw", "point") and w.dtype == np.float32
    np.testing.assert_array_equal(w.values, np.stack([chain.w for chain in chains]))
    np.testing.assert_array_equal(w.sel(point=30, chain=1), chains[1].w[:, 2])
    norm = dataset(data, "posterior")["norm.conv1.weight"]
    np.testing.assert_array_equal(norm[1], chains[1].values["norm.conv1.weight"])
    stats = dataset(data, "sample_stats")
    np.testing.assert_array_equal(stats["lp"], -stats["potential"])
    np.testing.assert_array_equal(stats["potential"][0], chains[0].values["potential"])
    assert stats["step"][0].values.tolist() == [10, 20, 30, 40, 50, 60]
    constant = dataset(data, "constant_data")
    assert constant["group"].sel(point=[10, 20, 30]).values.tolist() == ["rare", "", "often"]
    assert constant["label"].values.tolist() == [0, 1, 1]
    assert data.attrs["mode"] == "calibrated" and data.attrs["seed"] == 3
    assert json.loads(data.attrs["versions"]) == {"torch": "2"}
    assert json.loads(data.attrs["auxiliary"]) is None


def test_groups_hold_weights_functions_and_what_is_known_of_points():
    check_content(make_posterior())


def test_file_gives_back_the_same_content(tmp_path):
    path = tmp_path / "posterior.nc"
    save(make_posterior(), path)
    assert os.listdir(tmp_path) == ["posterior.nc"]
    loaded = load(path)
    check_content(loaded)
    save(loaded, path)  # over the file that it is read from
    check_content(load(path))


def test_arviz_itself_takes_the_data():
    rhat = arviz.rhat(make_posterior(), var_names=["w", "norm.conv1.weight"])
    rhat = getattr(rhat, "dataset", rhat)
    assert rhat["w"].shape == (3,) and np.isfinite(rhat["w"]).all()


def test_weights_beyond_memory_go_through_a_file_with_the_same_content(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_IN_MEMORY", 0)
    data = make_posterior()
    check_content(data)
    save(data, tmp_path / "posterior.nc")
    check_content(load(tmp_path / "posterior.nc"))


def test_functions_choose_what_is_kept():
    assert list(dataset(make_posterior(functions=[]), "posterior").data_vars) == ["w"]
    with pytest.raises(InputError, match=r"among \['norm.conv1.weight'\], got 'norm'"):
        make_posterior(functions=["norm"])


def test_unequal_chains_are_refused_with_their_lengths():
    with pytest.raises(InputError, match=r"same number of draws, got \[6, 4\]"):
        to_arviz([make_chain(0), make_chain(1, draws=4)], ids=IDS)


@pytest.mark.parametrize("draws", [[], [make_chain(0, draws=0)]])
def test_no_draws_are_refused(draws):
    with pytest.raises(InputError, match="at least one draw"):
        to_arviz(draws, ids=IDS)


def test_chains_of_other_points_or_functions_are_refused():
    with pytest.raises(InputError, match=r"\(6, 3\), \(6, 4\)"):
        to_arviz([make_chain(0), make_chain(1, size=4)], ids=IDS)
    with pytest.raises(InputError, match=r"\(2,\) ids"):
        to_arviz(make_chains(), ids=[1, 2])
    with pytest.raises(InputError, match=r"shape \(2,\) for 'group' and 3 ids"):
        to_arviz(make_chains(), ids=IDS, constant_data={"group": ["a", "b"]})
    other = make_chain(1)
    other.values["loss"] = other.values.pop("norm.conv1.weight")
    with pytest.raises(InputError, match=r"'loss'.*in chain 1"):
        to_arviz([make_chain(0), other], ids=IDS)


def test_group_that_is_absent_is_named():
    with pytest.raises(InputError, match="no group 'prior'"):
        dataset(make_posterior(), "prior")


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "absent.nc")
    good = tmp_path / "good.nc"
    save(make_posterior(), good)
    for name, content in (("cut", good.read_bytes()[:3000]), ("text", b"not netCDF")):
        path = tmp_path / f"{name}.nc"
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.nc cannot be read"):
            load(path)
    foreign = tmp_path / "foreign.nc"
    dataset(make_posterior(), "sample_stats").to_netcdf(
        foreign, group="sample_stats", engine="h5netcdf"
    )
    with pytest.raises(InputError, match=r"no posterior of weights.*\['sample_stats'\]"):
        load(foreign)
