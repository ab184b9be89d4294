"""Residual networks for 32x32 colour images (He et al., 2016, section 4.2)."""

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from bads_ppl.errors import InputError


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters: strided, new channels zero."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, 0, self.added))
        return functional.relu(y + shortcut)


class ResNet(nn.Module):
    """Images (B, 3, 32, 32) to logits (B, classes); ResNet32 has 464,154 parameters.

    Args:
        classes: number of classes.
        depth: layers with weights, 6 n + 2: 20, 32, 44, ...
        width: channels of the first stage; the two others have two and four times as many.
        stem_stride: of the first convolution; 2 halves the images' sides, for a quarter of the
            work.

    Raises:
        InputError: for another depth.
    """

    def __init__(
        self, classes: int = 10, *, depth: int = 32, width: int = 16, stem_stride: int = 1
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"depth must be 6 n + 2 (8, 14, 20, 26, 32, ...), got {depth}")
        stages: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                first = stage > 0 and block == 0
                outputs = width * 2**stage
                stages.append(Block(channels, outputs, stride=2 if first else 1))
                channels = outputs
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # He et al., 2015
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(self.stem(images)).mean((2, 3))
        logits: Tensor = self.head(x)
        return logits
