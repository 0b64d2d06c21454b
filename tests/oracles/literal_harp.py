# SPDX-License-Identifier: Apache-2.0
"""HARP written down literally: layers that sort their scores at every forward, plain autograd.

It does the work of a straightforward release (twelve sorts and twelve passes a step, weight
gradients in every attack step), so it is both the oracle of the tests and the peer of
`bench/train_step.py`.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LiteralMask(torch.autograd.Function):
    """Sort |scores|, zero the first int((1 - a) n), one for the rest; straight-through."""

    @staticmethod
    def forward(ctx, magnitude: Tensor, density: Tensor) -> Tensor:
        order = magnitude.flatten().sort().indices
        removed = int((1.0 - density) * magnitude.numel())
        mask = torch.empty_like(magnitude).flatten()
        mask[order[:removed]] = 0.0
        mask[order[removed:]] = 1.0
        return mask.view_as(magnitude)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, gradient.sum()


class LiteralLayer(nn.Module):
    """A convolution or linear layer that carries its own scores and rate."""

    def __init__(self, layer: nn.Module, scores: Tensor, logit: Tensor, floor: float):
        super().__init__()
        self.layer = layer
        self.scores = nn.Parameter(scores.clone())
        self.logit = nn.Parameter(logit.clone())
        self.floor = floor

    def density(self) -> Tensor:
        return (1.0 - self.floor) * torch.sigmoid(self.logit) + self.floor

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight * LiteralMask.apply(self.scores.abs(), self.density())
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


def literal_network(model: nn.Module, scores: dict, logits: dict, floor: float) -> nn.Module:
    """A copy of the plain `model` whose convolutions and linear layers are `LiteralLayer`s."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parent, _, child = name.rpartition(".")
            key = f"{name}.weight"
            layer = LiteralLayer(module, scores[key], logits[key], floor)
            setattr(twin.get_submodule(parent), child, layer)
            layer.layer.weight.requires_grad_(True)
    return twin


def literal_layers(model: nn.Module) -> dict[str, LiteralLayer]:
    """Its literal layers, by the name of the weight in the plain model."""
    named = model.named_modules()
    return {f"{name}.weight": m for name, m in named if isinstance(m, LiteralLayer)}


def literal_penalty(model: nn.Module, target: float, gamma: float, epoch: int) -> Tensor:
    """(epoch + 1) gamma max(sum a_l n_l / (target sum n_l) - 1, 0)."""
    layers = literal_layers(model).values()
    kept = sum(layer.density() * layer.scores.numel() for layer in layers)
    total = sum(layer.scores.numel() for layer in layers)
    return (epoch + 1) * gamma * torch.clamp(kept / (target * total) - 1.0, min=0.0)


def literal_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step: float,
    steps: int,
    noise: Tensor,
) -> Tensor:
    """L-infinity PGD by `backward()`, in eval mode, weight gradients and all."""
    was_training = model.training
    model.eval()
    adversarial = (x + noise).clamp(0.0, 1.0)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_(True)
        loss = F.cross_entropy(model(adversarial), y)
        loss.backward()
        moved = adversarial + step * adversarial.grad.sign()
        adversarial = torch.min(torch.max(moved, x - epsilon), x + epsilon).clamp(0.0, 1.0)
    model.zero_grad()
    model.train(was_training)
    return adversarial.detach()


def literal_gamma(gamma: float, hardware_losses: list[float]) -> list[float]:
    """The weight of the penalty in each epoch, given the hardware loss at each epoch's end."""
    weights, frozen = [], None
    for epoch, loss in enumerate(hardware_losses):
        weight = (epoch + 1) * gamma if frozen is None else frozen
        weights.append(weight)
        if frozen is None and round(loss, 4) == 0:
            frozen = weight
    return weights
