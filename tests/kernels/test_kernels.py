# SPDX-License-Identifier: Apache-2.0
"""The kernels against torch and against the NumPy twin, on shapes drawn at random."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from harprune.kernels import graph as g
from harprune.kernels import native, team
from harprune.kernels.forward import Forward
from harprune.kernels.gradient import Gradient
from harprune.kernels.graph import Graph, Shape, Window
from harprune.kernels.lists import Pattern
from harprune.kernels.plan import Plan
from harprune.kernels.rows import RowExecutable, RowGradient
from harprune.kernels.runtime import Executable, each
from tests.oracles.numpy_graph import evaluate

SETS = ["avx512_bf16", "avx512", "avx2", "neon", "plain", "float64"]
KERNELS = [name for name in SETS if native.named(name) is not None]
pytestmark = pytest.mark.skipif(native.best() is None, reason="the kernels were not built")
draws = settings(max_examples=60, deadline=None, derandomize=True)


def tolerance(kernels):
    return 1e-12 if kernels.dtype == np.float64 else 1e-5


def near(got, wanted, bound):
    wanted = np.asarray(wanted, np.float64)
    return np.abs(got - wanted).max(initial=0.0) <= bound * max(np.abs(wanted).max(initial=0.0), 1)


@st.composite
def convolutions(draw):
    """A layer, an image size that it fits, a batch and a density."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    per_group = draw(st.sampled_from([1, 2, 3, 4, 5]))
    filters = groups * draw(st.sampled_from([1, 2, 4, 7, 8, 19]))
    size, stride, dilation = (
        (draw(st.integers(1, most)), draw(st.integers(1, most))) for most in (5, 3, 2)
    )
    padding = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    extra = tuple(draw(st.sampled_from([0, 0, 1, 2, -p])) for p in padding)
    room = (2 * p + e for p, e in zip(padding, extra))
    least = [d * (k - 1) + 1 - n for k, d, n in zip(size, dilation, room)]
    sides = [max(1, n) + draw(st.integers(0, 18)) for n in least]
    return {
        "shape": (filters, per_group, *size),
        "groups": groups,
        "window": Window(size, stride, padding, dilation, extra),
        "sides": sides,
        "images": draw(st.sampled_from([1, 2, 15, 16, 17, 33, 65])),
        "density": draw(st.sampled_from([0.0, 0.03, 0.2, 0.7, None])),
        "rectify": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


class Case:
    """One convolution, perhaps with a ReLU, its arrays, and torch's answers in float64."""

    def __init__(self, kernels, layer):
        rng = np.random.default_rng(layer["seed"])
        self.kernels, self.shape = kernels, layer["shape"]
        filters, per_group = self.shape[:2]
        self.weight = rng.standard_normal(self.shape)
        index = None
        if layer["density"] is not None:
            self.weight[rng.random(self.shape) >= layer["density"]] = 0.0
            index = np.flatnonzero(self.weight)
        if filters > 1 and index is not None:
            self.weight[filters // 2] = 0.0  # a filter without weights
            index = np.flatnonzero(self.weight)
        channels = per_group * layer["groups"]
        self.x = rng.standard_normal((layer["images"], channels, *layer["sides"]))
        self.x[:, 0] = 0.0
        self.bias = rng.standard_normal(filters)
        self.weight, self.x, self.bias = (
            a.astype(kernels.dtype).astype(np.float64) for a in (self.weight, self.x, self.bias)
        )
        self.graph = graph = Graph()
        start = graph.value(Shape(channels, *layer["sides"]))
        end = graph.value(Shape(filters, *layer["window"].over(*layer["sides"])))
        graph.nodes.append(g.Convolution((start,), end, "layer", layer["window"], layer["groups"]))
        if layer["rectify"]:
            graph.nodes.append(g.Rectifier((end,), graph.value(graph.shapes[end])))
        graph.inputs, graph.outputs = [start], [graph.nodes[-1].out]
        self.pattern = Pattern(self.shape, index)
        self.gradient = rng.standard_normal((layer["images"], *graph.shapes[end]))
        self.gradient = self.gradient.astype(kernels.dtype).astype(np.float64)
        self._answer(layer)

    def _answer(self, layer):
        w = layer["window"]
        x, weight, bias = (
            torch.tensor(a, requires_grad=True) for a in (self.x, self.weight, self.bias)
        )
        (top, left), (below, beside) = w.padding, w.extra
        wide = F.pad(x, (left, left + beside, top, top + below))
        y = F.conv2d(wide, weight, bias, w.stride, 0, w.dilation, layer["groups"])
        y = F.relu(y) if layer["rectify"] else y
        y.backward(torch.tensor(self.gradient))
        self.y, self.to_x, self.to_weight = y.detach().numpy(), x.grad.numpy(), weight.grad.numpy()

    def executable(self, *, training=False, threads=1):
        dtype = self.kernels.dtype
        plan = Plan(self.graph, self.kernels, training=training, gradients=self.graph.inputs)
        vectors = {"layer/bias": self.bias.astype(dtype)}
        made = Executable(plan, {"layer": self.pattern}, vectors, threads=threads)
        flat = self.weight.astype(dtype).reshape(-1)
        made.load("layer", flat if self.pattern.index is None else flat[self.pattern.index])
        return made

    def rows(self, kind=RowExecutable, *, threads=1):
        dtype = self.kernels.dtype
        vectors = {"layer/bias": self.bias.astype(dtype)}
        patterns = {"layer": self.pattern}
        made = kind(self.graph, self.kernels, patterns, vectors, threads=threads)
        flat = self.weight.astype(dtype).reshape(-1)
        made.load("layer", flat if self.pattern.index is None else flat[self.pattern.index])
        return made

    def run(self, executable):
        """Output, gradient to the input, and the memory that holds both."""
        cast = [np.ascontiguousarray(a, self.kernels.dtype) for a in (self.x, self.gradient)]
        (y,), memory = executable.forward(cast[:1])
        sums = [lambda *sums: None] if isinstance(executable, Executable) else []
        (to_x,) = executable.backward(memory, cast[1:], *sums)
        return y, to_x, memory


@pytest.mark.parametrize("name", KERNELS)
@given(layer=convolutions())
@draws
def test_a_convolution_and_its_gradients_equal_torchs(name, layer):
    case = Case(native.named(name), layer)
    bound = tolerance(case.kernels) * max(1.0, case.to_weight.size**0.25)
    y, to_x, _ = case.run(case.executable())
    assert near(y, case.y, bound) and near(to_x, case.to_x, bound)
    executable = case.executable(training=True)
    y, to_x, memory = case.run(executable)
    assert near(y, case.y, bound) and near(to_x, case.to_x, bound)
    full = executable.weight_gradient("layer", memory, native.ALL)
    assert near(full.reshape(case.shape), case.to_weight, bound)
    kept = executable.weight_gradient("layer", memory, native.KEPT)
    wanted = case.to_weight.reshape(-1)
    assert near(kept, wanted if case.pattern.index is None else wanted[case.pattern.index], bound)
    if case.kernels.has_bf16:
        low = executable.weight_gradient("layer", memory, native.ALL_BF16)
        # Eight bits of mantissa; errors of many products partly cancel.
        rounding = 2**-8 * np.sqrt((case.gradient**2).sum() * (case.x**2).max())
        assert np.abs(low.reshape(case.shape) - case.to_weight).max() <= max(rounding, bound)


@pytest.mark.parametrize("name", KERNELS)
@given(layer=convolutions())
@draws
def test_a_convolution_in_rows_equals_torchs(name, layer):
    case = Case(native.named(name), layer)
    bound = tolerance(case.kernels) * max(1.0, case.to_weight.size**0.25)
    (y,) = case.rows().forward([case.x.astype(case.kernels.dtype)])
    assert near(y, case.y, bound)
    y, to_x, _ = case.run(case.rows(RowGradient))
    assert near(y, case.y, bound) and near(to_x, case.to_x, bound)


@given(layer=convolutions())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_the_numpy_twin_agrees(layer):
    case = Case(native.named("float64"), {**layer, "images": min(layer["images"], 3)})
    y, _, _ = case.run(case.executable())
    (wanted,) = evaluate(case.graph, [case.x], {"layer": case.weight}, {"layer/bias": case.bias})
    assert near(y, wanted, 1e-12)


@st.composite
def poolings(draw):
    """A node that pools, often by pairs as fast paths do, and the sides of its map."""
    side, pairs = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 32, 40]), draw(st.booleans())
    if pairs:
        sides, window = (draw(side), draw(side)), Window((2, 2), (2, 2))
        sides = tuple(2 * n for n in sides)
    else:
        size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        window = Window(size, (draw(st.integers(1, 3)), 2), (size[0] // 2, size[1] // 2))
        # Often no larger than the window, where a fast path takes the whole map.
        sides = tuple(n + draw(st.integers(0, 20) | st.just(0)) for n in size)
    kind = draw(st.sampled_from([g.MaxPool, g.MeanPool]))
    fields = {} if kind is g.MaxPool else {"full_area": draw(st.booleans())}
    return kind((0,), 1, window=window, **fields), sides


@pytest.mark.parametrize("name", KERNELS)
@given(drawn=poolings(), images=st.sampled_from([1, 3, 17]))
@draws
def test_poolings_and_their_gradients_equal_torchs(name, drawn, images):
    (node, sides), kernels = drawn, native.named(name)
    window, rng = node.window, np.random.default_rng(0)
    x = rng.standard_normal((images, 3, *sides)).astype(kernels.dtype)
    exact = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    if isinstance(node, g.MaxPool):
        y = F.max_pool2d(exact, window.size, window.stride, window.padding)
    else:
        y = F.avg_pool2d(
            exact, window.size, window.stride, window.padding, count_include_pad=node.full_area
        )
    gradient = rng.standard_normal(y.shape).astype(kernels.dtype)
    y.backward(torch.tensor(gradient, dtype=torch.float64))
    graph = Graph([Shape(*x.shape[1:]), Shape(*y.shape[1:])], [node], [0], [1])
    (found,) = RowExecutable(graph, kernels, {}, {}).forward([x])
    assert near(found, y.detach(), tolerance(kernels))
    in_blocks = Executable(Plan(graph, kernels, gradients=[0]), {}, {})
    for executable in (in_blocks, RowGradient(graph, kernels, {}, {})):
        (found,), memory = executable.forward([x])
        (to_x,) = executable.backward(memory, [gradient])
        assert near(found, y.detach(), tolerance(kernels))
        assert near(to_x, exact.grad, tolerance(kernels))


def test_the_first_of_equal_numbers_wins_its_window():
    """As in torch: a gradient goes to one position."""
    x = np.zeros((1, 2, 8, 8), np.float32)
    x[:, 1] = np.arange(8) // 2
    shapes = [Shape(2, 8, 8), Shape(2, 4, 4)]
    graph = Graph(shapes, [g.MaxPool((0,), 1, Window((2, 2), (2, 2)))], [0], [1])
    gradient = np.arange(1, 33, dtype=np.float32).reshape(1, 2, 4, 4)
    wanted = np.zeros_like(x)
    wanted[:, :, ::2, ::2] = gradient
    for executable in (
        Executable(Plan(graph, native.best(), gradients=[0]), {}, {}),
        RowGradient(graph, native.best(), {}, {}),
    ):
        _, memory = executable.forward([x])
        assert np.array_equal(executable.backward(memory, [gradient])[0], wanted)


def branching(rng, dtype):
    """Every kind of node, values with one to three readers, two inputs and two outputs."""
    graph = Graph()
    first, second = (graph.value(Shape(6, 9, 7)) for _ in range(2))
    weights, vectors = {}, {}

    def add(kind, sources, shape, **fields):
        graph.nodes.append(kind(sources, graph.value(shape), **fields))
        return graph.nodes[-1].out

    def convolve(source, name, filters, window, groups=1):
        channels, *sides = graph.shapes[source]
        weights[name] = rng.standard_normal((filters, channels // groups, *window.size))
        weights[name][rng.random(weights[name].shape) < 0.6] = 0.0
        vectors[f"{name}/bias"] = rng.standard_normal(filters)
        shape = Shape(filters, *window.over(*sides))
        return add(g.Convolution, (source,), shape, name=name, window=window, groups=groups)

    three = Window((3, 3), (1, 1), (1, 1))
    a = add(g.Rectifier, (convolve(first, "a", 6, three, 3),), Shape(6, 9, 7))
    vectors["affine/scale"], vectors["affine/shift"] = rng.standard_normal((2, 6))
    b = add(g.Affine, (second,), Shape(6, 9, 7), name="affine")
    b = add(g.Swish, (b,), Shape(6, 9, 7))
    b = add(g.Rectifier, (add(g.Sum, (b, a), Shape(6, 9, 7)),), Shape(6, 9, 7))
    c = add(g.Sum, (convolve(a, "c", 6, three), add(g.Sum, (b, b), Shape(6, 9, 7))), Shape(6, 9, 7))
    c = add(g.Rectifier, (c,), Shape(6, 9, 7))
    s, t = (add(kind, (c,), Shape(6, 9, 7)) for kind in (g.Swish, g.Rectifier6))
    d = add(g.Concatenation, (s, b, t), Shape(18, 9, 7))
    window = Window((3, 2), (2, 2), (1, 1))
    e = add(g.MaxPool, (d,), Shape(18, *window.over(9, 7)), window=window)
    e = add(g.MeanPool, (e,), Shape(18, *window.over(5, 4)), window=window, full_area=False)
    h = add(g.Flatten, (e,), Shape(18 * 9))
    h = add(g.Rectifier, (convolve(h, "h", 5, Window((1, 1))),), Shape(5))
    whole = Window((9, 7), (9, 7))
    graph.inputs, graph.outputs = (
        [first, second],
        [h, add(g.MeanPool, (c,), Shape(6), window=whole)],
    )
    vectors = {name: vector.astype(dtype) for name, vector in vectors.items()}
    return graph, {n: w.astype(dtype) for n, w in weights.items()}, vectors


def in_blocks(graph, kernels, patterns, vectors, *, threads=1):
    plan = Plan(graph, kernels, gradients=graph.inputs)
    return Executable(plan, patterns, vectors, threads=threads)


BACKWARDS = [in_blocks, RowGradient, Gradient]


def loaded(graph, kernels, weights, vectors, threads=1, kind=in_blocks):
    index = {name: np.flatnonzero(w) for name, w in weights.items()}
    patterns = {name: Pattern(w.shape, index[name]) for name, w in weights.items()}
    executable = kind(graph, kernels, patterns, vectors, threads=threads)
    for name, w in weights.items():
        executable.load(name, w.reshape(-1)[index[name]])
    return executable


@pytest.mark.parametrize("images", [1, 16, 21])
@pytest.mark.parametrize("kind", BACKWARDS)
def test_every_kind_of_node_forwards_and_backwards(images, kind):
    rng, kernels = np.random.default_rng(0), native.named("float64")
    graph, weights, vectors = branching(rng, np.float64)
    inputs = [rng.standard_normal((images, 6, 9, 7)) for _ in range(2)]
    executable = loaded(graph, kernels, weights, vectors, kind=kind)
    outputs, memory = executable.forward(inputs)
    for y, wanted in zip(outputs, evaluate(graph, inputs, weights, vectors)):
        assert near(y, wanted, 1e-12)
    gradients = [rng.standard_normal(y.shape) for y in outputs]
    found = executable.backward(memory, gradients)
    # Along a direction, the gradient's product is the slope of the NumPy twin.
    for number, gradient in enumerate(found):
        direction = rng.standard_normal(gradient.shape)
        sides = []
        for step in (1e-6, -1e-6):
            moved = [x + step * direction * (i == number) for i, x in enumerate(inputs)]
            out = evaluate(graph, moved, weights, vectors)
            sides.append(sum((y * w).sum() for y, w in zip(out, gradients)))
        slope = (sides[0] - sides[1]) / 2e-6
        assert slope == pytest.approx((gradient * direction).sum(), rel=1e-6)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("kind", BACKWARDS)
def test_any_number_of_threads_gives_the_same_bits(threads, kind):
    rng = np.random.default_rng(1)
    graph, weights, vectors = branching(rng, np.float32)
    inputs = [rng.standard_normal((70, 6, 9, 7), dtype=np.float32) for _ in range(2)]
    results = []
    for many in (1, threads):
        executable = loaded(graph, native.best(), weights, vectors, many, kind)
        outputs, memory = executable.forward(inputs)
        results.append([*outputs, *executable.backward(memory, outputs)])
    assert all(np.array_equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_kind_of_node_runs_in_rows_forwards_and_backwards(name, threads, helpful):
    rng, kernels = np.random.default_rng(3), native.named(name)
    graph, weights, vectors = branching(rng, kernels.dtype)
    executable = loaded(graph, kernels, weights, vectors, threads, RowExecutable)
    both_ways = loaded(graph, kernels, weights, vectors, threads, RowGradient)
    double = native.named("float64")
    twin = loaded(graph, double, *in_double(weights, vectors))
    for images in (1, 37, 16, 2, 5):
        inputs = [rng.standard_normal((images, 6, 9, 7)).astype(kernels.dtype) for _ in range(2)]
        exact = [x.astype(np.float64) for x in inputs]
        wanted, memory = twin.forward(exact)
        gradients = [rng.standard_normal(y.shape).astype(kernels.dtype) for y in wanted]
        wanted_back = twin.backward(memory, [a.astype(np.float64) for a in gradients])
        twin.release(memory)
        found, records = both_ways.forward(inputs)
        back = both_ways.backward(records, gradients)
        both_ways.release(records)
        assert len(found) == len(wanted) == 2 and len(back) == len(wanted_back) == 2
        for got, want in zip(
            (*found, *executable.forward(inputs), *back), (*wanted, *wanted, *wanted_back)
        ):
            assert near(got, want, 10 * tolerance(kernels))


def in_double(weights, vectors):
    return [{name: a.astype(np.float64) for name, a in of.items()} for of in (weights, vectors)]


@pytest.mark.parametrize("kind", BACKWARDS)
@pytest.mark.parametrize("read", [0, 1])
def test_an_input_that_no_output_reads_gets_no_gradient(kind, read):
    graph = Graph([Shape(3, 4, 4)] * 3, [g.Rectifier((read,), 2)], [0, 1], [2])
    executable = loaded(graph, native.best(), {}, {}, kind=kind)
    x = np.ones((2, 3, 4, 4), np.float32)
    (y,), records = executable.forward([x, x])
    gradients = executable.backward(records, [y])
    assert np.array_equal(gradients[read], x) and not gradients[1 - read].any()


@pytest.mark.parametrize("kind", [*BACKWARDS, RowExecutable])
def test_a_layer_that_no_output_reads_does_not_matter(kind):
    layers = [g.Convolution((0,), 1 + n, name=f"conv{n}", window=Window((1, 1))) for n in range(2)]
    graph = Graph([Shape(3, 4, 4), Shape(2, 4, 4), Shape(2, 4, 4)], layers, [0], [1])
    weights = {layer.name: np.ones((2, 3, 1, 1), np.float32) for layer in layers}
    executable = loaded(graph, native.best(), weights, {}, kind=kind)
    x = np.ones((2, 3, 4, 4), np.float32)
    if kind is RowExecutable:
        assert np.all(executable.forward([x])[0] == 3)
        return
    (y,), records = executable.forward([x])
    assert np.all(y == 3)
    assert np.all(executable.backward(records, [y])[0] == 6)


@pytest.fixture
def helpful(monkeypatch):
    """Helpers share the steps of the smallest network, and are woken for it."""
    for bound in ("SHARED", "HALVED", "LONG"):
        monkeypatch.setattr(f"harprune.kernels.rows.{bound}", 0)
    monkeypatch.setattr(team.Pace, "shared", lambda _: True)


def test_an_interrupted_call_leaves_its_team_usable(helpful, monkeypatch):
    rng = np.random.default_rng(4)
    graph, weights, vectors = branching(rng, np.float32)
    inputs = [rng.standard_normal((3, 6, 9, 7), dtype=np.float32) for _ in range(2)]
    executable = loaded(graph, native.best(), weights, vectors, 2, RowExecutable)
    wanted = executable.forward(inputs)

    def interrupted(*_):
        raise KeyboardInterrupt

    for _ in range(3):  # as often as there are arenas, and once more
        with monkeypatch.context() as patched:
            patched.setattr(native.Kernels, "run_rows", interrupted)
            with pytest.raises(KeyboardInterrupt):
                executable.forward(inputs)
    for y, want in zip(executable.forward(inputs), wanted):
        assert np.array_equal(y, want)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_give_the_same_bits_on_any_number_of_threads(shared, request):
    if shared:
        request.getfixturevalue("helpful")
    rng = np.random.default_rng(4)
    graph, weights, vectors = branching(rng, np.float32)
    inputs = [rng.standard_normal((19, 6, 9, 7), dtype=np.float32) for _ in range(2)]
    made = [loaded(graph, native.best(), weights, vectors, n, RowExecutable) for n in (1, 2, 3, 40)]
    for images in (1, 3, 7, 8, 19):
        some = [x[:images] for x in inputs]
        alone = made[0].forward(some)
        for _ in range(20):  # helpers come early, late or not at all
            for other in made[1:]:
                assert all(map(np.array_equal, alone, other.forward(some)))


def test_calls_from_several_threads_share_one_team(helpful):
    rng = np.random.default_rng(5)
    graph, weights, vectors = branching(rng, np.float32)
    inputs = [rng.standard_normal((2, 6, 9, 7), dtype=np.float32) for _ in range(2)]
    made = [loaded(graph, native.best(), weights, vectors, 2, RowExecutable) for _ in range(3)]
    wanted = made[0].forward(inputs)
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(made[n % 3].forward, inputs) for n in range(60)]
    assert all(all(map(np.array_equal, wanted, each.result())) for each in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(helpful):
    rng = np.random.default_rng(6)
    graph, weights, vectors = branching(rng, np.float32)
    inputs = [rng.standard_normal((20, 6, 9, 7), dtype=np.float32) for _ in range(2)]
    executable = loaded(graph, native.best(), weights, vectors, 2, RowExecutable)
    sizes = (20, 8, 1, 1)
    wanted = [executable.forward([x[:many] for x in inputs]) for many in sizes]
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that waits for its parent's threads would wait for ever
        found = [executable.forward([x[:many] for x in inputs]) for many in sizes]
        same = all(all(map(np.array_equal, a, b)) for a, b in zip(found, wanted))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_helpers_are_woken_for_what_is_long_or_soon_follows(helpful, monkeypatch):
    woken = []
    monkeypatch.setattr(native.Kernels, "help", lambda *_: woken.append(1))
    monkeypatch.setattr(team, "PATIENCE", 10.0)
    monkeypatch.setattr(team, "_team", team._Team())
    monkeypatch.setattr(team._team, "last", -60.0)
    given = (native.best(), 2)
    for long, wanted in ((False, None), (False, 1), (True, 2)):
        with team.helped(*given, long, team.Pace()) as state:
            assert (state is None) == (wanted is None)
        assert all(helper.result() is None for helper in team._team._helpers)
        assert len(woken) == (wanted or 0)
    with team.helped(*given, True, team.Pace()), team.helped(*given, True, team.Pace()) as second:
        assert second is None


@pytest.mark.parametrize("alone, shared", [(1.0, 0.6), (1.0, 1.6)])
def test_the_faster_way_is_taken_and_the_other_tried_again(alone, shared):
    pace, rng = team.Pace(), np.random.default_rng(0)

    def calls(many):
        for _ in range(many):
            helpers = pace.shared()
            taken.append(helpers)
            pace.took(helpers, (shared if helpers else alone) * rng.uniform(1.0, 1.2))

    taken = []
    calls(10 * team.ROUND)
    share = np.mean(np.array(taken[team.ROUND :]) == (shared < alone))
    assert share == 1 - team.TRIAL / team.ROUND
    alone, shared, taken = shared, alone, []
    calls(10 * team.ROUND)
    assert np.mean(np.array(taken[8 * team.ROUND :]) == (shared < alone)) > 0.9


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("width, size, padding", [(16, 2, 1), (16, 1, 1), (8, 1, 9), (5, 3, 40)])
def test_rows_may_become_longer(name, width, size, padding):
    """With so much padding that whole vectors of an output row see none of the input's row."""
    layer = {
        "shape": (5, 3, size, size),
        "groups": 1,
        "window": Window((size, size), (1, 1), (1, padding)),
        "sides": [4, width],
        "images": 3,
        "density": 0.7,
        "rectify": False,
        "seed": 7,
    }
    case = Case(native.named(name), layer)
    (y,) = case.rows().forward([case.x.astype(case.kernels.dtype)])
    assert near(y, case.y, tolerance(case.kernels))
    y, to_x, _ = case.run(case.rows(RowGradient))
    assert near(y, case.y, tolerance(case.kernels))
    assert near(to_x, case.to_x, tolerance(case.kernels))


def followed(sides, strided, dtype):
    """conv -> + x -> ReLU, and what alone reads it: a convolution of stride two, or a pooling."""
    rng, window = np.random.default_rng(8), Window((3, 3), (1, 1), (1, 1))
    graph = Graph()
    x, y, total, clipped = (graph.value(Shape(5, *sides)) for _ in range(4))
    graph.nodes += [g.Convolution((x,), y, "first", window), g.Sum((y, x), total)]
    graph.nodes.append(g.Rectifier((total,), clipped))
    shapes = {"first": (5, 5, 3, 3)}
    if strided:
        window, shapes["second"] = Window((3, 3), (2, 2), (1, 1)), (7, 5, 3, 3)
        out = graph.value(Shape(7, *window.over(*sides)))
        graph.nodes.append(g.Convolution((clipped,), out, "second", window))
    else:
        window = Window((2, 2), (2, 2))
        out = graph.value(Shape(5, *window.over(*sides)))
        graph.nodes.append(g.MaxPool((clipped,), out, window))
    graph.inputs, graph.outputs = [x], [out]
    weights = {n: rng.standard_normal(s) * (rng.random(s) < 0.4) for n, s in shapes.items()}
    weights = {name: w.astype(dtype) for name, w in weights.items()}
    vectors = {
        f"{n}/bias": rng.standard_normal(w.shape[0]).astype(dtype) for n, w in weights.items()
    }
    return graph, weights, vectors


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("strided", [True, False])
@pytest.mark.parametrize("height", [2, 3, 4, 6, 12, 16])
def test_a_convolution_stores_what_its_only_reader_makes_of_it(name, strided, height):
    kernels, merged, double = native.named(name), set(), native.named("float64")
    for width in (2, 4, 8, 15, 16, 24, 32, 48, 64, 80):
        graph, weights, vectors = followed((height, width), strided, kernels.dtype)
        executable = loaded(graph, kernels, weights, vectors, kind=RowExecutable)
        x = np.random.default_rng(9).standard_normal((5, 5, height, width)).astype(kernels.dtype)
        (y,) = executable.forward([x])
        (wanted,) = evaluate(graph, [x.astype(np.float64)], weights, vectors)
        assert near(y, wanted, 10 * tolerance(kernels))
        stored = {step.stored for step in executable._program._steps}
        if stored != {"plain"}:
            merged.add(width // kernels.lanes)
        back = []
        for made in (
            loaded(graph, kernels, weights, vectors, kind=RowGradient),
            loaded(graph, double, *in_double(weights, vectors)),
        ):
            dtype = made.vectors["first/bias"].dtype
            (y,), memory = made.forward([x.astype(dtype)])
            back += made.backward(memory, [np.cos(wanted).astype(dtype)])
        assert near(back[0], back[1], 10 * tolerance(kernels))
    assert merged == ({1, 2, 4} if height % 4 == 0 else {2, 4} if height % 2 == 0 else set())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("side", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("size, padding", [(1, 0), (3, 1), (3, 0), (2, 1), (5, 2)])
def test_small_maps_do_not_read_their_border(name, side, stride, size, padding):
    """Where a tile holds the whole map; other windows and sides run as larger maps do."""
    kernels = native.named(name)
    sides = [side * s + (size - 1 - 2 * padding if padding < size // 2 else 0) for s in stride]
    if min(sides) < 1 or min(sides) + 2 * padding < size:
        pytest.skip("the window does not fit the map")
    layer = {
        "shape": (6, 4, size, size),
        "groups": 2,
        "window": Window((size, size), stride, (padding, padding)),
        "sides": sides,
        "images": 19,
        "density": 0.4,
        "rectify": True,
        "seed": 11,
    }
    case = Case(kernels, layer)
    bound = 10 * tolerance(kernels)
    for training in (False, True):
        executable = case.executable(training=training)
        y, to_x, memory = case.run(executable)
        assert near(y, case.y, bound) and near(to_x, case.to_x, bound)
    wanted = case.to_weight.reshape(-1)[case.pattern.index]
    assert near(executable.weight_gradient("layer", memory), wanted, 10 * bound)
    (forward,) = executable._forward_lists.values()
    out = case.y.shape[2:]
    same = stride == (1, 1) and (size, padding) in ((3, 1), (1, 0))
    if same:
        assert forward.reaches == (out in ((2, 2), (4, 4)) and out[0] * out[1] <= kernels.tile)


@pytest.mark.parametrize("kind, rows", [(Forward, RowExecutable), (Gradient, RowGradient)])
@pytest.mark.parametrize("share, busy", [(0.01, False), (0.9, True)])
def test_passes_take_the_layout_that_is_faster(share, busy, kind, rows):
    rng = np.random.default_rng(6)
    graph, weights, vectors = branching(rng, np.float32)
    for w in weights.values():
        w[...] = rng.standard_normal(w.shape) * (rng.random(w.shape) < share)
    made = loaded(graph, native.best(), weights, vectors, kind=kind)

    def check():
        for images in (3, 37):
            inputs = [rng.standard_normal((images, 6, 9, 7), dtype=np.float32) for _ in range(2)]
            exact = [x.astype(np.float64) for x in inputs]
            outputs = made.forward(inputs) if kind is Forward else made.forward(inputs)[0]
            for y, wanted in zip(outputs, evaluate(graph, exact, weights, vectors)):
                assert near(y, wanted, 10 * tolerance(made.kernels))

    check()
    assert [type(stage) for stage in made.for_few] == [rows]
    kinds = [Executable] if busy else [rows, Executable]
    assert [type(stage) for stage in made.for_blocks] == kinds
    for name, w in weights.items():
        w *= 2.0
        made.load(name, w[w != 0])
    check()  # both layouts take the new values


def test_multiply_adds_count_at_every_position():
    """Of 4 * 64 + 64 in a dense network, 160 are half."""
    graph = Graph([Shape(4, 4, 4), Shape(4, 2, 2), Shape(4)], [], [0], [2])
    window = Window((2, 2), (2, 2))
    graph.nodes = [g.Convolution((0,), 1, "wide", window), g.Convolution((1,), 2, "deep", window)]
    shape = (4, 4, 2, 2)

    def busy(wide: int, deep: int) -> bool:
        patterns = {
            "wide": Pattern(shape, np.arange(wide)),
            "deep": Pattern(shape, np.arange(deep)),
        }
        return Forward(graph, native.best(), patterns, {}).is_busy

    assert not busy(36, 16) and busy(37, 16) and not busy(25, 60) and busy(25, 61)


@pytest.mark.parametrize("kind", BACKWARDS)
def test_memory_used_again_leaves_no_trace(kind):
    rng = np.random.default_rng(2)
    graph, weights, vectors = branching(rng, np.float32)
    used = loaded(graph, native.best(), weights, vectors, kind=kind)
    for images in (65, 3, 17, 48):
        inputs = [rng.standard_normal((images, 6, 9, 7), dtype=np.float32) for _ in range(2)]
        results = []
        for executable in (used, loaded(graph, native.best(), weights, vectors, kind=kind)):
            outputs, memory = executable.forward(inputs)
            results.append([*outputs, *executable.backward(memory, outputs)])
            executable.release(memory)
        assert all(np.array_equal(a, b) for a, b in zip(*results))


def test_a_map_whose_offsets_would_wrap_is_refused():
    graph, channels = Graph(), 512 // native.best().lanes
    x, y = graph.value(Shape(channels, 2048, 2046)), graph.value(Shape(1, 2048, 2046))
    graph.nodes = [g.Convolution((x,), y, "a", Window((3, 3), (1, 1), (1, 1)), bias=False)]
    graph.inputs, graph.outputs = [x], [y]
    with pytest.raises(ValueError, match=r", 2048, 2046\) takes 2149580800 numbers .* 'dense'"):
        Plan(graph, native.best())


def test_the_newest_build_is_loaded(tmp_path, monkeypatch):
    (built,) = Path(native.__file__).parent.glob("_blocks*.so")
    for number, name in enumerate(("_blocks.a.so", "_blocks.c.so", "_blocks.b.so")):
        shutil.copy(built, tmp_path / name)
        os.utime(tmp_path / name, (number, number))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native._library.cache_clear()
    try:
        assert native._library()._name == str(tmp_path / "_blocks.b.so")
        monkeypatch.setattr(native, "STEP", np.dtype("i8"))
        native._library.cache_clear()
        with pytest.raises(ValueError, match=r"_blocks\.b\.so was built from other sources"):
            native._library()
    finally:
        native._library.cache_clear()


@pytest.mark.parametrize("side", [7, 9, 15, 17, 31, 33])
@pytest.mark.parametrize("name", KERNELS)
def test_the_phases_of_odd_sides_stay_zero_where_they_end(name, side):
    """conv(max_pool(x)) + a convolution of stride two: where the pool was, the phases come next."""
    kernels, rng, graph = native.named(name), np.random.default_rng(3), Graph()
    half, three = Window((3, 3), (2, 2), (1, 1)), Window((3, 3), (1, 1), (1, 1))
    small = Shape(6, *half.over(side, side))
    x, (pooled, a, b, total) = (
        graph.value(Shape(6, side, side)),
        [graph.value(small) for _ in "1234"],
    )
    graph.nodes = [
        g.MaxPool((x,), pooled, half),
        g.Convolution((pooled,), a, "a", three, bias=False),
        g.Convolution((x,), b, "b", half, bias=False),
        g.Sum((a, b), total),
    ]
    graph.inputs, graph.outputs = [x], [total]
    weights = {
        n: rng.standard_normal((6, 6, 3, 3)) * (rng.random((6, 6, 3, 3)) < 0.3) for n in "ab"
    }
    weights = {n: w.astype(kernels.dtype) for n, w in weights.items()}
    inputs = [rng.standard_normal((3, 6, side, side)).astype(kernels.dtype)]
    (wanted,), memory = (blocks := loaded(graph, kernels, weights, {})).forward(inputs)
    (to_x,) = blocks.backward(memory, [wanted])
    rows = loaded(graph, kernels, weights, {}, kind=RowGradient)
    for _ in range(2):
        (found,), records = rows.forward(inputs)
        assert near(found, wanted, tolerance(kernels))
        assert near(rows.backward(records, [wanted])[0], to_x, tolerance(kernels))
        rows.release(records)


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_to_all_weights_over_rows_longer_than_a_span(name):
    layer = {
        "shape": (9, 2, 3, 3),
        "groups": 1,
        "window": Window((3, 3), (1, 1), (1, 1)),
        "sides": [3, 131],
        "images": 17,
        "density": None,
        "rectify": False,
        "seed": 6,
    }
    case = Case(native.named(name), layer)
    executable = case.executable(training=True)
    _, _, memory = case.run(executable)
    found = executable.weight_gradient("layer", memory, native.ALL).reshape(case.shape)
    assert near(found, case.to_weight, tolerance(case.kernels) * case.to_weight.size**0.25)
    if case.kernels.has_bf16:
        low = executable.weight_gradient("layer", memory, native.ALL_BF16).reshape(case.shape)
        assert near(low, case.to_weight, 2e-2) and not np.array_equal(low, found)


def test_a_task_that_fails_is_the_callers_error_after_all_have_ended():
    begun, ended = [], []

    def task(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise ValueError("number 1")
        time.sleep(0.01)
        ended.append(number)

    with pytest.raises(ValueError, match="number 1"):
        each(task, 5, 3)
    assert sorted(begun) == sorted([*ended, 1]) and len(ended) >= 2


def test_weight_gradients_do_not_depend_on_threads():
    layer = {
        "shape": (19, 3, 3, 3),
        "groups": 1,
        "window": Window((3, 3), (1, 1), (1, 1)),
        "sides": [12, 9],
        "images": 70,
        "density": 0.3,
        "rectify": True,
        "seed": 5,
    }
    case, results = Case(native.best(), layer), []
    for threads in (1, 2, 3):
        executable = case.executable(training=True, threads=threads)
        _, _, memory = case.run(executable)
        kinds = [native.KEPT, native.ALL, native.ALL_BF16][: 3 if case.kernels.has_bf16 else 2]
        results.append([executable.weight_gradient("layer", memory, kind) for kind in kinds])
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kind", BACKWARDS)
@pytest.mark.parametrize(
    "node, function", [(g.Swish, F.silu), (g.Rectifier6, F.relu6)], ids=["swish", "relu6"]
)
def test_activations_and_their_slopes_at_any_size_of_number(name, kind, node, function):
    kernels = native.named(name)
    graph = Graph([Shape(3, 5, 7)] * 2, [node((0,), 1)], [0], [1])
    sizes = np.logspace(-20, 30, 17 * 105 - 5)  # of 17 images, with the five numbers below
    signs = np.random.default_rng(0).choice([-1, 1], len(sizes))
    x = np.append(sizes * signs, [0.0, np.nan, 6.0, -87.5, 88.5]).astype(kernels.dtype)
    exact = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    wanted = function(exact)
    (slope,) = torch.autograd.grad(wanted.sum(), exact)
    executable = kind(graph, kernels, {}, {})
    (y,), memory = executable.forward([x.reshape(17, 3, 5, 7)])
    (back,) = executable.backward(memory, [np.ones_like(y)])
    wanted, slope, limit = wanted.detach().numpy(), slope.numpy(), tolerance(kernels)
    number = ~np.isnan(x)
    assert np.isnan(y.ravel()[~number]).all()
    # What exp cannot say counts as zero, or nearly.
    assert np.allclose(y.ravel()[number], wanted[number], rtol=limit, atol=1e-6)
    assert np.allclose(back.ravel()[number], slope[number], rtol=limit, atol=100 * limit)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("window", [Window((2, 2), (2, 2)), Window((3, 3), (2, 2), (1, 1))])
@pytest.mark.parametrize("at", [(0, 0), (1, 1), (2, 3)])
def test_what_is_no_number_stays_none(name, window, at):
    """Through a convolution with a ReLU, and through a pooling in its window."""
    kernels = native.named(name)
    for pooled in (False, True):
        graph = Graph()
        start = graph.value(Shape(1, 6, 6))
        end = graph.value(Shape(1, 6, 6))
        graph.nodes.append(g.Convolution((start,), end, "layer", Window((1, 1))))
        graph.nodes.append(g.Rectifier((end,), graph.value(graph.shapes[end])))
        if pooled:
            last = graph.nodes[-1].out
            shape = Shape(1, *window.over(6, 6))
            graph.nodes.append(g.MaxPool((last,), graph.value(shape), window))
        graph.inputs, graph.outputs = [start], [graph.nodes[-1].out]
        x = np.random.default_rng(0).random((17, 1, 6, 6)).astype(kernels.dtype)
        x[:, :, at[0], at[1]] = np.nan
        wanted = torch.relu(torch.tensor(x))
        if pooled:
            wanted = F.max_pool2d(wanted, window.size, window.stride, window.padding)
        pattern = {"layer": Pattern((1, 1, 1, 1), None)}
        vectors = {"layer/bias": np.zeros(1, kernels.dtype)}
        for made in (
            Executable(Plan(graph, kernels), pattern, vectors),
            RowExecutable(graph, kernels, pattern, vectors),
            RowGradient(graph, kernels, pattern, vectors),
        ):
            made.load("layer", np.ones(1, kernels.dtype))
            found = made.forward([x])
            (found,) = found if isinstance(made, RowExecutable) else found[0]
            assert np.array_equal(np.isnan(found), wanted.isnan().numpy())
