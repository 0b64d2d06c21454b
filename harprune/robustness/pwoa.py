# SPDX-License-Identifier: Apache-2.0
"""PwoA (Jian et al., ICDM 2022): keep a robust network robust without adversarial examples.

On clean images alone, the dense robust network being the teacher:

    alpha T^2 KL(teacher_T || model_T)
        + sum over hidden layers Z_j of  lambda_x HSIC(X, Z_j) - lambda_y HSIC(Y, Z_j)

Softened by the temperature T the teacher's answers carry the distances to its decision boundaries;
the HSIC bottleneck (Wang et al. 2021) takes from the hidden layers what depends on the image but
not on the label. The paper prunes by ADMM at the same time; here the loss goes with any method.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harprune.robustness.attacks import record

_HIDDEN = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True, repr=False)
class PwoA:
    """Distillation and the HSIC bottleneck, on clean images.

    Args:
        teacher: images -> logits, in eval mode; it is not trained.
        temperature: T, by which both networks' logits are divided.
        alpha: weight of the distillation.
        lambda_x: weight of what hidden layers know of the image.
        lambda_y: weight of what they know of the label.
        sigma: width of the Gaussian kernels on X and Z_j, per square root of their dimensions.
    """

    teacher: nn.Module = field(repr=False)
    temperature: float = 30.0
    alpha: float = 10.0
    lambda_x: float = 2e-5
    lambda_y: float = 1e-4
    sigma: float = 5.0

    attack = None
    replays = 1
    passes = 1

    __repr__ = record

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(x)
        with hidden_layers(model) as hidden:
            logits = model(x)
        distance = F.kl_div(
            (logits / self.temperature).log_softmax(dim=1),
            (wanted / self.temperature).log_softmax(dim=1),
            reduction="batchmean",
            log_target=True,
        )
        loss = self.alpha * self.temperature**2 * distance
        of_x = gaussian_kernel(x, self.sigma)
        labels = F.one_hot(y, logits.shape[1]).to(logits.dtype)
        of_y = labels @ labels.t()  # linear kernel
        for z in hidden:
            of_z = gaussian_kernel(z, self.sigma)
            bottleneck = self.lambda_x * hsic(of_x, of_z) - self.lambda_y * hsic(of_y, of_z)
            if z.shape == logits.shape:  # no term of its own where these are the logits
                bottleneck = torch.where((z == logits).all(), 0.0, bottleneck)
            loss = loss + bottleneck
        return loss


@contextmanager
def hidden_layers(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that a forward pass inside fills: the outputs of convolutions and linear layers."""
    found: list[Tensor] = []
    hooks = [
        # A copy, for what follows may work in place.
        module.register_forward_hook(lambda module, inputs, out: found.append(out.clone()))
        for module in model.modules()
        if isinstance(module, _HIDDEN)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def gaussian_kernel(values: Tensor, sigma: float) -> Tensor:
    """exp(-|v - v'|^2 / (2 sigma^2 d)) between all pairs of a batch (m, ...), d numbers each."""
    flat = values.flatten(1)
    squares = flat.square().sum(dim=1)
    distances = (squares[:, None] + squares[None] - 2.0 * flat @ flat.t()).clamp_min(0.0)
    return torch.exp(-distances / (2.0 * sigma**2 * flat.shape[1]))


def hsic(first: Tensor, second: Tensor) -> Tensor:
    """tr(K H L H) / (m - 1)^2 of two kernel matrices (m, m), H = 1 - 1/m (Gretton et al. 2005)."""
    centred = first - first.mean(dim=0) - first.mean(dim=1, keepdim=True) + first.mean()
    return (centred * second).sum() / (len(first) - 1) ** 2
