# SPDX-License-Identifier: Apache-2.0
"""MAD against its formulas: soft masks by hand-written Adam, saliency by full K-FAC factors."""

from math import expm1, log

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harprune.methods.base import Budget, Sample
from harprune.methods.mad import MAD
from harprune.sparsity import masks

SEEDED = torch.Generator().manual_seed(0)
X, Y = torch.rand(4, 2, 5, 5, dtype=torch.float64, generator=SEEDED), torch.arange(4) % 3
NAMES = ("0.weight", "3.weight")


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)
    ).double()  # fmt: skip


def logits(model, conv, linear, x):
    hidden = F.conv2d(x, conv, model[0].bias, stride=2, padding=1).relu()
    return hidden.flatten(1) @ linear.t() + model[3].bias


def literal_damage(model, steps, rate):
    """Adam on the levels mu of masks softplus(mu) <= 1, from 1 down."""
    weights = [model[0].weight.detach(), model[3].weight.detach()]
    one = log(expm1(1.0))
    levels = [torch.full_like(w, one).requires_grad_() for w in weights]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for t in range(1, steps + 1):
        masked = [w * F.softplus(v) for w, v in zip(weights, levels)]
        gradients = torch.autograd.grad(F.cross_entropy(logits(model, *masked, X), Y), levels)
        for v, g, m, s in zip(levels, gradients, first, second):
            m.mul_(0.9).add_(0.1 * g)
            s.mul_(0.999).add_(0.001 * g * g)
            step = m / (1 - 0.9**t) / ((s / (1 - 0.999**t)).sqrt() + 1e-8)
            v.data = (v.data - rate * step).clamp(max=one)
    return [(w - w * F.softplus(v)).detach() for w, v in zip(weights, levels)]


def literal_saliency(model, damage):
    """1/2 G_ii dw_ij (dw_i A)_j with A and G summed image by image, position by position.

    A and G are those of the weights that the soft masks leave.
    """
    padded = F.pad(X, (1, 1, 1, 1))
    left = [model[0].weight.detach() - damage[0], model[3].weight.detach() - damage[1]]
    before = F.conv2d(X, left[0], model[0].bias, stride=2, padding=1).detach()
    before.requires_grad_()
    after = before.relu().flatten(1)
    out = after @ left[1].t() + model[3].bias
    loss = F.cross_entropy(out, Y, reduction="sum")
    to_hidden, to_out = torch.autograd.grad(loss, [before, out])
    a_conv, a_linear = torch.zeros(18, 18).double(), torch.zeros(27, 27).double()
    g_conv, g_linear = torch.zeros(3).double(), torch.zeros(3).double()
    for n in range(len(X)):
        for row in range(3):
            for column in range(3):
                patch = padded[n, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].flatten()
                a_conv += torch.outer(patch, patch) / len(X)
                g_conv += to_hidden[n, :, row, column] ** 2 / (9 * len(X))
        a_linear += torch.outer(after[n], after[n]).detach() / len(X)
        g_linear += to_out[n] ** 2 / len(X)
    conv, linear = damage[0].flatten(1), damage[1]
    return {
        "0.weight": (0.5 * g_conv[:, None] * conv * (conv @ a_conv)).view(3, 2, 3, 3),
        "3.weight": 0.5 * g_linear[:, None] * linear * (linear @ a_linear),
    }


def test_the_saliency_is_that_of_the_formulas(model):
    method = MAD(mask_steps=6, mask_rate=0.2)
    method.attach(model, Budget(0.1, floor=0.0))
    method.observe(model.eval(), [(X, Y), (X, Y)])
    damage = literal_damage(model, 6, 0.2)
    assert all((d.abs() > 0).any() for d in damage)
    expected = {name: 2 * s for name, s in literal_saliency(model, damage).items()}
    for name in NAMES:
        scale = expected[name].abs().max()
        assert torch.allclose(method._scores[name], expected[name], atol=1e-9 * scale, rtol=1e-6)
    method.settle(model)
    ranked = torch.cat([s.flatten() for s in expected.values()]).sort(descending=True).values
    for name, kept in masks.kept_masks(model).items():
        assert torch.equal(kept, expected[name] >= ranked[int(0.1 * 135) - 1]), name


def test_what_follows_a_layer_may_work_in_place(model):
    scores = []
    for in_place in (False, True):
        model[1] = nn.ReLU(inplace=in_place)
        method = MAD(mask_steps=2)
        method.attach(model, Budget(0.1, floor=0.0))
        method.observe(model.eval(), [(X, Y)])
        scores.append(method._scores)
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in NAMES)


def test_the_masks_take_away_damage_and_never_add(model):
    method = MAD()
    method.attach(model, Budget(0.3))
    layers = Budget(0.3).layers(model)
    damage = method._damage(model.eval(), layers, X, Y)
    for name, layer in layers.items():
        share = damage[name] / layer.parameter
        assert share.min() >= 0.0 and share.max() <= 1.0
    left = [layers[n].parameter - damage[n] for n in NAMES]
    whole = [layers[n].parameter for n in NAMES]
    assert F.cross_entropy(logits(model, *left, X), Y) < 0.98 * F.cross_entropy(
        logits(model, *whole, X), Y
    )


def test_all_training_images_are_asked_for_under_attack():
    # Twenty steps of the soft masks and one pass for the factors.
    assert MAD().sample == Sample(None, attacked=True, passes=21)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(2, 2, 3, groups=2), nn.ConvTranspose2d(2, 3, 3), nn.Conv1d(2, 2, 3)]
)
def test_a_layer_without_factors_is_named(layer):
    with pytest.raises(ValueError, match=r"mad has no K-FAC factors for 0\.weight; exclude it"):
        MAD().check(nn.Sequential(layer, nn.Linear(3, 3)), Budget(0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": 0}, "batches = 0"),
        ({"mask_steps": 0}, "mask_steps = 0"),
        ({"mask_rate": 0.0}, "mask_rate 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MAD(**options)
