# SPDX-License-Identifier: Apache-2.0
"""The global random generators of torch, NumPy and Python, seeded together.

This package draws from torch's alone; a user's network or method may draw from any of them.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Make what is drawn from any of the three from now on a function of `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed([seed % 2**32, seed // 2**32 % 2**32])  # it takes words of 32 bits


@contextmanager
def python_generators_kept() -> Iterator[None]:
    """Whatever happens inside, Python's and NumPy's generators are outside as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of `seed` inside; outside, the generators are as if nothing had happened."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), python_generators_kept():
        seed_generators(seed)
        yield
