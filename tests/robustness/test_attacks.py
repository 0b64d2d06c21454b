# SPDX-License-Identifier: Apache-2.0
"""Attacks: optimal on linear models, the reference's Auto-PGD, and traces left on the model."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from harprune.modes import eval_mode
from harprune.robustness import attacks
from harprune.robustness.attacks import (
    APGD,
    FGSM,
    PGD,
    Margin,
    clean_logits,
    cross_entropy,
    dlr,
    kl_divergence,
    no_start,
    normal_start,
)
from harprune.robustness.threat import L2, Linf

TRADES = {"start": normal_start, "loss": kl_divergence, "target": clean_logits}


def every_attack(threat):
    return [
        FGSM(threat),
        PGD(threat, 10),
        PGD(threat, 10, restarts=3),
        PGD(threat, 10, step_size=threat.epsilon / 4, loss=Margin()),
        PGD(threat, 10, **TRADES),
        APGD(threat, steps=20, restarts=2),
        APGD(threat, steps=20, restarts=2, loss=dlr),
    ]


ATTACKS = every_attack(Linf(0.05)) + every_attack(L2(0.5))


class Count(nn.Module):
    """Counts the images that pass through a model, forward and backward."""

    def __init__(self, model):
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x):
        self.forwards += len(x)
        if x.requires_grad:
            x.register_hook(self.count)
        return self.model(x)

    def count(self, gradient):
        self.backwards += len(gradient)


# --- losses ---


def test_losses_match_their_formulas():
    logits = torch.randn(50, 6, dtype=torch.float64)
    other = torch.randn(50, 6, dtype=torch.float64)
    y = torch.randint(6, (50,))
    for i in range(50):
        z, k = logits[i].tolist(), y[i].item()
        wrong = max(z[j] for j in range(6) if j != k)
        top = sorted(z)
        p, q = logits[i].softmax(0), other[i].softmax(0)
        total = sum(math.exp(v) for v in z)
        assert cross_entropy(logits, y)[i].item() == pytest.approx(math.log(total) - z[k])
        assert Margin(1.0)(logits, y)[i].item() == pytest.approx(min(wrong - z[k], 1.0))
        assert dlr(logits, y)[i].item() == pytest.approx(-(z[k] - wrong) / (top[-1] - top[-3]))
        assert kl_divergence(other, logits)[i].item() == pytest.approx(
            (p * (p / q).log()).sum().item()
        )


def test_margin_is_the_published_cw_loss_up_to_a_constant():
    logits, y, kappa = torch.randn(30, 10, dtype=torch.float64) * 40, torch.randint(10, (30,)), 50.0
    one_hot = F.one_hot(y, 10)
    correct = (one_hot * logits).sum(1)
    wrong = ((1 - one_hot) * logits - 1e4 * one_hot).max(1).values
    published = -F.relu(correct - wrong + kappa)
    assert torch.allclose(Margin(kappa)(logits, y), published + kappa)


def test_losses_in_half_precision_are_taken_in_single():
    logits = (20 * torch.randn(8, 5)).bfloat16()
    y = torch.randint(5, (8,))
    for loss in (cross_entropy, Margin(), dlr):
        assert torch.equal(loss(logits, y), loss(logits.float(), y))


def test_dlr_needs_three_classes():
    with pytest.raises(ValueError, match="3 classes"):
        dlr(torch.randn(2, 2), torch.tensor([0, 1]))


# --- optimality ---


def linear(classes, features=12):
    """A linear model, images in the middle of the box, and their optimal radius in each norm."""
    model = nn.Linear(features, classes).double()
    with torch.no_grad():
        model.bias -= model.weight.sum(1) / 2
    x = 0.5 + 0.05 * torch.randn(40, features, dtype=torch.float64)
    with torch.no_grad():
        z = model(x)
    y = z.argmax(1)
    gap = z.gather(1, y[:, None]) - z
    normal = model.weight.detach()[y][:, None] - model.weight.detach()
    radius = {}
    for threat, order in ((Linf, 1), (L2, 2)):
        distance = gap / normal.norm(order, dim=2)
        distance.scatter_(1, y[:, None], torch.inf)
        radius[threat] = distance.amin(1)
    return model, x, y, radius


def attack_each(make, threat, model, x, y, radius):
    """Whether each image falls when the attack may go as far as its own `radius`."""
    fallen = []
    for i in range(len(x)):
        attack = make(threat(radius[i].item()))
        x_adv = attack(model, x[i : i + 1], y[i : i + 1])
        fallen.append(bool(model(x_adv).argmax(1) != y[i]))
    return torch.tensor(fallen)


@pytest.mark.parametrize("threat", [Linf, L2])
@pytest.mark.parametrize(
    "make",
    [
        FGSM,
        lambda t: PGD(t, 10),
        lambda t: PGD(t, 10, loss=Margin()),
        lambda t: APGD(t, 20, 1),
    ],
    ids=["fgsm", "pgd", "cw", "apgd"],
)
def test_attacks_reach_the_closed_form_between_two_classes(make, threat):
    model, x, y, radius = linear(2)
    assert radius[threat].max() < 0.4 * (1 if threat is Linf else 2)
    # A random start takes L2 steps some way round; ten of them leave a few percent.
    slack = 1.01 if threat is Linf else 1.1
    assert attack_each(make, threat, model, x, y, slack * radius[threat]).all()
    assert not attack_each(make, threat, model, x, y, 0.99 * radius[threat]).any()


@pytest.mark.parametrize("threat", [Linf, L2])
@pytest.mark.parametrize("loss", [Margin(), dlr], ids=["margin", "dlr"])
def test_apgd_comes_near_the_closed_form_among_five_classes(loss, threat):
    model, x, y, radius = linear(5)
    x, y, near = x[:15], y[:15], radius[threat][:15]
    assert attack_each(lambda t: APGD(t, 30, 2, loss), threat, model, x, y, 1.25 * near).all()
    assert not attack_each(lambda t: APGD(t, 30, 2, loss), threat, model, x, y, 0.99 * near).any()


def test_fgsm_is_one_signed_step(model, batch):
    x, y = batch
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model(leaf), y).backward()
    expected = (x + 0.05 * leaf.grad.sign()).clamp(0, 1)
    assert torch.equal(FGSM(Linf(0.05))(model, x, y), expected.clamp(x - 0.05, x + 0.05))


def test_pgd_is_the_naive_loop(model, batch):
    x, y = batch
    torch.manual_seed(7)
    got = PGD(Linf(0.05), 4, step_size=0.02)(model, x, y)
    torch.manual_seed(7)
    x_adv = (x + torch.empty_like(x).uniform_(-0.05, 0.05)).clamp(0, 1)
    for _ in range(4):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv + 0.02 * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - 0.05), x + 0.05).clamp(0, 1)
    assert torch.allclose(got, x_adv, atol=1e-7)


def test_the_trades_attack_climbs_the_divergence_from_the_clean_answer(model, batch):
    x, y = batch
    torch.manual_seed(7)
    got = PGD(Linf(0.05), 3, 0.02, **TRADES)(model, x, y)
    torch.manual_seed(7)
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(3):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.kl_div(model(x_adv).log_softmax(1), model(x).softmax(1), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = torch.min(torch.max(x_adv + 0.02 * gradient.sign(), x - 0.05), x + 0.05).clamp(0, 1)
    assert (got - x_adv).abs().gt(1e-6).double().mean() < 0.01


# --- Auto-PGD against the reference ---


def reference_apgd(threat, model, loss, steps, restarts, seed):
    from pyautoattack.autopgd_base import APGDAttack

    return APGDAttack(
        model,
        n_iter=steps,
        n_restarts=restarts,
        norm=type(threat).__name__,
        eps=threat.epsilon,
        seed=seed,
        loss={cross_entropy: "ce", dlr: "dlr"}[loss],
        device=torch.device("cpu"),
        logger=logging.getLogger("reference"),
    )


@pytest.mark.parametrize("loss", [cross_entropy, dlr])
@pytest.mark.parametrize("threat", [Linf(0.03), L2(0.3)], ids=repr)
def test_apgd_walks_as_the_reference_from_the_same_start(make_network, threat, loss):
    model = make_network(10).eval()
    x = torch.rand(60, 3, 6, 6)
    y = model(x).argmax(1)
    start = threat.boundary_start(x)
    ours, broken, highest = APGD(threat, 50, loss=loss).run(model, x, y, start)
    reference = reference_apgd(threat, model, loss, 50, 1, 0)
    reference.init_hyperparam(x)
    best, correct, reference_loss, found = reference.attack_single_run(x, y, x_init=start)
    theirs = torch.where(correct.bool().reshape(-1, 1, 1, 1), best, found)
    assert 5 < int(broken.sum()) < 55
    # Rounding may send single trajectories another way, where DLR's denominator nears zero.
    assert (broken == ~correct.bool()).double().mean() >= 0.98
    assert torch.isclose(highest, reference_loss, rtol=5e-3, atol=1e-4).double().mean() >= 0.95
    same = (ours - theirs).flatten(1).abs().amax(1) < 1e-4
    assert same.double().mean() >= 0.9


@pytest.mark.parametrize("threat", [Linf(0.03), L2(0.3)], ids=repr)
def test_apgd_is_as_strong_as_the_reference(make_network, threat):
    model = make_network(10).eval()
    x = torch.rand(100, 3, 6, 6)
    y = model(x).argmax(1)
    torch.manual_seed(5)
    ours = model(APGD(threat, 30, 2)(model, x, y)).argmax(1) == y
    theirs = reference_apgd(threat, model, cross_entropy, 30, 2, 5).perturb(x, y)
    theirs = model(theirs).argmax(1) == y
    assert 0.05 < theirs.double().mean() < 0.95
    assert abs(ours.double().mean() - theirs.double().mean()) <= 0.02


def test_checkpoints_shrink_as_published():
    # p = 0.22, then + max(last width - 0.03, 0.06), of 100 steps.
    assert list(attacks._checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


# --- what an attack may not disturb, and what it costs ---


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_an_attack_keeps_to_its_threat_and_leaves_the_model_alone(model, batch, attack):
    x, y = batch
    original, state = x.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x_adv = attack(model, x, y)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(x, original)
    assert not x_adv.requires_grad
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (attack.threat.distance(x_adv, x) <= attack.threat.epsilon * (1 + 1e-5)).all()


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_an_attack_lowers_accuracy_more_than_noise(model, batch, attack):
    x, y = batch
    noisy = attack.threat.random_start(x)
    accuracy = [(model(z).argmax(1) == y).sum() for z in (noisy, attack(model, x, y))]
    assert accuracy[1] <= accuracy[0] - 5


def test_the_training_attack_makes_exactly_as_many_passes_as_steps(model, batch):
    x, y = batch
    counter = Count(model)
    PGD(Linf(0.05), 10)(counter, x, y)
    assert (counter.forwards, counter.backwards) == (10 * len(x), 10 * len(x))


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_passes_count_the_backward_passes_of_an_image_that_stands(attack):
    class Fortress(nn.Module):
        """Always right, and the gradient is not zero."""

        def forward(self, x):
            small = 1e-3 * x.flatten(1).sum(1, keepdim=True)
            return torch.cat([9 + small, small * 0, small * 0], 1)

    counter = Count(Fortress())
    attack(counter, torch.rand(4, 3, 6, 6), torch.zeros(4, dtype=torch.long))
    assert counter.backwards == 4 * attack.passes


def test_restarts_attack_only_what_still_stands_and_keep_the_best(model, batch):
    x, y = batch
    counter = Count(model)
    attack = PGD(Linf(0.02), 5, restarts=4)
    x_adv = attack(counter, x, y)
    single = PGD(Linf(0.02), 5)
    torch.manual_seed(1)
    once = single(model, x, y)
    torch.manual_seed(1)
    x_adv = attack(counter, x, y)
    assert counter.backwards < 2 * len(x) * attack.passes
    broken = model(once).argmax(1) != y
    assert 0 < broken.sum() < len(x)
    assert torch.equal(x_adv[broken], once[broken])
    assert (cross_entropy(model(x_adv), y) >= cross_entropy(model(once), y))[~broken].all()


def test_attacks_follow_the_seed(model, batch):
    for attack in ATTACKS:
        torch.manual_seed(4)
        first = attack(model, *batch)
        torch.manual_seed(4)
        assert torch.equal(attack(model, *batch), first)


@pytest.mark.parametrize("shape", [(6, 9), (6, 2, 2, 2, 3), (6, 1, 9), (1, 9)], ids=str)
def test_attacks_take_any_image_shape_in_double_precision(shape):
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4)).double()
    x = torch.rand(shape, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).argmax(1)
    for attack in ATTACKS:
        x_adv = attack(model, x, y)
        assert x_adv.shape == x.shape and x_adv.dtype == torch.float64


def test_attacks_work_under_autocast_and_no_grad(model, batch):
    x, y = batch
    for attack in ATTACKS:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            x_adv = attack(model, x, y)
        assert x_adv.dtype == torch.float32
        assert (model(x_adv).argmax(1) == y).sum() <= len(x) - 7


def test_weights_cached_before_the_attack_still_learn_after_it(model, batch):
    class Scale(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.scores = nn.Parameter(torch.ones_like(weight))

        def forward(self, weight):
            return weight * self.scores

    x, y = batch
    parametrize.register_parametrization(model[0], "weight", Scale(model[0].weight))
    scores = model[0].parametrizations.weight[0].scores
    for attack in (PGD(Linf(0.05), 3), PGD(Linf(0.05), 3, **TRADES), APGD(Linf(0.05), 5, 2)):
        torch.manual_seed(2)
        with parametrize.cached():
            cross_entropy(model(attack(model, x, y)), y).sum().backward()
        cached, scores.grad = scores.grad, None
        torch.manual_seed(2)
        cross_entropy(model(attack(model, x, y)), y).sum().backward()
        assert cached is not None and cached.abs().sum() > 0
        assert torch.equal(cached, scores.grad)
        scores.grad = None


def test_eval_mode_restores_each_module_even_after_an_error(model):
    model.train()
    model[1].eval()
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert model.training and model[0].training and not model[1].training


def test_reprs_are_records_without_addresses():
    assert repr(PGD(Linf(0.5), 10, **TRADES)) == (
        "PGD(threat=Linf(epsilon=0.5), steps=10, step_size=None, restarts=1, loss=kl_divergence, "
        "start=normal_start, target=clean_logits)"
    )
    assert repr(FGSM(L2(1.0), Margin())) == "FGSM(threat=L2(epsilon=1.0), loss=Margin(kappa=50.0))"
    assert not any(" at 0x" in repr(attack) for attack in ATTACKS)


def test_wrong_settings_are_refused():
    for make in (
        lambda: PGD(Linf(0.1), 0),
        lambda: PGD(Linf(0.1), 5, restarts=0),
        lambda: PGD(Linf(0.1), 5, step_size=0),
        lambda: PGD(Linf(0.1), 5, step_size=float("nan")),
        lambda: APGD(Linf(0.1), steps=0),
        lambda: APGD(Linf(0.1), restarts=-1),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()


def test_no_start_is_the_clean_image(batch):
    assert no_start(Linf(0.1), batch[0]) is batch[0]
