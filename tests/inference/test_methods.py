"""What each method's weights say about the train set, and that all share one interface."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.priors import SparsityPrior
from bads_ppl.program import Impact
from bads_ppl.weights import FixedWeights, InstanceWeights, WeightNetwork
from inference.methods import METHODS, instance_weights, method, network_weights
from inference.tasks import Task
from models.joint import joint
from models.normalised import normalised

TRAIN, META = 40, 8
FIXED = sorted(set(METHODS) - {"bads", "blo"})


def task() -> Task:
    generator = torch.Generator().manual_seed(0)

    def data(count: int, first: int, name: str) -> Data:
        ids = torch.arange(first, first + count)
        return Data(torch.randn(count, 3, generator=generator), ids % 2, ids, name=name)

    rare = torch.arange(TRAIN) < 4
    sets = data(TRAIN, 100, "train"), data(META, 500, "meta"), data(6, 900, "test")
    return Task("t", "t", *sets, 2, {"rare": rare, "frequent": ~rare}, ("rare",), 0.1)


def setup(name: str, seed: int = 0, sparsity: float = 0.25):
    return method(name)(
        task(),
        model=normalised,
        weights=partial(instance_weights, classes=2, mean=sparsity),
        sparsity=SparsityPrior(sparsity),
        impact=Impact(weight=2.0),
        names=("normalised", "instance"),
        seed=seed,
    )


def test_bads_takes_the_model_weights_and_impact_that_it_is_given():
    found = setup("bads")
    assert found.model is normalised and found.fixed is None
    assert found.sparsity == SparsityPrior(0.25) and found.impact == Impact(weight=2.0)
    assert isinstance(found.weights(nn.Linear(3, 2)), InstanceWeights)
    assert found.names == ("normalised", "instance") and found.points == 10 + META


def test_bilevel_optimisation_is_bads_with_its_own_model_and_weights_that_are_optimised():
    found, like = setup("blo"), setup("bads")
    assert found.optimises and not like.optimises and found.names == ("bilevel", "instance")
    same = {"names": like.names, "weights": like.weights, "train": like.train}
    assert replace(found, optimises=False, **same) == like
    assert found.weights(nn.Linear(3, 2)) == InstanceWeights(mean=0.5, concentration=1.0)


@pytest.mark.parametrize(
    ("name", "weight", "points"),
    [("mixing", 1.0, TRAIN + META), ("meta_only", 0.0, META), ("dup_meta", 1.0, 2 * TRAIN)],
)
def test_a_baseline_gives_every_point_the_weight_of_its_definition(name, weight, points):
    found = setup(name)
    assert found.fixed.tolist() == [weight] * TRAIN
    assert found.points == points


def test_dup_meta_repeats_the_meta_set_to_the_size_of_the_train_set():
    assert setup("dup_meta").impact == Impact(meta=TRAIN / META)
    assert setup("mixing").impact == setup("meta_only").impact == Impact()


def test_random_select_keeps_the_share_beta_and_its_seed_chooses_which():
    found, again, other = setup("random_select"), setup("random_select"), setup("random_select", 1)
    chosen = found.fixed.nonzero().flatten()
    assert len(chosen) == 10 and found.points == 10 + META
    assert torch.equal(found.train.ids, task().train.ids[chosen])
    assert torch.equal(found.fixed, again.fixed) and not torch.equal(found.fixed, other.fixed)


@pytest.mark.parametrize("name", FIXED)
def test_baselines_run_the_joint_program_with_fixed_weights_for_the_points_they_train_on(name):
    found = setup(name)
    weights = found.weights(nn.Linear(3, 2))
    assert found.model is joint and found.names == ("joint", "fixed") and found.sparsity is None
    assert isinstance(weights, FixedWeights) and len(weights.values) == len(found.train)
    assert len(found.fixed) == TRAIN


def test_an_unknown_method_is_refused_with_the_names_there_are():
    with pytest.raises(
        InputError, match=r"must be one of \['bads', .*'random_select'\], got 'bda'"
    ):
        method("bda")


def test_a_weight_network_fits_the_embedding_and_the_labels_of_the_task():
    network = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2))
    plain = network_weights(network, classes=2, initial=0.2)
    labelled = network_weights(network, classes=2, label=True)
    assert isinstance(plain, WeightNetwork) and isinstance(labelled, WeightNetwork)
    assert (plain.linear.in_features, labelled.linear.in_features) == (7, 9)
    w = plain(torch.randn(5, 7), torch.zeros(5, dtype=torch.int64))
    assert w.tolist() == pytest.approx([0.2] * 5)
