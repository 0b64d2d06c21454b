# SPDX-License-Identifier: Apache-2.0
"""Training losses against their papers' formulas, written out naively in double precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from harprune.robustness.attacks import PGD
from harprune.robustness.objectives import (
    MART,
    MART_ATTACK,
    PGDAT,
    RSLAD,
    TRADES,
    TRADES_ATTACK,
    Free,
    Natural,
    SoftLabels,
)
from harprune.robustness.threat import L2, Linf

THREAT = Linf(0.05)


def shifted(model, x, y):
    """A stand-in for an attack: known, and different from x."""
    return (x + 0.03).clamp(0, 1)


def every_objective():
    pgd = PGD(THREAT, 3)
    return [
        Natural(),
        PGDAT(pgd),
        TRADES(PGD(THREAT, 3, **TRADES_ATTACK)),
        MART(PGD(THREAT, 3, **MART_ATTACK)),
        Free(THREAT),
        RSLAD(PGD(THREAT, 3, loss=SoftLabels()), lambda x: x.flatten(1)[:, :5]),
    ]


OBJECTIVES = every_objective()


@pytest.fixture
def double(model, batch):
    return model.double(), batch[0].double(), batch[1]


def test_natural_and_pgd_at(double):
    model, x, y = double
    naive = [
        -model(z).softmax(1)[torch.arange(len(y)), y].log().mean() for z in (x, shifted(0, x, 0))
    ]
    assert torch.allclose(Natural()(model, x, y), naive[0])
    assert torch.allclose(PGDAT(shifted)(model, x, y), naive[1])


def test_trades(double):
    model, x, y = double
    p, q = model(x).softmax(1), model(shifted(model, x, y)).softmax(1)
    naive = 0.0
    for i in range(len(y)):
        divergence = sum(p[i, k] * torch.log(p[i, k] / q[i, k]) for k in range(5))
        naive = naive + (-torch.log(p[i, y[i]]) + 6.0 * divergence) / len(y)
    assert_same_loss_and_gradient(model, TRADES(shifted)(model, x, y), naive)


def test_mart(double):
    model, x, y = double
    p, q = model(x).softmax(1), model(shifted(model, x, y)).softmax(1)
    naive = 0.0
    for i in range(len(y)):
        rival = max(q[i, k] for k in range(5) if k != y[i])
        boosted = -torch.log(q[i, y[i]]) - torch.log(1 - rival)
        divergence = sum(p[i, k] * torch.log(p[i, k] / q[i, k]) for k in range(5))
        naive = naive + (boosted + 5.0 * divergence * (1 - p[i, y[i]])) / len(y)
    assert_same_loss_and_gradient(model, MART(shifted)(model, x, y), naive)


def test_rslad_distils_the_teachers_answer_to_clean_images(double, make_network):
    model, x, y = double
    teacher, given = make_network().double().eval(), []

    def attack(model, x, reference):
        given.append(reference)
        return shifted(model, x, y)

    ours = RSLAD(attack, teacher, SoftLabels(2.0), weight=0.7)(model, x, y)
    q, naive = (teacher(x) / 2).softmax(1), 0.0
    for z, weight in ((x, 0.3), (shifted(model, x, y), 0.7)):
        p = (model(z) / 2).softmax(1)
        for i in range(len(y)):
            divergence = sum(q[i, k] * torch.log(q[i, k] / p[i, k]) for k in range(5))
            naive = naive + 4 * weight * divergence / len(y)
    assert_same_loss_and_gradient(model, ours, naive)
    assert torch.equal(given[0], teacher(x)) and not given[0].requires_grad
    assert all(p.grad is None for p in teacher.parameters())


def test_the_attack_of_rslad_leads_away_from_the_teacher(double):
    model, x, _ = double
    reference = model(x).detach()
    divergence = SoftLabels()
    torch.manual_seed(9)
    x_adv = PGD(THREAT, 1, 0.1, loss=divergence)(model, x, reference)
    torch.manual_seed(9)
    start = THREAT.random_start(x).requires_grad_()
    p, q = model(start).softmax(1), reference.softmax(1)
    (gradient,) = torch.autograd.grad((q * (q / p).log()).sum(), start)
    assert torch.allclose(x_adv, THREAT.project(start.detach() + 0.1 * gradient.sign(), x))
    assert divergence(model(x_adv), reference).mean() > 0


def assert_same_loss_and_gradient(model, ours, naive):
    assert torch.allclose(ours, naive)
    got = torch.autograd.grad(ours, list(model.parameters()))
    expected = torch.autograd.grad(naive, list(model.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(got, expected, strict=True))


def test_mart_stays_finite_on_a_model_sure_of_the_wrong_class():
    weight = nn.Parameter(torch.tensor([500.0, 0.0, 0.0]))
    loss = MART(shifted)(lambda x: weight.expand(len(x), 3), torch.rand(4, 2), torch.ones(4).long())
    (gradient,) = torch.autograd.grad(loss, weight)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all() and gradient.any()


@pytest.mark.parametrize("threat", [THREAT, L2(0.4)], ids=repr)
def test_fast_training_takes_one_long_step_from_a_uniform_start(double, threat):
    model, x, y = double
    torch.manual_seed(9)
    ours = PGDAT(PGD(threat, 1, 1.25 * threat.epsilon))(model, x, y)
    torch.manual_seed(9)
    start = threat.random_start(x).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(start), y, reduction="sum"), start)
    step = 1.25 * threat.epsilon * threat.ascent(gradient)
    naive = F.cross_entropy(model(threat.project(start.detach() + step, x)), y)
    assert torch.allclose(ours, naive)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_the_attack_runs_in_eval_mode_and_the_loss_in_the_models_own(make_network, objective):
    class Watch(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.passes = model, []

        def forward(self, x):
            self.passes.append(self.training)
            return self.model(x)

    model = Watch(make_network())
    x, y = torch.rand(6, 3, 6, 6), torch.randint(5, (6,))
    loss = objective(model, x, y)
    loss.backward()
    outer = 2 if isinstance(objective, TRADES | MART | RSLAD) else 1
    assert loss.shape == () and model.training
    assert sum(model.passes) == outer
    assert not any(model.passes[:-outer]) and all(model.passes[-outer:])
    assert objective.passes - outer == len(model.passes) - outer - isinstance(objective, TRADES)
    assert objective.replays == (4 if isinstance(objective, Free) else 1)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", [PGDAT, TRADES, MART])
def test_a_clean_forward_only_shows_batch_norm_the_clean_batch(make_network, kind):
    results = []
    for clean_forward in (False, True):
        torch.manual_seed(1)
        model = make_network()
        model[6] = nn.Identity()
        x, y = torch.rand(8, 3, 6, 6), torch.randint(5, (8,))
        loss = kind(shifted, clean_forward=clean_forward)(model, x, y)
        results.append((loss, int(model[1].num_batches_tracked)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[1][1] == results[0][1] + 1


@pytest.mark.parametrize("clean_forward", [False, True])
@pytest.mark.parametrize("kind", [PGDAT, TRADES, MART])
def test_cached_weights_learn_as_uncached_ones(model, batch, kind, clean_forward):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Parameter(torch.ones(6, 3, 3, 3))

        def forward(self, weight):
            return weight * self.scores

    parametrize.register_parametrization(model[0], "weight", Scale())
    options = TRADES_ATTACK if kind is TRADES else MART_ATTACK
    objective = kind(PGD(THREAT, 2, **options), clean_forward=clean_forward)
    gradients = []
    for cached in (False, True):
        torch.manual_seed(2)
        model.zero_grad()
        if cached:
            with parametrize.cached():
                objective(model, *batch).backward()
        else:
            objective(model, *batch).backward()
        gradients.append(model[0].parametrizations.weight[0].scores.grad.clone())
    assert gradients[0].any() and torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


# --- Free ---


def naive_free(model, threat, batches, replays):
    """Algorithm 1 of Shafahi et al. with plain gradients, in Linf; yields the losses."""
    noise, losses = torch.zeros_like(batches[0][0]), []
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in batches:
        for _ in range(replays):
            leaf = noise[: len(x)].clone().requires_grad_()
            loss = F.cross_entropy(model((x + leaf).clamp(0, 1)), y)
            optimiser.zero_grad()
            loss.backward()
            moved = noise[: len(x)] + threat.epsilon * leaf.grad.sign()
            noise[: len(x)] = moved.clamp(-threat.epsilon, threat.epsilon)
            optimiser.step()
            losses.append(loss.item())
    return losses, noise


def train_free(model, objective, batches, restart=None):
    """The same through the objective; at step `restart` it is replaced by a resumed one."""
    optimiser, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for x, y in batches:
        for _ in range(objective.replays):
            if restart == len(losses):
                resumed = Free(objective.threat, objective.replays)
                resumed.load_state_dict(objective.state_dict())
                objective = resumed
            loss = objective(model, x, y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    return losses, objective.state_dict()["noise"]


@pytest.mark.parametrize("restart", [None, 2, 7])
def test_free_is_the_published_algorithm_through_a_short_batch_and_a_resume(make_network, restart):
    model = make_network().eval().double()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [
        (torch.rand(size, 3, 6, 6, dtype=torch.float64), torch.randint(5, (size,)))
        for size in (8, 8, 3, 8)
    ]
    expected = naive_free(model, THREAT, batches, 3)
    model.load_state_dict(start)
    losses, noise = train_free(model, Free(THREAT, replays=3), batches, restart)
    assert losses == pytest.approx(expected[0], rel=1e-9)
    assert torch.allclose(noise, expected[1]) and noise.abs().max() == THREAT.epsilon


def test_free_keeps_l2_noise_in_its_ball_and_forgets_on_reset(model, batch):
    objective = Free(L2(0.3), replays=2)
    assert objective.state_dict() == {}
    for _ in range(3):
        objective(model, *batch).backward()
    noise = objective.state_dict()["noise"]
    assert noise.flatten(1).norm(dim=1).amax().item() == pytest.approx(0.3, rel=1e-5)
    objective.reset()
    assert objective.state_dict() == {}
    assert torch.equal(objective(model, *batch), Natural()(model, *batch))
    empty = Free(L2(0.3))
    empty.load_state_dict({})
    assert empty.state_dict() == {}


def test_free_grows_with_the_batch_and_refuses_another_shape(model, batch):
    x, y = batch
    objective = Free(THREAT)
    objective(model, x[:4], y[:4]).backward()
    first = objective.state_dict()["noise"]
    objective(model, x, y)
    grown = objective.state_dict()["noise"]
    assert torch.equal(grown[:4], first) and not grown[4:].any()
    with pytest.raises(ValueError, match="reset"):
        objective(model, x[:, :, :5], y)


def test_reprs_are_records():
    assert repr(Free(Linf(0.5), replays=8)) == "Free(threat=Linf(epsilon=0.5), replays=8)"
    assert not any(" at 0x" in repr(objective) for objective in OBJECTIVES)
