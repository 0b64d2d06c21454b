# SPDX-License-Identifier: Apache-2.0
"""BCS-P: signs stay, sleepers are replaced one for one, layers exchange connections by size."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harprune.methods.base import Budget
from harprune.methods.bcs import BCS, _drawn
from harprune.sparsity import allocation, masks

BUDGET = Budget(0.2, allocation=allocation.uniform)


def network():
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 30))


def parts_of(model):
    return masks.installed(model)


def active(model):
    return sum(int(mask.kept.sum()) for _, mask in parts_of(model).values())


def test_it_starts_with_a_random_part_of_the_network():
    model = network()
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    BCS().attach(model, BUDGET)
    for name, (layer, mask) in parts_of(model).items():
        assert torch.equal(layer.weight, dense[name] * mask.kept)
        assert abs(float(mask.kept.float().mean()) - 0.2) < 0.01
    assert active(model) == int(0.2 * 1728)


def test_a_weight_that_reaches_zero_sleeps_and_another_wakes():
    model, method = network(), BCS(noise=0.0)
    method.attach(model, BUDGET)
    layer, mask = parts_of(model)["3.weight"]
    before, fallen = mask.kept.clone(), mask.kept.flatten().nonzero().flatten()[:40]
    conv_before = parts_of(model)["0.weight"][1].kept.clone()
    with torch.no_grad():
        layer.parameter.view(-1)[fallen[:20]] = -0.1
        layer.parameter.view(-1)[fallen[20:]] = 0.0
        kept_values = layer.parameter.clone()
    method.step_ended(model, 7)
    assert active(model) == int(0.2 * 1728)
    lost = before.clone()
    lost.view(-1)[fallen] = False
    assert mask.kept[lost].all()
    assert torch.equal(layer.parameter[lost], kept_values[lost])
    woken = mask.kept & ~lost
    assert layer.parameter[woken].eq(1e-12).all()
    assert layer.parameter[~mask.kept].eq(0).all()
    conv = parts_of(model)["0.weight"][1].kept
    assert int(conv.sum()) - int(conv_before.sum()) == 40 - int(woken.sum())


def test_a_layer_wakes_in_proportion_to_its_size():
    model, method = network(), BCS(noise=0.0)
    method.attach(model, BUDGET)
    conv = parts_of(model)["0.weight"][1]
    before, asleep = int(conv.kept.sum()), 324
    with torch.no_grad():
        parts_of(model)["3.weight"][0].parameter.zero_()
    method.step_ended(model, 7)
    # One weight in 16 is in the convolution.
    assert int(conv.kept.sum()) - before == pytest.approx(asleep / 16, abs=15)


def test_noise_moves_active_weights_alone():
    model, method = network(), BCS(noise=1e-3)
    method.attach(model, BUDGET)
    before = {n: layer.parameter.detach().clone() for n, (layer, _) in parts_of(model).items()}
    kept = {n: mask.kept.clone() for n, (_, mask) in parts_of(model).items()}
    method.step_ended(model, 0)
    moves = torch.cat([
        (layer.parameter - before[n])[kept[n] & mask.kept]
        for n, (layer, mask) in parts_of(model).items()
    ])  # fmt: skip
    assert 0.5e-3 < moves.std() < 1.5e-3
    # The same step gives the same noise: a resumed run goes the same way.
    again = network()
    other = BCS(noise=1e-3)
    other.attach(again, BUDGET)
    other.load_state_dict(method.state_dict())
    assert torch.equal(
        torch.randn(3, generator=method._random(5)), torch.randn(3, generator=other._random(5))
    )


def test_no_sign_ever_changes_and_the_count_is_constant_in_training():
    model, method = network(), BCS()
    method.attach(model, BUDGET)
    signs = {n: mask.sign.clone() for n, (_, mask) in parts_of(model).items()}
    optimiser = torch.optim.SGD(method.trainable(model), lr=0.5)
    x, y = torch.rand(8, 2, 5, 5), torch.arange(8)
    start = {n: mask.kept.clone() for n, (_, mask) in parts_of(model).items()}
    for step in range(10):
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
        optimiser.zero_grad()
        method.step_ended(model, step)
        assert active(model) == int(0.2 * 1728)
    for name, (layer, mask) in parts_of(model).items():
        assert torch.equal(layer.weight[mask.kept].sign(), signs[name][mask.kept])
    assert any(not torch.equal(start[n], mask.kept) for n, (_, mask) in parts_of(model).items())


def test_layers_are_drawn_by_size_and_never_overfilled():
    random = torch.Generator().manual_seed(0)
    sizes, room = torch.tensor([100.0, 300.0, 600.0]), torch.tensor([10_000, 10_000, 10_000])
    drawn = _drawn(10_000, sizes, room, random)
    assert sum(drawn) == 10_000
    assert drawn == pytest.approx([1000, 3000, 6000], rel=0.1)
    assert _drawn(90, sizes, torch.tensor([100, 20, 10]), random)[1:] == [20, 10]


def test_negative_noise_is_refused():
    with pytest.raises(ValueError, match="noise -1"):
        BCS(noise=-1.0)
