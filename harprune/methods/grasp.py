# SPDX-License-Identifier: Apache-2.0
"""GraSP (Wang, Zhang & Grosse, ICLR 2020): keep the weights that keep the gradient flowing.

To first order, removing weight q changes the squared gradient norm by S(-w_q) = -w_q (H g)_q (eq. 8
and algorithm 2). The paper removes the *highest* S, so the highest w_q (H g)_q stay, sign included:
weights that hinder the flow go first, however large they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harprune.methods.base import Ranked, Sample, differentiable, gradients


@dataclass(eq=False)
class GraSP(Ranked):
    """Gradient signal preservation at the weights as they are.

    Attributes:
        batches: batches over which g and H g are averaged.
        temperature: by which the logits are divided, so that the softmax is far from saturation.
        adversarial: score on attacked images.
    """

    batches: int = 1
    temperature: float = 200.0
    adversarial: bool = False

    @property
    def sample(self) -> Sample:
        return Sample(self.batches, attacked=self.adversarial, passes=3)  # g, and H g for two

    def __post_init__(self):
        _ = self.sample  # refuses a wrong number of batches
        if not self.temperature > 0.0:
            raise ValueError(
                f"temperature {self.temperature:g} must be above 0; the paper's is 200"
            )

    def observe(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        layers = self._budget.layers(model)
        weights = [layer.parameter for layer in layers.values()]
        seen = list(batches)

        def gradient(x: Tensor, y: Tensor, **options) -> tuple[Tensor, ...]:
            loss = F.cross_entropy(model(x) / self.temperature, y)
            return gradients(loss, layers, **options)

        scores = [torch.zeros_like(w) for w in weights]
        with differentiable(layers):
            mean = [sum(parts) / len(seen) for parts in zip(*(gradient(*batch) for batch in seen))]
            for batch in seen:
                # H g is the gradient of g . stop(g).
                ahead = gradient(*batch, create_graph=True)
                flow = sum(((a * b).sum() for a, b in zip(ahead, mean)), torch.zeros(()))
                for total, product, w in zip(scores, gradients(flow, layers), weights):
                    total += w.detach() * product
        grain = self._budget.granularity
        self._scores = {n: grain.total(layer, s) for (n, layer), s in zip(layers.items(), scores)}
