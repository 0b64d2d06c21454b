# SPDX-License-Identifier: Apache-2.0
"""Small robust networks that others publish, with their module names, so that their checkpoints
load directly.

- `trades_small_cnn`: the MNIST network of TRADES (Zhang et al., ICML 2019) and of its leaderboard,
  its SmallCNN.
- `resnet2b`: a residual network without batch norm for CIFAR-10, from the neural network
  verification competition.
- `cnn_a` (also known as `cifar_wide`) and `cifar_base`, half as wide: sequential CIFAR-10 networks
  of the verification literature.
"""

from collections import OrderedDict

from torch import Tensor, nn


class TradesSmallCNN(nn.Module):
    """Four unpadded 3x3 convolutions, two max-pools, three linear layers; for 28 x 28 images.

    312,202 parameters at 10 classes and one channel.
    """

    def __init__(self, num_classes: int, *, in_channels: int = 1, width: int = 32):
        super().__init__()
        self.feature_extractor = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, width, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(width, width, 3),
                relu2=nn.ReLU(),
                maxpool1=nn.MaxPool2d(2),
                conv3=nn.Conv2d(width, 2 * width, 3),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(2 * width, 2 * width, 3),
                relu4=nn.ReLU(),
                maxpool2=nn.MaxPool2d(2),
            )
        )
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(2 * width * 4 * 4, 200),
                relu1=nn.ReLU(),
                drop=nn.Dropout(0.5),
                fc2=nn.Linear(200, 200),
                relu2=nn.ReLU(),
                fc3=nn.Linear(200, num_classes),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 28, 28) -> logits (N, K)."""
        return self.classifier(self.flatten(self.feature_extractor(x)))


class PlainBlock(nn.Module):
    """A residual block of two 3x3 convolutions with bias and without batch norm."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(nn.Conv2d(in_channels, channels, 1, stride))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, channels, H / stride, W / stride)."""
        return self.relu(self.conv2(self.relu(self.conv1(x))) + self.shortcut(x))


class ResNet2B(nn.Module):
    """A strided convolution, two residual blocks, two linear layers; for 32 x 32 images.

    112,006 parameters at 10 classes.
    """

    def __init__(self, num_classes: int, *, in_channels: int = 3, width: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 2, 1)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(
            PlainBlock(width, 2 * width, 2), PlainBlock(2 * width, 2 * width, 1)
        )
        self.flatten = nn.Flatten()
        self.linear1 = nn.Linear(2 * width * 8 * 8, 100)
        self.linear2 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 32, 32) -> logits (N, K)."""
        x = self.flatten(self.layer1(self.relu(self.conv1(x))))
        return self.linear2(self.relu(self.linear1(x)))


def cnn_a(num_classes: int, *, in_channels: int = 3, width: int = 16) -> nn.Sequential:
    """CNN-A, 214,918 parameters at 10 classes (105,966 at width 8); for 32 x 32 images."""
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 8 * 8, 100),
        nn.ReLU(),
        nn.Linear(100, num_classes),
    )
