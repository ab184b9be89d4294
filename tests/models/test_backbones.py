"""Backbones: their shapes and sizes, and that embedding and all parameters are within reach."""

from __future__ import annotations

import pytest
import torch

from bads_ppl.errors import InputError
from bads_ppl.program import capture_features, embedding_layer
from models.lenet5 import LeNet5
from models.resnet import ResNet


@pytest.mark.parametrize("classes", [2, 10])
def test_lenet5_maps_images_to_logits(classes):
    assert LeNet5(classes)(torch.zeros(3, 1, 28, 28)).shape == (3, classes)


def test_lenet5_has_the_parameters_of_the_original():
    assert sum(p.numel() for p in LeNet5(10).parameters()) == 61_706


def test_a_narrower_lenet5_has_fewer_parameters_and_the_same_shapes():
    narrow = LeNet5(10, width=3)
    assert narrow(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert embedding_layer(narrow).in_features == 42
    assert sum(p.numel() for p in narrow.parameters()) < 61_706 / 3
    with pytest.raises(InputError, match="width must be at least 1 channel, got 0"):
        LeNet5(10, width=0)


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154)])
def test_resnets_have_the_parameters_of_the_paper(depth, count):
    """0.27 and 0.46 million in Table 6 of He et al. (2016)."""
    assert sum(p.numel() for p in ResNet(depth=depth).parameters()) == count


@pytest.mark.parametrize("depth", [2, 31])
def test_a_resnet_of_another_depth_is_refused(depth):
    with pytest.raises(InputError, match=f"depth must be .*, got {depth}"):
        ResNet(depth=depth)


def test_a_shortcut_carries_what_the_convolutions_do_not():
    network = ResNet(depth=8, width=4).eval()
    with torch.no_grad():
        for block in network.stages:
            block.second_norm.weight.zero_()
        x = network.stem(torch.randn(2, 3, 32, 32))
        y = network.stages(x)
    assert y.shape == (2, 16, 8, 8)
    assert torch.equal(y[:, :4], x[:, :, ::4, ::4]) and not y[:, 4:].any()


NETWORKS = [
    (lambda: LeNet5(2), (1, 28, 28), 84),
    (lambda: ResNet(2, depth=8, width=4), (3, 32, 32), 16),
]
every_network = pytest.mark.parametrize(
    ("make", "shape", "width"), NETWORKS, ids=["lenet5", "resnet"]
)


@every_network
def test_every_parameter_gets_a_gradient(make, shape, width):
    network = make()
    network(torch.randn(8, *shape)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


@every_network
def test_its_embedding_is_the_input_of_the_head(make, shape, width):
    network = make()
    images = torch.randn(4, *shape)
    assert embedding_layer(network) is network.head
    with capture_features(network) as kept:
        logits = network(images)
    assert kept[0].shape == (4, width) and not kept[0].requires_grad
    assert torch.equal(network.head(kept[0]), logits)


@every_network
def test_points_of_a_batch_do_not_mix(make, shape, width):
    network, images = make().eval(), torch.randn(6, *shape)
    apart = torch.cat([network(image[None]) for image in images])
    assert torch.allclose(network(images), apart, atol=1e-5)
