# SPDX-License-Identifier: Apache-2.0
"""Ascending positions near their entropy: Rice codes of the gaps between them.

A gap g is written with a parameter r as g >> r in unary and the low r bits as they are. Blocks of
gaps have parameters of their own, for some filters are sparser than others. Unary and low bits
stand in two streams, so that NumPy can read many gaps at once. With r = 0 the first stream is
simply a bitmap.
"""

from dataclasses import dataclass

import numpy as np

LARGEST_PARAMETER = 31
_FINEST = 32
"""Gaps in the smallest block that is tried."""
_PIECE = 1024
"""Bytes of quotients that are read at a time."""
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)
"""Bits that are set in each byte."""
_COARSER = 6
"""How many times the block is doubled before one block for all is tried."""


@dataclass(frozen=True, eq=False)
class Coded:
    """Positions in code; every stream is bytes, the lowest bit of a byte first.

    Attributes:
        block: gaps that share a parameter.
        parameters: one byte for each block.
        quotients: for each gap g >> r zeros and a one.
        remainders: the low r bits of each gap, lowest first.
    """

    block: int
    parameters: np.ndarray
    quotients: np.ndarray
    remainders: np.ndarray

    @property
    def bytes(self) -> int:
        return self.parameters.nbytes + self.quotients.nbytes + self.remainders.nbytes


def encode(positions: np.ndarray) -> Coded:
    """The code of `positions`, ascending int64 from 0, with the block that makes it smallest."""
    gaps = np.diff(positions, prepend=-1) - 1
    block, parameters = _cheapest(gaps)
    widths = _per_gap(parameters, block, len(gaps))
    return Coded(
        block, parameters.astype(np.uint8), _unary(gaps >> widths), _low_bits(gaps, widths)
    )


def decode(coded: Coded, count: int, size: int) -> np.ndarray:
    """The `count` positions below `size`, int64; `size` is at most 2**31.

    The streams are read piece by piece: memory beside the result does not grow with them.

    Raises:
        ValueError: the streams do not hold exactly that.
    """
    _check_lengths(coded, count)
    positions = np.empty(count, np.int64)
    known, bit, last_end, last = 0, 0, -1, -1
    for first in range(0, len(coded.quotients), _PIECE):
        piece = np.unpackbits(coded.quotients[first : first + _PIECE], bitorder="little")
        ends = np.flatnonzero(piece) + 8 * first
        if len(ends) == 0:
            continue
        quotients = np.diff(ends, prepend=last_end) - 1
        whose = np.arange(known, known + len(ends)) // coded.block
        widths = coded.parameters[whose].astype(np.int64)
        # Before they are shifted: what is too large could lose its high bits there.
        if (quotients > size >> widths).any():
            raise ValueError(f"a gap between positions exceeds {size}")
        gaps = (quotients << widths) + _from_low_bits(coded.remainders, bit, widths)
        found = positions[known : known + len(ends)]
        found[...] = last + np.cumsum(gaps + 1)
        known, bit = known + len(ends), bit + int(widths.sum())
        last_end, last = ends[-1], int(found[-1])
        if last >= size:
            raise ValueError(f"position {last} exceeds {size - 1}")
    rest = coded.remainders[bit // 8 :]
    if len(rest) != (bit % 8 > 0) or (rest >> bit % 8).any():
        raise ValueError(f"{len(coded.remainders)} bytes do not hold {bit} low bits of positions")
    return positions


def _check_lengths(coded: Coded, count: int) -> None:
    """Before anything is made of length `count`: the streams speak of so many gaps."""
    blocks = -(-count // coded.block)
    if len(coded.parameters) != blocks or count > 8 * len(coded.quotients):
        raise ValueError(f"{count} positions need other streams than there are")
    if coded.parameters.max(initial=0) > LARGEST_PARAMETER:
        raise ValueError(f"a parameter of positions exceeds {LARGEST_PARAMETER}")
    ends = int(_ONES[coded.quotients].sum(dtype=np.int64))
    if ends != count or not coded.quotients[-1:].all():
        raise ValueError(
            f"{len(coded.quotients)} bytes of quotients end {ends} gaps, not {count} in their last"
        )


def _cheapest(gaps: np.ndarray) -> tuple[int, np.ndarray]:
    """The block, and its parameters, that give the fewest bytes."""
    if len(gaps) == 0:
        return 1, np.zeros(0, np.int64)
    largest = min(int(gaps.max()).bit_length(), LARGEST_PARAMETER)
    starts = np.arange(0, len(gaps), _FINEST)
    lengths = np.diff(starts, append=len(gaps))
    costs = np.stack(
        [np.add.reduceat(gaps >> r, starts) + (1 + r) * lengths for r in range(largest + 1)]
    )
    choices = []
    for step in [2**n for n in range(_COARSER + 1) if 2**n < len(starts)] + [len(starts)]:
        joined = np.add.reduceat(costs, np.arange(0, len(starts), step), axis=1)
        bits = joined.min(axis=0).sum() + 8 * joined.shape[1]
        choices.append((bits, step * _FINEST, joined.argmin(axis=0)))
    _, block, parameters = min(choices, key=lambda choice: choice[0])
    return block, parameters


def _per_gap(parameters: np.ndarray, block: int, count: int) -> np.ndarray:
    """The parameter of each of `count` gaps, int64."""
    lengths = np.full(len(parameters), min(block, count), np.int64)
    if count:
        lengths[-1] = count - block * (len(parameters) - 1)
    return np.repeat(parameters.astype(np.int64), lengths)


def _unary(quotients: np.ndarray) -> np.ndarray:
    ends = np.cumsum(quotients + 1) - 1
    bits = np.zeros(ends[-1] + 1 if len(ends) else 0, np.uint8)
    bits[ends] = 1
    return np.packbits(bits, bitorder="little")


def _low_bits(gaps: np.ndarray, widths: np.ndarray) -> np.ndarray:
    starts = np.cumsum(widths) - widths
    bits = np.zeros(widths.sum(), np.uint8)
    for place in range(widths.max(initial=0)):
        wide = widths > place
        bits[starts[wide] + place] = gaps[wide] >> place & 1
    return np.packbits(bits, bitorder="little")


def _from_low_bits(stream: np.ndarray, first: int, widths: np.ndarray) -> np.ndarray:
    """The low `widths` bits of each gap, from bit `first` on; ValueError where the stream ends."""
    starts = np.cumsum(widths) - widths + first % 8
    widest = int(widths.max())
    end = first + int(widths.sum())
    if end > 8 * len(stream):
        raise ValueError(f"{len(stream)} bytes do not hold {end} low bits of positions")
    bits = np.unpackbits(stream[first // 8 : -(-end // 8)], bitorder="little")
    bits = np.concatenate([bits, np.zeros(widest, np.uint8)])
    numbers = np.zeros(len(widths), np.int64)
    for place in range(widest):
        numbers |= (bits[starts + place] & (widths > place)).astype(np.int64) << place
    return numbers
