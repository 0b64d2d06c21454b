# SPDX-License-Identifier: Apache-2.0
"""The density of a layer: the fraction of its units that is kept, given or learned."""

from abc import ABC, abstractmethod
from math import log

import torch
from torch import Tensor, nn

_LARGEST = 0.99
LARGEST_LOGIT = log(_LARGEST / (1.0 - _LARGEST))
"""Where a learned density starts at most; far above it the gradient of the sigmoid vanishes."""


class Density(nn.Module, ABC):
    """A scalar in (0, 1]; call it for its value. Layers are tied by sharing one object."""

    @abstractmethod
    def forward(self) -> Tensor:
        """The density as a scalar tensor."""


class GivenDensity(Density):
    """A density that somebody chose."""

    value: Tensor

    def __init__(self, value: float):
        super().__init__()
        if not 0.0 < value <= 1.0:
            raise ValueError(f"density {value:g} must lie in (0, 1]")
        self.register_buffer("value", torch.tensor(float(value), dtype=torch.float64))

    def forward(self) -> Tensor:
        return self.value


class LearnedDensity(Density):
    """g(r) = (1 - floor) sigmoid(r) + floor, with r learned (HARP, its rate parametrisation).

    Initialised so that g(r) = `value`, but never above floor + 0.99 (1 - floor), where the
    gradient of the sigmoid would vanish.

    Raises:
        ValueError: floor outside [0, 1), or value outside (floor, 1].
    """

    def __init__(self, value: float, floor: float):
        super().__init__()
        if not 0.0 <= floor < 1.0:
            raise ValueError(f"density floor {floor:g} must lie in [0, 1)")
        if not floor < value <= 1.0:
            raise ValueError(
                f"density {value:g} must lie above its floor {floor:g} and not above 1; "
                "lower the floor or raise the start density"
            )
        level = min((value - floor) / (1.0 - floor), _LARGEST)
        self.floor = floor
        self.logit = nn.Parameter(torch.tensor(log(level / (1.0 - level))))

    def forward(self) -> Tensor:
        return (1.0 - self.floor) * torch.sigmoid(self.logit) + self.floor

    def extra_repr(self) -> str:
        return f"floor={self.floor:g}"
