# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: functions from progress in [0, 1] to a multiplier."""

from collections.abc import Callable
from functools import partial
from math import cos, floor, pi

Schedule = Callable[[float], float]


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def cosine(progress: float) -> float:
    """From 1 down to 0 along half a cosine."""
    return 0.5 * (1.0 + cos(pi * progress))


def one_cycle(progress: float, *, peak: float = 0.3) -> float:
    """Linearly from 0 to 1 at `peak`, and linearly back to 0."""
    return progress / peak if progress < peak else (1.0 - progress) / (1.0 - peak)


def steps(progress: float, *, at: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> float:
    """Multiplied by `factor` at each progress in `at`."""
    return factor ** sum(progress >= point for point in at)


def offset_cosine(progress: float, *, epochs: int) -> float:
    """The cosine of HARP's released code: per epoch e, 0.5 (1 + cos(pi (e - 1) / epochs)).

    The "- 1" puts the peak on the second epoch and never reaches zero.
    """
    epoch = min(floor(progress * epochs + 1e-9), epochs - 1)
    return 0.5 * (1.0 + cos(pi * (epoch - 1) / epochs))


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "steps": steps,
}


def make_schedule(name: str, *, epochs: int, offset: bool = False) -> Schedule:
    """The schedule of that name in `SCHEDULES`; `offset` asks for the parity form of the cosine.

    Raises:
        ValueError: `offset` with anything but the cosine.
    """
    if not offset:
        return SCHEDULES[name]
    if name != "cosine":
        raise ValueError(f"parity.cosine_offset is a form of the cosine, not of {name!r}")
    return partial(offset_cosine, epochs=epochs)
