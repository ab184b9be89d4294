"""Random views: what they are, who sees them, and that a restored chain draws the same ones."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import nn

from bads_ppl.data import Data
from bads_ppl.program import Parts, bind
from bads_ppl.sgld import SGLD
from bads_ppl.weights import InstanceWeights, WeightNetwork
from inference.augmentation import PADDING, crop_and_flip
from models.joint import joint


def images(count: int, side: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def crop_of(view: torch.Tensor, image: torch.Tensor) -> tuple[int, int, bool] | None:
    """Row and column of the crop that a view is, and whether it is mirrored; None if it is none."""
    side = image.shape[-1]
    padded = functional.pad(image, [PADDING] * 4)
    for row in range(2 * PADDING + 1):
        for column in range(2 * PADDING + 1):
            crop = padded[:, row : row + side, column : column + side]
            for mirrored in (False, True):
                if torch.equal(view, crop.flip(2) if mirrored else crop):
                    return row, column, mirrored
    return None


def test_every_view_is_a_crop_of_its_own_image_and_all_kinds_of_crop_occur():
    given = images(400)
    views = crop_and_flip(given, torch.Generator().manual_seed(1))
    found = [crop_of(view, image) for view, image in zip(views, given, strict=True)]
    crops = [crop for crop in found if crop is not None]
    assert len(crops) == len(given)
    assert {row for row, _, _ in crops} == {column for _, column, _ in crops} == set(range(9))
    assert 150 < sum(mirrored for _, _, mirrored in crops) < 250  # 5 sd of a fair coin


def test_views_come_from_the_generator_alone():
    first, again = (crop_and_flip(images(20), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, crop_and_flip(images(20), torch.Generator().manual_seed(4)))


class Seen(nn.Module):
    """Keeps the inputs that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(75, 2)
        self.inputs: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inputs.append(x)
        return self.head(x.flatten(1))


def data(count: int, augment=crop_and_flip) -> Data:
    return Data(images(count), torch.arange(count) % 2, augment=augment)


def kernel(seed: int = 0, weights=None) -> tuple[SGLD, Seen]:
    torch.manual_seed(0)
    network = Seen()
    parts = Parts(network, weights or InstanceWeights())
    made = SGLD(
        bind(joint, parts),
        step_size=1e-3,
        train_batch=6,
        meta_batch=4,
        generator=torch.Generator().manual_seed(seed),
    )
    return made, network


def test_steps_see_views_and_evaluations_see_the_points_as_they_are():
    made, network = kernel(weights=WeightNetwork(75, initial=0.5))
    train, meta = data(12), Data(images(4), torch.arange(4) % 2, name="meta", augment=crop_and_flip)
    made.setup(0, train, meta)
    made.step()
    network.inputs.clear()
    made.step()
    (seen,) = network.inputs
    known = [any(torch.equal(x, image) for image in train.input) for x in seen]
    assert len(seen) == 10
    assert sum(known) <= 2  # 1 in 162 views is the image itself
    network.inputs.clear()
    made.site_values()
    assert torch.equal(network.inputs[0][:12], train.input)


def test_a_restored_chain_draws_the_same_views():
    whole, network = kernel()
    whole.setup(0, data(12), data(4))
    for _ in range(3):
        whole.step()
    saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    for _ in range(3):
        whole.step()
    restored, other = kernel(seed=5)
    restored.setup(0, data(12), data(4))
    restored.load_state_dict(saved)
    for _ in range(3):
        restored.step()
    assert torch.equal(network.inputs[-1], other.inputs[-1])
    assert torch.equal(network.head.weight, other.head.weight)


def test_draws_from_views_are_called_approximate():
    made, _ = kernel()
    made.setup(0, data(12), data(4))
    assert made.evidence == "approximate"
    made, _ = kernel()
    made.setup(0, data(12, None), data(4, None))
    assert made.evidence == "calibrated"
