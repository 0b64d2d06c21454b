# SPDX-License-Identifier: Apache-2.0
"""Wide residual networks WRN-depth-factor for small images, as TRADES and RobustBench train them.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016: a 16-channel stem, then three
pre-activation stages of 16 x factor, 32 x factor and 64 x factor channels. No dropout.
"""

from torch import Tensor, nn

from harprune.models.resnet import he_normal

STEM = 16


class WideBlock(nn.Module):
    """BN-ReLU-conv twice; a shortcut of its own weights starts after the first activation."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels, H / stride, W / stride)."""
        out = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv2(self.relu2(self.bn2(self.conv1(out))))


class WideResNet(nn.Module):
    """Stem, three stages of (depth - 4) / 6 blocks, BN-ReLU, global average pool, linear.

    `width` is the first stage's channels, the factor times the stem's.
    """

    def __init__(self, depth: int, num_classes: int, *, in_channels: int = 3, width: int):
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, STEM, 3, 1, 1, bias=False)
        self.block1 = _stage(STEM, width, blocks, 1)
        self.block2 = _stage(width, 2 * width, blocks, 2)
        self.block3 = _stage(2 * width, 4 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(4 * width, num_classes)
        nn.init.zeros_(self.linear.bias)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.linear(self.flatten(self.pool(self.relu(self.bn1(x)))))


def _stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    stage = nn.Sequential(WideBlock(in_channels, channels, stride))
    stage.extend(WideBlock(channels, channels, 1) for _ in range(depth - 1))
    return stage
