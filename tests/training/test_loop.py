# SPDX-License-Identifier: Apache-2.0
"""The one loop: what it trains, at which rate, with which random numbers; and exact resumes."""

import copy
import random

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F

from harprune.methods.base import Budget
from harprune.methods.harp import HARP
from harprune.robustness.attacks import PGD
from harprune.robustness.objectives import PGDAT, Free
from harprune.robustness.threat import Linf
from harprune.sparsity import masks
from harprune.training import checkpoint
from harprune.training.batches import Batches
from harprune.training.loop import Diverged, fit, step_seed
from harprune.training.schedules import constant, cosine, one_cycle
from harprune.training.splits import from_arrays

BATCHES, EPOCHS = 3, 3


def network(*, norm: bool = True):
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(),
        nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


class Drawing(nn.Module):
    """Noise from Python's and NumPy's generators, in front of a network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x + random.random() * np.random.rand())


def batches():
    torch.manual_seed(9)
    split = from_arrays(torch.rand(20, 1, 4, 4), torch.arange(20) % 3)
    return Batches(split, 6, seed=1)


def natural(model, x, y):
    return F.cross_entropy(model(x), y)


def adversarial():
    return PGDAT(PGD(Linf(0.1), 2))  # with a random start, so that the noise matters


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)


def train(model, optimiser, loss=natural, *, precision="32-true", **options):
    """`fit` with everything that a test does not care about."""
    settings = {"schedule": constant, "epochs": EPOCHS, "seed": 0} | options
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fit(model, batches(), loss=loss, optimiser=optimiser, fabric=fabric, **settings)


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the literal loop --------------------------------------------------------------------------


def test_it_is_the_loop_anyone_would_write():
    model, twin = network(), network()
    train(model, sgd(model.parameters()), adversarial(), schedule=cosine)

    optimiser, loss = sgd(twin.parameters()), adversarial()
    for epoch in range(EPOCHS):
        for index, (x, y) in enumerate(batches().epoch(epoch)):
            step = epoch * BATCHES + index
            optimiser.param_groups[0]["lr"] = 0.1 * cosine(step / (EPOCHS * BATCHES))
            torch.manual_seed(step_seed(0, step))
            twin.train()
            loss(twin, x, y).backward()
            optimiser.step()
            optimiser.zero_grad()
    assert same(model, twin)


def test_callbacks_come_in_order_with_the_loss_of_each_step():
    seen, model = [], network()
    train(
        model,
        sgd(model.parameters()),
        after_step=lambda step, loss: seen.append((step, loss)),
        after_epoch=lambda epoch: seen.append(f"epoch {epoch}"),
        epochs=2,
    )
    assert [s if isinstance(s, str) else s[0] for s in seen] == [
        0, 1, 2, "epoch 0", 3, 4, 5, "epoch 1"
    ]  # fmt: skip
    losses = [s[1] for s in seen if not isinstance(s, str)]
    assert all(loss.shape == () and not loss.requires_grad for loss in losses)
    twin, batch = network().train(), next(iter(batches().epoch(0)))
    torch.manual_seed(step_seed(0, 0))
    assert torch.equal(losses[0], natural(twin, *batch).detach())


def test_images_keep_their_precision_when_the_passes_have_a_lower_one():
    seen, model = [], network()

    def loss(model, x, y):
        seen.append((x, model(x).dtype))
        return natural(model, x, y)

    train(model, sgd(model.parameters()), loss, precision="bf16-mixed", epochs=1)
    for (x, dtype), (given, _) in zip(seen, batches().epoch(0), strict=True):
        assert torch.equal(x, given) and dtype == torch.bfloat16


# --- what is trained ----------------------------------------------------------------------------


def test_only_the_optimisers_parameters_train_and_flags_come_back():
    model = network()
    model[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = copy.deepcopy(model)
    during = []

    def loss(model, x, y):
        during.append([name for name, p in model.named_parameters() if p.requires_grad])
        return natural(model, x, y)

    # The bias of the convolution asks for no gradient, and trains because it is named.
    train(model, sgd([model[5].weight, model[0].bias]), loss)
    assert during == [["0.bias", "5.weight"]] * (EPOCHS * BATCHES)
    moved = [
        name
        for (name, new), old in zip(model.named_parameters(), before.parameters())
        if not torch.equal(new, old)
    ]
    assert moved == ["0.bias", "5.weight"]
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("fault", [RuntimeError("broken"), KeyboardInterrupt()])
def test_flags_and_rates_come_back_after_an_error(fault):
    model = network()
    optimiser = sgd([model[5].weight])

    def stop(step, loss):
        if step == 4:
            raise fault

    with pytest.raises(type(fault)):
        train(model, optimiser, schedule=cosine, after_step=stop)
    assert all(p.requires_grad for p in model.parameters())
    assert optimiser.param_groups[0]["lr"] == 0.1


def test_batch_norm_counts_even_where_its_parameters_are_frozen():
    model = network().eval()
    scale = model[1].weight.clone()
    train(model, sgd([model[5].weight]), adversarial())
    assert int(model[1].num_batches_tracked) == EPOCHS * BATCHES  # the attack ran in eval mode
    assert not torch.equal(model[1].running_mean, torch.zeros(4))
    assert torch.equal(model[1].weight, scale)


@pytest.mark.parametrize("learn_densities", [True, False])
def test_learned_masks_train_inside_the_cache(learn_densities):
    model, method = network(), HARP(gamma=0.1, learn_densities=learn_densities)
    method.attach(model, Budget(0.2))
    weights = [layer.parameter.clone() for layer, _ in masks.installed(model).values()]
    before = copy.deepcopy(model.state_dict())

    def loss(model, x, y):
        return adversarial()(model, x, y) + method.penalty(model)

    train(model, torch.optim.SGD(method.trainable(model), lr=0.1, momentum=0.9), loss)
    after = model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    expected = {name for name in after if name.endswith(".scores") or "running" in name}
    expected |= {name for name in after if learn_densities and name.endswith(".logit")}
    assert moved - {"1.num_batches_tracked"} == expected
    kept = [layer.parameter for layer, _ in masks.installed(model).values()]
    assert all(torch.equal(a, b) for a, b in zip(weights, kept))


def test_a_mask_is_computed_once_a_step():
    model, method = network(), HARP()
    method.attach(model, Budget(0.2))
    calls = [0]

    def count(module, arguments, output):
        calls[0] += 1

    for _, mask in masks.installed(model).values():
        mask.register_forward_hook(count)
    train(model, torch.optim.SGD(method.trainable(model), lr=0.1), PGDAT(PGD(Linf(0.1), 5)))
    assert calls[0] == EPOCHS * BATCHES * 2  # two masked layers


# --- learning rate -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [cosine, one_cycle, constant])
def test_the_rate_follows_progress_in_each_group_and_is_given_back(schedule):
    model, rates = network(), []
    groups = [{"params": [model[0].weight], "lr": 0.5}, {"params": [model[5].weight]}]
    optimiser = torch.optim.SGD(groups, lr=0.2)
    train(
        model,
        optimiser,
        schedule=schedule,
        after_step=lambda *_: rates.append([g["lr"] for g in optimiser.param_groups]),
    )
    total = EPOCHS * BATCHES
    progress = [step / total for step in range(total)]
    assert rates == [[0.5 * schedule(p), 0.2 * schedule(p)] for p in progress]
    assert [g["lr"] for g in optimiser.param_groups] == [0.5, 0.2]


# --- randomness and resuming ---------------------------------------------------------------------


def test_seeds_of_steps_stages_and_ranks_differ():
    seeds = {
        step_seed(seed, step, rank)
        for seed in (0, 1, 2, 1000)
        for step in range(500)
        for rank in (0, 1, 1023)
    }
    assert len(seeds) == 4 * 500 * 3
    torch.manual_seed(step_seed(2**70, 10**6, 1023))  # however large, torch takes it


def test_noise_differs_from_step_to_step_and_from_seed_to_seed():
    def noises(seed):
        drawn, model = [], network()

        def loss(model, x, y):
            drawn.append(tuple(torch.rand(3).tolist()))
            return natural(model, x, y)

        train(model, sgd(model.parameters()), loss, seed=seed)
        return drawn

    first = noises(0)
    assert len({*first, *noises(1)}) == 2 * EPOCHS * BATCHES
    torch.rand(17)  # what came before does not matter
    assert noises(0) == first


class Stop(Exception):
    """Ends a run after a step."""


def start(kind):
    """A model, its optimiser and loss: one of each sort of state that a resume must carry."""
    model = network()
    if kind == "free":
        return model, sgd(model.parameters()), Free(Linf(0.1), replays=2)
    if kind == "adamw":
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), adversarial()
    if kind == "masked":
        method = HARP(gamma=0.1)
        method.attach(model, Budget(0.3))
        return model, sgd(method.trainable(model)), adversarial()
    if kind == "drawing":
        model = Drawing(model)
    return model, sgd(model.parameters()), adversarial()


@pytest.mark.parametrize("kind", ["sgd", "adamw", "masked", "free", "drawing"])
@pytest.mark.parametrize("last", range(EPOCHS * BATCHES))
def test_a_resume_at_any_step_is_bit_identical(kind, last, tmp_path):
    settings = {"schedule": one_cycle, "seed": 4}
    whole, optimiser, loss = start(kind)
    replays = {"replays": 2} if kind == "free" else {}
    train(whole, optimiser, loss, **settings, **replays)

    model, optimiser, loss = start(kind)

    def interrupt(step, value):
        if step == last:
            noise = loss.state_dict() if kind == "free" else {}
            state, plain = checkpoint.pack_optimiser(optimiser)
            packed = checkpoint.pack("o", state) | checkpoint.pack("m", model.state_dict())
            checkpoint.save(tmp_path / "state", packed | checkpoint.pack("n", noise), plain)
            raise Stop

    with pytest.raises(Stop):
        train(model, optimiser, loss, after_step=interrupt, **settings, **replays)

    resumed, optimiser, loss = start(kind)
    stored, plain = checkpoint.load(tmp_path / "state")
    resumed.load_state_dict(checkpoint.unpack("m", stored))
    checkpoint.unpack_optimiser(optimiser, checkpoint.unpack("o", stored), plain)
    if kind == "free":
        loss.load_state_dict(checkpoint.unpack("n", stored))
    steps = []
    train(
        resumed,
        optimiser,
        loss,
        start=last + 1,
        after_step=lambda step, value: steps.append(step),
        **settings,
        **replays,
    )
    assert steps == list(range(last + 1, EPOCHS * BATCHES))
    assert same(resumed, whole)


def test_replays_step_on_the_same_batch():
    seen, model = [], network(norm=False)
    steps = []

    def loss(model, x, y):
        seen.append(x)
        return natural(model, x, y)

    optimiser = sgd(model.parameters())
    train(model, optimiser, loss, replays=3, epochs=1, after_step=lambda s, v: steps.append(s))
    assert steps == [0, 1, 2]
    expected = [x for x, _ in batches().epoch(0) for _ in range(3)]
    assert len(seen) == 9 and all(torch.equal(a, b) for a, b in zip(seen, expected))
    once = network(norm=False)
    train(once, sgd(once.parameters()), epochs=1)
    assert not same(once, model)


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_names_the_step(value):
    model, calls = network(), []

    def loss(model, x, y):
        calls.append(None)
        return natural(model, x, y) * (value if len(calls) == 6 else 1.0)

    with pytest.raises(Diverged, match=rf"{value} at step 5"):
        train(model, sgd(model.parameters()), loss)
    assert all(p.requires_grad for p in model.parameters())
