# SPDX-License-Identifier: Apache-2.0
"""A file gives back the network that was saved, is small, and does no harm when it is wrong."""

import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harprune.deploy import rice
from harprune.deploy.artifact import ALIGNMENT, MAGIC, Values, load, save
from harprune.kernels.graph import Shape, Window
from harprune.models import create_model
from tests.oracles import literal_artifact

from .files import PREAMBLE, put_together, signed, taken_apart
from .networks import Branching, Drawn, deployed, drawn, identical, in_blocks, logits, pruned

LARGEST_ARENA = 2**24
"""Bytes up to which an altered network is run: sound ones may ask for gigabytes of padding."""


@pytest.fixture(scope="module")
def resnet():
    """ResNet-18 at densities 0.1 and 0.01, by density."""
    return {d: deployed(pruned(create_model("resnet18", 10), d)) for d in (0.1, 0.01)}


@pytest.fixture
def small(tmp_path):
    """A small network and its file."""
    network = drawn(4, nodes=2)
    path = tmp_path / "network.hpn"
    save(path, network)
    return network, path


def test_positions_come_back_whatever_they_are():
    random.seed(0)
    for size in (1, 2, 31, 32, 33, 1000, 2**31 - 1):
        for count in {0, 1, min(size, 40), min(size, 3000)}:
            positions = np.array(sorted(random.sample(range(size), count)), np.int64)
            assert np.array_equal(rice.decode(rice.encode(positions), count, size), positions)


def test_a_dense_part_and_a_sparse_part_get_parameters_of_their_own():
    generator = np.random.default_rng(0)
    kept = np.concatenate([generator.random(20000) < 0.3, generator.random(2_000_000) < 0.003])
    coded = rice.encode(np.flatnonzero(kept))
    assert len(set(coded.parameters)) > 1
    entropy = _entropy(20000, kept[:20000].sum()) + _entropy(2_000_000, kept[20000:].sum())
    assert coded.bytes < 1.05 * entropy


@given(st.integers(0, 10**9))
@settings(max_examples=60)
def test_float32_comes_back_bit_for_bit(tmp_path_factory, seed):
    network, path = drawn(seed), tmp_path_factory.mktemp("files") / "a.hpn"
    save(path, network)
    assert identical(load(path), network)


@given(st.integers(0, 10**9), st.sampled_from([Values.FLOAT16, Values.INT8]))
@settings(max_examples=40)
def test_a_rounded_network_comes_back_as_rounded(tmp_path_factory, seed, values):
    network, path = drawn(seed), tmp_path_factory.mktemp("files") / "a.hpn"
    save(path, network, values=values)
    once = load(path)
    save(path, once, values=values)
    assert identical(load(path), once)
    for name in network.patterns:
        before, after = network.weight(name), once.weight(name)
        largest = np.abs(before).max(axis=(1, 2, 3), keepdims=True)
        near = 2**-11 * np.abs(before) if values is Values.FLOAT16 else largest / 127 / 1.99
        assert (np.abs(after - before) <= near).all()
    for name, before in network.vectors.items():
        near = 2**-11 * np.abs(before) if values is Values.FLOAT16 else 0.0
        assert (np.abs(once.vectors[name] - before) <= near).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_halves_hold_weights_of_any_size(tmp_path, scale):
    network = drawn(4)
    for numbers in (*network.values.values(), *network.vectors.values()):
        numbers[...] *= np.float32(scale)
    save(tmp_path / "a.hpn", network, values=Values.FLOAT16)
    back = load(tmp_path / "a.hpn")
    for name in network.values:
        assert np.allclose(back.weight(name), network.weight(name), rtol=2**-11, atol=0)
    for name, vector in network.vectors.items():
        assert np.allclose(back.vectors[name], vector, rtol=2**-11, atol=0)


def test_a_layer_without_weights_and_a_dense_layer(tmp_path):
    made = Drawn(0)
    made._sparse = lambda shape: np.zeros(shape, np.float32)
    value = made.convolution(0, 4, _window())
    made._sparse = lambda shape: np.ones(shape, np.float32)
    made.convolution(value, 3, _window())
    network = made.finished()
    for values in Values:
        save(tmp_path / "a.hpn", network, values=values)
        assert all(
            np.allclose(load(tmp_path / "a.hpn").weight(n), network.weight(n))
            for n in network.values
        )


def test_a_dense_layer_lies_in_the_file_as_it_is(tmp_path):
    network = deployed(Branching(), side=20)
    save(tmp_path / "a.hpn", network)
    content = (tmp_path / "a.hpn").read_bytes()
    assert all(network.weight(n).astype("<f4").tobytes() in content for n in network.values)


@pytest.mark.parametrize("values", [Values.FLOAT32, Values.FLOAT16])
@pytest.mark.parametrize("density", [0.1, 0.01])
def test_resnet18_is_near_its_entropy_and_fast_to_read(tmp_path, resnet, density, values):
    network, path = resnet[density], tmp_path / "resnet18.hpn"
    save(path, network, values=values)
    width = 2 if values is Values.FLOAT16 else 4
    bound = sum(width * v.size for v in network.vectors.values())
    for name, pattern in network.patterns.items():
        kept = len(network.values[name])
        bound += kept * values.dtype.itemsize + _entropy(pattern.size, kept)
    begin = time.process_time()
    load(path)
    seconds = time.process_time() - begin
    size = path.stat().st_size
    print(f"{density} {values.value}: {size} bytes, {size / bound:.4f} x entropy, {seconds:.3f} s")
    assert size < 1.05 * bound
    if values is Values.FLOAT16 and density == 0.01:
        dense = 4 * sum(p.numel() for p in create_model("resnet18", 10).parameters())
        assert 130 * size < dense
    assert seconds < 1.0


def test_halves_change_logits_little(tmp_path, resnet):
    network = resnet[0.01]
    save(tmp_path / "a.hpn", network, values=Values.FLOAT16)
    images = np.random.default_rng(0).random((16, 3, 32, 32), np.float32)
    expected, found = logits(network, images), logits(load(tmp_path / "a.hpn"), images)
    assert 0 < np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("seed", range(12))
def test_the_description_is_enough_to_read_a_file(tmp_path, seed):
    network, path = drawn(seed), tmp_path / "a.hpn"
    save(path, network, values=list(Values)[seed % 3])
    network = load(path)
    header, numbers = literal_artifact.read(path.read_bytes())
    assert header["classes"] == list(network.classes) and header["metadata"] == network.metadata
    assert set(numbers) == {*network.patterns, *network.vectors}
    for name in network.patterns:
        expected = np.array(numbers[name], np.float32)
        assert np.array_equal(network.weight(name).reshape(-1), expected)
    for name, vector in network.vectors.items():
        assert np.array_equal(vector, np.array(numbers[name], np.float32))


# Files that are wrong -----------------------------------------------------------------------


def test_every_flipped_byte_is_noticed(small):
    _, path = small
    content = path.read_bytes()
    for position in range(len(content)):
        altered = bytearray(content)
        altered[position] ^= 1 << position % 8
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"network\.hpn: "):
            load(path)


def test_every_truncation_is_noticed(small):
    _, path = small
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"network\.hpn: "):
            load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="cut off or altered"):
        load(path)


@pytest.mark.parametrize("values", Values)
def test_a_file_may_change_once_it_is_loaded(tmp_path, values):
    network, path = drawn(4), tmp_path / "a.hpn"
    save(path, network, values=values)
    loaded, images = (
        load(path),
        np.random.default_rng(0).random((2, *network.input_shape), np.float32),
    )
    before = logits(loaded, images)
    with path.open("r+b") as file:  # the same file, not another in its place
        file.write(bytes(path.stat().st_size))
        file.truncate(0)
    assert np.array_equal(logits(loaded, images), before)


def test_absent_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.hpn"):
        with pytest.raises(ValueError, match="cannot be read"):
            load(path)


def test_a_newer_version_says_so(small):
    _, path = small
    content = bytearray(path.read_bytes())
    content[len(MAGIC)] = 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match="upgrade harprune"):
        load(path)


@pytest.mark.parametrize("seed", range(3))
def test_a_payload_with_right_checksums_and_wrong_bytes_does_no_harm(tmp_path, seed):
    """Every byte in turn: a ValueError, or a network that runs."""
    network, path = drawn(seed, nodes=3), tmp_path / "a.hpn"
    values = list(Values)[seed % 3]
    save(path, network, values=values)
    header, payload = taken_apart(path.read_bytes())
    images = np.zeros((1, *network.input_shape), np.float32)
    read = 0
    for position in range(len(payload)):
        altered = bytearray(payload)
        altered[position] ^= 1 << position % 8
        path.write_bytes(put_together(header, bytes(altered)))
        read += _loads_or_refuses(path, images)
    assert read > 0


@pytest.mark.parametrize("seed", range(3))
def test_a_header_with_right_checksums_and_wrong_fields_does_no_harm(tmp_path, seed):
    """Each number, word, list and object of the header in turn is replaced, doubled or left out."""
    network, path = drawn(seed, nodes=3), tmp_path / "a.hpn"
    save(path, network, values=list(Values)[seed % 3])
    header, payload = taken_apart(path.read_bytes())
    images = np.zeros((1, *network.input_shape), np.float32)
    refused = 0
    for altered in _alterations(header):
        path.write_bytes(put_together(altered, payload))
        refused += not _loads_or_refuses(path, images)
    assert refused > 300


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"values":"float32","values":"float32"}',
        b'{"values":NaN}',
        b"\xff\xff",
        b"null",
        b'{"values":"float32","input":[3,8,8],"nodes":[{"op":"pickle"}]}',
        b'{"values":"float32","input":[67108864,67108864,1],"nodes":[],"output":0,"classes":[],'
        b'"metadata":{}}',
        b'{"values":"float32","input":[3,8,8],"nodes":[],"output":0,"classes":[],'
        b'"metadata":{"a":1e999}}',
        b'{"values":"float32","input":[3,8,8],"nodes":[],"output":' + b"9" * 5000 + b"}",
    ],
    ids=["deep", "twice", "nan", "no text", "null", "operation", "large", "infinite", "long"],
)
def test_headers_made_to_hurt_are_refused(tmp_path, text):
    text += b" " * (-(PREAMBLE + len(text)) % ALIGNMENT)
    (tmp_path / "a.hpn").write_bytes(signed(text, b""))
    with pytest.raises(ValueError, match=r"a\.hpn: ") as error:
        load(tmp_path / "a.hpn")
    assert "\n" not in str(error.value)


def test_sizes_that_double_from_node_to_node_are_refused_early(tmp_path):
    nodes = [{"op": "concatenation", "from": [n, n]} for n in range(20_000)]
    header = {"values": "float32", "input": [3, 8, 8], "nodes": nodes, "output": 0}
    (tmp_path / "a.hpn").write_bytes(put_together({**header, "classes": [], "metadata": {}}, b""))
    with pytest.raises(ValueError, match="exceeds"):
        load(tmp_path / "a.hpn")


def test_sections_must_follow_one_another(tmp_path):
    made = Drawn(0)
    made._sparse = lambda shape: np.ones(shape, np.float32)
    made.graph.shapes[0] = Shape(3, 1, 1)
    made.convolution(0, 3, Window((1, 1)))
    path = tmp_path / "a.hpn"
    save(path, made.finished())
    header, payload = taken_apart(path.read_bytes())
    first, second = (node["weights"]["values"] for node in header["nodes"])
    assert first == [0, 36] and second[0] == 40 + 8 * 2 * ("bias" in header["nodes"][0])
    path.write_bytes(put_together(header, payload[:36] + b"\1" + payload[37:]))
    with pytest.raises(ValueError, match="are not zero"):
        load(path)
    path.write_bytes(put_together(header, payload + bytes(8)))
    with pytest.raises(ValueError, match="8 bytes after its last section"):
        load(path)
    second[:] = first
    path.write_bytes(put_together(header, payload))
    with pytest.raises(ValueError, match="out of place"):
        load(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 4}, "end 5 gaps, not 4"),
        ({"count": 6}, "end 5 gaps, not 6"),
        ({"count": 10**9}, "other streams"),
        ({"size": 4}, "position 4 exceeds 3"),
        ({"parameters": [32]}, "parameter"),
        ({"parameters": [4, 4]}, "other streams"),
        ({"quotients": [0]}, "end 0 gaps, not 5"),
        ({"quotients": [0b11111, 0, 0]}, "end 5 gaps, not 5"),
        ({"remainders": [0] * 9}, "low bits"),
        ({"remainders": [0, 0, 0xF0]}, "low bits"),
    ],
)
def test_codes_of_other_positions_are_refused(change, message):
    good = {"quotients": [0b11111], "parameters": [4], "remainders": [0, 0, 0]}
    streams = {n: np.array(change.get(n, v), np.uint8) for n, v in good.items()}
    coded = rice.Coded(32, **streams)
    with pytest.raises(ValueError, match=message):
        rice.decode(coded, change.get("count", 5), change.get("size", 200))


def test_a_gap_whose_high_bits_would_be_lost_is_refused():
    """2**31 zeros before a one, shifted by 31, would be gone from 64 bits; a few are enough."""
    stream = np.packbits(np.r_[np.zeros(9, np.uint8), 1].astype(np.uint8), bitorder="little")
    coded = rice.Coded(1, np.array([31], np.uint8), stream, np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match="gap"):
        rice.decode(coded, 1, 2**31 - 1)


def _window():
    return Window((3, 3), padding=(1, 1))


def _entropy(size: int, kept: int) -> float:
    """Bytes that say which `kept` of `size` weights are kept, if all choices are alike."""
    choices = math.lgamma(size + 1) - math.lgamma(kept + 1) - math.lgamma(size - kept + 1)
    return choices / math.log(2) / 8


def _loads_or_refuses(path, images) -> bool:
    """Whether the file was read; anything but a network that runs or a ValueError is a fault."""
    try:
        network = load(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
        return False
    executable = in_blocks(network)
    if network.input_shape == images.shape[1:] and executable.plan.arena_bytes < LARGEST_ARENA:
        executable.forward([images])
    return True


def _alterations(value, rebuild=lambda altered: altered):
    """`value`, the whole header, with one of its parts made wrong, in many ways."""
    for wrong in (None, -1, 0, 2**31, 10**40, True, "x", []):
        if wrong != value or type(wrong) is not type(value):
            yield rebuild(wrong)
    if isinstance(value, int) and not isinstance(value, bool):
        for near in (value - 1, value + 1, value + 8, 2 * value):
            yield rebuild(near)
    elif isinstance(value, list):
        yield rebuild(value[:-1])
        yield rebuild([*value, *value[-1:]])
        for number, item in enumerate(value):
            yield from _alterations(
                item, lambda a, n=number: rebuild([*value[:n], a, *value[n + 1 :]])
            )
    elif isinstance(value, dict):
        yield rebuild({**value, "more": 0})
        for name, item in value.items():
            yield rebuild({n: v for n, v in value.items() if n != name})
            yield from _alterations(item, lambda a, n=name: rebuild({**value, n: a}))
