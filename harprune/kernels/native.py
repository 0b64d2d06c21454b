# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels as Python sees them: one shared library, called through its C interface.

`best()` gives the fastest kernels this processor runs, `named(name)` those of one instruction set.
Both give None where the library was not built: `pip install` goes on without a C compiler.
"""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

_PLACE = [("at", "i8"), ("plane", "i8"), ("row", "i8"), ("column", "i8")]
_LIST = [("starts", "u8"), ("offsets", "u8"), ("values", "u8")]
_LIST += [("width", "i8"), ("reaches", "i8")]
STEP = np.dtype(
    [("kind", "i8")]
    + [(name, _PLACE) for name in ("in", "second", "out", "other")]
    + [(name, "i8") for name in ("has_other", "channels", "height", "width")]
    + [(name, "i8") for name in ("rectify", "signs_out", "signs_in")]
    + [(name, "i8") for name in ("signs_plane", "signs_row", "signs_column")]
    + [("list", _LIST)]
    + [(name, "u8") for name in ("scale", "shift", "slope")]
    + [(name, "i8") for name in ("external", "band", "in_height", "in_width")]
    + [(name, "i8") for name in ("size_y", "size_x", "stride_y", "stride_x")]
    + [(name, "i8") for name in ("pad_y", "pad_x", "full_area", "index")]
)
"""`struct step` of blocks.h."""
GRADIENT = np.dtype(
    [("in", _PLACE), ("out", _PLACE), ("height", "i8"), ("width", "i8")]
    + [("starts", "u8"), ("offsets", "u8")]
    + [(name, "i8") for name in ("band", "per_group", "window")]
)
"""`struct gradient` of blocks.h."""
_ROWS = [(name, "i8") for name in ("at", "plane", "pitch", "image", "copies")]
ROW_STEP = np.dtype(
    [("kind", "i8")]
    + [(name, _ROWS) for name in ("in", "out", "other")]
    + [(name, "i8") for name in ("has_other", "rectify", "channels", "height", "width")]
    + [(name, "i8") for name in ("stored", "together", "lines", "vectors", "packed")]
    + [(name, "u8") for name in ("masks", "starts", "offsets", "values")]
    + [("list_width", "i8"), ("displacements", "u8")]
    + [(name, "i8") for name in ("displaced", "whole", "in_vectors")]
    + [("scale", "u8"), ("shift", "u8")]
    + [(name, "i8") for name in ("external", "in_height", "in_width")]
    + [(name, "i8") for name in ("size_y", "size_x", "stride_y", "stride_x")]
    + [(name, "i8") for name in ("pad_y", "pad_x", "full_area")]
    + [(name, "i8") for name in ("record", "record_bytes", "signs_out", "signs_in", "kept")]
)
"""`struct row_step` of rows.h."""
DISPLACEMENT = np.dtype([(name, "i8") for name in ("vectors", "lanes", "mask")])
"""`struct displacement` of rows.h."""
TEAM = np.dtype(
    [(name, "i8") for name in ("ticket", "done", "parts", "processor", "image", "images")]
    + [(name, "u8") for name in ("step", "arena", "external", "run")]
)
"""`struct team` of team.h."""

KINDS = [
    "pack",
    "unpack",
    "convolve",
    "scale",
    "moments",
    "combine",
    "max_pool",
    "max_pool_back",
    "mean_pool",
    "mean_pool_back",
    "swish",
    "relu6",
    "times_slopes",
]
ROW_KINDS = [
    "pack",
    "unpack",
    "convolve",
    "scale",
    "split",
    "flatten",
    "max_pool",
    "mean_pool",
    "join",
    "unflatten",
    "max_spread",
    "mean_spread",
    "swish",
    "relu6",
    "times_slopes",
]
ROW_STORES = ["plain", "split", "max_pool"]
"""How a convolution stores its sums: the kinds of the steps that it makes needless."""
KEPT, ALL, ALL_BF16 = 0, 1, 2
"""Which gradients to weights `Kernels.gradient` computes."""


class _Table(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("number_bytes", ctypes.c_int64),
        ("sign_bytes", ctypes.c_int64),
        ("lanes", ctypes.c_int64),
        ("tile", ctypes.c_int64),
        ("run", ctypes.c_void_p),
        ("kept_gradient", ctypes.c_void_p),
        ("full_gradient", ctypes.c_void_p),
        ("full_gradient_bf16", ctypes.c_void_p),
        ("run_rows", ctypes.c_void_p),
    )


class Kernels:
    """One instruction set: its properties, and calls that run without Python's lock.

    Attributes:
        name: avx512_bf16, avx512, avx2, neon, plain or float64.
        dtype: of every number, float32, or float64 for the last.
        sign_bytes: bytes that keep the signs of one position of a block.
        lanes: numbers of a vector, and images of a block.
        tile: vectors of sums that a tile holds, at most.
        has_bf16: whether gradients to all weights can be computed with bf16 products.
    """

    def __init__(self, library: ctypes.CDLL, table: int):
        entry = _Table.from_address(table)
        self._library, self._table = library, ctypes.c_void_p(table)
        self.name = entry.name.decode()
        self.dtype = np.dtype(np.float32 if entry.number_bytes == 4 else np.float64)
        self.sign_bytes = entry.sign_bytes
        self.lanes, self.tile = entry.lanes, entry.tile
        self.has_bf16 = entry.full_gradient_bf16 is not None

    def run(self, steps: np.ndarray, arena: int, kept: int, external: np.ndarray, images: int):
        """Run `steps` on one block; `external` holds the addresses of the caller's arrays."""
        self._library.harprune_run(
            self._table, _address(steps), len(steps), arena, kept, _address(external), images
        )

    def run_rows(
        self,
        steps: np.ndarray,
        arena: int,
        external: np.ndarray,
        images: int,
        team: np.ndarray | None = None,
    ) -> None:
        """Run row steps, alone or with those who `help` the same `team`, a TEAM."""
        self._library.harprune_run_rows(
            self._table,
            _address(steps),
            len(steps),
            arena,
            _address(external),
            images,
            None if team is None else _address(team),
        )

    def help(self, team: np.ndarray, patience: float) -> None:
        """Take parts of what others run with `team`, until there was nothing for `patience` s."""
        self._library.harprune_help(_address(team), int(patience * 1e9))

    def gradient(
        self,
        which: int,
        task: np.ndarray,
        arena: int,
        arena_stride: int,
        blocks: int,
        filters: range,
        result: np.ndarray,
    ) -> None:
        """The gradient to the weights of `filters`, summed over blocks, into `result`."""
        self._library.harprune_gradient(
            self._table,
            which,
            _address(task),
            arena,
            arena_stride,
            blocks,
            filters.start,
            filters.stop,
            _address(result),
        )


def best() -> Kernels | None:
    """The fastest single-precision kernels of this processor, or None where none were built."""
    return named("")


@cache
def named(name: str) -> Kernels | None:
    """The kernels of one instruction set, or None where they were not built or cannot run."""
    library = _library()
    if library is None:
        return None
    table = library.harprune_kernels(name.encode())
    return Kernels(library, table) if table else None


@cache
def _library() -> ctypes.CDLL | None:
    # No Python in it, so the newest serves every version that this folder was installed for.
    builds = Path(__file__).parent.glob("_blocks*.so")
    newest = max(builds, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return None
    library = ctypes.CDLL(str(newest))
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    library.harprune_kernels.argtypes = (ctypes.c_char_p,)
    library.harprune_kernels.restype = pointer
    library.harprune_run.argtypes = (pointer, pointer, integer, pointer, pointer, pointer, integer)
    library.harprune_run.restype = None
    library.harprune_gradient.argtypes = (
        (pointer, integer, pointer, pointer) + (integer,) * 4 + (pointer,)
    )
    library.harprune_gradient.restype = None
    library.harprune_run_rows.argtypes = (pointer, pointer, integer, pointer, pointer, integer)
    library.harprune_run_rows.argtypes += (pointer,)
    library.harprune_run_rows.restype = None
    library.harprune_help.argtypes = (pointer, integer)
    library.harprune_help.restype = None
    structs = (("step", STEP), ("gradient", GRADIENT), ("row_step", ROW_STEP), ("team", TEAM))
    for call, dtype in structs:
        function = getattr(library, f"harprune_{call}_bytes")
        function.restype = integer
        if function() != dtype.itemsize:
            raise ValueError(
                f"{newest} was built from other sources than these; build it again: pip install "
                "--no-deps -e . where they lie"
            )
    return library


def _address(array: np.ndarray) -> int:
    return array.ctypes.data
