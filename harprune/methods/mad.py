# SPDX-License-Identifier: Apache-2.0
"""Masking Adversarial Damage (Lee, Kim & Ro, CVPR 2022): prune what matters least under attack.

For each batch of adversarial images a soft mask in [0, 1] on every weight is fitted to lower the
loss; it takes away the part dw = w - w * mask of the weights that does the damage. What that part
costs is the quadratic form of the Hessian, block by block from K-FAC, H ~ A x G:

    saliency_ij = 1/2 G_ii dw_ij (dw A)_ij,    A = E[a a^T],  G_ii = E[g_i^2]

with a a layer's inputs and g the gradient at its outputs, both of the network under its soft mask,
averaged over the training images. The units of the lowest saliency go. The authors rank the
classifier row by row; here it is ranked with the other layers, whose floors keep it from being
emptied.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from math import expm1, log
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from harprune.methods.base import Budget, Ranked, Sample, differentiable
from harprune.sparsity.layers import Layer

_OPEN = log(expm1(1.0))  # softplus(_OPEN) = 1: the mask that changes nothing


@dataclass(eq=False)
class MAD(Ranked):
    """Adversarial saliency of a trained network; nothing is trained but the soft masks.

    Attributes:
        batches: batches over which the saliency is averaged; all training images by default.
        mask_steps: steps of Adam that fit the soft masks of a batch.
        mask_rate: their learning rate.
    """

    batches: int | None = None
    mask_steps: int = 20
    mask_rate: float = 0.1

    @property
    def sample(self) -> Sample:
        return Sample(self.batches, attacked=True, passes=self.mask_steps + 1)

    def __post_init__(self):
        _ = self.sample  # refuses a wrong number of batches
        if self.mask_steps < 1:
            raise ValueError(f"mask_steps = {self.mask_steps} must be at least 1")
        if not self.mask_rate > 0.0:
            raise ValueError(f"mask_rate {self.mask_rate:g} must be above 0")

    def check(self, model: nn.Module, budget: Budget) -> None:
        for name, layer in budget.layers(model).items():
            kinds = [isinstance(m, nn.Linear | nn.Conv2d) for m, _ in layer.places]
            if not all(kinds) or layer.groups > 1:
                raise ValueError(
                    f"mad has no K-FAC factors for {name}; exclude it: linear layers and 2-d "
                    "convolutions in one group have them"
                )

    def observe(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        layers = self._budget.layers(model)
        total = {n: torch.zeros_like(layer.parameter.detach()) for n, layer in layers.items()}
        with differentiable(layers):
            for x, y in batches:
                damage = self._damage(model, layers, x, y)
                for name, saliency in _saliencies(model, layers, damage, x, y):
                    total[name] += saliency
        grain = self._budget.granularity
        self._scores = {name: grain.total(layers[name], s) for name, s in total.items()}

    def _damage(
        self, model: nn.Module, layers: dict[str, Layer], x: Tensor, y: Tensor
    ) -> dict[str, Tensor]:
        """dw by layer, from soft masks that start at 1 and may only fall."""
        weights = {name: layer.parameter.detach() for name, layer in layers.items()}
        levels = {n: torch.full_like(w, _OPEN).requires_grad_() for n, w in weights.items()}
        adam = torch.optim.Adam(levels.values(), lr=self.mask_rate)
        for _ in range(self.mask_steps):
            masked = {name: w * F.softplus(levels[name]) for name, w in weights.items()}
            loss = F.cross_entropy(functional_call(model, masked, (x,)), y)
            slopes = torch.autograd.grad(loss, list(levels.values()), materialize_grads=True)
            for level, gradient in zip(levels.values(), slopes):
                level.grad = gradient
            adam.step()
            for level in levels.values():
                level.data.clamp_(max=_OPEN)
        return {n: (w - w * F.softplus(levels[n])).detach() for n, w in weights.items()}


def _saliencies(
    model: nn.Module, layers: dict[str, Layer], damage: dict[str, Tensor], x: Tensor, y: Tensor
) -> list[tuple[str, Tensor]]:
    """(layer, saliency in the shape of its weight) for each use of a layer in a forward pass."""
    uses: list[tuple[str, Any, Tensor, Tensor]] = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        # What follows may work in place, so it gets a copy.
        uses.append((name, module, inputs[0].detach().clone(), out))
        return out.clone()

    hooks = [
        module.register_forward_hook(partial(note, name))
        for name, layer in layers.items()
        for module, _ in layer.places
    ]
    try:
        left = {name: layer.parameter - damage[name] for name, layer in layers.items()}
        logits = functional_call(model, left, (x,))
        loss = F.cross_entropy(logits, y, reduction="sum")  # gradients image by image
    finally:
        for hook in hooks:
            hook.remove()
    slopes = torch.autograd.grad(loss, [out for *_, out in uses], materialize_grads=True)
    found = []
    for (name, module, a, _), g in zip(uses, slopes):
        dw = damage[name].flatten(1)
        inputs = _rows(module, a)
        curvature = _positions(module, g).square().mean(dim=(0, 2))  # G_ii, (outputs,)
        # dw A without A itself: the inputs' products with dw, once more times the inputs.
        through = torch.einsum("nti,oi->nto", inputs, dw)
        spread = torch.einsum("nto,nti->oi", through, inputs) / len(a)
        found.append((name, (0.5 * curvature[:, None] * dw * spread).view(damage[name].shape)))
    return found


def _rows(module: nn.Conv2d | nn.Linear, a: Tensor) -> Tensor:
    """(images, positions, inputs of one output): what the layer's weight is multiplied with."""
    if isinstance(module, nn.Linear):
        return a.reshape(len(a), -1, a.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    a = F.pad(a, module._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(a, module.kernel_size, module.dilation, 0, module.stride).transpose(1, 2)


def _positions(module: nn.Module, g: Tensor) -> Tensor:
    """(images, outputs, positions)."""
    if isinstance(module, nn.Linear):
        return g.reshape(len(g), -1, g.shape[-1]).transpose(1, 2)
    return g.flatten(2)
