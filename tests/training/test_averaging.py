# SPDX-License-Identifier: Apache-2.0
"""The averaged network against the closed form of its weights, under masks and in the loop."""

import copy

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from harprune.robustness.objectives import Free
from harprune.robustness.threat import Linf
from harprune.sparsity import masks
from harprune.sparsity.layers import prunable_layers
from harprune.training.averaging import Average
from harprune.training.batches import Batches
from harprune.training.loop import fit
from harprune.training.schedules import constant
from harprune.training.splits import from_arrays


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def batches() -> Batches:
    torch.manual_seed(9)
    split = from_arrays(torch.rand(18, 1, 4, 4), torch.arange(18) % 3)
    return Batches(split, 6, seed=1)


def loss(model, x, y):
    return F.cross_entropy(model(x.double()), y)


def train(model, average, objective=loss, **options) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    fit(
        model, batches(), loss=objective, optimiser=optimiser, schedule=constant, epochs=3,
        fabric=fabric, seed=0, average=average, **options,
    )  # fmt: skip


def closed_form(states: list[dict], decay: float, name: str) -> torch.Tensor:
    """sum_s decay^(t - s) w_s over the sum of the same powers."""
    powers = [decay ** (len(states) - 1 - s) for s in range(len(states))]
    return sum(p * state[name] for p, state in zip(powers, states)) / sum(powers)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_weights_are_the_weighted_mean_of_all_steps(decay):
    model, states = network(), []
    average = Average(model, decay)

    def note(step, value):
        states.append(copy.deepcopy(model.state_dict()))
        for name, value in average.module.named_parameters():
            wanted = closed_form(states, decay, name)
            assert torch.allclose(value, wanted, rtol=1e-12, atol=1e-14), (step, name)
        for name, value in average.module.named_buffers():
            assert torch.equal(value, states[-1][name])

    train(model, average, after_step=note)
    assert len(states) == 9


def test_statistics_of_batch_norm_are_the_averages_own():
    """At the end of an epoch: the mean over its batches, as the averaged weights see them."""
    model, seen = network(), []
    average = Average(model, 0.9)
    momentum = model[1].momentum

    def check(epoch):
        x = torch.stack([average.module[0](x.double()) for x, _ in batches().epoch(epoch)])
        mean = x.mean((1, 3, 4)).mean(0)
        variance = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in x]).mean(0)
        norm = average.module[1]
        assert torch.allclose(norm.running_mean, mean) and torch.allclose(
            norm.running_var, variance
        )
        assert norm.momentum == momentum and int(norm.num_batches_tracked) == 3
        seen.append(epoch)

    train(model, average, after_epoch=check)
    assert seen == [0, 1, 2]


def test_the_first_attack_while_settling_meets_statistics_that_were_learned():
    model = network()
    average = Average(model, 0.9)
    train(model, average)
    learned, met = copy.deepcopy(average.module[1].state_dict()), []

    def forward(module, x, y):
        met.append(module[1].running_var.clone())  # what an attack in eval mode has
        module(x.double())

    average.settle(batches().epoch(0), forward)
    assert torch.equal(met[0], learned["running_var"]) and not torch.equal(met[1], met[0])


def test_a_batch_norm_in_eval_mode_keeps_its_statistics():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    model = Frozen(*network())
    average = Average(model, 0.9)
    train(model, average)
    assert torch.equal(average.module[1].running_mean, torch.zeros(4).double())


def test_an_average_leaves_the_training_as_it_is():
    alone, watched = network(), network()
    train(alone, None)
    train(watched, Average(watched, 0.9))
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_every_optimiser_step_counts_where_a_batch_gets_several():
    model = network().float()
    average = Average(model, 0.9)
    train(model, average, Free(Linf(0.1), replays=2), replays=2)
    assert int(average.n_averaged) == 18


def test_kept_weights_average_as_masked_weights_do():
    def fixed() -> nn.Module:
        model = network()
        torch.manual_seed(3)
        for layer in prunable_layers(model).values():
            masks.fix(layer, torch.rand(layer.shape) < 0.3)
        return model

    masked, compact = fixed(), fixed()
    masks.compact(compact)
    averages = [Average(model, 0.8) for model in (masked, compact)]
    for model, average in zip((masked, compact), averages):
        train(model, average)
    held = [p for n, p in averages[1].module.named_parameters() if "original" in n]
    kept = masks.kept_masks(masked)
    assert [p.numel() for p in held] == [int(k.sum()) for k in kept.values()]
    masks.expand(averages[1].module)
    assert not torch.equal(averages[1].module[0].weight, masked[0].weight)
    first, second = (masks.bake(average.module).state_dict() for average in averages)
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-10, atol=1e-12), name
    assert torch.equal(first["0.weight"] != 0, kept["0.weight"])
