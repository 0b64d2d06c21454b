# SPDX-License-Identifier: Apache-2.0
"""A network as one small file: a JSON header, then positions and values of the kept weights.

docs/artifact.md describes the format; nothing else need be known to read it. A file is data to be
doubted: its checksums say that it arrived whole, and every number in it is checked before use, so
that opening one from a stranger costs memory in proportion to its size and can do nothing else.
"""

import hashlib
import json
import mmap
import struct
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from harprune.deploy import rice
from harprune.deploy.header import Fields, parse
from harprune.deploy.network import LARGEST_EXTENT, LARGEST_LAYER, Network, made_shape, vector_names
from harprune.files import write
from harprune.kernels import graph as g
from harprune.kernels.graph import Graph, Node, Shape, Window
from harprune.kernels.lists import Pattern

MAGIC = b"\x89HPN\r\n\x1a\n"
VERSION = 1
LARGEST_HEADER = 2**22
ALIGNMENT = 8
_PREAMBLE = struct.Struct("<8sIIQ32s32s")
_UNSIGNED = 56
"""Bytes of the preamble before the header's checksum, which covers them too."""

_OPERATIONS: dict[str, type[Node]] = {
    "convolution": g.Convolution,
    "affine": g.Affine,
    "relu": g.Rectifier,
    "swish": g.Swish,
    "relu6": g.Rectifier6,
    "sum": g.Sum,
    "concatenation": g.Concatenation,
    "max_pool": g.MaxPool,
    "mean_pool": g.MeanPool,
    "flatten": g.Flatten,
}
_WINDOW = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "extra": (0, 0)}


class Values(Enum):
    """How the values of kept weights are stored; FLOAT16 also stores biases and the like so."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"

    @classmethod
    def _missing_(cls, value: object) -> "Values":
        short = {"fp32": cls.FLOAT32, "fp16": cls.FLOAT16}
        if str(value) not in short:
            known = ", ".join(values.value for values in cls)
            raise ValueError(f"values = {value!r} are unknown; choose one of {known}")
        return short[str(value)]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype({"float32": "<f4", "float16": "<f2", "int8": "i1"}[self.value])


def save(path: str | Path, network: Network, *, values: Values = Values.FLOAT32) -> None:
    """Write `network` to `path`: the old file or the new one, never half.

    FLOAT32 keeps every bit. FLOAT16 rounds weights and vectors to halves times a power of two for
    each of them, INT8 weights to whole multiples of a step for each filter; a weight that rounds to
    zero goes.
    """
    payload = _Payload()
    header = {
        "values": values.value,
        "input": list(network.input_shape),
        "nodes": [_node_as_json(node, network, values, payload) for node in network.graph.nodes],
        "output": network.graph.outputs[0],
        "classes": list(network.classes),
        "metadata": dict(network.metadata),
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-(_PREAMBLE.size + len(text)) % ALIGNMENT)
    if len(text) > LARGEST_HEADER:
        raise ValueError(f"a header of {len(text)} bytes exceeds {LARGEST_HEADER}; cut metadata")
    parse(text.decode())  # metadata that no reader would take
    body = payload.bytes()
    signed = _PREAMBLE.pack(
        MAGIC, VERSION, len(text), len(body), hashlib.sha256(body).digest(), bytes(32)
    )[:_UNSIGNED]
    write(path, signed + hashlib.sha256(signed + text).digest() + text + body)


def load(path: str | Path) -> Network:
    """Read a network back. It holds copies: what becomes of the file later does not matter.

    Raises:
        ValueError: no such file, not an artifact, of a newer version, truncated, altered, or made
            with intent to be wrong.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.read(1) else b""
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); give the path of a saved network"
        ) from None
    try:
        header, payload = _parts(memoryview(data))
        return _network(header, _Sections(payload))
    except RecursionError:
        raise ValueError(f"{path}: its header is nested too deep; get the file again") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; get the file again") from None


# Writing ------------------------------------------------------------------------------------


class _Payload:
    """Sections one after the other, each at the next multiple of `ALIGNMENT`."""

    def __init__(self):
        self._pieces: list[bytes] = []
        self._end = 0

    def add(self, array: np.ndarray) -> list[int]:
        """[offset, bytes] of the section that now holds `array`."""
        content, gap = array.tobytes(), -self._end % ALIGNMENT
        self._pieces += [bytes(gap), content]
        at = self._end + gap
        self._end = at + len(content)
        return [at, len(content)]

    def bytes(self) -> bytes:
        return b"".join(self._pieces)


def _node_as_json(node: Node, network: Network, values: Values, payload: _Payload) -> dict:
    name = next(n for n, kind in _OPERATIONS.items() if kind is type(node))
    fields: dict[str, Any] = {"op": name, "from": list(node.sources)}
    if isinstance(node, g.Convolution | g.Affine):
        fields["name"] = node.name
    window = getattr(node, "window", None)
    if window is not None:
        fields["size"] = list(window.size)
        for side, usual in _WINDOW.items():
            if getattr(window, side) != usual:
                fields[side] = list(getattr(window, side))
    if isinstance(node, g.MeanPool) and not node.full_area:
        fields["full_area"] = False
    if isinstance(node, g.MeanPool) and node.adaptive:
        fields["adaptive"] = True
    if isinstance(node, g.Convolution):
        fields["filters"] = network.patterns[node.name].filters
        if node.groups != 1:
            fields["groups"] = node.groups
        fields["weights"] = _weights_as_json(node.name, network, values, payload)
    for vector in vector_names(node):
        stored, *exponent = _vector_as_stored(network.vectors[vector], values)
        fields[vector.rpartition("/")[2]] = [*payload.add(stored), *exponent]
    return fields


def _vector_as_stored(vector: np.ndarray, values: Values) -> tuple:
    """The numbers to store, and for halves the exponent behind them."""
    if values is not Values.FLOAT16:
        return (vector.astype("<f4", copy=False),)
    exponent = _exponent(np.abs(vector))
    return _halves(vector, exponent), exponent


def _exponent(sizes: np.ndarray) -> int:
    """Of halves: the largest lies just within their range, the smallest as far as can be."""
    return int(np.frexp(sizes.max(initial=0))[1]) - 15


def _halves(numbers: np.ndarray, exponent: int) -> np.ndarray:
    return np.ldexp(numbers, -exponent).astype("<f2")


def _weights_as_json(name: str, network: Network, values: Values, payload: _Payload) -> dict:
    """Whichever is smaller: all weights, or the kept ones and their positions."""
    pattern = network.patterns[name]
    size = pattern.size
    index = np.arange(size) if pattern.index is None else pattern.index
    scaling = _Scaling.of(network.values[name], pattern, values)
    stored = scaling.rounded(network.values[name], pattern)
    restored = scaling.restored(stored, pattern)
    index, stored = index[restored != 0], stored[restored != 0]
    coded = rice.encode(index)
    fields: dict[str, Any] = {"kept": len(index)}
    if coded.bytes + stored.nbytes < size * stored.itemsize:
        fields["block"] = coded.block
        for part in ("parameters", "quotients", "remainders"):
            fields[part] = payload.add(getattr(coded, part))
    else:
        stored, kept = np.zeros(size, stored.dtype), stored
        stored[index] = kept
    if scaling.exponent is not None:
        fields["exponent"] = scaling.exponent
    if scaling.steps is not None:
        fields["steps"] = payload.add(scaling.steps)
    fields["values"] = payload.add(stored)
    return fields


@dataclass(frozen=True)
class _Scaling:
    """What stored values are multiplied by: 2 ** exponent, or the step of their filter."""

    exponent: int | None = None
    steps: np.ndarray | None = None

    @classmethod
    def of(cls, weights: np.ndarray, pattern: Pattern, values: Values) -> "_Scaling":
        sizes = np.abs(weights)
        if values is Values.FLOAT16:
            return cls(exponent=_exponent(sizes))
        if values is Values.INT8:
            largest = np.zeros(pattern.filters, np.float32)
            np.maximum.at(largest, pattern.filter_and_place[0], sizes)
            return cls(steps=(largest / np.float32(127)).astype("<f4"))
        return cls()

    def rounded(self, weights: np.ndarray, pattern: Pattern) -> np.ndarray:
        """The numbers to store."""
        if self.exponent is not None:
            return _halves(weights, self.exponent)
        if self.steps is not None:
            steps = _for_each_weight(self.steps, pattern).astype(np.float64)
            multiples = np.divide(weights, steps, out=np.zeros(len(steps)), where=steps > 0)
            return np.clip(np.rint(multiples), -127, 127).astype(np.int8)
        return weights.astype("<f4", copy=False)

    def restored(self, stored: np.ndarray, pattern: Pattern) -> np.ndarray:
        """The weights that stored numbers stand for, float32."""
        weights = stored.astype(np.float32, copy=False)
        if self.exponent is not None:
            return np.ldexp(weights, self.exponent)
        return weights if self.steps is None else weights * _for_each_weight(self.steps, pattern)


def _for_each_weight(of_filters: np.ndarray, pattern: Pattern) -> np.ndarray:
    return np.repeat(of_filters, np.diff(pattern.starts))


# Reading ------------------------------------------------------------------------------------


def recognised(path: str | Path) -> bool:
    """Whether there is a file that starts as a saved network does, whatever follows."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):  # no such file, or no name of one
        return False


def _parts(data: memoryview) -> tuple[dict, memoryview]:
    """Header and payload of a file, once both checksums are right."""
    if len(data) < _PREAMBLE.size or bytes(data[: len(MAGIC)]) != MAGIC:
        raise ValueError(f"{len(data)} bytes that do not start as a saved network does")
    _, version, header, payload, payload_sum, header_sum = _PREAMBLE.unpack(data[: _PREAMBLE.size])
    if version != VERSION:
        raise ValueError(f"format version {version}, not {VERSION}; upgrade harprune")
    start = _PREAMBLE.size + header
    if header > LARGEST_HEADER or start % ALIGNMENT or len(data) != start + payload:
        raise ValueError(
            f"it has {len(data)} bytes, and should have {start + payload}: it is cut off or altered"
        )
    text = bytes(data[_PREAMBLE.size : start])
    if hashlib.sha256(bytes(data[:_UNSIGNED]) + text).digest() != header_sum:
        raise ValueError("the header's checksum does not match")
    if hashlib.sha256(data[start:]).digest() != payload_sum:
        raise ValueError("the payload's checksum does not match")
    return parse(text.decode()), data[start:]


class _Sections:
    """The payload, taken section by section in the order of the file."""

    def __init__(self, payload: memoryview):
        self._payload = payload
        self._end = 0

    def take(self, place: tuple[int, int], dtype: np.dtype, what: str) -> np.ndarray:
        """A section as a read-only array over the file's own memory."""
        at, size = place
        gap = -self._end % ALIGNMENT
        if at != self._end + gap or size > len(self._payload) - at or size % dtype.itemsize:
            raise ValueError(f"the section of {what} at {at} with {size} bytes is out of place")
        if any(self._payload[self._end : at]):
            raise ValueError(f"bytes before the section of {what} are not zero")
        self._end = at + size
        return np.frombuffer(self._payload[at : self._end], dtype)

    def finish(self) -> None:
        if self._end != len(self._payload):
            raise ValueError(f"{len(self._payload) - self._end} bytes after its last section")


_EXPONENTS = (-170, 120)
"""Least and largest of halves."""


def _network(header: Any, sections: _Sections) -> Network:
    fields = Fields(header, "the header")
    values = fields.take("values", str)
    if values not in {v.value for v in Values}:
        raise ValueError(f"values of type {values[:20]!r} are unknown")
    graph = Graph([Shape(*fields.integers("input", 3, 1, LARGEST_LAYER))], [], [0])
    reader = _Reader(graph, Values(values), sections)
    for entry in fields.take("nodes", list):
        reader.read(Fields(entry, f"node {len(graph.nodes)}"))
    graph.outputs.append(fields.integer("output", 0, len(graph.nodes)))
    classes, metadata = fields.take("classes", list), fields.take("metadata", dict)
    fields.finish()
    sections.finish()
    return Network(graph, reader.patterns, reader.values, reader.vectors, tuple(classes), metadata)


class _Reader:
    """Nodes of a header, one after the other, and the sections that belong to them."""

    def __init__(self, graph: Graph, coding: Values, sections: _Sections):
        self.graph, self._coding, self._sections = graph, coding, sections
        self.patterns: dict[str, Pattern] = {}
        self.values: dict[str, np.ndarray] = {}
        self.vectors: dict[str, np.ndarray] = {}

    def read(self, fields: Fields) -> None:
        graph = self.graph
        kind = _OPERATIONS.get(fields.take("op", str))
        if kind is None:
            raise ValueError(f"{fields.what} is of an unknown kind")
        sources = fields.integers("from", None, 0, len(graph.nodes))
        own: dict[str, Any] = {}
        if kind in (g.Convolution, g.Affine):
            own["name"] = fields.take("name", str)
        if kind in (g.Convolution, g.MaxPool, g.MeanPool):
            own["window"] = _window(fields)
        if kind is g.MeanPool:
            own["full_area"] = fields.take("full_area", bool, True)
            own["adaptive"] = fields.take("adaptive", bool, False)
        filters = 0
        if kind is g.Convolution:
            own["groups"] = fields.integer("groups", 1, LARGEST_LAYER, 1)
            own["bias"] = "bias" in fields
            filters = fields.integer("filters", 1, LARGEST_LAYER)
        node = kind(sources, len(graph.shapes), **own)
        shape = made_shape(node, [graph.shapes[s] for s in sources], filters)
        if isinstance(node, g.Convolution):
            self._read_weights(node, filters, Fields(fields.take("weights", dict), fields.what))
        for vector in vector_names(node):
            if vector in self.vectors:
                raise ValueError(f"{fields.what} has the name of an earlier one")
            self.vectors[vector] = self._read_vector(fields, vector)
        fields.finish()
        graph.value(shape)
        graph.nodes.append(node)

    def _read_vector(self, fields: Fields, vector: str) -> np.ndarray:
        name = vector.rpartition("/")[2]
        if self._coding is not Values.FLOAT16:
            return _native(self._sections.take(fields.section(name), np.dtype("<f4"), vector))
        place, exponent = fields.section_of_halves(name, _EXPONENTS)
        stored = self._sections.take(place, np.dtype("<f2"), vector)
        with np.errstate(all="ignore"):  # as for weights
            return np.ldexp(stored.astype(np.float32), exponent)

    def _read_weights(self, node: g.Convolution, filters: int, fields: Fields) -> None:
        channels = self.graph.shapes[node.sources[0]].channels // node.groups
        pattern = Pattern((filters, channels, *node.window.size), None)
        size = pattern.size
        if size > LARGEST_LAYER or node.name in self.patterns:
            raise ValueError(f"{fields.what} has {size} weights, or the name of an earlier one")
        kept = fields.integer("kept", 0, size)
        index = self._read_index(fields, kept, size) if "block" in fields else None
        scaling = self._read_scaling(fields, filters)
        stored = self._sections.take(fields.section("values"), self._coding.dtype, node.name)
        fields.finish()
        if len(stored) != (size if index is None else kept):
            raise ValueError(f"{fields.what} has {len(stored)} values for {kept} kept weights")
        if index is None:
            # Not before it is known that the file holds as many values.
            index = np.flatnonzero(stored)
            stored = stored if len(index) == size else stored[index]
        if len(index) != kept:
            raise ValueError(f"{fields.what} keeps {len(index)} weights, not {kept}")
        pattern.index = index if kept < size else None
        # What is not finite is refused later, where all numbers are looked at.
        with np.errstate(all="ignore"):
            values = _native(scaling.restored(stored, pattern))
        self.patterns[node.name], self.values[node.name] = pattern, values

    def _read_index(self, fields: Fields, kept: int, size: int) -> np.ndarray:
        block = fields.integer("block", 1, LARGEST_LAYER)
        parts = [
            self._sections.take(fields.section(part), np.dtype("u1"), part)
            for part in ("parameters", "quotients", "remainders")
        ]
        return rice.decode(rice.Coded(block, *parts), kept, size)

    def _read_scaling(self, fields: Fields, filters: int) -> _Scaling:
        if self._coding is Values.FLOAT16:
            return _Scaling(exponent=fields.integer("exponent", *_EXPONENTS))
        if self._coding is Values.INT8:
            steps = self._sections.take(fields.section("steps"), np.dtype("<f4"), "steps")
            if len(steps) != filters or not (np.isfinite(steps) & (steps >= 0)).all():
                raise ValueError(f"{fields.what} must have {filters} steps that are not negative")
            return _Scaling(steps=steps)
        return _Scaling()


def _window(fields: Fields) -> Window:
    size = fields.pair("size", 1, LARGEST_EXTENT)
    least = dict.fromkeys(_WINDOW, 0) | {"extra": -LARGEST_EXTENT}
    rest = {n: fields.pair(n, least[n], LARGEST_EXTENT, list(d)) for n, d in _WINDOW.items()}
    return Window(size, **rest)


def _native(numbers: np.ndarray) -> np.ndarray:
    """In the byte order of this machine, and out of the file, which may change once checked."""
    return numbers.astype(np.float32)
