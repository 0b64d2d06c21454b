# SPDX-License-Identifier: Apache-2.0
"""Small networks and images for the tests of attacks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from harprune.robustness.autoattack import AutoAttack


def network(classes: int = 5, size: int = 6, *, width: int = 16) -> nn.Module:
    """A small convolutional network with batch norm and dropout, so that modes matter.

    Its logits are centred on noise images, so that these get every class and thin margins.
    """
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * size * size, width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(width, classes),
    )
    with torch.no_grad():
        model[-1].bias -= model.eval()(torch.rand(200, 3, size, size)).mean(0)
    return model.train()


@pytest.fixture
def make_network() -> Callable[..., nn.Module]:
    return network


@pytest.fixture
def model(seed: int) -> nn.Module:
    return network().eval()


@pytest.fixture
def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    """24 images that the model gets right, but for the first two."""
    x = torch.rand(24, 3, 6, 6)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:2] = (y[:2] + 1) % 5
    return x, y


@pytest.fixture
def brief(monkeypatch):
    """AutoAttack of few steps."""
    whole = AutoAttack._reference

    def shortened(self, *given):
        reference, extra = whole(self, *given)
        for part in (reference.apgd, reference.apgd_targeted, reference.fab):
            part.n_iter = 5
        reference.square.n_queries = 20
        return reference, extra

    monkeypatch.setattr(AutoAttack, "_reference", shortened)
