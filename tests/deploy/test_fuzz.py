# SPDX-License-Identifier: Apache-2.0
"""Files altered at random, with right checksums: refused in one line, or read as what they say.

What is read must be what the plain reader of docs/artifact.md reads, must run to the logits of a
plain twin in float64, and loading must cost memory in proportion to the file.
"""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from harprune.deploy import artifact
from harprune.deploy.artifact import Values, save
from harprune.deploy.network import Network
from harprune.deploy.runtime import Engine
from harprune.kernels.graph import Convolution, Graph, Shape, Window
from harprune.kernels.lists import Pattern
from tests.oracles import literal_artifact

from .files import put_together, taken_apart
from .networks import by_torch, drawn, in_blocks

ALLOWANCE = 2**20
"""Bytes that loading may take beside those in proportion to the file: Python's own objects."""
TIMES = 80
"""Times the file's size: a bit of the file may say a position, which is eight bytes."""
LARGEST_READ = 200_000
"""Weights of all layers, zeros included, up to which a plain reader reads them too."""
LARGEST_ARENA = 2**22
"""Bytes of all maps of a block up to which what was read is also run."""
LARGEST_NUMBER = 1e6
"""Above it float32 and float64 part ways."""


def altered(content: bytes, chance: random.Random) -> bytes:
    """A file like `content` with something wrong in it, mostly with right checksums."""
    header, payload = taken_apart(content)
    match chance.randrange(6):
        case 0:
            return _flipped(content, chance)
        case 1:
            return content[: chance.randrange(len(content))]
        case 2:
            return put_together(header, _flipped(payload, chance))
        case 3:
            cut = chance.randrange(len(payload) + 1)
            return put_together(header, payload[:cut] + payload[cut + chance.randrange(1, 9) :])
        case 4:
            return put_together(_with_hostile_number(header, chance), payload)
    text = _flipped(json.dumps(header).encode(), chance)
    try:
        return put_together(json.loads(text), payload)
    except ValueError:  # no JSON any more, or no UTF-8
        return content[:-1]


def _flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _with_hostile_number(header: dict, chance: random.Random) -> dict:
    """The header with one of its numbers replaced by a near, a large or an impossible one."""
    places = list(_numbers(header["nodes"])) + list(_numbers(header["input"]))
    holder, key = chance.choice(places)
    value = holder[key]
    holder[key] = chance.choice(
        [value + 1, value - 1, value * 2, value + 8, 0, 1, 2**16, 2**26, 2**31 - 1, 2**63, -(2**40)]
    )
    return header


def _numbers(part):
    items = part.items() if isinstance(part, dict) else enumerate(part)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from _numbers(value)
        elif type(value) is int:
            yield part, key


def check(content: bytes, path: Path) -> bool:
    """Whether the file was read; fails where it was read wrong, or cost too much."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        network = artifact.load(path)
    except ValueError as error:
        assert "\n" not in str(error)
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < ALLOWANCE + TIMES * len(content)
    if sum(p.size for p in network.patterns.values()) < LARGEST_READ:
        _, numbers = literal_artifact.read(content)
        for name, values in numbers.items():
            read = network.vectors[name] if "/" in name else network.weight(name).reshape(-1)
            assert np.array_equal(read, np.array(values, np.float32))
    if in_blocks(network).plan.arena_bytes < LARGEST_ARENA:
        _require_right(network)
    return True


def _require_right(network: Network) -> None:
    """The engine's logits are the plain twin's, as near as the sizes of the numbers let them be."""
    if network.output_shape[1:] != (1, 1):
        return
    images = np.random.default_rng(0).random((3, *network.input_shape), np.float32)
    with np.errstate(all="ignore"):
        found, expected = Engine(network)(images), by_torch(network, images)[:, :, 0, 0]
        # A flipped exponent makes sums of 1e30 in which the rest is lost.
        scale = max([1.0, *(np.abs(v).max(initial=0) for v in _all_numbers(network))])
    if scale < LARGEST_NUMBER:
        assert np.allclose(found, expected, rtol=1e-3, atol=1e-3 * scale)


def _all_numbers(network: Network):
    return (*network.values.values(), *network.vectors.values())


def mutate(files: list[bytes], count: int, path: Path) -> tuple[int, int]:
    """How many of `count` altered files were refused, and how many read."""
    chance, read = random.Random(0), 0
    for number in range(count):
        read += check(altered(files[number % len(files)], chance), path)
    return count - read, read


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[bytes]:
    """Artifacts of small networks of all kinds of node, in each of the three codings."""
    path, made = tmp_path_factory.mktemp("fuzz") / "a.hpn", []
    for seed in range(12):
        save(path, drawn(seed, nodes=6), values=list(Values)[seed % 3])
        made.append(path.read_bytes())
    return made


def test_files_as_they_were_written_pass(files, tmp_path):
    assert all(check(content, tmp_path / "a.hpn") for content in files)


def test_some_hundred_altered_files(files, tmp_path):
    refused, read = mutate(files, 300, tmp_path / "a.hpn")
    assert refused > 150 and read > 15


@pytest.mark.slow
def test_ten_thousand_altered_files(files, tmp_path):
    refused, read = mutate(files, 10_000, tmp_path / "a.hpn")
    assert refused > 5000 and read > 500


def test_loading_a_large_layer_costs_little_beside_what_it_holds(tmp_path):
    """A million weights of which a tenth is kept: their positions and values, and a third more."""
    random_numbers = np.random.default_rng(0)
    kept = np.flatnonzero(random_numbers.random(2**20) < 0.1)
    pattern = Pattern((1024, 1024, 1, 1), kept)
    graph = Graph([Shape(1024)] * 2, [Convolution((0,), 1, "layer", Window((1, 1)), 1, False)])
    graph.inputs, graph.outputs = [0], [1]
    values = random_numbers.standard_normal(len(kept)).astype(np.float32)
    path = tmp_path / "a.hpn"
    save(path, Network(graph, {"layer": pattern}, {"layer": values}, {}))
    tracemalloc.start()
    artifact.load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.34 * 12 * len(kept)
