# SPDX-License-Identifier: Apache-2.0
"""A grid of methods, densities and seeds on one recipe: each cell an ordinary run, then one table.

A cell is a process that repeats `harprune run` on a recipe written down for it, so it resumes, a
finished one costs nothing, and one that fails takes no other with it. The standard library's pool
keeps so many at work; on several machines that share a folder, the same command on each is enough,
since a run folder can be in one process's hands only.
"""

import copy
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from harprune.files import to_json, write
from harprune.pipeline import checks
from harprune.pipeline.console import Console
from harprune.pipeline.recipe import Recipe, Section, as_toml, make_recipe
from harprune.pipeline.run import in_use
from harprune.reporting.comparison import write_comparison

_PAUSE = 2.0
"""Seconds between two looks at a folder that another process works in."""


class Grid(Section):
    """What is compared. Cells are the product of methods, densities and seeds."""

    title: str = "Comparison"
    """Heading of the table."""
    note: str = ""
    """What a reader should know first."""
    base: str
    """The recipe all cells share; a path, seen from this file."""
    densities: list[float] = Field(min_length=1)
    """Fractions of the weights to keep."""
    seeds: list[int] = Field([0], min_length=1)
    """Each has a dense network of its own, unless the recipe names weights."""
    baseline: str | None = None
    """The method against which the others are tested, image by image."""
    common: dict[str, Any] = Field(default_factory=dict)
    """Keys of a recipe for all cells, over those of the base."""
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    """By the name in the table: keys of a recipe for its cells, over all others.

    With `pretrain.epochs = 0` a method starts from random weights, not from the dense network.
    """

    @field_validator("densities", "seeds")
    @classmethod
    def _once(cls, values: list) -> list:
        if len(set(values)) < len(values):
            raise ValueError("must not name a value twice")
        return values


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
        last = "dense.safetensors" if self.until == "pretrain" else "report/report.json"
        return (self.folder / last).exists()


def read_grid(path: str | Path) -> Grid:
    """The grid in a TOML file.

    Raises:
        ValueError: unreadable, an unknown key or a value out of range.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        return Grid.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        known = f"; the keys are {', '.join(Grid.model_fields)}"
        rule = fault["msg"].removeprefix("Value error, ")
        unknown = fault["type"] == "extra_forbidden"
        raise ValueError(
            f"{path}: unknown key {where!r}{known}" if unknown else f"{path}: {where}: {rule}"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def cells_of(path: str | Path, out: str | Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """The cells of the grid in a file, dense networks first, each with its checked recipe.

    Args:
        overrides: `section.key=value` for all cells.

    Raises:
        ValueError: the grid, its base or one of the recipes is at fault.
    """
    grid, out = read_grid(path), Path(out)
    base = Path(path).parent / grid.base
    try:
        content = tomllib.loads(base.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"base = {grid.base!r} of {path} cannot be read: {error}") from None
    shared = _over(content, grid.common)
    given = make_recipe(shared, overrides, source=str(path))
    made = []

    def add(name: str, label: str, changes: Mapping[str, Any], until: str, needs=None) -> None:
        recipe = make_recipe(_over(shared, changes), overrides, source=f"{path}, {label}")
        checks.check(recipe, weights_follow=needs is not None)
        made.append(Cell(name, label, recipe, out / name, until, needs))

    if given.model.weights is None:
        for seed in grid.seeds:
            name = f"dense-seed{seed}"
            add(name, "dense", {"name": name, "seed": seed}, "pretrain")
    for seed in grid.seeds:
        dense = None if given.model.weights else out / f"dense-seed{seed}"
        # The dense network of a seed is attacked once, in its first cell.
        first = given.attack.dense
        for density in grid.densities:
            for label, changes in grid.methods.items():
                name = f"{label.replace('/', '-').replace(' ', '-')}-{density:g}-seed{seed}"
                own = {"name": name, "seed": seed, "budget": {"density": density}}
                anew = changes.get("pretrain", {}).get("epochs") == 0
                own["attack"] = {"dense": first and not anew}
                if anew:
                    own["model"] = {"weights": None}
                elif dense is not None:
                    own["model"] = {"weights": str(dense / "dense.safetensors")}
                needs = None if dense is None or anew else dense.name
                add(name, label, _over(changes, own), "report", needs)
                first = first and anew
    return made


def compare(
    path: str | Path,
    out: str | Path,
    *,
    command: str,
    jobs: int = 1,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Run what is left of a grid, and write comparison.md, .json and plots of what is finished.

    Args:
        command: what makes this comparison again.
        jobs: processes at work at a time.

    Returns the comparison, with `failed`: why a cell is missing, by its name.

    Raises:
        ValueError: see `cells_of`; or no cell was finished.
    """
    if jobs < 1:
        raise ValueError(f"jobs = {jobs} must be at least 1")
    grid, cells = read_grid(path), cells_of(path, out, overrides)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(out / "log.txt")
    failed = _run_all(cells, jobs, console, out / "seconds.json")
    points = [cell for cell in cells if cell.until == "report"]
    done = [cell for cell in points if cell.finished and cell.name not in failed]
    if not done:
        first = next(iter(failed.items()))
        raise ValueError(f"no cell was finished; the first, {first[0]}: {first[1]}")
    seconds = _read_seconds(out / "seconds.json")
    return write_comparison(
        [cell.folder for cell in done],
        out / "comparison.md",
        title=grid.title,
        note=grid.note,
        command=command,
        baseline=grid.baseline,
        labels=[cell.label for cell in done],
        seconds=[seconds.get(cell.name) for cell in done],
        failed=failed,
    )


def _run_all(cells: Sequence[Cell], jobs: int, console: Console, clock: Path) -> dict[str, str]:
    """Run what is not finished; why a cell failed, by its name."""
    waiting = [cell for cell in cells if not cell.finished]
    failed: dict[str, str] = {}
    done = {cell.name for cell in cells if cell.finished}
    working: dict[Future, Cell] = {}
    with console.bar("cells", len(cells)) as bar, ThreadPoolExecutor(jobs) as pool:
        bar.update(len(done))
        while waiting or working:
            for cell in _ready(waiting, done, failed)[: jobs - len(working)]:
                waiting.remove(cell)
                if cell.needs in failed:
                    failed[cell.name] = f"{cell.needs} failed"
                    continue
                console.say(f"{cell.name}: starts")
                working[pool.submit(_run_one, cell)] = cell
            bar.update(len(done) + len(failed), ", ".join(c.name for c in working.values()))
            if not working:
                # The rest is in other processes' hands, or has just been given up.
                if waiting and not _ready(waiting, done, failed):
                    time.sleep(_PAUSE)
                    done |= {cell.name for cell in waiting if cell.finished}
                    waiting = [cell for cell in waiting if cell.name not in done]
                continue
            ended, _ = wait(working, timeout=30.0, return_when=FIRST_COMPLETED)
            for future in ended:
                cell = working.pop(future)
                fault, taken = future.result()
                _add_seconds(clock, cell.name, taken)
                if fault is None:
                    done.add(cell.name)
                    console.say(f"{cell.name}: finished after {taken:.0f} s")
                elif in_use(cell.folder):
                    waiting.append(cell)
                else:
                    failed[cell.name] = fault
                    console.say(f"{cell.name}: failed: {fault}")
    return failed


def _ready(waiting: Sequence[Cell], done: set[str], failed: Mapping[str, str]) -> list[Cell]:
    """Cells that can start: what they need is settled, and no other process has them."""
    settled = {None, *done, *failed}
    return [cell for cell in waiting if cell.needs in settled and not in_use(cell.folder)]


def _run_one(cell: Cell) -> tuple[str | None, float]:
    """Run a cell to its end: what went wrong, if anything did, and the seconds it took."""
    started = time.monotonic()
    content = cell.recipe.model_dump(mode="json", exclude_unset=True)
    write(cell.file, "\n".join(as_toml(content)) + "\n")
    program = [sys.executable, "-m", "harprune", "run", str(cell.file), "--out", str(cell.folder)]
    with open(cell.said, "wb") as said:
        ended = subprocess.run(
            [*program, "--until", cell.until], stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
    return _fault(cell, ended.returncode), time.monotonic() - started


def _fault(cell: Cell, code: int) -> str | None:
    if code == 0:
        return None
    if code < 0:
        return f"its process was killed by signal {-code}, as for lack of memory"
    lines = [line for line in cell.said.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("harprune: ") if lines else f"its process ended with {code}"


def _read_seconds(clock: Path) -> dict[str, float]:
    return json.loads(clock.read_text()) if clock.exists() else {}


def _add_seconds(clock: Path, name: str, taken: float) -> None:
    """Count what a cell took, over all times that it was begun."""
    seconds = _read_seconds(clock)
    seconds[name] = seconds.get(name, 0.0) + taken
    write(clock, to_json(seconds))


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
