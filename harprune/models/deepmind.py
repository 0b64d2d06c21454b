# SPDX-License-Identifier: Apache-2.0
"""The networks of DeepMind's robust training, as which many of the most robust networks for CIFAR
are published, with their module names, so that the checkpoints load directly.

Gowal et al., "Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial
Examples", 2020; Wang et al., "Better Diffusion Models Further Improve Adversarial Training",
ICML 2023, train them too. SiLU (swish) is in place of ReLU, and before a convolution of stride 2
zeros stand below and on the right alone. Published checkpoints hold the constants of their input
normalisation, for which a model gets a mean and std here.
"""

from collections import OrderedDict

from torch import Tensor, nn

from harprune.models.wideresnet import STEM

# (left, right, top, bottom) of a 3x3 convolution, so that a side n becomes n / stride.
ZEROS = {1: (1, 1, 1, 1), 2: (0, 1, 0, 1)}


class WideBlock(nn.Module):
    """BN-SiLU-conv twice; a shortcut of its own weights starts after the first activation."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.pad = nn.ZeroPad2d(ZEROS[stride])
        self.conv_0 = nn.Conv2d(in_channels, channels, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(channels)
        self.conv_1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.silu = nn.SiLU()
        self.shortcut = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels, H / stride, W / stride)."""
        out = self.silu(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv_0(self.pad(out))
        return shortcut + self.conv_1(self.silu(self.batchnorm_1(out)))


class DeepMindWideResNet(nn.Module):
    """Stem, three stages of (depth - 4) / 6 blocks, BN-SiLU, global average pool, linear.

    `width` is the first stage's channels, the factor times the stem's.
    """

    def __init__(self, depth: int, num_classes: int, *, in_channels: int = 3, width: int):
        super().__init__()
        channels, blocks = (STEM, width, 2 * width, 4 * width), (depth - 4) // 6
        self.init_conv = nn.Conv2d(in_channels, STEM, 3, 1, 1, bias=False)
        self.layer = nn.Sequential(
            *(
                nn.Sequential(OrderedDict(block=_stage(WideBlock, before, after, blocks, stride)))
                for before, after, stride in zip(channels, channels[1:], (1, 2, 2))
            )
        )
        self.batchnorm = nn.BatchNorm2d(channels[-1])
        self.silu = nn.SiLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.logits = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K); H and W are multiples of 4."""
        x = self.silu(self.batchnorm(self.layer(self.init_conv(x))))
        return self.logits(self.flatten(self.pool(x)))


class PreActBlock(nn.Module):
    """BN-SiLU-conv twice; a 3x3 shortcut starts before both where the map changes its shape."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.pad = nn.ZeroPad2d(ZEROS[stride])
        self.conv_2d_1 = nn.Conv2d(in_channels, channels, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(channels)
        self.conv_2d_2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.silu = nn.SiLU()
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 3, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels, H / stride, W / stride)."""
        shortcut = x if self.shortcut is None else self.shortcut(self.pad(x))
        out = self.conv_2d_1(self.pad(self.silu(self.batchnorm_0(x))))
        return self.conv_2d_2(self.silu(self.batchnorm_1(out))) + shortcut


class DeepMindPreActResNet(nn.Module):
    """3x3 convolution, four stages of two blocks, BN-SiLU, global average pool, linear layer."""

    def __init__(self, num_classes: int, *, in_channels: int = 3, width: int = 64):
        super().__init__()
        self.conv_2d = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.layer_0 = _stage(PreActBlock, width, width, 2, 1)
        self.layer_1 = _stage(PreActBlock, width, 2 * width, 2, 2)
        self.layer_2 = _stage(PreActBlock, 2 * width, 4 * width, 2, 2)
        self.layer_3 = _stage(PreActBlock, 4 * width, 8 * width, 2, 2)
        self.batchnorm = nn.BatchNorm2d(8 * width)
        self.silu = nn.SiLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.logits = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K); H and W are multiples of 8."""
        x = self.layer_3(self.layer_2(self.layer_1(self.layer_0(self.conv_2d(x)))))
        return self.logits(self.flatten(self.pool(self.silu(self.batchnorm(x)))))


def _stage(
    block: type[WideBlock] | type[PreActBlock],
    in_channels: int,
    channels: int,
    blocks: int,
    stride: int,
) -> nn.Sequential:
    stage = nn.Sequential(block(in_channels, channels, stride))
    stage.extend(block(channels, channels, 1) for _ in range(blocks - 1))
    return stage
