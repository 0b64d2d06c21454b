# SPDX-License-Identifier: Apache-2.0
"""What is taken out of torch computes what the model computes."""

import numpy as np
import pytest
import torch
from torch import nn

from harprune.kernels import graph as g
from harprune.kernels import native
from harprune.kernels.plan import Plan
from harprune.kernels.runtime import Executable
from harprune.models import create_model
from harprune.models.normalised import Normalised
from harprune.sparsity import masks
from harprune.sparsity.density import GivenDensity
from harprune.sparsity.extraction import Extracted, extract
from harprune.sparsity.layers import prunable_layers


def run(found: Extracted, x: torch.Tensor) -> np.ndarray:
    made = Executable(Plan(found.graph, native.best()), found.patterns, found.vectors)
    for name, values in found.values.items():
        made.load(name, values)
    return made.forward([x.numpy()])[0][0].reshape(len(x), -1)


def stirred(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that have seen data."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.eval()


@pytest.mark.parametrize(
    "name", ["small_cnn", "resnet18", "preact_resnet18", "wrn28_4", "dm_preact_resnet18"]
)
@pytest.mark.parametrize("baked", [False, True])
def test_logits_are_the_models(name, baked):
    width = {} if name == "wrn28_4" else {"width": 8}
    model = stirred(create_model(name, 10, **width))
    for layer in prunable_layers(model).values():
        masks.install(layer, masks.LearnedMask(layer.parameter, GivenDensity(0.1)))
    model = Normalised(masks.bake(model) if baked else model, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    x = torch.rand(3, 3, 32, 32)
    found = extract(model, x[:1])
    kept = sum(len(v) for v in found.values.values())
    expected = sum(int(layer.weight.count_nonzero()) for layer in prunable_layers(model).values())
    assert kept == expected
    assert np.allclose(run(found, x), model(x).detach(), atol=1e-4)


def test_an_input_normalisation_is_one_step_and_exact_at_the_borders():
    model = Normalised(nn.Conv2d(3, 4, 3, padding=1), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).eval()
    found, x = extract(model, torch.rand(1, 3, 8, 8)), torch.rand(2, 3, 8, 8)
    assert [type(n) for n in found.graph.nodes] == [g.Affine, g.Convolution]
    (name,) = (n.name for n in found.graph.nodes if isinstance(n, g.Affine))
    assert np.allclose(found.vectors[f"{name}/shift"], [-2.0, -0.5 / 0.3, -1.5])
    assert np.allclose(run(found, x), model(x).flatten(1).detach(), atol=1e-5)


def test_arithmetic_with_constants_is_folded_wherever_it_stands():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.rand(1, 4, 1, 1))
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            x = self.first(2 * x - 1)
            y = x * self.gain
            x = torch.relu(1.0 - y.mul(0.5)) + y / 3.0
            return self.last(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)) + 0.25

    model, x = Scaled().eval(), torch.rand(2, 3, 6, 6)
    assert np.allclose(run(extract(model, x), x), model(x).detach(), atol=1e-5)


def test_what_is_computed_of_buffers_is_a_constant():
    class Normalising(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.rand(3))
            self.register_buffer("variance", torch.rand(3) + 0.5)
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = (x - self.mean[None, :, None, None]) / self.variance.view(1, -1, 1, 1).sqrt()
            return self.layer(x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)).flatten(1)

    model, x = Normalising().eval(), torch.rand(2, 3, 6, 6)
    found = extract(model, x)
    assert sum(isinstance(node, g.Affine) for node in found.graph.nodes) == 1
    assert np.allclose(run(found, x), model(x).detach(), atol=1e-5)


def test_later_training_does_not_change_what_was_taken():
    model = nn.Sequential(nn.Conv2d(1, 2, 1)).eval()
    found = extract(model, torch.rand(1, 1, 2, 2))
    before = found.values["_0"].copy(), found.vectors["_0/bias"].copy()
    with torch.no_grad():
        model[0].weight.fill_(7.0)
        model[0].bias.fill_(7.0)
    assert np.array_equal(found.values["_0"], before[0])
    assert np.array_equal(found.vectors["_0/bias"], before[1])


class Odd(nn.Module):
    """A step that no kernel runs, behind one that does."""

    def __init__(self, step):
        super().__init__()
        self.conv, self.step = nn.Conv2d(3, 4, 3), step

    def forward(self, x):
        return self.step(self.conv(x))


@pytest.mark.parametrize(
    "step, word",
    [
        (torch.sigmoid, "sigmoid"),
        (nn.GELU(), r"step \(GELU, in step\)"),
        (nn.ConvTranspose2d(4, 4, 2), "ConvTranspose2d"),
        (lambda x: x / torch.arange(1.0, 17.0).view(1, 1, 4, 4), "truediv"),
        (lambda x: 1.0 / x, "truediv"),
        (lambda x: (x, x), "one output"),
    ],
)
def test_the_first_step_that_cannot_run_is_named(step, word):
    with pytest.raises(ValueError, match=word):
        extract(Odd(step).eval(), torch.rand(1, 3, 6, 6))


def test_models_that_cannot_be_traced_or_are_not_float32_are_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="cannot be traced"):
        extract(Branching(), torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"call \.float\(\)"):
        extract(nn.Conv2d(3, 4, 3).double(), torch.rand(1, 3, 4, 4))


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_padding_may_be_a_word(padding):
    model = nn.Sequential(
        nn.Conv2d(3, 4, (3, 5), padding=padding, dilation=(2, 1)), nn.ReLU(), nn.AvgPool2d(4),
        nn.Flatten(),
    )  # fmt: skip
    x = torch.rand(5, 3, 8, 8)
    assert np.allclose(run(extract(model.eval(), x), x), model(x).detach().numpy(), atol=1e-5)


def test_one_number_in_a_tuple_stands_for_both_sides():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=(2,)), nn.MaxPool2d((2,)), nn.Flatten())
    x = torch.rand(5, 3, 9, 9)
    assert np.allclose(run(extract(model.eval(), x), x), model(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")],
        [nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3)],
        [nn.ConstantPad2d(1, 0.5), nn.Conv2d(3, 4, 3)],
    ],
)
def test_padding_of_another_kind_is_what_the_refusal_says(layers):
    with pytest.raises(ValueError, match="zeros as padding"):
        extract(nn.Sequential(*layers, nn.Flatten()).eval(), torch.rand(1, 3, 8, 8))


def test_a_pooling_that_repeats_numbers_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    with pytest.raises(ValueError, match="a map of 1 x 1, which no file says; give larger images"):
        extract(model.eval(), torch.rand(1, 3, 4, 4))
