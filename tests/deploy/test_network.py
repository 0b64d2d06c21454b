# SPDX-License-Identifier: Apache-2.0
"""A network that exists is sound, and the kernels compute what its graph says."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harprune.deploy.network import Network
from harprune.kernels import graph as g
from harprune.kernels import native
from harprune.kernels.graph import Graph, Shape, Window
from harprune.kernels.lists import Pattern

from .networks import Drawn, by_torch, drawn, in_blocks


@given(st.integers(0, 10**9))
@settings(max_examples=100)
def test_the_kernels_compute_what_torch_computes(seed):
    network = drawn(seed)
    images = np.random.default_rng(1).standard_normal((19, *network.input_shape))
    made = in_blocks(network, native.named("float64"))
    assert np.allclose(made.forward([images])[0][0], by_torch(network, images), rtol=1e-9)


def test_a_flattened_map_may_get_a_border():
    made = Drawn(0)
    made.graph = Graph([Shape(2, 3, 4)], [], [0])
    flat = made.add(g.Flatten, 0)
    made._sparse = lambda shape: made.random.standard_normal(shape).astype(np.float32)
    made.convolution(flat, 3, Window((3, 3), padding=(1, 1)))
    network = made.finished()
    images = np.random.default_rng(0).standard_normal((5, 2, 3, 4))
    found = in_blocks(network, native.named("float64")).forward([images])[0][0]
    assert np.allclose(found, by_torch(network, images), rtol=1e-9)


def simple() -> dict:
    """The parts of a network with one convolution."""
    made = Drawn(0)
    made.graph = Graph([Shape(3, 4, 4)], [], [0])
    made.convolution(0, 4, Window((3, 3), padding=(1, 1)))
    network = made.finished()
    return {name: getattr(network, name) for name in network.__dataclass_fields__}


def first(parts: dict, **changes) -> dict:
    """`parts` with fields of the first node changed."""
    graph = parts["graph"]
    nodes = [replace(graph.nodes[0], **changes), *graph.nodes[1:]]
    return {**parts, "graph": replace(graph, nodes=nodes)}


def with_weights(parts: dict, pattern: Pattern, values) -> dict:
    name = parts["graph"].nodes[0].name
    patterns, kept = {**parts["patterns"], name: pattern}, {**parts["values"], name: values}
    return {**parts, "patterns": patterns, "values": kept}


SHAPE = (4, 3, 3, 3)
ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    "altered, message",
    [
        (lambda p: first(p, out=2), "must make value 1"),
        (lambda p: first(p, sources=(1,)), "from earlier ones"),
        (lambda p: first(p, sources=(-1,)), "from earlier ones"),
        (lambda p: first(p, groups=2), "do not fit"),
        (lambda p: first(p, window=Window((3, 3), padding=(0, 0))), "makes"),
        (lambda p: first(p, window=Window((3, 3), stride=(0, 1))), "stride"),
        (lambda p: first(p, name=p["graph"].nodes[-1].name), "must differ"),
        (lambda p: first(p, bias=not p["graph"].nodes[0].bias), "vectors"),
        (lambda p: {**p, "vectors": {**p["vectors"], "x/bias": ONE}}, "vectors"),
        (lambda p: {**p, "classes": ("a",)}, "class names"),
        (lambda p: {**p, "metadata": {"a": float("nan")}}, "no JSON"),
        (lambda p: with_weights(p, Pattern(SHAPE, np.array([108])), ONE), "ascend within"),
        (lambda p: with_weights(p, Pattern(SHAPE, np.array([-1])), ONE), "ascend within"),
        (lambda p: with_weights(p, Pattern(SHAPE, np.array([2, 2])), ONE.repeat(2)), "ascend"),
        (lambda p: with_weights(p, Pattern(SHAPE, np.array([2], np.int32)), ONE), "int64"),
        (lambda p: with_weights(p, Pattern(SHAPE, np.array([2])), ONE.repeat(2)), "must be 1"),
        (lambda p: with_weights(p, Pattern(SHAPE, np.array([2])), 0 * ONE), "is zero"),
        (lambda p: with_weights(p, Pattern(SHAPE, np.array([2])), np.nan * ONE), "NaN"),
        (lambda p: with_weights(p, Pattern(SHAPE, np.array([2])), ONE.astype(float)), "float32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(altered, message):
    parts = simple()
    Network(**parts)
    with pytest.raises(ValueError, match=message):
        Network(**altered(parts))


@pytest.mark.parametrize(
    "node",
    [
        g.MaxPool((0,), 1, Window((3, 3), padding=(2, 2))),
        g.MaxPool((0,), 1, Window((17, 17))),
        g.MeanPool((0,), 1, Window((2, 2), dilation=(2, 2))),
        g.MeanPool((0,), 1, Window((99, 99))),
        g.Normalisation((0,), 1, "norm"),
        g.Sum((0,), 1),
        g.Concatenation((), 1),
    ],
    ids=lambda node: type(node).__name__,
)
def test_nodes_that_the_kernels_would_run_wrong_are_refused(node):
    with pytest.raises(ValueError, match=r"node 0 \("):
        Network(Graph([Shape(3, 32, 32)] * 2, [node], [0], [1]), {}, {}, {})


@pytest.mark.parametrize("classes, dense", [(8, True), (6, False)])  # four filters go together
def test_nearly_dense_layers_run_as_dense_ones(classes, dense):
    made = Drawn(0)
    made._sparse = lambda shape: (np.arange(np.prod(shape)) % 4).reshape(shape).astype(np.float32)
    network = made.finished(classes)
    runner = network.runner()
    assert all(p.index is not None for p in network.patterns.values())
    assert all((p.index is None) == dense for p in runner.patterns.values())
    images = np.ones((1, *network.input_shape), np.float32)
    assert np.allclose(runner.forward([images])[0], by_torch(network, images), rtol=1e-5)
