# SPDX-License-Identifier: Apache-2.0
"""The threat model: which perturbed images an attacker may show instead of the clean one.

Images lie in [0, 1] and `epsilon` is in that unit; the allowed set is a norm ball around the
clean image, cut by the box of valid pixels. Every function takes batches of any image shape.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """(N,) -> (N, 1, ..., 1), to multiply with a batch shaped as `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _length(noise: Tensor) -> Tensor:
    """Euclidean length per image, (N,)."""
    return torch.linalg.vector_norm(noise.flatten(1), dim=1)


def _require_radius(epsilon: float) -> None:
    if isinstance(epsilon, bool) or not isinstance(epsilon, Real):
        raise ValueError(f"epsilon = {epsilon!r} is not a number; give one such as 8 / 255")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon = {epsilon} must be finite and above 0; give one such as 8/255")


@dataclass(frozen=True)
class Linf:
    """Every pixel may change by at most `epsilon`, in (0, 1]. Raises ValueError outside it."""

    epsilon: float

    def __post_init__(self) -> None:
        _require_radius(self.epsilon)
        if self.epsilon > 1:
            raise ValueError(
                f"epsilon = {self.epsilon:g} exceeds 1, the whole pixel range; in the 0-255 unit "
                f"write {self.epsilon:g}/255"
            )

    def clip(self, noise: Tensor) -> Tensor:
        """The nearest perturbation inside the ball, whatever the image."""
        return noise.clamp(-self.epsilon, self.epsilon)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest image inside the ball around `x` and inside [0, 1]."""
        return torch.clamp(x_adv, x - self.epsilon, x + self.epsilon).clamp(0.0, 1.0)

    def random_start(self, x: Tensor) -> Tensor:
        """Uniform in the ball, then clipped to [0, 1]."""
        noise = torch.empty_like(x).uniform_(-self.epsilon, self.epsilon)
        return self.project(x + noise, x)

    def boundary_start(self, x: Tensor) -> Tensor:
        """On the ball's boundary in a random direction, then clipped to [0, 1]."""
        noise = 2 * torch.rand_like(x) - 1
        largest = noise.flatten(1).abs().amax(dim=1)
        return (x + self.epsilon * (noise / _per_image(largest + 1e-12, x))).clamp(0.0, 1.0)

    def ascent(self, gradient: Tensor) -> Tensor:
        """The unit step that raises the loss fastest: the gradient's sign."""
        return gradient.sign()

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Largest change of a pixel, per image, (N,)."""
        return (x_adv - x).flatten(1).abs().amax(dim=1)


@dataclass(frozen=True)
class L2:
    """The whole image may move by the Euclidean length `epsilon` > 0. Raises ValueError."""

    epsilon: float

    def __post_init__(self) -> None:
        _require_radius(self.epsilon)

    def clip(self, noise: Tensor) -> Tensor:
        """The nearest perturbation inside the ball, whatever the image."""
        length = _length(noise).clamp_min(torch.finfo(noise.dtype).tiny)
        return noise * _per_image((self.epsilon / length).clamp_max(1.0), noise)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Into the ball, then into [0, 1]; the second only shortens what the first left."""
        return (x + self.clip(x_adv - x)).clamp(0.0, 1.0)

    def random_start(self, x: Tensor) -> Tensor:
        """Uniform in the ball, then clipped to [0, 1]."""
        noise = self.ascent(torch.randn_like(x))
        radius = x.new_empty(len(x)).uniform_() ** (1 / max(x[0].numel(), 1) if len(x) else 1)
        return self.project(x + self.epsilon * _per_image(radius, x) * noise, x)

    def boundary_start(self, x: Tensor) -> Tensor:
        """On the ball's boundary in a random direction, then clipped to [0, 1]."""
        noise = torch.randn_like(x)
        return (x + self.epsilon * (noise / _per_image(_length(noise) + 1e-12, x))).clamp(0.0, 1.0)

    def ascent(self, gradient: Tensor) -> Tensor:
        """The unit step that raises the loss fastest: the gradient over its length, or zero."""
        tiny = torch.finfo(gradient.dtype).tiny
        # Confident models give gradients whose squares underflow: scale before squaring.
        largest = gradient.flatten(1).abs().amax(dim=1).clamp_min(tiny)
        scaled = gradient / _per_image(largest, gradient)
        return scaled / _per_image(_length(scaled).clamp_min(tiny), gradient)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Euclidean length of the perturbation, per image, (N,)."""
        return _length(x_adv - x)


Threat = Linf | L2


def require_threat(threat: Any) -> None:
    """Raises ValueError where what a caller gives as a threat is none."""
    if not isinstance(threat, Linf | L2):
        raise ValueError(f"threat = {threat!r} says no norm; give Linf(8 / 255) or L2(0.5)")


NORMS: dict[str, type[Linf] | type[L2]] = {"linf": Linf, "l2": L2}


def parse_epsilon(value: str | float) -> float:
    """A radius in the unit of [0, 1] images from "8/255", "0.031" or a number.

    Raises:
        ValueError: `value` is no number or fraction, or is not finite and above 0.
    """
    numbers = [value] if not isinstance(value, str) else value.split("/")
    try:
        numerator, denominator = (*map(float, numbers), 1.0)[:2]
        if len(numbers) > 2:
            raise ValueError
        epsilon = numerator / denominator
    except (ValueError, TypeError, ZeroDivisionError):
        raise ValueError(
            f"epsilon = {value!r} is not a number; write a fraction such as 8/255 or 0.031"
        ) from None
    _require_radius(epsilon)
    return epsilon


def make_threat(norm: str, epsilon: str | float) -> Threat:
    """The threat model of a norm's name in `NORMS` and a radius as `parse_epsilon` reads it.

    Raises:
        ValueError: the radius is wrong.
    """
    return NORMS[norm](parse_epsilon(epsilon))
