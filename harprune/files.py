# SPDX-License-Identifier: Apache-2.0
"""Files written whole or not at all, JSON as any reader takes it and as records that are checked,
and archives of arrays."""

import errno
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP)


class Unwritten(OSError):
    """A file or folder that could not be made: its text names the way out, `reason` says why."""

    def __init__(self, path: Path, error: OSError, kept: str = ""):
        # Its own words would name a temporary file, as those of a file within this one do.
        self.reason = error.reason if isinstance(error, Unwritten) else error.strerror or str(error)
        way = (
            "allow writing there, or name another place"
            if error.errno in _FORBIDDEN + _NO_PLACE
            else "make room and give the same command again"
        )
        super().__init__(f"{path} could not be written ({self.reason}){kept}: {way}")
        self.errno = error.errno


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A context that yields a temporary path and moves it over `path` when the block succeeds.

    Where `path` is a link, the file that it names is replaced.

    Raises:
        OSError: the file cannot be written; what stood at `path` stands there still.
    """
    path = Path(path)
    place, temporary = Path(os.path.realpath(path)), None
    try:
        if place.exists() and not place.is_file():
            raise FileExistsError(errno.EEXIST, "what is there is no regular file")
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        temporary = Path(name)
        os.close(handle)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a run is for others to read
        os.replace(temporary, place)
    except OSError as error:
        raise Unwritten(path, error, "; what was there before is intact") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def make_folder(path: str | Path) -> None:
    """A folder with those above it, where it is not there yet; raises OSError with a way out."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unwritten(Path(path), error) from None


def require_writable(path: str | Path) -> None:
    """Say before the work, not after it, that `path` cannot become a file.

    Raises:
        ValueError: it is a folder, or nothing can be written where it would lie.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file; give the name of one")
    home = next(folder for folder in path.absolute().parents if folder.exists())
    if not (home.is_dir() and os.access(home, os.W_OK | os.X_OK)):
        raise ValueError(f"{path} cannot be written in {home}; name a file elsewhere")


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file atomically, text as UTF-8; its folder is made when absent."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name, atomically, as NumPy's .npz."""
    buffer = io.BytesIO()
    # Any, for one of the names is an option in NumPy's hints.
    np.savez(buffer, **cast(dict[str, Any], arrays))
    write(path, buffer.getvalue())


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name; nothing is unpickled.

    Raises:
        ValueError: it is damaged, or no archive of arrays.
        OSError: it cannot be read.
    """
    try:
        # From memory: numpy leaves a file open that is no archive.
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError:
        raise
    except Exception as error:  # a damaged archive makes zipfile and numpy raise almost anything
        raise ValueError(f"{path} is no archive of arrays ({error})") from None


def to_json(value: Any) -> str:
    """Indented JSON; a number that is not finite becomes null, for which JSON has no word."""
    return json.dumps(_finite(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parsed(kind: Any, text: str | bytes, where: str | Path, way: str) -> Any:
    """JSON `text` as a `kind`: a class whose fields pydantic checks, or a hint such as a dict's.

    Raises:
        ValueError: it is none; as `garbled`, by the first fault.
    """
    # Not here where networks only run.
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise garbled(where, f"{place}: {fault['msg']}" if place else fault["msg"], way) from None


def garbled(where: str | Path, reason: str, way: str) -> ValueError:
    """The error, in one line, that `where` is garbled, with the `way` out."""
    return ValueError(f"{where} is garbled ({' '.join(reason.split())}); {way}")
