# SPDX-License-Identifier: Apache-2.0
"""Layers that make other numbers of zeros are refused, harmless ones are not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harprune.sparsity.effective import require_zeros_kept


class Standardised(nn.Conv2d):
    def forward(self, x):
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class Centred(nn.Conv2d):
    """Of each kernel, so that a channel that is gone stays gone."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((2, 3), keepdim=True), bias)


class Binary(nn.Linear):
    def forward(self, x):
        sign = (self.weight >= 0).float() * 2 - 1
        return F.linear(x, self.weight + (sign - self.weight).detach(), self.bias)


class Padded(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Cast(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        low = torch.bfloat16
        return super()._conv_forward(x.to(low), weight.to(low), bias.to(low)).float()


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), weight=F.normalize(self.weight))


class Ternary(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight + (self.weight.sign() - self.weight).detach())


class ByHand(nn.Linear):
    def forward(self, x):
        return x @ self.weight.t()


class Outside(nn.Module):
    """Standardises the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return F.conv2d(x, self.conv.weight - self.conv.weight.mean()).mean((2, 3))


def convolution(kind):
    return nn.Sequential(kind(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def linear(kind):
    return nn.Sequential(nn.Flatten(), kind(48, 2))


IMAGE = torch.rand(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (convolution(Standardised), "0.weight"),
        (convolution(Centred), "0.weight"),
        (linear(Binary), "1.weight"),
        (Outside(), "conv.weight"),
    ],
)
def test_a_layer_that_computes_with_other_weights_is_refused_unless_left_out(model, name):
    model.append(nn.Linear(2, 2)) if isinstance(model, nn.Sequential) else None
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{name} is not what its layer computes with.*exclude"):
        require_zeros_kept(model, IMAGE)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    if isinstance(model, nn.Sequential):
        require_zeros_kept(model, IMAGE, exclude=[name])


def test_zeros_of_a_fresh_layer_do_not_hide_it():
    model = convolution(Standardised)
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ValueError, match="is not what its layer computes with"):
        require_zeros_kept(model, IMAGE)


@pytest.mark.parametrize(
    "model",
    [
        *(convolution(kind) for kind in (nn.Conv2d, Padded, Cast)),
        *(linear(kind) for kind in (nn.Linear, Scaled, Ternary)),
    ],
    ids=lambda model: type(model[0]).__name__ + type(model[1]).__name__,
)
def test_what_keeps_zeros_is_taken(model):
    require_zeros_kept(model, IMAGE)


def test_what_cannot_be_told_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"1\.weight belongs to a ByHand, whose forward is its"):
        require_zeros_kept(linear(ByHand), IMAGE)


def test_a_compiled_model_is_looked_at_as_it_was():
    with pytest.raises(ValueError, match=r"0\.weight is not what its layer computes with"):
        require_zeros_kept(torch.compile(convolution(Standardised), backend="eager"), IMAGE)
