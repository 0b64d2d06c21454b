# SPDX-License-Identifier: Apache-2.0
"""VGG-16 with batch norm in the form HARP and HYDRA train on 32 x 32 images.

Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, shortened for small images:
thirteen 3x3 convolutions without bias, four max-pools instead of five, a 2x2 average pool, and a
three-layer classifier.
"""

from torch import Tensor, nn

# Channels as multiples of the width; "pool" halves the image.
STAGES = (1, 1, "pool", 2, 2, "pool", 4, 4, 4, "pool", 8, 8, 8, "pool", 8, 8, 8)
HIDDEN = 4


class VGG(nn.Module):
    """Convolutions, 2x2 average pool, three linear layers. Any image from 16 x 16 upwards.

    15,302,848 prunable weights for RGB images and 10 classes.
    """

    def __init__(self, num_classes: int, *, in_channels: int = 3, width: int = 64):
        super().__init__()
        self.features = _features(in_channels, width)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.flatten = nn.Flatten()
        hidden = HIDDEN * width
        self.classifier = nn.Sequential(
            nn.Linear(8 * width * 4, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K)."""
        return self.classifier(self.flatten(self.pool(self.features(x))))


def _features(in_channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for stage in STAGES:
        if stage == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        channels = int(stage) * width
        convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers)
