# SPDX-License-Identifier: Apache-2.0
"""Which parts of a traced model the kernels run: as much as they can, in one piece."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harprune.models import create_model, list_models
from harprune.sparsity.bridge import FunctionRegion, TrainingRegion
from harprune.sparsity.execution import training_twin, twin


def regions(module, kind):
    return [m for m in module.modules() if isinstance(m, kind)]


def parts(model, x):
    """The regions of the model's twin, and what else it calls."""
    function = twin(model).current()
    function(x)
    (network,) = function._networks.values()
    others = [n for n in network.graph.nodes if n.op not in ("placeholder", "output")]
    return regions(network, FunctionRegion), [n for n in others if "fused" not in str(n.target)]


@pytest.mark.parametrize(
    "name", [n for n in list_models() if n != "trades_small_cnn" and "imagenet" not in n]
)
def test_every_model_of_the_registry_is_one_region(name):
    found, others = parts(create_model(name, 10, width=2).eval(), torch.rand(1, 3, 32, 32))
    assert len(found) == 1 and not others


def with_activation(model, activation):
    for name, child in model.named_children():
        given = isinstance(child, nn.ReLU)
        setattr(model, name, activation() if given else with_activation(child, activation))
    return model


@pytest.mark.parametrize("images", [3, 20])  # in rows, and in blocks too
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU6])
def test_activations_leave_a_network_one_region(activation, name, images):
    torch.manual_seed(0)
    model = with_activation(create_model(name, 10, width=4), activation).double()
    x = torch.rand(images, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    trained = training_twin(model.train())
    wanted, got = (
        torch.autograd.grad(function(x).square().sum(), [x, *model.parameters()])
        for function in (model, trained)
    )
    for a, b in zip(got, wanted):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)
    found, others = parts(model.eval(), x.detach())
    assert len(found) == 1 and not others
    wanted, got = (
        torch.autograd.grad(function(x).square().sum(), x)[0]
        for function in (model, twin(model).current())
    )
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)


class Styles(nn.Module):
    """Poolings and flattenings as functions and methods, as models in the wild have them."""

    def __init__(self, ending):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.linear, self.ending = nn.Linear(6, 4), ending

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.linear(self.ending(F.avg_pool2d(x, 2, stride=2)))


ENDINGS = {
    "view": lambda x: F.avg_pool2d(x, 2).view(x.size(0), -1),
    "reshape": lambda x: F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], 6),
    "flatten": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1),
    "method": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(start_dim=1),
    "mean": lambda x: x.mean((2, 3)),
    "mean, kept": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True).flatten(1),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_functions_and_methods_are_run_too(ending):
    torch.manual_seed(0)
    model = Styles(ending).eval().double()
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    found, others = parts(model, x)
    assert len(found) == 1 and not others
    expected, logits = model(x), twin(model).current()(x)
    assert torch.allclose(logits, expected, rtol=1e-10, atol=1e-12)
    wanted, got = (torch.autograd.grad(z.square().sum(), x)[0] for z in (expected, logits))
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)


class Padded(nn.Module):
    """A convolution that reads a map with zeros around it, beside what reads the map itself."""

    def __init__(self, pad, size=3, **options):
        super().__init__()
        self.first, self.pad = nn.Conv2d(3, 4, 3), pad
        self.second, self.shortcut = nn.Conv2d(4, 6, size, **options), nn.Conv2d(4, 6, 1)

    def forward(self, x):
        x = torch.relu(self.first(x))
        second = self.second(self.pad(x))
        return torch.cat([second.flatten(1), self.shortcut(x).flatten(1)], 1)


EVEN = {"padding": "same", "dilation": (1, 3)}
PADDED = {
    "uneven": Padded(lambda x: F.pad(x, (0, 1, 0, 1)), stride=2),
    "named": Padded(lambda x: F.pad(x, pad=[2, 0, 0, 3], value=0.0), stride=(1, 2)),
    "on top of its own": Padded(nn.ZeroPad2d((1, 0, 2, 0)), padding=1),
    "even size": Padded(nn.Identity(), size=4, **EVEN),
    "even size, padded": Padded(nn.ConstantPad2d(1, 0.0), size=2, **EVEN),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("images", [3, 20])  # in rows, and in blocks too
@pytest.mark.parametrize("model", PADDED.values(), ids=PADDED)
def test_zeros_around_a_map_are_the_convolutions_padding(model, images):
    torch.manual_seed(0)
    model = model.double()
    x = torch.rand(images, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    found, others = parts(model, x.detach())
    assert len(found) == 1 and [n.target for n in others] in ([torch.cat], [])
    for function in (twin(model).current(), training_twin(model)):
        expected, logits = model(x), function(x)
        assert torch.allclose(logits, expected, rtol=1e-10, atol=1e-12)
        wanted, got = (torch.autograd.grad(z.square().sum(), x)[0] for z in (expected, logits))
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "pad",
    [
        lambda x: F.pad(x, (0, 1, 0, 1), value=1.0),
        lambda x: F.pad(x, (0, 1, 0, 1), mode="replicate"),
        lambda x: F.pad(x, (0, -1, 0, 1)),
        lambda x: F.pad(x, (0, 1)),
        lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2),
        nn.ReflectionPad2d(1),
    ],
)
def test_torch_puts_anything_else_around_a_map(pad):
    torch.manual_seed(0)
    model = Padded(pad).double()
    x = torch.rand(3, 3, 9, 8, dtype=torch.float64)
    assert len(parts(model, x)[1]) > 0
    assert torch.allclose(twin(model).current()(x), model(x), rtol=1e-10, atol=1e-12)


class Mixed(nn.Module):
    """Two convolutions that something foreign to the kernels comes between."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.between = between

    def forward(self, x):
        kept = self.first(x)
        return self.second(self.between(kept) + kept).flatten(1)


@pytest.mark.parametrize("between", [nn.Tanh(), nn.GroupNorm(2, 4), nn.Softmax(1)], ids=repr)
def test_torch_runs_what_lies_between(between):
    torch.manual_seed(0)
    model = Mixed(between).double()
    x = torch.rand(3, 3, 7, 7, dtype=torch.float64)
    trained = training_twin(model)
    weights = [model.first.weight, model.second.weight]
    expected, logits = model(x), trained(x)
    (network,) = trained._networks.values()
    assert len(regions(network, TrainingRegion)) == 2
    assert torch.allclose(logits, expected, rtol=1e-10, atol=1e-12)
    wanted, got = (torch.autograd.grad(z.square().sum(), weights) for z in (expected, logits))
    for a, b in zip(wanted, got):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


class Placed(nn.Module):
    """Adds what no image decides, computed from a parameter, to every image."""

    def __init__(self):
        super().__init__()
        self.conv, self.place = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(1, 4, 5, 5))

    def forward(self, x):
        return torch.relu(self.conv(x) + self.place * 2).flatten(1)


def test_what_is_no_batch_of_images_is_broadcast():
    torch.manual_seed(0)
    model, x = Placed().double(), torch.rand(40, 3, 7, 7, dtype=torch.float64)
    assert torch.allclose(twin(model).current()(x), model(x), rtol=1e-12, atol=1e-14)
    assert torch.allclose(training_twin(model)(x), model(x), rtol=1e-12, atol=1e-14)


class Sliced(nn.Module):
    """Slices a map that the kernels make; a flattened map as an exported network once had it."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Conv2d(50, 3, 1)

    def forward(self, x):
        x = torch.relu(self.conv(x))[:, :2]
        return self.linear(x.flatten(1)[:, :, None, None]).flatten(1)


def test_torch_slices_a_map():
    torch.manual_seed(0)
    model = Sliced().double()
    x = torch.rand(20, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    for trained in (twin(model).current(), training_twin(model)):
        expected, logits = model(x), trained(x)
        assert torch.allclose(logits, expected, rtol=1e-12, atol=1e-14)
        wanted, got = (torch.autograd.grad(z.square().sum(), x)[0] for z in (expected, logits))
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)


class Twice(nn.Module):
    """A map that leaves a region twice, once through what does nothing."""

    def __init__(self, second):
        super().__init__()
        self.conv, self.second = nn.Conv2d(3, 4, 3), second

    def forward(self, x):
        x = F.adaptive_avg_pool2d(torch.relu(self.conv(x)), 1)
        return (torch.sin(x).flatten(1) + torch.cos(self.second(x)).flatten(1)).exp()


@pytest.mark.parametrize("second", [nn.Identity(), nn.Flatten()], ids=repr)
@pytest.mark.parametrize("images", [5, 20])
def test_a_map_may_leave_a_region_twice(second, images):
    torch.manual_seed(0)
    model = Twice(second).double()
    with torch.no_grad():
        model.conv.weight[torch.rand_like(model.conv.weight) < 0.8] = 0.0
    x = torch.rand(images, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    function, expected = twin(model).current(), model(x)
    assert torch.allclose(function(x.detach()), expected, rtol=1e-12, atol=1e-14)
    wanted, got = (torch.autograd.grad(z.square().sum(), x)[0] for z in (expected, function(x)))
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)


class Reading(nn.Module):
    """Joins what is computed from an image to the image itself, whose gradient nobody wants."""

    def __init__(self):
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.rand(3, 1, 1)), nn.Conv2d(6, 4, 3)

    def forward(self, x):
        return self.conv(torch.cat([x, torch.sin(x * self.scale)], 1)).flatten(1)


def test_of_two_maps_read_the_second_alone_may_want_a_gradient():
    torch.manual_seed(0)
    model, x = Reading().double(), torch.rand(5, 3, 7, 7, dtype=torch.float64)
    expected, logits = model(x), training_twin(model)(x)
    wanted, got = (
        torch.autograd.grad(z.square().sum(), model.scale)[0] for z in (expected, logits)
    )
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-12)
