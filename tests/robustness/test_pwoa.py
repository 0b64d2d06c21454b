# SPDX-License-Identifier: Apache-2.0
"""PwoA: HSIC by its definition, the loss term by term, and what the terms reward."""

import pytest
import torch
from torch import nn

from harprune.robustness.pwoa import PwoA, gaussian_kernel, hidden_layers, hsic

X, Y = torch.rand(7, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 3


def network():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5),
        nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip


def literal_kernel(values, sigma):
    rows = [v.flatten().double() for v in values.detach()]
    width = 2 * sigma**2 * len(rows[0])
    return torch.tensor(
        [[torch.exp(-((a - b) ** 2).sum() / width) for b in rows] for a in rows]
    ).double()


def literal_hsic(first, second):
    m = len(first)
    h = torch.eye(m).double() - 1 / m
    return torch.trace(first.double() @ h @ second.double() @ h) / (m - 1) ** 2


def test_hsic_is_its_definition():
    first, second = (literal_kernel(torch.rand(6, 4), 0.5) for _ in range(2))
    assert hsic(first, second).item() == pytest.approx(literal_hsic(first, second).item(), rel=1e-4)
    assert torch.allclose(gaussian_kernel(X, 0.7).double(), literal_kernel(X, 0.7), atol=1e-6)


def test_hsic_is_near_zero_for_independent_values_and_larger_for_dependent_ones():
    a, b = torch.randn(200, 3), torch.randn(200, 3)
    of_a = gaussian_kernel(a, 0.5)
    assert hsic(of_a, gaussian_kernel(b, 0.5)) < 0.3 * hsic(of_a, gaussian_kernel(a**3, 0.5))


def test_the_loss_is_the_sum_of_its_terms():
    model, teacher = network().double(), network().double().eval()
    loss = PwoA(teacher, temperature=3.0, alpha=2.0, lambda_x=0.5, lambda_y=0.3, sigma=0.8)
    value = loss(model, X.double(), Y)

    first = model[0](X.double())
    second = model[4](model[3](model[2](model[1](first))))
    logits = model[6](model[5](second))
    p, q = (teacher(X.double()) / 3).softmax(1), (logits / 3).softmax(1)
    distance = sum((a * (a / b).log()).sum() for a, b in zip(p, q)) / 7
    same = torch.tensor([[float(a == b) for b in Y] for a in Y]).double()
    expected = 2.0 * 9.0 * distance
    for z in (first, second):
        of_z = literal_kernel(z, 0.8)
        expected += 0.5 * literal_hsic(literal_kernel(X, 0.8), of_z)
        expected -= 0.3 * literal_hsic(same, of_z)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_hidden_layers_are_seen_before_what_works_in_place():
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(in_place), nn.Flatten(), nn.Linear(12, 3))
        with hidden_layers(model) as hidden:
            model(X)
        found.append(hidden)
    assert (found[0][0] < 0).any()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_teacher_learns_nothing_and_the_network_does():
    model, teacher = network(), network().eval()
    PwoA(teacher)(model, X, Y).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())
    assert PwoA(teacher).passes == 1  # no forward pass alone is counted, here or elsewhere


def test_a_network_equal_to_its_teacher_is_left_where_it_is():
    model = network().eval()
    loss = PwoA(model, lambda_x=0.0, lambda_y=0.0)(model, X, Y)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert all(p.grad.abs().max() < 1e-4 for p in model.parameters())


def test_the_hooks_are_gone_after_the_pass_and_after_an_error():
    model = network()
    with hidden_layers(model) as found:
        model(X)
    assert len(found) == 3
    with pytest.raises(RuntimeError), hidden_layers(model):
        model(X[:, :1])
    model(X)
    assert len(found) == 3
    assert not any(m._forward_hooks for m in model.modules())
