"""LeNet5: its shape and size, and that its embedding and all its parameters are within reach."""

from __future__ import annotations

import pytest
import torch

from bads_ppl.program import capture_features, last_linear
from models.lenet5 import LeNet5


@pytest.mark.parametrize("classes", [2, 10])
def test_lenet5_maps_images_to_logits(classes):
    assert LeNet5(classes)(torch.zeros(3, 1, 28, 28)).shape == (3, classes)


def test_lenet5_has_the_parameters_of_the_original():
    assert sum(p.numel() for p in LeNet5(10).parameters()) == 61_706


def test_every_parameter_gets_a_gradient():
    network = LeNet5(2)
    network(torch.randn(8, 1, 28, 28)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


def test_its_embedding_is_the_input_of_the_head():
    network = LeNet5(2)
    images = torch.randn(4, 1, 28, 28)
    assert last_linear(network) is network.head
    with capture_features(network) as kept:
        logits = network(images)
    assert kept[0].shape == (4, 84) and not kept[0].requires_grad
    assert torch.equal(network.head(kept[0]), logits)


def test_points_of_a_batch_do_not_mix():
    network, images = LeNet5(3).eval(), torch.randn(6, 1, 28, 28)
    apart = torch.cat([network(image[None]) for image in images])
    assert torch.allclose(network(images), apart, atol=1e-5)
