# SPDX-License-Identifier: Apache-2.0
"""Networks for other runtimes compute what the kernels' network does."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from harprune.deploy import interchange
from harprune.deploy.module import Module

from .networks import Branching, by_torch, deployed, drawn, pruned


@given(st.integers(0, 10**9))
@settings(max_examples=60)
def test_a_module_is_the_network(seed):
    network = drawn(seed)
    x = np.random.default_rng(0).random((3, *network.input_shape), np.float32)
    found = Module(network).double()(torch.from_numpy(x).double()).detach()
    assert np.allclose(found, by_torch(network, x)[:, :, 0, 0], rtol=1e-9)


@pytest.fixture(scope="module")
def branching() -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """A module of a network with all kinds of node, images, and its logits."""
    network = deployed(pruned(Branching(), 0.3), side=20)
    x = np.random.default_rng(0).random((5, 3, 20, 20), np.float32)
    return Module(network).eval(), x, by_torch(network, x)[:, :, 0, 0]


def test_a_program_takes_any_number_of_images(branching, tmp_path):
    module, x, expected = branching
    interchange.save_program(tmp_path / "a.pt2", module, torch.from_numpy(x), {"a": "b"})
    run = interchange.run_program(tmp_path / "a.pt2")
    for count in (1, 5):
        assert np.allclose(run(x[:count]), expected[:count], atol=1e-5)


def test_onnx_takes_any_number_of_images_and_quantises(branching, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    module, x, expected = branching
    path = tmp_path / "a.onnx"
    interchange.save_onnx(path, module, torch.from_numpy(x), {"harprune": "what it is"})
    run = interchange.run_onnx(path)
    for count in (1, 5):
        assert np.allclose(run(x[:count]), expected[:count], atol=1e-5)
    held = onnx.load(path)
    assert {p.key: p.value for p in held.metadata_props} == {"harprune": "what it is"}
    before = path.stat().st_size
    interchange.quantise(path, x)
    found = interchange.run_onnx(path)(x)
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert path.stat().st_size < 0.7 * before


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", sys)
    monkeypatch.setitem(sys.modules, "onnxscript", sys)
    with pytest.raises(ValueError, match=r"onnxruntime .*pip install 'harprune\[onnx\]'"):
        interchange.require_onnx()


def test_what_torch_cannot_export_is_refused_in_one_line(tmp_path):
    class Deciding(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    for save in (interchange.save_program, interchange.save_onnx):
        with pytest.raises(ValueError, match=r"cannot write the model for .* guard") as error:
            save(tmp_path / "a", Deciding(), torch.rand(1, 3, 4, 4), {})
        assert str(error.value).isprintable() and not (tmp_path / "a").exists()
