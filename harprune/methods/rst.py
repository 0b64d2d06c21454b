# SPDX-License-Identifier: Apache-2.0
"""Robust scratch tickets (Fu et al., NeurIPS 2021): robust subnetworks of random weights.

    min over s   max over delta   L(f(x + delta; W * M(s))),   W random and never trained

Edge-popup (Ramanujan et al., CVPR 2020) under an adversary: every weight of a layer is +c or -c,
c = sqrt(2 / fan_in), batch norm neither scales nor shifts, scores start at random. The ticket is
what the pruning stage leaves (finetune.epochs = 0); finetuning it is the paper's "inherited" form.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from harprune.methods.base import Budget, Scored, score_group
from harprune.sparsity.layers import Layer


@dataclass(eq=False)
class RST(Scored):
    """Scores alone are learned; the network's own weights are replaced by random ones."""

    @property
    def trains_scores(self) -> bool:
        return True

    def attach(self, model: nn.Module, budget: Budget) -> None:
        _randomise(model, budget.layers(model))
        super().attach(model, budget)

    def score(self, layer: Layer, magnitude: Tensor) -> Tensor:
        """Uniform in +-1 / sqrt(fan_in), as Kaiming's rule has it for a = sqrt(5)."""
        drawn = 2.0 * torch.rand(magnitude.shape) - 1.0
        return drawn.to(magnitude) / sqrt(layer.fan_in)

    def trainable(self, model: nn.Module) -> list[dict]:
        return [score_group(model, decay=True)]


@torch.no_grad()
def _randomise(model: nn.Module, layers: dict[str, Layer]) -> None:
    for layer in layers.values():
        signs = torch.randn(layer.shape).sign()
        layer.parameter.copy_(sqrt(2.0 / layer.fan_in) * signs)
        for module, _ in layer.places:
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias.zero_()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()  # scale 1, shift 0
