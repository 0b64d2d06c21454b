# SPDX-License-Identifier: Apache-2.0
"""The twin computes what the model computes, and follows it."""

import copy
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from harprune.models import create_model, list_models
from harprune.sparsity import masks
from harprune.sparsity.density import GivenDensity
from harprune.sparsity.execution import training_twin, twin
from harprune.sparsity.layers import prunable_layers

LARGE = ("wrn", "dm_wrn", "resnet34", "resnet50", "vgg")
SMALL = [n for n in list_models() if not n.startswith(LARGE)]


def stirred(model):
    """Batch-norm statistics that are not those of a fresh network."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.double()


@pytest.mark.parametrize("name", [*SMALL, "wrn28_4", "vgg16_bn"])
def test_logits_and_input_gradients_equal_the_models(name):
    torch.manual_seed(0)
    channels, side = (1, 28) if name == "trades_small_cnn" else (3, 32)
    model = stirred(create_model(name, 10, in_channels=channels)).eval()
    for layer in prunable_layers(model).values():
        masks.install(layer, masks.LearnedMask(layer.parameter, GivenDensity(0.3)))
    x = torch.rand(2, channels, side, side, dtype=torch.float64, requires_grad=True)
    function = twin(model).current()
    expected, logits = model(x), function(x)
    assert torch.allclose(logits, expected, rtol=1e-10, atol=1e-10)
    wanted, got = (torch.autograd.grad(z.square().sum(), x)[0] for z in (expected, logits))
    assert torch.allclose(got, wanted, rtol=1e-8, atol=1e-10)


def test_the_twin_is_in_eval_mode_whatever_the_model_is_in():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    function, x = twin(model).current(), torch.rand(3, 4)
    assert torch.equal(function(x), function(x))
    assert model[2].num_batches_tracked == 0
    assert torch.allclose(function(x), model.eval()(x), atol=1e-6)


class Noisy(nn.Module):
    """What it does in training mode stands in its forward, not in a module."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x = F.dropout(self.linear(x), 0.5, self.training)
        return x + 1 if self.training else x


def test_the_twin_does_what_the_forward_does_in_eval_mode():
    model, x = Noisy().train(), torch.rand(3, 4)
    function = twin(model).current()
    assert model.training and model.linear.training
    assert torch.allclose(function(x), model.eval()(x), atol=1e-6)


class InPlace(nn.Module):
    """Tensors that are read before and after they are changed in place."""

    def __init__(self, change):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.norm, self.rectify, self.change = nn.BatchNorm2d(4), nn.ReLU(inplace=True), change
        self.swish = nn.SiLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        before = self.second(x)
        y = self.norm(self.second(self.change(self, x)))
        return (before + y + x).mean((2, 3))


CHANGES = {
    "module": lambda model, x: model.rectify(x),
    "by name": lambda model, x: model.rectify(input=x),
    "relu_": lambda model, x: torch.relu_(x),
    "method": lambda model, x: x.relu_(),
    "inplace": lambda model, x: F.relu(x, inplace=True),
    "positional": lambda model, x: F.relu(x, True),
    "swish": lambda model, x: model.swish(x),
    "silu": lambda model, x: F.silu(x, inplace=True),
    "relu6": lambda model, x: F.relu6(x, True),
    "silu, positional": lambda model, x: F.silu(x, True),
    "iadd": lambda model, x: operator.iadd(x, 1.0),
    "add_": lambda model, x: x.add_(x),
    "imul": lambda model, x: operator.imul(x, 2.0),
    "hardtanh": lambda model, x: F.hardtanh_(x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_in_place_are_seen_by_whoever_reads_later(change):
    torch.manual_seed(0)
    model, x = InPlace(change), torch.randn(16, 4, 8, 8)
    with torch.no_grad():
        model.first.weight[torch.rand(4, 4, 3, 3) < 0.8] = 0.0
    trained, follower = training_twin(model), twin(model)
    assert torch.allclose(trained(x), model.train()(x), atol=1e-5)
    assert torch.allclose(follower.current()(x), model.eval()(x), atol=1e-5)


def test_a_batch_norm_in_eval_mode_stays_as_it_is_while_others_train():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    stirred(model).float().train()[1].eval()
    held = copy.deepcopy(model)
    x = torch.rand(16, 3, 9, 9)
    found, wanted = training_twin(model)(x), held(x)
    assert torch.allclose(found, wanted, atol=1e-5)
    for a, b in zip(model.buffers(), held.buffers()):
        assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(model[1].running_mean, held[1].running_mean)
    assert not model[1].training and model[3].training


def test_it_follows_the_weights_when_asked():
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval(), torch.rand(1, 1, 5, 5)
    follower = twin(model)
    before = follower.current()(x)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
        model[1].running_mean.add_(1.0)
    assert torch.allclose(follower.current()(x), model(x), atol=1e-6)
    assert not torch.allclose(before, model(x))


def test_reading_weights_for_the_twin_leaves_the_cache_trainable():
    model = nn.Sequential(nn.Conv2d(1, 2, 3))
    (layer,) = prunable_layers(model).values()
    masks.install(layer, masks.LearnedMask(layer.parameter, GivenDensity(0.5)))
    follower, x = twin(model), torch.rand(1, 1, 5, 5)
    with parametrize.cached():
        follower.current()(x)
        model(x).sum().backward()
    assert masks.installed(model)["0.weight"][1].scores.grad is not None


def test_a_batch_norm_used_twice_or_seen_from_elsewhere_is_not_folded_away():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + self.norm(self.conv(y)) + y

    torch.manual_seed(0)
    model = stirred(Shared()).eval()
    x = torch.rand(2, 2, 4, 4, dtype=torch.float64)
    assert torch.allclose(twin(model).current()(x), model(x), atol=1e-12)


def test_a_model_that_cannot_be_traced_has_no_twin():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert twin(Branching()) is None


def test_bf16_is_near_and_gives_logits_in_the_type_of_the_images():
    model = create_model("small_cnn", 10).eval()
    x = torch.rand(4, 3, 16, 16)
    logits = twin(model, dtype=torch.bfloat16).current()(x)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, model(x), atol=0.05)


class Viewed(nn.Module):
    """Flattens by a view, which asks how its tensor lies in memory."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, x):
        maps = self.conv(x).view_as(self.conv(x))
        return self.linear(maps.view(x.size(0), -1))


@pytest.mark.parametrize("options", [{}, {"execution": "dense"}, {"dtype": torch.bfloat16}])
def test_a_view_does_not_mind_the_layout(options):
    model, x = Viewed().eval(), torch.rand(2, 3, 8, 8)
    assert torch.allclose(twin(model, **options).current()(x), model(x), atol=0.05)
    assert torch.allclose(training_twin(model)(x), model(x), atol=1e-6)


def test_a_view_under_another_type_stays_one():
    class Bits(Viewed):
        def forward(self, x):
            return super().forward(x) + (x.view(torch.int32) >> 31).sum()

    model, x = Bits().eval(), -torch.rand(2, 3, 8, 8)
    assert torch.allclose(twin(model).current()(x), model(x), atol=1e-4)


def test_a_map_of_the_model_itself_is_added_to_every_image():
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.place = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(1, 4, 5, 5))

        def forward(self, x):
            return self.conv(x) + self.place

    model, x = Placed().eval(), torch.rand(40, 3, 5, 5)
    assert torch.allclose(twin(model).current()(x), model(x), atol=1e-6)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_with_hooks_is_no_affair_of_a_twin(register):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    assert twin(model) is not None and training_twin(model) is not None
    hook = getattr(model[3], register)(lambda *_: None)
    assert twin(model) is None and training_twin(model) is None
    hook.remove()
    assert twin(model) is not None


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Linear(144, 3)

    def forward(self, x):
        return self.second(nn.functional.dropout(self.first(x).relu().flatten(1), 0.5, True))


def test_the_first_pass_draws_as_all_others_do():
    model = Random().train()
    running = training_twin(model)
    x = torch.rand(5, 1, 8, 8)
    logits = []
    for _ in range(2):
        torch.manual_seed(3)
        logits.append(running(x))
    assert torch.equal(*logits)


def test_hooks_of_whatever_a_trace_calls_count():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))
    model[1].register_forward_hook(lambda module, inputs, out: out * 0)
    assert twin(model) is None and training_twin(model) is None


class Standardised(nn.Conv2d):
    """What it computes stands in a part that a mask does not show."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def test_a_convolution_of_the_users_own_stays_what_it_is_under_a_mask():
    model, x = (
        nn.Sequential(Standardised(3, 4, 3), nn.Conv2d(4, 2, 3)).eval(),
        torch.rand(2, 3, 8, 8),
    )
    for layer in prunable_layers(model).values():
        masks.install(layer, masks.FixedMask(torch.rand(layer.shape) < 0.3))
    assert torch.allclose(twin(model).current()(x), model(x), atol=1e-6)
    assert torch.allclose(training_twin(model)(x), model(x), atol=1e-6)


class ByName(nn.Module):
    """Gives its modules what they read by its name."""

    def __init__(self):
        super().__init__()
        self.conv, self.same, self.linear = nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x):
        seen = self.same(input=self.conv(input=x).relu().mean((2, 3)))
        return self.linear(input=F.dropout(seen, training=False))


def test_modules_may_be_called_by_name():
    model, x = ByName().eval(), torch.rand(2, 3, 8, 8)
    assert torch.allclose(twin(model).current()(x), model(x), atol=1e-6)
    assert training_twin(model.train())(x).shape == (2, 2)


@pytest.mark.parametrize("compact", [False, True])
def test_a_mask_that_is_loaded_into_the_old_ones_place_is_seen(compact):
    model, other = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()) for _ in range(2))
    for network in (model, other):
        for layer in prunable_layers(network).values():
            kept = torch.zeros(layer.size, dtype=torch.bool)
            kept[torch.randperm(layer.size)[:20]] = True
            masks.fix(layer, kept.view(layer.shape))
        if compact:
            masks.compact(network)
    x, function, running = torch.rand(2, 3, 8, 8), twin(model), training_twin(model)
    function.current()(x), running(x)
    model.load_state_dict(other.state_dict())
    assert torch.allclose(model(x), other(x))
    assert torch.allclose(function.current()(x), other(x), atol=1e-6)
    assert torch.allclose(running(x), other(x), atol=1e-6)


def test_what_torch_runs_between_regions_may_be_rounded():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten()
    )
    x = torch.rand(2, 3, 8, 8)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        for function in (twin(model).current(), training_twin(model.train())):
            logits = function(x.clone().requires_grad_())
            assert torch.allclose(logits.float(), expected, atol=0.05)
            logits.sum().backward()


def test_a_number_that_is_none_does_not_vanish_in_a_relu():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model.append(nn.Flatten())
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    for count in (1, 20):
        x = torch.rand(count, 3, 8, 8)
        assert twin(model).current()(x).isnan().all()
        assert training_twin(model.train())(x).isnan().all()


def test_variances_do_not_drown_in_their_means():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Flatten()).train()
    nn.init.ones_(model[0].weight)
    nn.init.constant_(model[0].bias, 100.0)
    x = 0.1 * torch.rand(20, 1, 8, 8)
    exact = copy.deepcopy(model).double()
    got, wanted = training_twin(model)(x), exact(x.double())
    assert torch.allclose(got.double(), wanted, atol=1e-2)
    assert torch.allclose(model[1].running_var.double(), exact[1].running_var, rtol=1e-6)
