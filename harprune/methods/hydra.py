# SPDX-License-Identifier: Apache-2.0
"""HYDRA (Sehwag et al., NeurIPS 2020): learn which connections stay, at given densities."""

from dataclasses import dataclass

from torch import Tensor, nn

from harprune.methods.base import (
    Scored,
    batch_norm_parameters,
    parameter_group,
    scaled_magnitude,
    score_group,
)
from harprune.sparsity import masks
from harprune.sparsity.layers import Layer


@dataclass(eq=False)
class HYDRA(Scored):
    """Straight-through scores under the robust loss; the allocation sets each layer's density.

    Attributes:
        train_batch_norm: also train scale and shift of batch norm (parity).
        decay_scores: weight decay on the scores (parity).
    """

    train_batch_norm: bool = False
    decay_scores: bool = False

    @property
    def trains_scores(self) -> bool:
        return True

    def score(self, layer: Layer, magnitude: Tensor) -> Tensor:
        return scaled_magnitude(layer, magnitude)

    def trainable(self, model: nn.Module) -> list[dict]:
        groups = [score_group(model, decay=self.decay_scores)]
        if self.train_batch_norm:
            groups.append(parameter_group(batch_norm_parameters(model), decay=True))
        return groups

    def metrics(self, model: nn.Module) -> dict:
        densities = masks.densities(model)
        return {"densities": {name: float(value) for name, value in densities.items()}}
