# SPDX-License-Identifier: Apache-2.0
"""A trace is refused where the model does what it would not say, and the reason is said."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from harprune.sparsity import masks
from harprune.sparsity.execution import training_twin, twin
from harprune.sparsity.layers import prunable_layers
from harprune.sparsity.tracing import Untraceable, traced


class Model(nn.Module):
    """Two layers, and `between` them what a test is about."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.head, self.between = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), between
        self.register_buffer("mean", torch.ones(4))
        self.count, self.pair = 0, torch.zeros(2)

    def forward(self, x):
        return self.head(self.between(self, self.conv(x)).mean((2, 3)))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, g):
        return g


class Reversed(torch.autograd.Function):
    """Its forward does nothing that could be written down."""

    @staticmethod
    def forward(ctx, x, slope=1.0):
        return x

    @staticmethod
    def backward(ctx, g):
        return -g, None


reverse = Reversed.apply
generator, drawing = torch.Generator(), np.random.default_rng(0)


def without_gradients(model, x):
    with torch.no_grad():
        return x * 2


def in_low_precision(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model.conv(F.pad(x[:, :3], (1, 1, 1, 1)))


def counted(model, x):
    model.count += 1
    return x * (model.count % 2)


def kept(model, x):
    model.seen = x
    return x


def running(model, x):
    model.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
    return x


def running_in_part(model, x):
    model.mean.view(2, 2)[0].add_(x.mean())
    return x


def tensor_kept_outside(model, x):
    model.pair.add_(1)
    return x


def functional_norm(model, x):
    return F.batch_norm(x, model.mean, model.mean + 0, training=True)


def into(model, x):
    torch.mean(x, (0, 2, 3), out=model.mean)
    return x


def by_view(model, x):
    x[:, :2].mul_(2.0)
    return x


REFUSED = {
    "straight through": (lambda m, x: Rounded.apply(x), "calls Rounded, whose backward"),
    "of a weight": (lambda m, x: F.conv2d(x, Rounded.apply(m.conv.weight[:, :1]), groups=4),
                    "calls Rounded, whose backward"),
    "apply held": (lambda m, x: reverse(x), "calls Reversed, whose backward"),
    "no_grad": (without_gradients, "switches gradients or autocast"),
    "autocast": (in_low_precision, "switches gradients or autocast"),
    "random": (lambda m, x: x if random.random() < 2 else -x, "draws random numbers"),
    "numpy": (lambda m, x: x * np.random.rand(), "draws random numbers"),
    "torch": (lambda m, x: x + torch.randn(1, 4, 1, 1), "draws random numbers"),
    "own generator": (lambda m, x: x + torch.randn(4, 1, 1, generator=generator),
                      "another constant each time"),
    "own generator of numpy": (lambda m, x: x + torch.from_numpy(drawing.random((4, 1, 1))),
                               "another constant each time"),
    "counter": (counted, "changes 'count' of Model"),
    "kept": (kept, "changes 'seen' of Model"),
    "tensor kept outside": (tensor_kept_outside, "changes 'pair' of Model"),
    "running mean": (running, "changes its mean in place"),
    "a part of it": (running_in_part, "changes its mean in place"),
    "functional batch norm": (functional_norm, "moves running statistics"),
    "out": (into, "changes its mean in place"),
    "a view": (by_view, "changes a part of a tensor in place"),
    "control flow": (lambda m, x: x if x.sum() > 0 else -x, r"TraceError \(symbolically traced"),
}  # fmt: skip


@pytest.mark.parametrize(("between", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_trace_does_not_say_is_left_to_torch(between, reason):
    model = Model(between)
    before = [dict(vars(model)), model.mean.clone(), random.getstate(), torch.get_rng_state()]
    drawn = np.random.get_state()[1].tolist()
    with pytest.raises(Untraceable, match=f"cannot be traced by torch.fx: it .*{reason}") as caught:
        traced(model)
    assert "\n" not in str(caught.value)
    assert twin(model) is None and training_twin(model) is None
    assert dict(vars(model)) == before[0] and torch.equal(model.mean, before[1])
    assert random.getstate() == before[2] and torch.equal(torch.get_rng_state(), before[3])
    assert np.random.get_state()[1].tolist() == drawn


def test_functions_work_again_after_a_trace():
    with pytest.raises(Untraceable):
        traced(Model(lambda model, x: reverse(x)))
    x = torch.ones(2, requires_grad=True)
    reverse(x).sum().backward()
    assert x.grad.tolist() == [-1.0, -1.0]
    assert "apply" not in vars(torch.autograd.Function.__base__)


TRUSTED = {
    "drawn for a tensor": lambda model, x: x + 0 * torch.rand_like(x),
    "a constant": lambda model, x: x - torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1),
    "a view of a buffer": lambda model, x: x - model.mean[None, :, None, None],
    "a map changed when flat": lambda model, x: F.relu(x.flatten(1), True).view(-1, 4, 6, 6),
}


@pytest.mark.parametrize("between", TRUSTED.values(), ids=TRUSTED)
def test_what_a_trace_says_is_trusted(between):
    model, x = Model(between), torch.rand(20, 3, 8, 8)
    held = list(vars(model))
    follower, trained = twin(model), training_twin(model)
    assert list(vars(model)) == held
    assert torch.allclose(trained(x), model(x), atol=1e-6)
    model.mean = torch.rand(4)  # another tensor in its place
    assert torch.allclose(follower.current()(x), model(x), atol=1e-6)
    low = twin(model, dtype=torch.bfloat16).current()(x)
    assert torch.allclose(low, model(x), atol=0.05)


def test_the_reason_names_the_line_and_the_part():
    model = nn.Sequential(nn.Identity(), Model(lambda model, x: x if x.sum() > 0 else -x))
    with pytest.raises(Untraceable, match=rf"in line \d+ of {__file__}, in its part 1; take contr"):
        traced(model)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(("wrap", "inner"), [(compiled, "_orig_mod"), (nn.DataParallel, "module")])
def test_a_wrapper_is_named_with_what_it_wraps(wrap, inner):
    model = nn.Sequential(wrap(nn.Linear(3, 2)))
    with pytest.raises(Untraceable, match=rf"0 \(\w+\) is a wrapper; .* its \.{inner}"):
        traced(model)


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_pre_hook"],
)
def test_hooks_of_the_model_itself_count(register):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    getattr(model, register)(lambda *_: None)
    with pytest.raises(Untraceable, match=r"the model itself \(Sequential\) has hooks"):
        traced(model)


@pytest.mark.parametrize("part", [None, 1])
def test_a_forward_that_is_not_the_classs_counts(part):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    module = model if part is None else model[part]
    module.forward = lambda x: x * 0
    with pytest.raises(Untraceable, match="has a forward of its own"):
        traced(model)


class ByWeight(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return F.linear(self.conv(x).relu().mean((2, 3)), self.head.weight, self.head.bias)


def test_a_masked_weight_that_is_read_elsewhere_learns_and_is_followed():
    torch.manual_seed(0)
    model, x = ByWeight(), torch.rand(20, 3, 8, 8)
    for layer in prunable_layers(model).values():
        masks.fix(layer, torch.rand(layer.shape) < 0.7)
    trained, follower = training_twin(model), twin(model)
    weight = model.head.parametrizations.weight.original
    for _ in range(2):
        weight.grad = None
        with parametrize.cached():
            assert torch.allclose(follower.current()(x), model(x), atol=1e-6)
            trained(x).square().sum().backward()
        (wanted,) = torch.autograd.grad(model(x).square().sum(), weight)
        assert torch.allclose(weight.grad, wanted, atol=1e-5)
        with torch.no_grad():
            weight.sub_(0.1 * weight.grad)
