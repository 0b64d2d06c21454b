# SPDX-License-Identifier: Apache-2.0
"""TwinRep against its formulas: the product, what decay does to it, when and what is pruned."""

import pytest
import torch
from torch import nn

from harprune.methods.base import Budget
from harprune.methods.twinrep import TwinRep
from harprune.sparsity import masks
from harprune.sparsity.granularity import Granularity

GRAINS = [Granularity.WEIGHT, Granularity.FILTER, Granularity.CHANNEL]


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 25, 5),
    )  # fmt: skip


def parts_of(model):
    return masks.installed(model)


@pytest.mark.parametrize("grain", GRAINS)
def test_the_network_computes_with_the_product(grain):
    model, method = network(), TwinRep()
    method.attach(model, Budget(0.5, granularity=grain))
    for name, (layer, mask) in parts_of(model).items():
        w, a = layer.parameter, mask.factor
        outputs_first = name != "2.weight"
        if grain is Granularity.WEIGHT:
            expected = w * a
        elif (grain is Granularity.FILTER) == outputs_first:
            expected = torch.einsum("oj,j...->o...", a, w)
        else:
            expected = torch.einsum("ij,oj...->oi...", a, w)
        assert torch.allclose(layer.weight, expected, atol=1e-6), name
        assert not torch.allclose(layer.weight, w, atol=1e-3)


@pytest.mark.parametrize("grain", GRAINS)
def test_the_second_factor_begins_as_torch_begins_a_weight(grain):
    """Uniform within 1 / sqrt(inputs): kaiming_uniform_ with a = sqrt(5)."""
    model = nn.Sequential(nn.Conv2d(30, 40, 3), nn.Conv2d(40, 50, 1))
    TwinRep().attach(model, Budget(0.5, granularity=grain))
    for _, mask in parts_of(model).values():
        literal = torch.empty_like(mask.factor)
        nn.init.kaiming_uniform_(literal, a=5**0.5)
        assert mask.factor.std().item() == pytest.approx(literal.std().item(), rel=0.1)
        assert mask.factor.abs().max().item() == pytest.approx(literal.abs().max().item(), rel=0.05)


@pytest.mark.parametrize("grain", GRAINS)
def test_inheriting_leaves_the_function_as_it_was(grain):
    model, x = network(), torch.rand(2, 3, 4, 4)
    before = model(x)
    TwinRep(inherit=True).attach(model, Budget(0.5, granularity=grain))
    assert torch.allclose(model(x), before, atol=1e-5)


def test_decay_of_the_factors_is_an_l1_penalty_on_the_product():
    """min over w a = v of (w^2 + a^2) / 2 is |v|, reached where |w| = |a|: as `inherit` starts."""
    model = network()
    sizes = {n: p.detach().abs().sum() for n, p in model.named_parameters() if p.dim() > 1}
    TwinRep(inherit=True).attach(model, Budget(0.5))
    for name, (layer, mask) in parts_of(model).items():
        decay = (layer.parameter.square().sum() + mask.factor.square().sum()) / 2
        assert decay.item() == pytest.approx(sizes[name].item(), rel=1e-5)


@pytest.mark.parametrize("grain", GRAINS)
def test_one_global_threshold_on_the_product_sets_the_masks_once(grain):
    model, method = network(), TwinRep(prune_at=0.5)
    budget = Budget(0.4, granularity=grain, exclude=("2", "5") if grain != GRAINS[0] else ())
    method.attach(model, budget)
    method.begin(epochs=4, steps=1)
    method.epoch_ended(model, 0)
    assert all(mask.kept.all() for _, mask in parts_of(model).values())
    assert not method.budget_met(model)
    norms = {}
    for name, (layer, _) in parts_of(model).items():
        w = layer.weight.detach()
        axes = {"weight": (), "filter": (1, 2, 3), "channel": (0, 2, 3)}[grain.value]
        norms[name] = w.square().sum(dim=axes, keepdim=True).sqrt() if axes else w.abs()
    method.epoch_ended(model, 1)
    assert method.budget_met(model)
    kept = sum(int(mask.kept.sum()) for _, mask in parts_of(model).values())
    ranked = torch.cat([n.flatten() for n in norms.values()]).sort(descending=True).values
    for name, (_, mask) in parts_of(model).items():
        assert torch.equal(mask.kept, norms[name] >= ranked[kept - 1]), name
    if grain is Granularity.WEIGHT:
        assert kept == int(0.4 * ranked.numel())
    before = {name: mask.kept.clone() for name, (_, mask) in parts_of(model).items()}
    with torch.no_grad():
        for _, mask in parts_of(model).values():
            mask.factor.mul_(torch.randn_like(mask.factor))
    method.epoch_ended(model, 2)
    assert all(torch.equal(mask.kept, before[n]) for n, (_, mask) in parts_of(model).items())


@pytest.mark.parametrize("grain", GRAINS)
def test_folding_leaves_a_plain_network_of_the_same_function(grain):
    model, method, x = network(), TwinRep(), torch.rand(2, 3, 4, 4)
    method.attach(model, Budget(0.5, granularity=grain))
    method.begin(epochs=1, steps=1)
    method.epoch_ended(model, 0)
    before = model(x)
    method.settle(model)
    assert torch.equal(model(x), before)
    plain = network()
    plain.load_state_dict(masks.bake(model).state_dict(), strict=True)
    assert torch.equal(plain(x), before)


def test_a_threshold_outside_the_training_is_refused():
    with pytest.raises(ValueError, match="prune_at 0 "):
        TwinRep(prune_at=0.0)
