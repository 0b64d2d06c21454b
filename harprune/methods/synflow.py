# SPDX-License-Identifier: Apache-2.0
"""SynFlow (Tanaka, Kunin, Yamins & Ganguli, NeurIPS 2020): no data, and no layer collapses.

R = 1^T (prod |W_l|) 1 sums over all paths from pixel to logit. The score w dR/dw of eq. 3 is what
flows through a weight; it is conserved from layer to layer (theorem 1), so a layer with few weights
left scores high. Pruned in rounds, at density^(k / rounds) after round k, no layer is emptied.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harprune.methods.base import Ranked, Sample, differentiable, gradients
from harprune.sparsity.allocation import global_top
from harprune.sparsity.layers import Layer
from harprune.sparsity.selection import keep_top


@dataclass(eq=False)
class SynFlow(Ranked):
    """Synaptic flow, pruned iteratively.

    One image is asked for, and only its shape is used.

    Attributes:
        rounds: times the scores are computed anew.
    """

    rounds: int = 100

    @property
    def sample(self) -> Sample:
        return Sample(1, passes=0)  # each round is a pass of one image of ones

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"rounds = {self.rounds} must be at least 1; the paper's are 100")

    def observe(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        paths = _paths_of(model)
        layers = self._budget.layers(paths)
        for x, _ in batches:
            ones = torch.ones_like(x[:1], dtype=torch.float64)
        self._scores = self._flow(paths, layers, ones)
        for k in range(1, self.rounds):
            shares = global_top(self._scores, self._budget.density ** (k / self.rounds))
            for name, layer in layers.items():
                score = self._scores[name]
                kept = keep_top(score, round(shares[name] * score.numel()))
                layer.parameter.data.mul_(kept)
            self._scores = self._flow(paths, layers, ones)

    def _flow(self, paths: nn.Module, layers: dict[str, Layer], ones: Tensor) -> dict[str, Tensor]:
        with differentiable(layers):
            slopes = gradients(paths(ones).sum(), layers)
        grain = self._budget.granularity
        return {
            name: grain.total(layer, layer.parameter.detach() * slope)
            for (name, layer), slope in zip(layers.items(), slopes)
        }


@torch.no_grad()
def _paths_of(model: nn.Module) -> nn.Module:
    """A copy whose output on ones is R: |weights|, no shifts; in float64, for R is huge."""
    paths = copy.deepcopy(model).double().eval()
    for name, parameter in paths.named_parameters():
        parameter.zero_() if name.endswith("bias") else parameter.abs_()
    for name, buffer in paths.named_buffers():
        if name.endswith("mean"):  # of batch norm, and of the images
            buffer.zero_()
    return paths
