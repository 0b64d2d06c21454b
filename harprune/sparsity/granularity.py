# SPDX-License-Identifier: Apache-2.0
"""What is kept or dropped together: single weights, filters (outputs) or channels (inputs)."""

from enum import Enum
from math import prod

import torch
from torch import Tensor

from harprune.sparsity.layers import Layer


class Granularity(Enum):
    """The unit of pruning. A unit has one score; its mask is broadcast over its weights."""

    WEIGHT = "weight"
    FILTER = "filter"
    CHANNEL = "channel"

    def score_shape(self, layer: Layer) -> torch.Size:
        """Shape of the scores of `layer`, broadcastable to its weight.

        Raises:
            ValueError: channels of a grouped convolution, which groups do not share, or filters of
                a transposed one.
        """
        if self is Granularity.WEIGHT:
            return layer.shape
        if self is Granularity.CHANNEL and layer.groups > 1:
            raise ValueError(
                f"{layer.name}: a convolution in {layer.groups} groups has no common input "
                "channels to prune; exclude it or prune by filter"
            )
        if self is Granularity.FILTER and layer.groups > 1 and layer.output_axis:
            raise ValueError(
                f"{layer.name}: filters of a transposed convolution in {layer.groups} groups lie "
                "one upon another; exclude it or prune by weight"
            )
        axis = layer.output_axis if self is Granularity.FILTER else 1 - layer.output_axis
        return torch.Size(n if i == axis else 1 for i, n in enumerate(layer.shape))

    def units(self, layer: Layer) -> int:
        """How many units `layer` has."""
        return prod(self.score_shape(layer))

    def unit_size(self, layer: Layer) -> int:
        """Weights in one unit of `layer`."""
        return layer.size // self.units(layer)

    def magnitude(self, layer: Layer, weight: Tensor) -> Tensor:
        """The weight itself, or the L1 norm of each unit in `score_shape`."""
        return weight if self is Granularity.WEIGHT else self.total(layer, weight.abs())

    def total(self, layer: Layer, values: Tensor) -> Tensor:
        """`values`, shaped as the weight, summed over each unit: in `score_shape`."""
        shape = self.score_shape(layer)
        axes = [i for i, n in enumerate(shape) if n == 1]
        return values.sum(dim=axes, keepdim=True) if axes else values
