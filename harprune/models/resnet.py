# SPDX-License-Identifier: Apache-2.0
"""Residual networks: ResNet-18, -34 and -50, with a 3x3 stem for small images or the 7x7 stem of
ImageNet.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. The bottleneck strides in its
3x3 convolution, as torchvision's does. Modules carry the names common in the CIFAR literature
(`shortcut`, `linear`).
"""

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; `4 * channels` channels leave."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 4 channels, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.shortcut(x))


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The identity where the shape stays, else a 1x1 convolution and batch norm."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, global average pool, linear layer.

    `stem` is (kernel size, stride, whether a 3x3 max-pool of stride 2 follows), by default that for
    small images; `width` the first stage's channels.
    """

    def __init__(
        self,
        block: Block,
        depths: tuple[int, int, int, int],
        num_classes: int,
        *,
        stem: tuple[int, int, bool] = (3, 1, False),
        in_channels: int = 3,
        width: int = 64,
    ):
        super().__init__()
        kernel, stride, pooled = stem
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pooled else nn.Identity()
        grow = block.expansion
        self.layer1 = _stage(block, width, width, depths[0], 1)
        self.layer2 = _stage(block, grow * width, 2 * width, depths[1], 2)
        self.layer3 = _stage(block, grow * 2 * width, 4 * width, depths[2], 2)
        self.layer4 = _stage(block, grow * 4 * width, 8 * width, depths[3], 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(grow * 8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.flatten(self.pool(x)))


def _stage(block: Block, in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    blocks: list[nn.Module] = [block(in_channels, channels, stride)]
    blocks += [block(block.expansion * channels, channels, 1) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def imagenet_resnet(
    block: Block, depths: tuple[int, int, int, int], num_classes: int, **shape: int
) -> ResNet:
    """A `ResNet` with the stem of ImageNet, which starts as torchvision's networks do."""
    network = ResNet(block, depths, num_classes, stem=(7, 2, True), **shape)
    he_normal(network)
    return network


def he_normal(network: nn.Module) -> None:
    """He's normal initialisation of the convolutions."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
