# SPDX-License-Identifier: Apache-2.0
"""How a recipe prunes: method with plug-ins, budget and allocation."""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from harprune.methods.admm import ADMM
from harprune.methods.base import Budget, Limit, Method
from harprune.methods.bcs import BCS
from harprune.methods.flying_bird import FlyingBird
from harprune.methods.grasp import GraSP
from harprune.methods.harp import HARP
from harprune.methods.hydra import HYDRA
from harprune.methods.li20 import Li20
from harprune.methods.mad import MAD
from harprune.methods.oneshot import Magnitude, Random
from harprune.methods.robust_bird import RobustBird
from harprune.methods.rst import RST
from harprune.methods.s2ap import S2AP
from harprune.methods.snip import SNIP
from harprune.methods.synflow import SynFlow
from harprune.methods.twinrep import TwinRep
from harprune.recipe.adversarial import require_second_pass
from harprune.recipe.faults import rule_of, value_of
from harprune.recipe.schema import Recipe
from harprune.robustness.evaluation import device_of
from harprune.sparsity import allocation, costs
from harprune.sparsity.granularity import Granularity
from harprune.user_code import current_directory_importable, user_function

METHODS: dict[str, type[Method]] = {
    "harp": HARP,
    "hydra": HYDRA,
    "magnitude": Magnitude,
    "random": Random,
    "snip": SNIP,
    "grasp": GraSP,
    "synflow": SynFlow,
    "li20": Li20,
    "rst": RST,
    "twinrep": TwinRep,
    "flying-bird": FlyingBird,
    "robust-bird": RobustBird,
    "admm": ADMM,
    "mad": MAD,
    "bcs": BCS,
}

WITHOUT_ALLOCATION = frozenset(n for n, kind in METHODS.items() if not kind.uses_allocation)
"""Those for which budget.allocation has no effect."""

PLUG_INS = {"s2ap": S2AP}
"""What a method's name may be followed by, as in `harp+s2ap`."""

ALLOCATIONS: dict[str, allocation.Allocation] = {
    "uniform": allocation.uniform,
    "erk": allocation.erk,
    "lamp": allocation.lamp,
    "igq": allocation.igq,
    "global": allocation.global_magnitude,
}


def method_notes() -> list[str]:
    """The options of every method: meaning, default, and whose they are."""
    homes: dict[tuple[str, str], list[str]] = {}
    kinds: dict[str, Any] = METHODS | PLUG_INS
    for name, kind in kinds.items():
        meanings = _meanings(kind)
        for option in (f for f in fields(kind) if f.init):
            held = option.default.value if isinstance(option.default, Enum) else option.default
            default = "" if held is None else json.dumps(held)
            line = f"{option.name} = {default}".strip()
            homes.setdefault((meanings.get(option.name, ""), line), []).append(name)
    found = []
    for (meaning, option), names in homes.items():
        found += [f"{', '.join(names)}: {meaning}", option]
    return found


def _meanings(kind: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of its attributes, by name."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        _, _, text = inspect.cleandoc(each.__doc__ or "").partition("Attributes:\n")
        entries = re.findall(r"^    (\w[\w, ]*): ((?:.*\n?)(?:^ {8}.*\n?)*)", text, re.MULTILINE)
        for names, meaning in entries:
            found |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return found


def method(recipe: Recipe) -> Method:
    """The pruning method with its options.

    Raises:
        ValueError: an unknown method or option (the nearest is named), or a bad value.
    """
    kind, plug_ins = _kinds(recipe)
    known = _options(kind)
    options = {
        option: value
        for key, (option, value) in _PARITY.items()
        if getattr(recipe.parity, key) and option in known
    }
    everyone = known.union(*map(_options, plug_ins))
    for name in recipe.method.options:
        if name not in everyone:
            near = get_close_matches(name, sorted(everyone), n=1, cutoff=0.0)
            hint = f"; the nearest known is 'method.{near[0]}'" if near else ""
            raise ValueError(f"unknown key 'method.{name}' of {recipe.method.name}{hint}")
    return _made(kind, {**options, **_given(recipe, kind)})


_PARITY = {
    "batch_norm_affine": ("train_batch_norm", True),
    "score_decay": ("decay_scores", True),
    "density_decay": ("decay_densities", True),
    "start_density": ("start_density", 0.1),
}
"""Keys of parity that are a method's own option, and its value then."""


def without_effect(recipe: Recipe) -> list[str]:
    """The keys that the recipe sets and its method does not look at."""
    kind, _ = _kinds(recipe)
    known = _options(kind)
    wanted = [key for key in _PARITY if getattr(recipe.parity, key)]
    idle = [f"parity.{key}" for key in wanted if _PARITY[key][0] not in known]
    if "allocation" in recipe.budget.model_fields_set and not kind.uses_allocation:
        idle.append("budget.allocation")
    return idle


def require_effect(recipe: Recipe) -> None:
    """Raises ValueError for an option of the method that cannot matter as the others stand."""
    made = method(recipe)
    usual = {option.name: option.default for option in fields(_kinds(recipe)[0])}
    for option, why in made.without_effect(recipe.prune.epochs).items():
        value = getattr(made, option)
        if option in recipe.method.options and value != usual[option]:
            raise ValueError(f"method.{option} = {value!r} has no effect {why}; leave it out")


def sharpness(recipe: Recipe) -> S2AP | None:
    """The plug-in S2AP with its options, where the method's name asks for it.

    Raises:
        ValueError: a bad value, or a training without scores or without a second pass.
    """
    _, plug_ins = _kinds(recipe)
    if S2AP not in plug_ins:
        return None
    if not method(recipe).trains_scores:
        raise ValueError(
            f"method.name = {recipe.method.name!r}: s2ap perturbs scores, and this method trains "
            "none; leave it out"
        )
    require_second_pass(recipe.prune.objective or recipe.objective, "s2ap")
    return _made(S2AP, _given(recipe, S2AP))


def _kinds(recipe: Recipe) -> tuple[Any, list[Any]]:
    """The classes behind `NAME+PLUG_IN`."""
    name, *extra = recipe.method.name.split("+")
    kind = METHODS.get(name) or _own_kind(name)
    if len(set(extra)) < len(extra):
        raise ValueError(
            f"method.name = {recipe.method.name!r} names a plug-in twice; name it once"
        )
    for each in extra:
        if each not in PLUG_INS:
            raise ValueError(
                f"method.name = {recipe.method.name!r}: {each!r} is no plug-in; choose one of "
                f"{', '.join(PLUG_INS)}"
            )
    return kind, [PLUG_INS[each] for each in extra]


def _own_kind(name: str) -> type[Method]:
    """The user's own method that `module:Class` names."""
    if ":" not in name:
        raise ValueError(
            f"method.name = {name!r} is unknown; choose one of {', '.join(METHODS)}, or give your "
            "own as module:Class"
        )
    with current_directory_importable():
        kind = user_function(name, "method.name")
    if not (isinstance(kind, type) and issubclass(kind, Method) and is_dataclass(kind)):
        raise ValueError(
            f"method.name = {name!r} must be a dataclass derived from harprune.methods.base.Method"
        )
    return kind


def _options(kind: Any) -> set[str]:
    return {f.name for f in fields(kind) if f.init}


def _given(recipe: Recipe, kind: type) -> dict:
    """The recipe's options that are `kind`'s."""
    return {n: value for n, value in recipe.method.options.items() if n in _options(kind)}


def _made(kind: type, options: Mapping) -> Any:
    """`kind` with typed options; a wrong one is named as the recipe has it."""
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(["method", *map(str, fault["loc"])])
        given = value_of(fault) if fault["loc"] else ""
        raise ValueError(f"{where}{given}: {rule_of(fault)}") from None


def budget(recipe: Recipe, example: Tensor) -> Budget:
    """What may be kept; `example` is one image, for a budget in multiply-adds."""
    section = recipe.budget

    def multiply_adds(model: nn.Module, layers: Mapping) -> dict[str, int]:
        return costs.multiply_add_prices(model, layers, example.to(device_of(model)))

    def mixed(model: nn.Module, layers: Mapping) -> dict[str, int]:
        images = example.to(device_of(model))
        return costs.mixed_prices(model, layers, images, section.multiply_add_share)

    choices = {"multiply-adds": {"prices": multiply_adds}, "mixed": {"prices": mixed}}
    prices = choices.get(section.cost, {})
    bound = section.multiply_adds
    return Budget(
        density=section.density,
        allocation=allocate(section.allocation),
        granularity=Granularity(section.granularity),
        include=section.include,
        exclude=section.exclude,
        floor=section.floor,
        limit=None if bound is None else Limit(bound, multiply_adds),
        **prices,
    )


def allocate(name: str) -> allocation.Allocation:
    """An allocation by name, or from a JSON file."""
    if name in ALLOCATIONS:
        return ALLOCATIONS[name]
    if not name.endswith(".json"):
        raise ValueError(
            f"budget.allocation = {name!r} is unknown; choose one of {', '.join(ALLOCATIONS)}, "
            "or a .json file of densities"
        )
    return allocation.read_allocation(name)
