# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning: rank once, without training; the floor under every claim.

Magnitude under a given allocation (global, LAMP, ERK, ... as of the budget), or random.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from harprune.methods.base import Scored
from harprune.sparsity.layers import Layer


@dataclass(eq=False)
class Magnitude(Scored):
    """Keep the largest weights of each layer."""

    def score(self, layer: Layer, magnitude: Tensor) -> Tensor:
        return magnitude


@dataclass(eq=False)
class Random(Scored):
    """Keep weights drawn at random, from torch's global generator."""

    def score(self, layer: Layer, magnitude: Tensor) -> Tensor:
        return torch.rand(magnitude.shape).to(magnitude)
