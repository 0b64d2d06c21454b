# SPDX-License-Identifier: Apache-2.0
"""Signs that an evaluation cannot be trusted: masked gradients, chance, a model still training.

After the check lists of Carlini et al. 2019 and of RobustBench (Croce et al. 2021).
"""

from collections.abc import Mapping
from itertools import permutations
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from harprune.outcomes import Check
from harprune.robustness.attacks import APGD, FGSM, PGD, Attack, cross_entropy
from harprune.robustness.autoattack import AutoAttack
from harprune.robustness.threat import L2, Linf, Threat

SAMPLE = 64
"""Images on which a model is checked, at most."""

ORDER_TOLERANCE = 0.005
"""Accuracy by which a stronger attack may miss a weaker one before it counts: random starts."""

ALIKE = 0.9
"""Cosine from which two gradients point alike, and the share of images where they have to."""

NEAR_ZERO = 0.05
"""Accuracy that may remain where the attacker may turn any image grey."""

_STRENGTH = {FGSM: 0, PGD: 1, APGD: 1, AutoAttack: 2}


def _is_known(attack: Attack) -> TypeGuard[FGSM | PGD | APGD | AutoAttack]:
    return type(attack) in _STRENGTH


def check_model(model: nn.Module, x: Tensor, y: Tensor, threat: Threat | None) -> dict[str, Check]:
    """Check a model on images x (N, ...) and their labels y (N,).

    Of what `evaluate` refuses, such as logits that are not finite, nothing is checked again.
    """
    training = [name for name, module in model.named_modules() if module.training]
    with torch.no_grad():
        first, second = model(x), model(x)
    right = first.argmax(1) == y
    checks = {
        "eval mode": Check(not training, f"{len(training)} modules in training mode"),
        "deterministic output": _deterministic(first, second),
    }
    if right.any():
        checks["input gradient"] = _gradient(model, x[right], y[right])
        if threat is not None:
            checks["huge epsilon"] = _huge_epsilon(model, x[right], y[right], threat)
    return checks


def check_same_function(
    model: nn.Module, attacked: nn.Module, x: Tensor, y: Tensor
) -> dict[str, Check]:
    """Whether the function that is attacked says what the model says, and so do its gradients.

    Logits agree to float tolerance. Gradients may not where a ReLU is near its kink, so most
    images decide.
    """
    (logits, slopes), (others, other_slopes) = (_with_slopes(f, x, y) for f in (model, attacked))
    gap = float((logits - others).abs().max())
    agree = torch.equal(logits.argmax(1), others.argmax(1))
    small = gap <= 1e-3 * max(1.0, float(logits.abs().max()))
    cosines = torch.cosine_similarity(slopes, other_slopes)
    both_zero = (slopes == 0).all(1) & (other_slopes == 0).all(1)
    alike = int(((cosines >= ALIKE) | both_zero).sum())
    detail = (
        f"logits differ by up to {gap:.2g} on {len(x)} images, input gradients agree on {alike}"
    )
    return {"attacked function": Check(agree and small and alike >= ALIKE * len(x), detail)}


@torch.enable_grad()
def _with_slopes(function: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K), and gradients (N, D) of the labels' leads, which no loss saturates.

    The largest number of a gradient becomes 1: of small ones, squares vanish.
    """
    x = x.detach().clone().requires_grad_()
    logits = function(x)
    lead = logits.gather(1, y[:, None]).sum() - logits.mean(1).sum()
    (slopes,) = torch.autograd.grad(lead, x)
    slopes = slopes.flatten(1)
    largest = slopes.abs().amax(1, keepdim=True).clamp(min=torch.finfo(slopes.dtype).tiny)
    return logits.detach(), slopes / largest


def _deterministic(first: Tensor, second: Tensor) -> Check:
    gap = float((first - second).abs().max())
    return Check(torch.equal(first, second), f"two forward passes differ by up to {gap:.3g}")


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Check:
    """No image may be without a gradient: an attack could not move it."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        loss = cross_entropy(model(x), y).sum()
        (gradient,) = torch.autograd.grad(loss, x)
    zero = int((gradient.flatten(1) == 0).all(1).sum())
    return Check(zero == 0, f"all zero on {zero} of {len(x)} images ({100 * zero / len(x):.1f} %)")


def _huge_epsilon(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Check:
    """Where every image may become the grey one, nothing honest stays correct."""
    huge = Linf(0.5) if isinstance(threat, Linf) else L2(0.5 * x[0].numel() ** 0.5)
    x_adv = PGD(huge, 20)(model, x, y)
    with torch.no_grad():
        correct = int((model(x_adv).argmax(1) == y).sum())
    return Check(correct <= NEAR_ZERO * len(x), f"{correct} of {len(x)} correct under {huge}")


def check_order(
    attacks: Mapping[str, Attack], outcomes: Mapping[str, np.ndarray]
) -> dict[str, Check]:
    """No stronger attack may leave more images correct than a weaker one of the same threat.

    Args:
        attacks: name -> attack; those of other kinds than this package's are not compared.
        outcomes: name -> bool (N,), the images still correct.
    """
    known = {n: a for n, a in attacks.items() if _is_known(a)}
    pairs = [
        (weak, strong)
        for weak, strong in permutations(known, 2)
        if _STRENGTH[type(known[weak])] < _STRENGTH[type(known[strong])]
        and known[weak].threat == known[strong].threat
    ]
    if not pairs:
        return {}
    wrong = [
        f"{strong} leaves {outcomes[strong].sum()} correct, {weak} {outcomes[weak].sum()}"
        for weak, strong in pairs
        if outcomes[strong].mean() > outcomes[weak].mean() + ORDER_TOLERANCE
    ]
    fine = f"{len(pairs)} pair{'' if len(pairs) == 1 else 's'} in order"
    return {"attack order": Check(not wrong, "; ".join(wrong) or fine)}


def threat_of(attacks: Mapping[str, Attack]) -> Threat | None:
    """The threat of the first attack of this package, if there is one."""
    return next((a.threat for a in attacks.values() if _is_known(a)), None)
