# SPDX-License-Identifier: Apache-2.0
"""Entry point of the command line: errors become one line and an exit code, never a traceback."""

import errno
import signal
import sys
from typing import Any

import typer

from harprune.cli.app import app

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_INTERRUPTED, _TERMINATED = 130, 143
_Usage: Any = typer.BadParameter.__mro__[1]  # what every fault in a command line derives from


class _Terminated(BaseException):
    """SIGTERM, as an exception: whoever is at work cleans up, as after Ctrl-C."""


def main() -> None:
    """Entry point: a user's error is one line and exit code 2, never a traceback."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = guarded()
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code)


def _terminate(*_: object) -> None:
    raise _Terminated


def guarded() -> int:
    """The exit code of the command line; what went wrong is said in one line."""
    try:
        code = app(prog_name="harprune", standalone_mode=False) or 0
    except _Usage as error:
        command = error.ctx.command_path if error.ctx else "harprune"
        fault = error.format_message().replace("Value error, ", "").rstrip(".")
        return _fail(f"{fault}; see `{command} --help`", 2)
    except OSError as error:
        from harprune.files import Unwritten

        said = isinstance(error, Unwritten) or error.errno not in _FULL
        way = "" if said else "; make room and give the same command again"
        return _fail(f"{error}{way}", 2)
    except ValueError as error:
        return _fail(str(error), 2)
    except (MemoryError, RuntimeError) as error:
        if not _lacks_memory(error):
            raise
        way = (
            "choose a smaller network, or lower the batch_size of this stage; where it has begun, "
            "choose another --out"
        )
        return _fail(f"{error}; {way}", 2)
    except _Terminated:
        return _fail("ended by SIGTERM; give the same command again to go on", _TERMINATED)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        return _fail("interrupted; give the same command again to go on", code)
    return code


def _lacks_memory(error: Exception) -> bool:
    """Whether an accelerator's memory was too little, or main memory, for NumPy or for torch."""
    # Torch, which is not imported for this, has a class for the one and words alone for the other.
    cuda = type(error).__name__ == "OutOfMemoryError"
    return cuda or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _fail(text: str, code: int) -> int:
    print(f"harprune: {' '.join(text.split())}", file=sys.stderr)
    return code
