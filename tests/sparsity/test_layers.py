# SPDX-License-Identifier: Apache-2.0
"""Which parameters are prunable, and what their names are."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from harprune.sparsity import masks
from harprune.sparsity.density import GivenDensity
from harprune.sparsity.granularity import Granularity
from harprune.sparsity.layers import prunable_layers, require_weights_of_its_own


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(2, 4, 3)
        self.three = nn.Conv3d(2, 4, 3)
        self.up = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.BatchNorm2d(4)
        self.table = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 3)


def test_the_usual_layers_are_found_in_order_and_nothing_else():
    assert list(prunable_layers(Mixed())) == [
        "one.weight",
        "three.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    ]


def test_names_do_not_change_under_masks():
    model = Mixed()
    before = list(prunable_layers(model))
    for layer in prunable_layers(model).values():
        masks.install(layer, masks.LearnedMask(layer.parameter, GivenDensity(0.5)))
    assert list(prunable_layers(model)) == before
    assert list(masks.installed(model)) == before


def test_patterns_choose_and_take_away():
    model = Mixed()
    assert list(prunable_layers(model, include=("table.*", "head"))) == [
        "table.weight",
        "head.weight",
    ]
    assert "head.weight" not in prunable_layers(model, exclude=("head",))


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(ValueError, match=r"'haed.weight'.*nearest is 'head.weight'"):
        prunable_layers(Mixed(), exclude=("haed.weight",))


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="nothing to prune"):
        prunable_layers(nn.Sequential(nn.BatchNorm2d(3)))


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        lambda layer: prune.identity(layer, "weight"),
    ],
)
def test_a_weight_computed_from_others_is_refused_unless_left_out(compute):
    model = Mixed()
    require_weights_of_its_own(model)
    compute(model.head)
    with pytest.raises(ValueError, match=r"head\.weight is computed from other tensors"):
        require_weights_of_its_own(model)
    require_weights_of_its_own(model, exclude=("head",))
    require_weights_of_its_own(model, include=("one",))


def test_fan_in_and_units_follow_the_kind_of_layer():
    layers = prunable_layers(Mixed())
    assert layers["one.weight"].fan_in == 2 * 3
    assert layers["up.weight"].fan_in == 3 * 3 * 3
    assert Granularity.FILTER.score_shape(layers["three.weight"]) == torch.Size([4, 1, 1, 1, 1])
    assert Granularity.CHANNEL.units(layers["three.weight"]) == 2
    with pytest.raises(ValueError, match="groups"):
        Granularity.CHANNEL.units(layers["up.weight"])


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(6, 4), nn.Linear(4, 6), nn.Linear(4, 6)
        self.a.weight = self.b.weight = self.table.weight
        self.c = nn.Linear(6, 2)


def test_a_shared_weight_is_chosen_and_left_out_under_any_of_its_names():
    model = Shared()
    shared, own = prunable_layers(model).values()
    assert shared.name == "table.weight" and own.name == "c.weight"
    assert [module for module, _ in shared.places] == [model.table, model.a, model.b]
    assert list(prunable_layers(model, include=["b"])) == ["table.weight"]
    for name in ("table", "a", "b.weight"):
        assert list(prunable_layers(model, exclude=[name])) == ["c.weight"]
    masks.install(shared, masks.FixedMask(torch.rand(6, 4) < 0.5))
    assert list(masks.installed(model)) == ["table.weight"]
    masks.bake(model)
    assert model.a.weight is model.b.weight is model.table.weight
    assert type(model.table) is nn.Embedding and type(model.b) is nn.Linear


def test_a_weight_that_the_user_computes_is_not_overwritten():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 2))
    nn.utils.parametrizations.spectral_norm(model[0])
    require_weights_of_its_own(model)
    with pytest.raises(ValueError, match=r"0\.weight is computed from other tensors"):
        require_weights_of_its_own(model, include=["0.weight"])


def test_filters_of_a_transposed_convolution_in_groups_are_refused():
    (layer,) = prunable_layers(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))).values()
    with pytest.raises(ValueError, match="transposed convolution in 2 groups lie one upon another"):
        Granularity.FILTER.units(layer)
