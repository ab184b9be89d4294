"""Random views of images, made on the device for a whole minibatch at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

PADDING = 4


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels and, half of the time, mirrored (He et al., 2016).

    Args:
        images: (B, C, H, W). What comes in from outside is 0, the mean colour where images are
            normalised.
        generator: source of randomness, on the images' device.

    Returns:
        (B, C, H, W), laid out in memory with the channels last.
    """
    count, _, height, width = images.shape
    device = images.device
    padded = functional.pad(images, [PADDING] * 4).permute(0, 2, 3, 1)
    shift = torch.randint(2 * PADDING + 1, (2, count, 1), generator=generator, device=device)
    mirrored = torch.randint(2, (count, 1), generator=generator, device=device).bool()
    right = torch.arange(width, device=device)
    rows = torch.arange(height, device=device) + shift[0]  # (B, H)
    columns = torch.where(mirrored, right.flip(0), right) + shift[1]  # (B, W)
    image = torch.arange(count, device=device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
