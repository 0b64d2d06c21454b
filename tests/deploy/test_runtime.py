# SPDX-License-Identifier: Apache-2.0
"""A file runs without torch, for any batch and any size of image that its network takes."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import harprune.deploy
from harprune.deploy.artifact import save
from harprune.deploy.network import Network
from harprune.deploy.runtime import _SIZES, Engine
from harprune.kernels import graph as g
from harprune.kernels import native
from harprune.kernels.graph import Graph, Shape, Window
from harprune.kernels.rows import RowExecutable
from harprune.kernels.runtime import Executable
from harprune.models import create_model, load_weights
from harprune.sparsity import masks
from harprune.sparsity.allocation import lamp
from harprune.sparsity.layers import prunable_layers, weights
from harprune.sparsity.masks import FixedMask
from harprune.sparsity.selection import keep_top
from harprune.training.data import load_dataset
from harprune.training.splits import to_float
from tests.oracles import numpy_graph

from .networks import Branching, deployed, drawn, normalised, pruned


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return normalised(pruned(create_model("resnet18", 10, width=8), 0.1))


@pytest.fixture
def engine(small, tmp_path) -> Engine:
    save(tmp_path / "small.hpn", deployed(small))
    return harprune.deploy.load(tmp_path / "small.hpn")


def images(count: int, channels: int = 3, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(count).random((count, channels, height, width), np.float32)


def wanted(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(np.ascontiguousarray(x))).numpy()


RUN_WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "scipy", "safetensors", "pydantic", "typer", "rich"}:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocked())
import numpy as np
import harprune
engine = harprune.deploy.load(sys.argv[1])
np.save(sys.argv[3], engine(np.load(sys.argv[2])))
try:
    harprune.prune
except ImportError as error:
    assert "torch" in str(error)
else:
    raise SystemExit("torch was there")
"""


def test_a_file_runs_where_there_is_no_torch(small, tmp_path):
    save(tmp_path / "small.hpn", deployed(small))
    x = images(5)
    np.save(tmp_path / "x.npy", x)
    files = [str(tmp_path / name) for name in ("small.hpn", "x.npy", "logits.npy")]
    root = Path(harprune.__file__).parents[1]
    subprocess.run([sys.executable, "-c", RUN_WITHOUT_TORCH, *files], check=True, cwd=root)
    found, expected = np.load(tmp_path / "logits.npy"), wanted(small, x)
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 300])
def test_any_number_of_images(engine, small, count):
    x = images(count)
    expected = wanted(small, x) if count else np.zeros((0, 10))
    found = engine(x)
    assert found.shape == (count, 10) and found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max(initial=0))


@pytest.mark.parametrize("seed", range(6))
def test_logits_are_those_of_the_literal_twin(tmp_path, seed):
    network = drawn(seed)
    save(tmp_path / "a.hpn", network)
    x = images(2, *network.input_shape)
    weights = {name: network.weight(name).astype(float) for name in network.patterns}
    (expected,) = numpy_graph.evaluate(network.graph, [x], weights, network.vectors)
    found = harprune.deploy.load(tmp_path / "a.hpn")(x)
    assert np.allclose(found, expected[:, :, 0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", [(32, 32), (48, 48), (33, 64), (64, 40)])
def test_other_sizes_where_the_network_allows_them(sides):
    model = pruned(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, 2, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        ),
        0.5,
    )
    x = images(3, 3, *sides)
    assert np.allclose(Engine(deployed(model))(x), wanted(model, x), atol=1e-5)


def test_a_residual_network_takes_other_sizes(engine, small):
    before = engine(images(2))
    for side in (64, 40, 32):
        expected = wanted(small, x := images(2, 3, side, side))
        assert np.allclose(engine(x), expected, atol=1e-4 * np.abs(expected).max())
    assert np.array_equal(engine(images(2)), before)


def test_an_adaptive_pool_of_four_parts_keeps_four():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    engine = Engine(deployed(model, side=8))
    x = images(3, 3, 12, 6)
    assert np.allclose(engine(x), wanted(model, x), atol=1e-6)
    with pytest.raises(ValueError, match=r"images of 9 x 8 do not fit this network .*give 8 x 8"):
        engine(images(1, 3, 9, 8))


@pytest.mark.parametrize("side", [5, 6, 7, 9, 10, 12])
def test_an_adaptive_pool_parts_a_map_as_torch_does_or_not_at_all(side):
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(4), nn.Conv2d(4, 5, 3)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    engine, x = Engine(deployed(model, side=8)), images(2, 3, side, side)
    if side % 4:
        with pytest.raises(ValueError, match="has no 4 x 4 parts of one size"):
            engine(x)
    else:
        assert np.allclose(engine(x), wanted(model, x), atol=1e-6)


def test_an_adaptive_pool_that_keeps_a_side():
    model = nn.Sequential(nn.AdaptiveAvgPool2d((None, None)), nn.Conv2d(3, 4, 1))
    whole = nn.Sequential(*model, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    engine, x = Engine(deployed(whole, side=8)), images(2, 3, 16, 16)
    assert np.allclose(engine(x), wanted(whole, x), atol=1e-6)
    whole[0].output_size = (None, 4)
    with pytest.raises(ValueError, match="AdaptiveAvgPool2d"):
        deployed(whole, side=8)


@pytest.mark.parametrize("side", [16, 32, 64, 4])
def test_a_network_that_fixes_the_size_says_so(side):
    engine = Engine(deployed(pruned(Branching(), 0.5), side=20))
    with pytest.raises(ValueError, match=f"images of {side} x {side} do not fit .*give 20 x 20"):
        engine(images(1, 3, side, side))


def test_a_fixed_pool_before_the_logits_fixes_the_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(4, 2))
    engine = Engine(deployed(model, side=8))
    with pytest.raises(ValueError, match=r"makes a map of \(2, 2, 2\), not logits; give 8 x 8"):
        engine(images(1, 3, 16, 16))


def test_a_network_that_ends_in_a_map_is_refused():
    graph = Graph([Shape(3, 4, 4)] * 2, [g.Rectifier((0,), 1)], [0], [1])
    with pytest.raises(ValueError, match="not logits"):
        Engine(Network(graph, {}, {}, {}))


def test_runners_of_few_sizes_are_kept(engine):
    sides = [32 + 8 * n for n in range(_SIZES + 3)]
    for side in sides:
        engine(images(1, 3, side, side))
    assert list(engine._runners) == [(side, side) for side in sides[-_SIZES:]]
    kept = engine._runners[sides[-1], sides[-1]]
    engine(images(1, 3, sides[-1], sides[-1]))
    assert engine._runners[sides[-1], sides[-1]] is kept


@pytest.mark.parametrize("density, stages", [(0.02, 2), (0.6, 1)])
def test_few_images_and_many_are_run_alike(density, stages):
    engine = Engine(deployed(pruned(create_model("resnet18", 10, width=8), density)))
    (runner,) = engine._runners.values()
    x = images(150)
    many = engine(x)
    assert len(runner.for_blocks) == stages and isinstance(runner.for_blocks[-1], Executable)
    for count in (1, 2, 15, 16, 33, 64, 81):
        assert np.abs(engine(x[:count]) - many[:count]).max() < 1e-5
    assert isinstance(runner.for_few[0], RowExecutable)


def test_memory_is_used_again():
    engine = Engine(deployed(pruned(create_model("resnet18", 10, width=8), 0.6)))
    (runner,) = engine._runners.values()
    (executable,) = runner.for_blocks
    engine(images(40))
    (memory,) = executable.plan.spare
    for count in (16, 40, 700):
        engine(images(count))
    assert len(executable.plan.spare) == 1
    largest = executable.plan.spare[0]
    engine(images(17)), engine(images(2000))
    assert executable.plan.spare == [largest] and memory is not largest
    assert largest.blocks <= 256 // native.best().lanes


@pytest.mark.parametrize(
    "wrong, message",
    [
        (images(2).astype(np.float64), r"float64 \[2, 3, 32, 32\]; give float32 \[n, 3, 32, 32\]"),
        ((255 * images(2)).astype(np.uint8), "uint8 images: divide by 255"),
        (images(2, 1), r"\[2, 1, 32, 32\]"),
        (images(2)[0], r"\[3, 32, 32\]"),
        (torch.rand(2, 3, 32, 32), "of type Tensor are no array"),
        ([[0.0]], "of type list"),
    ],
    ids=["double", "bytes", "grey", "one image", "tensor", "list"],
)
def test_what_is_no_image_is_refused_in_one_line(engine, wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        engine(wrong)
    assert "\n" not in str(error.value)


def test_images_in_any_memory_order(engine):
    x = images(6)
    expected = engine(x)
    assert np.array_equal(engine(np.asfortranarray(x)), expected)
    innermost = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert np.array_equal(engine(innermost), expected)
    assert np.array_equal(engine(np.concatenate([x, x])[::2][:3]), engine(x[::2]))


def test_a_network_of_vectors_takes_vectors():
    model = pruned(nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 3)), 0.5)
    from harprune.sparsity.extraction import extract

    engine = Engine(Network(*extract(model, torch.rand(1, 7))))
    x = np.random.default_rng(0).random((4, 7), np.float32)
    assert np.allclose(engine(x), wanted(model, x), atol=1e-6)


def test_threads_change_nothing_and_may_share_an_engine(small):
    network, x = deployed(small), images(70)
    expected = Engine(network)(x)
    shared = Engine(network, threads=3)
    found = {}
    callers = [
        threading.Thread(target=lambda n=n: found.update({n: shared(x[n:])})) for n in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(np.array_equal(found[n], expected[n:]) for n in range(4))
    with pytest.raises(ValueError, match="threads = 0"):
        Engine(network, threads=0)


def test_missing_kernels_are_named(small, monkeypatch):
    network = deployed(small)
    monkeypatch.setattr(native, "best", lambda: None)
    with pytest.raises(ValueError, match="install a C compiler"):
        Engine(network)


def test_a_deployed_network_knows_its_classes(tmp_path):
    network = drawn(3)
    save(tmp_path / "a.hpn", network)
    assert harprune.deploy.load(tmp_path / "a.hpn").classes == ("class 0", "class 1", "class 2")


def test_an_adaptive_pool_must_part_its_map():
    for window in (Window((3, 3), (3, 3)), Window((2, 2), (1, 1)), Window((4, 4), (4, 4), (1, 1))):
        node = g.MeanPool((0,), 1, window, adaptive=True)
        with pytest.raises(ValueError, match="does not part a map"):
            Network(
                Graph([Shape(3, 8, 8), Shape(3, *window.over(8, 8))], [node], [0], [1]), {}, {}, {}
            )


def test_real_images_get_the_logits_of_the_masked_model(data_root, checkpoint_root):
    """1,000 test images, a network that others trained, one weight in ten kept by LAMP."""
    statistics = json.loads((checkpoint_root / "MANIFEST.json").read_text())["resnet2b.pth"]
    model = create_model("resnet2b", 10, mean=statistics["mean"], std=statistics["std"]).eval()
    assert load_weights(model, checkpoint_root / "resnet2b.pth").complete
    layers = prunable_layers(model)
    for name, density in lamp(weights(layers), 0.1).items():
        weight = layers[name].parameter.detach()
        kept = keep_top(weight, round(density * weight.numel()))
        masks.install(layers[name], FixedMask(kept.bool()))
    x = to_float(load_dataset("cifar10", data_root).test.images[:1000]).numpy()
    with torch.no_grad():
        logits = model(torch.from_numpy(x)).numpy()
    for threads in (1, 2):
        found = Engine(deployed(model), threads=threads)(x)
        assert np.abs(found - logits).max() < 1e-4
        assert np.array_equal(found.argmax(1), logits.argmax(1))


def test_kernels_of_another_precision_are_refused(small):
    with pytest.raises(ValueError, match="kernels float64 compute in float64; give float32 ones"):
        Engine(deployed(small), kernels=native.named("float64"))


def test_an_engine_may_be_copied_and_sent_to_another_process(engine, small):
    x = images(3)
    for again in (pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine)):
        assert np.array_equal(again(x), engine(x)) and again.classes == engine.classes


def test_an_engine_is_made_of_a_network():
    with pytest.raises(ValueError, match=r"network = 'a.hpn' is no network; harprune\.deploy"):
        Engine("a.hpn")


def test_threads_are_counted_in_whole_numbers(small):
    with pytest.raises(ValueError, match=r"threads = 2\.5 must be a whole number"):
        Engine(deployed(small), threads=2.5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_does_not_wait_for_its_parents_threads(engine):
    x, stop = images(64), threading.Event()

    def work():
        while not stop.is_set():
            engine(x)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if not child:
                os._exit(0 if engine(x[:2]).shape == (2, 10) else 1)
            until = time.monotonic() + 60
            while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
                time.sleep(0.01)
            if done == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert done == (child, 0)
    finally:
        stop.set()
        thread.join()
