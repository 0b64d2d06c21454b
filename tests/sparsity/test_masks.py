# SPDX-License-Identifier: Apache-2.0
"""Masks on ordinary modules: install, train, share, copy, settle, bake."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from harprune.sparsity import masks
from harprune.sparsity.density import GivenDensity, LearnedDensity
from harprune.sparsity.execution import training_twin
from harprune.sparsity.granularity import Granularity
from harprune.sparsity.layers import prunable_layers


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def learned(model, density):
    for layer in prunable_layers(model).values():
        masks.install(layer, masks.LearnedMask(layer.parameter, density))


def test_the_weight_is_the_product_and_baking_changes_no_logit():
    model, x = network(), torch.rand(2, 3, 8, 8)
    plain = copy.deepcopy(model)
    learned(model, GivenDensity(0.25))
    masks.freeze(model, dict.fromkeys(masks.installed(model), 10))
    logits = model(x)
    assert torch.equal(masks.bake(model)(x), logits)
    assert [int(torch.count_nonzero(m.weight)) for m in (model[0], model[3])] == [10, 10]
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(plain(x), logits)
    assert type(model[0]) is nn.Conv2d


def test_a_shared_density_is_one_parameter_also_in_a_copy():
    model = network()
    learned(model, LearnedDensity(0.3, 0.01))
    copied = copy.deepcopy(model)
    for each in (model, copied):
        assert sum(n.endswith("logit") for n, _ in each.named_parameters()) == 1
    first, second = [m.density for _, m in masks.installed(copied).values()]
    assert first is second
    assert first is not masks.installed(model)["0.weight"][1].density


def test_baking_a_copy_leaves_the_original_masked():
    model, x = network(), torch.rand(2, 3, 8, 8)
    learned(model, GivenDensity(0.25))
    masks.freeze(model, dict.fromkeys(masks.installed(model), 10))
    logits, copied = model(x), copy.deepcopy(model)
    assert torch.equal(masks.bake(copied)(x), logits) and type(copied[0]) is nn.Conv2d
    assert torch.equal(model(x), logits) and len(masks.installed(model)) == 2
    assert torch.equal(masks.bake(model)(x), logits) and type(model[0]) is nn.Conv2d


def test_a_cached_mask_serves_attack_and_loss_with_equal_gradients():
    x = torch.rand(4, 3, 8, 8)

    def gradients(cached):
        model = network()
        learned(model, LearnedDensity(0.3, 0.01))
        with parametrize.cached() if cached else torch.enable_grad():
            point = x.clone().requires_grad_(True)
            (direction,) = torch.autograd.grad(model(point).square().sum(), point)
            model(x + 0.1 * direction.sign()).square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain, cached = gradients(False), gradients(True)
    assert plain.keys() == cached.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, cached[name]), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_pruned_weights_stay_exactly_zero_under_momentum_and_decay(weight_decay):
    model, x = network(), torch.rand(8, 3, 8, 8)
    layers = prunable_layers(model)
    kept = {n: torch.rand(layer.shape) < 0.3 for n, layer in layers.items()}
    for name, layer in layers.items():
        masks.fix(layer, kept[name])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    for _ in range(5):
        model(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    masks.bake(model)
    for name, layer in prunable_layers(model).items():
        assert not layer.weight[~kept[name]].any()
        assert layer.weight[kept[name]].all()


def test_a_weight_shared_by_two_layers_has_one_mask_and_stays_shared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    model = Tied()
    (layer,) = prunable_layers(model).values()
    assert len(layer.places) == 2
    masks.fix(layer, torch.rand(6, 6) < 0.5)
    assert torch.equal(model.first.weight, model.second.weight)
    masks.bake(model)
    assert model.first.weight is model.second.weight


@pytest.mark.parametrize("grain", [Granularity.FILTER, Granularity.CHANNEL])
def test_filter_and_channel_masks_are_masks_of_the_same_type(grain):
    model = network()
    layer = prunable_layers(model)["0.weight"]
    scores = grain.magnitude(layer, layer.parameter.detach())
    masks.install(layer, masks.LearnedMask(scores, GivenDensity(0.5)))
    masks.freeze(model, {"0.weight": grain.units(layer) - 1})
    axis = 0 if grain is Granularity.FILTER else 1
    norms = model[0].weight.transpose(0, axis).flatten(1).norm(dim=1)
    expected = scores.flatten().argmin()
    assert (norms == 0).nonzero().flatten().tolist() == [int(expected)]


def test_a_fixed_mask_must_be_boolean():
    with pytest.raises(ValueError, match="boolean"):
        masks.FixedMask(torch.ones(3))


@pytest.mark.parametrize(("value", "floor"), [(0.5, 1.0), (0.01, 0.01), (0.005, 0.01), (1.5, 0.1)])
def test_a_density_outside_its_interval_is_refused(value, floor):
    with pytest.raises(ValueError, match="must lie"):
        LearnedDensity(value, floor)


@pytest.mark.parametrize(
    ("value", "start"), [(1.0, 0.99 * 0.999 + 0.001), (0.1, 0.1), (0.002, 0.002)]
)
def test_a_learned_density_starts_where_it_is_told_or_just_below_dense(value, start):
    assert LearnedDensity(value, 0.001)().item() == pytest.approx(start, rel=1e-5)


class Tied(nn.Module):
    """Two places that hold one weight, and a norm between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.norm, self.out = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.second(torch.relu(self.norm(self.first(x))))
        return self.out(x.mean((2, 3)))


@pytest.mark.parametrize("on_kernels", [False, True])
def test_training_kept_values_alone_equals_training_under_the_mask(on_kernels):
    def fixed():
        torch.manual_seed(0)
        model = Tied().double()
        for layer in prunable_layers(model).values():
            masks.fix(layer, torch.rand(layer.shape) < 0.4)
        return model

    masked, alone = fixed(), fixed()
    masks.compact(alone)
    sizes = {p.numel() for n, p in alone.named_parameters() if "original" in n}
    assert sizes == {int(kept.sum()) for kept in masks.kept_masks(masked).values()}
    x, y = torch.rand(6, 4, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    for model in (masked, alone):
        run = training_twin(model) if on_kernels else model
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        for _ in range(4):
            sgd.zero_grad()
            F.cross_entropy(run(x), y).backward()
            sgd.step()
    masks.expand(alone)
    assert alone.first.parametrizations.weight.original is (
        alone.second.parametrizations.weight.original
    )
    assert masks.kept_masks(alone).keys() == masks.kept_masks(masked).keys()
    wanted = masks.bake(masked).state_dict()
    for name, value in masks.bake(alone).state_dict().items():
        assert torch.allclose(value, wanted[name], rtol=1e-10, atol=1e-12), name


def test_a_mask_goes_where_the_weight_is():
    model, density = network().to("meta"), LearnedDensity(0.5, 0.1)
    (layer, other) = prunable_layers(model).values()
    masks.install(layer, masks.LearnedMask(torch.rand(layer.shape), density))
    masks.install(other, masks.OpenMask(note=torch.zeros(3)))
    assert density.logit.is_meta
    assert all(tensor.is_meta for tensor in model.state_dict().values())
