import pytest
import torch
from torch import nn

from bads_ppl.checks import check_classes, check_labels, check_network
from bads_ppl.data import Data
from bads_ppl.errors import InputError
from bads_ppl.losses import cross_entropy


def points(labels, *, ids=None, name="train", scale=1.0) -> Data:
    labels = torch.as_tensor(labels)
    return Data(torch.full((len(labels), 2), scale), labels, ids, name=name)


def test_a_network_and_loss_that_fit_pass_and_are_left_as_they_were():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2))
    network[1].eval()  # a part that the user froze
    before = {name: value.clone() for name, value in network.state_dict().items()}
    noise = torch.get_rng_state()
    check_network(network, cross_entropy, points([0, 1, 1]), points([1], name="meta"))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training and network[2].training and not network[1].training
    assert torch.equal(torch.get_rng_state(), noise)


def test_a_network_that_changes_its_inputs_is_refused():
    network = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))
    with pytest.raises(InputError, match="Sequential changes its inputs in place"):
        check_network(network, cross_entropy, points([0, 1], scale=-1.0))


def test_a_frozen_network_is_refused():
    network = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(InputError, match="Linear has no parameter with requires_grad=True"):
        check_network(network, cross_entropy, points([0, 1]))


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda output, target: cross_entropy(output, target).mean(), r"got \(\)"),
        (lambda output, target: cross_entropy(output, target)[:, None], r"got \(3, 1\)"),
        (lambda output, target: 1.0, "got float"),
    ],
)
def test_a_loss_that_is_not_per_example_is_refused(loss, shape):
    with pytest.raises(InputError, match=r"shape \(3,\) for a batch of 3, " + shape):
        check_network(nn.Linear(2, 2), loss, points([0, 1, 1]))


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="loss of the first meta points is not finite"):
        check_network(
            nn.Linear(2, 2),
            lambda output, target: output.sum(1) / 0,
            points([0, 1], name="meta"),
        )


@pytest.mark.parametrize(
    ("network", "found"),
    [(nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)), r"\(2,\)"), (nn.LSTM(2, 2), "tuple")],
)
def test_outputs_that_are_no_logits_are_refused_for_cross_entropy(network, found):
    with pytest.raises(InputError, match=r"logits of shape \(B, classes\), got .*" + found):
        check_network(network, cross_entropy, points([0, 1]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2, 1], "train labels must be in 0..1 .* 2 classes, got 2 at index 11"),
        ([0, -1, 1], "got -1 at index 11"),
        ([0.0, 1.0, 1.0], "must be integers of shape .*float32 of shape"),
        ([[0], [1], [1]], r"integers of shape \(N,\), got torch.int64 of shape \(3, 1\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_their_index(labels, message):
    data = points(labels, ids=torch.tensor([10, 11, 12]))
    with pytest.raises(InputError, match=message):
        check_labels(data, 2)
    with pytest.raises(InputError, match=message):
        check_network(nn.Linear(2, 2), cross_entropy, data)


def test_labels_beyond_the_first_points_are_checked_too():
    with pytest.raises(InputError, match="got 7 at index 99"):
        check_network(nn.Linear(2, 2), cross_entropy, points([0] * 99 + [7]))


def test_a_meta_set_that_lacks_a_class_of_the_test_is_refused():
    check_classes(points([0, 1]), points([1, 0, 2], name="meta"))
    with pytest.raises(InputError, match=r"lacks classes \[1, 3\]"):
        check_classes(points([0, 1, 2, 3, 3]), points([0, 2], name="meta"))
