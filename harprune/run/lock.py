# SPDX-License-Identifier: Apache-2.0
"""A folder in one process's hands only."""

import fcntl
import os
import time
from pathlib import Path
from typing import TextIO

IN_USE = "is in use by process"
"""What the refusal of a folder says that another process works in."""
_ATTEMPTS, _MOMENT = 10, 0.02
"""How often a folder is tried, and seconds between, before it counts as in other hands."""


def lock(folder: Path) -> TextIO:
    """An existing folder for this process alone, until what is returned is closed.

    Raises:
        ValueError: another process works in it.
    """
    try:
        file = open(folder / ".lock", "a+")  # noqa: SIM115 - the open file *is* the lock
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to ({error.strerror}); allow it, or name another place"
        ) from None
    for _ in range(_ATTEMPTS):
        if _taken(file, fcntl.LOCK_EX):
            break
        time.sleep(_MOMENT)  # who only looks, as `in_use`, holds it no longer
    else:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ValueError(f"{folder} {IN_USE} {holder}; wait for it or choose another --out")
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def in_use(folder: Path) -> bool:
    """Whether a process works in a run folder."""
    path = folder / ".lock"
    if not path.exists():
        return False
    with open(path) as file:
        return not _taken(file, fcntl.LOCK_SH)


def _taken(file: TextIO, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
