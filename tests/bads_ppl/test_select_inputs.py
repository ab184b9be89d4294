"""Wrong input to `select` is refused before any step, with the value and what was expected."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bads_ppl import Data, InputError, Plan, select

PLAN = Plan(4, thinning=1, snapshots=0)


def points(count: int = 20, first: int = 0, name: str = "train") -> Data:
    generator = torch.Generator().manual_seed(count + first)
    ids = torch.arange(first, first + count)
    return Data(torch.randn(count, 3, generator=generator), ids % 2, ids, name=name)


def refused(message: str, **changes: Any) -> None:
    given: dict[str, Any] = {
        "network": nn.Linear(3, 2),
        "train": points(),
        "meta": points(6, 100, "meta"),
        "sparsity": 0.2,
        "chains": 1,
        "plan": PLAN,
        "device": "cpu",
        **changes,
    }
    with pytest.raises(InputError, match=message):
        select(given.pop("network"), given.pop("train"), given.pop("meta"), **given)


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def test_what_the_other_tests_start_from_is_accepted():
    assert len(select(nn.Linear(3, 2), points(), points(6, 100), sparsity=0.2, chains=1, plan=PLAN))


def test_a_loss_that_does_not_return_one_value_per_example_is_refused():
    refused(
        r"loss must return one value per example, shape \(4,\).*got \(\): use .*'none'",
        loss=mean_loss,
    )
    refused(r"shape \(4,\) for a batch of 4, got \(4, 2\)", loss=lambda output, target: output)
    refused("got float", loss=lambda output, target: 1.0)


def test_a_loss_that_is_not_finite_is_refused():
    refused("is not finite", loss=lambda output, target: output[:, 0] * math.nan)


def test_a_frozen_network_is_refused():
    refused(
        "Linear has no parameter with requires_grad=True.*unfreeze",
        network=nn.Linear(3, 2).requires_grad_(False),
    )


@pytest.mark.parametrize("which", ["train", "meta"])
def test_an_empty_set_is_refused(which):
    empty = torch.utils.data.TensorDataset(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    refused(f"the {which} set must have at least one point, got 0: add", **{which: empty})


@pytest.mark.parametrize("which", ["train", "meta"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_input_that_is_not_finite_is_refused_with_its_index(which, value):
    inputs = torch.zeros(20, 3)
    inputs[13, 1] = value
    dataset = torch.utils.data.TensorDataset(inputs, torch.zeros(20, dtype=torch.int64))
    refused(f"{which} inputs must be finite, got NaN or infinity at index 13", **{which: dataset})


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_out_of_range_is_refused_with_its_index(label):
    target = torch.arange(20) % 2
    target[7] = label
    dataset = torch.utils.data.TensorDataset(torch.zeros(20, 3), target)
    refused(rf"train labels must be in 0\.\.1 .* got {label} at index 7", train=dataset)


def test_sets_that_share_points_are_refused():
    refused(r"must not share points, got 2 shared ids, the first \[18, 19\]", meta=points(6, 18))


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 5, math.nan])
def test_a_sparsity_outside_of_zero_to_one_is_refused(sparsity):
    refused(rf"sparsity must be in \(0, 1\), got {sparsity}", sparsity=sparsity)


def test_a_sparsity_of_less_than_one_point_is_refused_with_the_least_that_works():
    refused("sparsity 0.01 of 20 points is less than one point: use at least 0.05", sparsity=0.01)


@pytest.mark.parametrize(("which", "size"), [("train", 20), ("meta", 6)])
def test_a_batch_larger_than_its_set_is_refused(which, size):
    refused(
        f"{which}_batch must be from 1 to the size of the {which} set, {size}, got {size + 1}",
        **{f"{which}_batch": size + 1},
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused_with_those_that_are():
    refused("device 'cuda' is not there: this machine has cpu", device="cuda")
    refused("device must be auto, cpu, cuda or mps, got 'gpu'", device="gpu")


def test_a_network_that_is_refused_is_left_as_it_was():
    network = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    refused("sparsity", network=network, sparsity=7)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
