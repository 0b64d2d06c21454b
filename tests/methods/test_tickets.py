# SPDX-License-Identifier: Apache-2.0
"""Boosting tickets (Li20) and robust scratch tickets (RST): what is ranked, what is put back."""

import copy
from math import sqrt

import pytest
import torch
from torch import nn

from harprune.methods.base import Budget
from harprune.methods.li20 import Li20
from harprune.methods.rst import RST
from harprune.sparsity import masks
from harprune.sparsity.granularity import Granularity


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )


@pytest.mark.parametrize("rewind", [True, False])
def test_li20_ranks_what_was_trained_and_keeps_where_it_began(rewind):
    model, method = network(), Li20(rewind=rewind)
    start = copy.deepcopy(model.state_dict())
    method.attach(model, Budget(0.25, floor=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        model[0].weight.mul_(100.0)  # a layer's scale must not matter
        model[1].running_mean.add_(1.0)
    trained = copy.deepcopy(model.state_dict())
    relative = {n: trained[n].abs() / trained[n].abs().mean() for n in ("0.weight", "4.weight")}
    ranked = torch.cat([r.flatten() for r in relative.values()]).sort(descending=True).values
    threshold = ranked[int(0.25 * 252) - 1]
    method.settle(model)
    assert torch.equal(masks.kept_masks(model)["0.weight"], relative["0.weight"] >= threshold)
    assert torch.equal(masks.kept_masks(model)["4.weight"], relative["4.weight"] >= threshold)
    masks.bake(model)
    source = start if rewind else trained
    for name, value in model.state_dict().items():
        kept = relative[name] >= threshold if name in relative else torch.ones_like(value)
        assert torch.equal(value, source[name] * kept), name


def test_li20_judges_filters_by_their_mean_magnitude():
    model, method = network(), Li20()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, 1.0, 2.0, 1.0]).view(4, 1, 1, 1))
        model[4].weight.copy_(torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0]).view(5, 1))
    method.attach(model, Budget(0.4, granularity=Granularity.FILTER, exclude=("4",)))
    method.settle(model)
    assert masks.kept_masks(model)["0.weight"].flatten().tolist() == [True, False, False, False]


def test_rst_prunes_a_network_of_signed_constants():
    model, method = network(), RST()
    with torch.no_grad():
        model[1].weight.fill_(3.0)
        model[1].running_var.fill_(3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method.attach(model, Budget(0.3))
    layers = {name: layer for name, (layer, _) in masks.installed(model).items()}
    for name, fan_in in (("0.weight", 18), ("4.weight", 36)):
        weight = layers[name].parameter
        assert torch.equal(weight.abs(), torch.full_like(weight, sqrt(2 / fan_in)))
        assert (weight > 0).any() and (weight < 0).any()
        assert not torch.equal(weight.sign(), before[name].sign())
    assert model[0].bias.eq(0).all() and model[4].bias.eq(0).all()
    assert model[1].weight.eq(1).all() and model[1].running_var.eq(1).all()


def test_rst_keeps_the_highest_scores_and_trains_nothing_else():
    model, method = network(), RST()
    method.attach(model, Budget(0.3))
    parts = masks.installed(model)
    scores = {name: mask.scores.detach().clone() for name, (_, mask) in parts.items()}
    assert all(s.abs().max() <= 1 / sqrt(parts[n][0].fan_in) for n, s in scores.items())
    trained = [p for group in method.trainable(model) for p in group["params"]]
    assert {id(p) for p in trained} == {id(mask.scores) for _, mask in parts.values()}
    method.settle(model)
    for name, kept in masks.kept_masks(model).items():
        least = scores[name][kept].abs().min()
        assert (scores[name][~kept].abs() <= least).all()
