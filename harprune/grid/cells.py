# SPDX-License-Identifier: Apache-2.0
"""The cells of a grid: which runs it asks for, each with its recipe and its folder."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from harprune.grid.schema import Grid, read_grid
from harprune.nested import differences, in_words
from harprune.recipe import checks
from harprune.recipe.schema import Recipe
from harprune.recipe.text import completed, is_grid, make_recipe, overridden, read_toml
from harprune.reporting.comparison import DENSE
from harprune.run.derived import read_record
from harprune.run.folder import WITHOUT_EFFECT
from harprune.run.opening import check

T = TypeVar("T", float, str)
_DENSE_ATTACKED = "attack/dense/evaluation.json"
"""What a cell's folder holds once the dense network was attacked there."""


@dataclass(frozen=True)
class Cell:
    """One run: a point of the grid, or the dense network that the points of a seed share."""

    name: str
    label: str
    recipe: Recipe
    folder: Path
    until: str
    needs: str | None = None

    @property
    def file(self) -> Path:
        """Its recipe, beside its folder."""
        return self.folder.with_name(f"{self.name}.toml")

    @property
    def said(self) -> Path:
        """What its process printed, beside its folder."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do for it."""
        # A report may also be of an unfinished run.
        last = ["attack/finetuned/evaluation.json", "report/report.json"]
        if self.recipe.attack.dense:
            last.append(_DENSE_ATTACKED)
        files = ["dense.safetensors"] if self.until == "pretrain" else last
        return all((self.folder / file).exists() for file in files)


def cells_of(
    path: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    densities: Sequence[float] = (),
    methods: Sequence[str] = (),
) -> list[Cell]:
    """The cells of the grid in a file, dense networks first, each with its checked recipe.

    A dense network is attacked once: in the cell of the grid whose folder in `out` says that it
    was, else in the first one here that starts from it.

    Args:
        overrides: `section.key=value` for all cells.
        densities, methods: those of the grid to which it is restricted; empty for all.

    Raises:
        ValueError: the grid, its base or one of the recipes is at fault; a density or method that
            the grid does not have.
    """
    grid, out = read_grid(path), Path(out)
    _require_free_axes(overrides)
    densities = _part(grid.densities, densities, f"--density of {path}")
    methods = _part(grid.methods, methods, f"--method of {path}")
    content = read_toml(Path(path).parent / grid.base, f"base = {grid.base!r} of {path}")
    if is_grid(content):
        raise ValueError(f"base = {grid.base!r} of {path} is itself a grid; name a recipe")
    content = _over(content, grid.common)
    shared = overridden(content, overrides)
    given = make_recipe(shared, source=str(path))

    def cell(name: str, label: str, content: dict[str, Any], until: str, needs=None) -> Cell:
        recipe = make_recipe(_trimmed(content), source=f"{path}, {label}")
        check(recipe, out / name, weights_follow=needs is not None)
        return Cell(name, label, recipe, out / name, until, needs)

    starts = {s: f"dense-seed{s}" if given.model.weights is None else None for s in grid.seeds}
    cells = [
        cell(name, DENSE, _over(shared, {"name": name, "seed": seed}), "pretrain")
        for seed, name in starts.items()
        if name is not None
    ]
    own = {label: overridden(_over(content, grid.methods[label]), overrides) for label in methods}
    recipes = {label: make_recipe(own[label], source=f"{path}, {label}") for label in methods}
    pretrained = [label for label in methods if recipes[label].pretrain.epochs]
    attacking = _attacking(grid, out, starts, densities, pretrained)
    for seed, density, label in product(grid.seeds, densities, methods):
        name, needs = _cell_name(label, density, seed), starts[seed]
        attacks = given.attack.dense and name in attacking
        idle = {"dense_size": None} if given.attack.dense and not attacks else {}
        point: dict[str, Any] = {"name": name, "seed": seed, "budget": {"density": density}}
        point["attack"] = {"dense": attacks, **idle}
        if label not in pretrained:
            point["model"], needs = {"weights": None}, None
        elif needs is not None:
            point["model"] = {"weights": str(out / needs / "dense.safetensors")}
        cells.append(cell(name, label, _over(own[label], point), "report", needs))
    _require_names_of_their_own(cells, path)
    return cells


def _attacking(
    grid: Grid,
    out: Path,
    starts: Mapping[int, str | None],
    densities: Sequence[float],
    methods: Sequence[str],
) -> set[str]:
    """For each dense network the one cell that attacks it: one that did, else the first that can.

    Args:
        starts: by seed, the dense network that its cells start from.
        densities, methods: of the cells that are wanted and start from it.
    """
    found: set[str] = set()
    for start in set(starts.values()):
        seeds = [seed for seed in starts if starts[seed] == start]
        every = _cell_names(seeds, grid.densities, grid.methods)
        did = [name for name in every if (out / name / _DENSE_ATTACKED).exists()]
        can = _cell_names(seeds, densities, methods)
        found.update([*did, *can][:1])
    return found


def _require_names_of_their_own(cells: Sequence[Cell], path: str | Path) -> None:
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{path}: two cells would be called {name!r}; let the names of methods differ in "
                "letters or digits, and densities in six digits"
            )


def _part(known: Iterable[T], wanted: Sequence[T], option: str) -> list[T]:
    """Of what a grid knows, in its order, that which is wanted; all where nothing is said."""
    known = list(known)
    for value in wanted:
        if value not in known:
            names = ", ".join(map(str, known))
            raise ValueError(f"{option} has no {value!r}; choose among {names}")
    return [value for value in known if value in (wanted or known)]


def _trimmed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without what only training has, where a stage has no epochs.

    A grid asks for it in all cells at once, also those of methods that skip the stage.
    """
    kept = dict(content)
    for name in ("pretrain", "prune", "finetune"):
        stage = kept.get(name)
        if isinstance(stage, Mapping) and stage.get("epochs") == 0:
            kept[name] = {key: stage[key] for key in stage if key not in checks.OF_TRAINING}
    return kept


def _require_free_axes(overrides: Sequence[str]) -> None:
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key in ("name", "seed", "budget.density"):
            raise ValueError(f"--set {text!r}: the grid says this for each cell; change it there")


def _cell_names(
    seeds: Iterable[int], densities: Iterable[float], labels: Iterable[str]
) -> list[str]:
    return [
        _cell_name(label, density, seed)
        for seed, density, label in product(seeds, densities, labels)
    ]


def _cell_name(label: str, density: float, seed: int) -> str:
    plain = "".join(c if c.isalnum() or c in "+._" else "-" for c in label)
    return f"{plain}-{density:g}-seed{seed}"


def require_same_recipe(cell: Cell) -> None:
    """Raises ValueError where a cell, which is not opened again, was finished by another recipe."""
    record = cell.folder / "recipe.json"
    if cell.finished and record.exists():
        held = completed(_trimmed(read_record(record)))
        wanted = cell.recipe.model_dump(mode="json")
        # Which cell attacks the dense network depends on the order of the methods; and that all
        # were attacked on the same images, wherever these lie now, the table sees to.
        free = {*WITHOUT_EFFECT, "data.folder", "attack.dense"}
        if not (cell.recipe.attack.dense and (cell.folder / "attack" / "dense").exists()):
            free.add("attack.dense_size")
        if cell.needs and _own_dense(held) == _own_dense(wanted):
            free.add("model.weights")
        later = ("budget.", "method.", "prune.", "finetune.", "attack.")
        found = [
            difference
            for difference in differences(held, wanted)
            if difference[0] not in free
            and not (cell.until == "pretrain" and difference[0].startswith(later))
        ]
        if found:
            raise ValueError(
                f"{cell.folder} holds a run of another recipe ({in_words(found)}); remove it or "
                "choose another --out"
            )


def _own_dense(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The weights of a cell as its grid's folder knows them, wherever that folder lies now."""
    return Path(recipe["model"]["weights"] or "").parts[-2:]


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, those of `above` where both have one; another method brings its own keys."""
    merged = copy.deepcopy(dict(below))
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and not _replaces(old, value):
            merged[key] = _over(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _replaces(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "name" in old and "name" in new and old["name"] != new["name"]
