# SPDX-License-Identifier: Apache-2.0
"""Threads that help with one image, or a few, while they are awake.

To wake a thread takes 0.1 to 0.3 ms, as long as a sparse network takes for an image. So helpers
stay awake for a moment, looking for more to do; they are only woken where one call follows soon on
another or is long; and nobody waits for one who is not awake yet. Threads whose processors share no
cache may be slower together than one is alone, so both are tried now and then.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from time import perf_counter

import numpy as np

from harprune.kernels.native import TEAM, Kernels

PATIENCE = 1e-3
"""Seconds for which a helper stays awake with nothing to do."""
PARTS = 2
"""Parts of a step for each thread: who comes late finds some left."""
LARGEST = 32
"""Threads of a team, at most."""
ROUND, TRIAL = 256, 6
"""Of so many calls the first few go the way that is not known to be faster."""


class Pace:
    """Which is faster for calls of one kind, alone or with helpers: learned from their times."""

    def __init__(self):
        self._calls = 0
        self._seconds: dict[bool, float] = {}

    def shared(self) -> bool:
        """Whether the next call is to have helpers."""
        better = len(self._seconds) == 2 and self._seconds[True] < self._seconds[False]
        self._calls += 1
        return better != (self._calls % ROUND < TRIAL)

    def took(self, shared: bool, seconds: float) -> None:
        """Note a call: fewer seconds count at once, more of them, which chance makes, slowly."""
        held = self._seconds.get(shared, seconds)
        share = 0.5 if seconds < held else 0.1
        self._seconds[shared] = held + share * (min(seconds, 2 * held) - held)


@contextmanager
def helped(kernels: Kernels, threads: int, long: bool, pace: Pace) -> Iterator[np.ndarray | None]:
    """A team of up to `threads`, the caller included, for `Kernels.run_rows`.

    None while another thread has the team, where it would come too late for a call not `long`, and
    where the caller is faster alone.
    """
    only = _only
    if not only.acquire(blocking=False):
        yield None
        return
    try:
        team = _team.called(kernels, threads, long) if pace.shared() else None
        begun = perf_counter()
        yield team
        if team is None or _team.awake:
            pace.took(team is not None, perf_counter() - begun)
    finally:
        _team.last = perf_counter()
        only.release()


class _Team:
    def __init__(self):
        self.last = 0.0
        self.awake = False  # all helpers, when they were called last
        self._state = np.zeros(1, TEAM)
        self._helpers: list[Future] = []
        self._pool = ThreadPoolExecutor(LARGEST, thread_name_prefix="harprune-team")

    def called(self, kernels: Kernels, threads: int, long: bool) -> np.ndarray | None:
        if not long and perf_counter() - self.last > PATIENCE:
            return None
        helpers = min(threads, LARGEST) - 1
        self._helpers = [helper for helper in self._helpers if not helper.done()]
        self.awake = len(self._helpers) >= helpers
        for _ in range(helpers - len(self._helpers)):
            self._helpers.append(self._pool.submit(kernels.help, self._state, PATIENCE))
        self._state["parts"] = PARTS * (helpers + 1)
        return self._state


def _anew() -> None:
    global _only, _team
    _only, _team = Lock(), _Team()


_anew()
if hasattr(os, "register_at_fork"):  # threads do not follow into a child
    os.register_at_fork(after_in_child=_anew)
