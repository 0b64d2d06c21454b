# SPDX-License-Identifier: Apache-2.0
"""A small convolutional network for experiments of minutes on one CPU."""

from torch import Tensor, nn

# (channels as multiples of the width, stride) of each convolution
BLOCKS = ((1, 1), (1, 2), (2, 1), (2, 2), (2, 1))


class SmallCNN(nn.Module):
    """Five conv-BN-ReLU blocks, two of them strided, global average pool, linear layer.

    Any image from 4 x 4 upwards; meant for 8 x 8 digits to 64 x 64 photographs. About 100,000
    prunable weights at the default width.
    """

    def __init__(self, num_classes: int, *, in_channels: int = 3, width: int = 32):
        super().__init__()
        self.blocks = nn.Sequential()
        for multiple, stride in BLOCKS:
            self.blocks.append(_block(in_channels, multiple * width, stride))
            in_channels = multiple * width
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        return self.linear(self.flatten(self.pool(self.blocks(x))))


def _block(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
