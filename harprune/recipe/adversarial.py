# SPDX-License-Identifier: Apache-2.0
"""How a recipe attacks and hardens: threat, training losses, attacks in training and evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from harprune.recipe import schema
from harprune.recipe.schema import Recipe
from harprune.robustness import attacks, objectives
from harprune.robustness.autoattack import AutoAttack
from harprune.robustness.awp import AWP
from harprune.robustness.pwoa import PwoA
from harprune.robustness.threat import Linf, Threat, make_threat, parse_epsilon
from harprune.sparsity import execution
from harprune.sparsity.execution import Twin

_PARITY_EPSILON, _PARITY_STEP = 0.031, 0.0078


def threat(recipe: Recipe) -> Threat:
    """The threat model, at the authors' epsilon under parity."""
    if recipe.parity.epsilon:
        return Linf(_PARITY_EPSILON)
    return make_threat(recipe.threat.norm, recipe.threat.epsilon)


def step_size(recipe: Recipe, section: schema.Objective) -> float:
    """The step of the training attack: as given, or a quarter of epsilon."""
    if recipe.parity.epsilon:
        return _PARITY_STEP
    if section.step_size is not None:
        return parse_epsilon(section.step_size)
    return threat(recipe).epsilon / 4.0


def twin(recipe: Recipe, model: nn.Module, dtype: torch.dtype | None = None) -> Twin | None:
    """The fixed function of `model`, on the backend of the recipe; None where it has none."""
    return execution.twin(model, dtype=dtype, execution=recipe.execution.backend)


class _Wrapped:
    """An attack run in another way; its record and its price stay its own."""

    attack: attacks.Attack

    def __repr__(self) -> str:
        return repr(self.attack)

    @property
    def passes(self) -> int:
        return self.attack.passes


@dataclass(frozen=True, repr=False)
class OnTwin(_Wrapped):
    """An attack on the model's twin: the same function, cheaper."""

    attack: attacks.Attack
    twin: Twin

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.attack(self.twin.current(), x, y)


@dataclass(eq=False, repr=False)
class Once(_Wrapped):
    """An attack that is run once a batch: a second pass meets the same adversarial images."""

    attack: attacks.Attack
    _batch: tuple[Tensor, Tensor] | None = None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if self._batch is None or self._batch[0] is not x:
            self._batch = x, self.attack(model, x, y)
        return self._batch[1]


_OF_LOSSES = {"trades": objectives.TRADES_ATTACK, "mart": objectives.MART_ATTACK}
"""What the attack of a loss has of its own: start, target and what it climbs."""


def training_attack(
    recipe: Recipe, section: schema.Objective, twin: Twin | None, **options
) -> attacks.Attack:
    """The attack of the loss that `section` names, on `twin` where there is one.

    PGD as the section and the loss have it; fgsm-rs takes one long step.
    """
    bound = threat(recipe)
    options = {**_OF_LOSSES.get(section.name, {}), **options}
    steps, step = section.steps, step_size(recipe, section)
    if section.name == "fgsm-rs":
        steps, step = 1, 1.25 * bound.epsilon
    attack = attacks.PGD(bound, steps, step_size=step, **options)
    return attack if twin is None else OnTwin(attack, twin)


def objective(
    recipe: Recipe,
    section: schema.Objective,
    twin: Twin | None,
    teacher: nn.Module | None = None,
) -> objectives.Objective:
    """The training loss that `section` names, its attack run on `twin` where there is one.

    `teacher` is the dense network in eval mode, for a loss that distils from it.
    """
    pgd = partial(training_attack, recipe, section, twin)
    match section.name:
        case "natural":
            return objectives.Natural()
        case "pgd-at":
            return objectives.PGDAT(pgd(), clean_forward=recipe.parity.clean_forward)
        case "trades":
            return objectives.TRADES(
                pgd(),
                beta=_beta(section, 6.0),
                clean_forward=recipe.parity.clean_forward,
            )
        case "mart":
            return objectives.MART(
                pgd(),
                beta=_beta(section, 5.0),
                clean_forward=recipe.parity.clean_forward,
            )
        case "free":
            return objectives.Free(threat(recipe), replays=section.replays)
        case "fgsm-rs":
            return objectives.PGDAT(pgd())
        case "pwoa":
            return PwoA(cast(nn.Module, teacher), **section.pwoa.model_dump())


def distilled(
    recipe: Recipe,
    section: schema.Objective,
    twin: Twin | None,
    soft: schema.Distillation,
    teacher: Callable[[Tensor], Tensor],
) -> objectives.RSLAD:
    """Distillation from `teacher` under the attack of the loss that `section` names.

    Raises:
        ValueError: a loss whose attack has a target of its own, or none.
    """
    if section.name not in ("pgd-at", "fgsm-rs"):
        raise ValueError(
            f"distillation takes its attack from pgd-at or fgsm-rs, not from objective.name = "
            f"{section.name!r}; name one of them, or leave out the stage's distillation"
        )
    divergence = objectives.SoftLabels(soft.temperature)
    attack = training_attack(recipe, section, twin, loss=divergence)
    return objectives.RSLAD(attack, teacher, divergence, soft.weight)


def attacked_once(objective: objectives.Objective) -> objectives.Objective:
    """`objective`, a second pass of which over the same batch does not attack anew."""
    if objective.attack is None:
        return objective
    return replace(cast(Any, objective), attack=Once(objective.attack))  # each is a dataclass


def passes_again(objective: objectives.Objective) -> int:
    """Forward + backward passes per image of a second pass that does not attack anew."""
    return objective.passes - (0 if objective.attack is None else objective.attack.passes)


def _beta(section: schema.Objective, usual: float) -> float:
    return usual if section.beta is None else section.beta


def perturbation(recipe: Recipe, section: schema.WeightTraining) -> AWP | None:
    """AWP, where a stage that trains weights asks for it.

    Raises:
        ValueError: a training without a second pass.
    """
    if section.awp is None:
        return None
    require_second_pass(section.objective or recipe.objective, "awp")
    return AWP(section.awp.radius, section.awp.warm_up)


def require_second_pass(section: schema.Objective, name: str) -> None:
    """Raises ValueError for a loss that meets no images twice, which `name` needs."""
    if section.name == "free":
        raise ValueError(
            f"objective.name = 'free' moves its images in every pass, and {name} needs a second "
            "pass over the same; choose another objective"
        )


def attack(name: str, bound: Threat, *, seed: int = 0, batch_size: int = 250) -> attacks.Attack:
    """An evaluation attack by name: fgsm, pgd-N, cw-N, apgd-ce, apgd-dlr, autoattack.

    `seed` and `batch_size` are AutoAttack's; the others draw from the global generator.
    """
    base, _, number = str(name).partition("-")
    try:
        match base:
            case "fgsm" if not number:
                return attacks.FGSM(bound)
            case "pgd":
                return attacks.PGD(bound, int(number))
            case "cw":
                return attacks.PGD(bound, int(number), loss=attacks.Margin(kappa=50.0))
            case "apgd" if number in ("ce", "dlr"):
                loss = attacks.cross_entropy if number == "ce" else attacks.dlr
                return attacks.APGD(bound, loss=loss)
            case "autoattack" if not number:
                return AutoAttack(bound, batch_size=batch_size, seed=seed)
    except ValueError:
        pass
    raise ValueError(
        f"attack {name!r} is unknown; choose among fgsm, pgd-STEPS (as pgd-20), cw-STEPS, apgd-ce, "
        "apgd-dlr, autoattack"
    )
