# SPDX-License-Identifier: Apache-2.0
"""What a comparison is of: a grid, read from TOML, checked at the door, and explained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from harprune.recipe.faults import rule_of, value_of
from harprune.recipe.schema import Recipe, Section
from harprune.recipe.text import as_toml, is_grid, read_toml
from harprune.reporting.comparison import DENSE

_METHODS = """\
[methods.HARP]
method.name = "harp"

[methods.HYDRA]
method.name = "hydra"
budget.allocation = "uniform"

[methods.SNIP]
method.name = "snip"
pretrain.epochs = 0
prune.epochs = 0"""


class Grid(Section):
    """What is compared. Cells are the product of methods, densities and seeds."""

    title: str = "Comparison"
    """Heading of the table."""
    note: str = ""
    """What a reader should know first."""
    base: str = Field(examples=['base = "recipes/digits.toml"'])
    """The recipe all cells share; a path, seen from this file."""
    densities: list[float] = Field(min_length=1, examples=["densities = [0.1, 0.01]"])
    """Fractions of the weights to keep."""
    seeds: list[int] = Field([0], min_length=1)
    """Each has a dense network of its own, unless the recipe names weights."""
    common: dict[str, Any] = Field(default_factory=dict, examples=["[common]\nattack.size = 100"])
    """Keys of a recipe for all cells, over those of the base."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1, examples=[_METHODS])
    """By the name in the table: keys of a recipe for its cells, over all others.

    With `pretrain.epochs = 0` a method starts from random weights, not from the dense network. That
    one is everybody's, so nothing else of `pretrain` can be a method's own.
    """
    baseline: str | None = Field(None, examples=['baseline = "HARP"'])
    """The method against which the others are tested, image by image."""

    @field_validator("densities", "seeds")
    @classmethod
    def _once(cls, values: list) -> list:
        if len(set(values)) < len(values):
            raise ValueError("must not name a value twice")
        return values

    @field_validator("methods")
    @classmethod
    def _own(cls, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for label, keys in methods.items():
            if label == DENSE:
                raise ValueError(
                    f"{DENSE!r} is the network all start from; name the method otherwise"
                )
            if "weights" in keys.get("model", {}):
                raise ValueError(f"{label}: model.weights are the grid's; give them in common")
            if keys.get("pretrain", {"epochs": 0}) != {"epochs": 0}:
                raise ValueError(f"{label}: of pretrain only epochs = 0 can be a method's own")
        return methods

    @field_validator("baseline")
    @classmethod
    def _known(cls, baseline: str | None, info: ValidationInfo) -> str | None:
        methods = info.data.get("methods", {})
        if baseline is not None and methods and baseline not in methods:
            raise ValueError(f"{baseline!r} is no method here; choose one of {', '.join(methods)}")
        return baseline


def read_grid(path: str | Path) -> Grid:
    """The grid in a TOML file.

    Raises:
        ValueError: unreadable, an unknown key or a value out of range.
    """
    content = read_toml(path, f"grid {path}")
    if not is_grid(content) and content.keys() & Recipe.model_fields.keys():
        raise ValueError(f"{path} is a recipe, not a grid; `harprune run {path}` runs it")
    try:
        return Grid.model_validate(content)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
        where = ".".join(map(str, fault["loc"]))
        known = f"; the keys are {', '.join(Grid.model_fields)}"
        unknown = fault["type"] == "extra_forbidden"
        raise ValueError(
            f"{path}: unknown key {where!r}{known}"
            if unknown
            else f"{path}: {where}{value_of(fault)}: {rule_of(fault)}"
        ) from None


def describe_grid() -> Iterator[str]:
    """The keys of a grid with their meaning, as the lines of a TOML file to start from."""
    tables = {"common", "methods"}  # which end the keys of a TOML file
    for name, field in sorted(Grid.model_fields.items(), key=lambda item: item[0] in tables):
        yield from ([""] if name in tables else [])
        yield f"# {' '.join((field.description or '').split())}"
        yield from field.examples or as_toml({name: field.get_default()})
