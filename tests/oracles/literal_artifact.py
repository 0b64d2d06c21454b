# SPDX-License-Identifier: Apache-2.0
"""A reader of docs/artifact.md and nothing else: plain Python, bit by bit, no checks but sums."""

import hashlib
import json
import struct


def read(content: bytes) -> tuple[dict, dict[str, list[float]]]:
    """The header, and the numbers of each layer by name: weights, zeros included, and vectors."""
    magic, version, h, p = struct.unpack_from("<8sIIQ", content)
    assert (magic, version) == (bytes.fromhex("89 48 50 4E 0D 0A 1A 0A"), 1)
    header, payload = content[88 : 88 + h], content[88 + h :]
    assert len(payload) == p
    assert hashlib.sha256(payload).digest() == content[24:56]
    assert hashlib.sha256(content[:56] + header).digest() == content[56:88]
    header = json.loads(header)
    numbers, shapes = {}, [header["input"]]
    for node in header["nodes"]:
        sources = [shapes[s] for s in node["from"]]
        for vector in {"bias", "scale", "shift"} & node.keys():
            at, size, *exponent = node[vector]
            stored = payload[at : at + size]
            if header["values"] == "float16":
                found = [v * 2.0 ** exponent[0] for v in _floats(stored, "e", 2)]
            else:
                found = _floats(stored, "f", 4)
            numbers[f"{node['name']}/{vector}"] = found
        if node["op"] == "convolution":
            channels = sources[0][0] // node.get("groups", 1)
            window = channels * node["size"][0] * node["size"][1]
            numbers[node["name"]] = _weights(header, node, window, payload)
        shapes.append(_shape(node, sources))
    return header, numbers


def _shape(node, sources) -> list[int]:
    channels, *sides = sources[0]
    if "size" in node:
        stride, padding = node.get("stride", [1, 1]), node.get("padding", [0, 0])
        dilation, extra = node.get("dilation", [1, 1]), node.get("extra", [0, 0])
        sides = [
            (n + 2 * p + e - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d, e in zip(sides, node["size"], stride, padding, dilation, extra)
        ]
    if node["op"] == "flatten":
        return [channels * sides[0] * sides[1], 1, 1]
    if node["op"] == "concatenation":
        return [sum(s[0] for s in sources), *sides]
    return [node.get("filters", channels), *sides]


def _weights(header, node, window, payload) -> list[float]:
    fields = node["weights"]

    def section(name):
        at, size = fields[name]
        return payload[at : at + size]

    code, width = {"float32": ("f", 4), "float16": ("e", 2), "int8": ("b", 1)}[header["values"]]
    stored = _floats(section("values"), code, width)
    steps = _floats(section("steps"), "f", 4) if "steps" in fields else None
    positions = range(len(stored)) if "block" not in fields else _positions(fields, section)
    full = [0.0] * (node["filters"] * window)
    for position, value in zip(positions, stored):
        scale = 2.0 ** fields.get("exponent", 0) if steps is None else steps[position // window]
        full[position] = value * scale
    return full


def _positions(fields, section) -> list[int]:
    quotients, remainders = _bits(section("quotients")), _bits(section("remainders"))
    found, position = [], -1
    for i in range(fields["kept"]):
        r = section("parameters")[i // fields["block"]]
        gap = 0
        while next(quotients) == 0:
            gap += 1 << r
        gap += sum(next(remainders) << place for place in range(r))
        position += gap + 1
        found.append(position)
    return found


def _bits(stream: bytes):
    return iter([byte >> place & 1 for byte in stream for place in range(8)])


def _floats(content: bytes, code: str, width: int) -> list[float]:
    return list(struct.unpack(f"<{len(content) // width}{code}", content))
