# SPDX-License-Identifier: Apache-2.0
"""Pre-activation ResNet-18 for small images, the network of the fast and the overfitting studies of
adversarial training.

He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016: batch norm and ReLU come before
each convolution, and once more before the pool.
"""

from torch import Tensor, nn


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice; a strided shortcut branches off after the first activation."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.relu = nn.ReLU()
        self.reshapes = stride != 1 or in_channels != channels
        self.shortcut = nn.Sequential()
        if self.reshapes:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels, H / stride, W / stride)."""
        out = self.relu(self.bn1(x))
        shortcut = self.shortcut(out) if self.reshapes else x
        out = self.conv2(self.relu(self.bn2(self.conv1(out))))
        return out + shortcut


class PreActResNet(nn.Module):
    """3x3 convolution, four stages of two blocks, BN-ReLU, global average pool, linear layer."""

    def __init__(self, num_classes: int, *, in_channels: int = 3, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(self.flatten(self.pool(self.relu(self.bn(x)))))


def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        PreActBlock(in_channels, channels, stride), PreActBlock(channels, channels, 1)
    )
