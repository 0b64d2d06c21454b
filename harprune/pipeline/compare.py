# SPDX-License-Identifier: Apache-2.0
"""A grid of methods, densities and seeds on one recipe: each cell an ordinary run, then one table.

A cell is a process that repeats `harprune run` on a recipe written down for it, so it resumes, a
finished one costs nothing, and one that fails takes no other with it. On several machines the same
command on each is enough, where they share the folder under the same path and its file locks: a run
folder can be in one process's hands only.
"""

import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from harprune.files import make_folder, write
from harprune.nested import differences, in_words
from harprune.pipeline import checks
from harprune.pipeline.console import Console
from harprune.pipeline.derived import read_record
from harprune.pipeline.grid import Grid, read_grid
from harprune.pipeline.lock import IN_USE, in_use
from harprune.pipeline.recipe import Recipe
from harprune.pipeline.recipe_text import (
    as_toml,
    completed,
    is_grid,
    make_recipe,
    overridden,
    read_toml,
)
from harprune.pipeline.run import WITHOUT_EFFECT
from harprune.reporting.comparison import DENSE
from harprune.reporting.comparison_report import require_free, write_comparison

T = TypeVar("T", float, str)
_PAUSE = 0.5
"""Seconds between two looks at what is going on."""
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
        checks.check(recipe, weights_follow=needs is not None)
        checks.require_effect(recipe, out / name)
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


def compare(
    path: str | Path,
    out: str | Path,
    *,
    command: str,
    jobs: int = 1,
    overrides: Sequence[str] = (),
    densities: Sequence[float] = (),
    methods: Sequence[str] = (),
) -> dict[str, Any]:
    """Run what is left of a grid, and write comparison.md, .json and plots of what is finished.

    Args:
        command: what makes this comparison again.
        densities, methods: as in `cells_of`.
        jobs: processes at work at a time; each takes `execution.threads` of the recipe.

    Returns the comparison, with `failed`: why a cell is missing, by its name, and `to_come`: the
    names of those that were not run yet.

    Raises:
        ValueError: see `cells_of` and `require_free`; a cell's folder holds a run of another
            recipe; or no cell was finished.
    """
    if jobs < 1:
        raise ValueError(f"jobs = {jobs} must be at least 1")
    grid = read_grid(path)
    cells = cells_of(path, out, overrides, densities, methods)
    for cell in (*cells, *cells_of(path, out, overrides)):
        _require_same_recipe(cell)
    out = Path(out)
    require_free(out / "comparison.md")
    make_folder(out)
    failed = _run_all(cells, jobs, Console(out / "log.txt"), out / "times.jsonl")
    # Of a part of the grid as of the whole: what was finished before stands in the table as well.
    points = [cell for cell in cells_of(path, out, overrides) if cell.until == "report"]
    done = [cell for cell in points if cell.finished and cell.name not in failed]
    if not done:
        name, why = next(iter(failed.items()), ("all of them", "see their logs"))
        raise ValueError(f"no cell was finished; the first, {name}: {why}")
    measured = grid.baseline in {cell.label for cell in done}
    known = {cell.name for cell in done} | failed.keys()
    seconds = _seconds(out / "times.jsonl")
    return write_comparison(
        [cell.folder for cell in done],
        out / "comparison.md",
        title=grid.title,
        note=grid.note,
        command=command,
        makes_runs=True,
        baseline=grid.baseline if measured else None,
        awaited=None if measured else grid.baseline,
        labels=[cell.label for cell in done],
        seconds=[seconds.get(cell.name) for cell in done],
        complete=completed,
        failed=failed,
        to_come=[cell.name for cell in points if cell.name not in known],
    )


def _require_same_recipe(cell: Cell) -> None:
    """A finished cell is not opened again, so the grid may have changed since."""
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


@dataclass
class _Work:
    """A cell's process."""

    cell: Cell
    process: subprocess.Popen
    started: float


def _run_all(cells: Sequence[Cell], jobs: int, console: Console, times: Path) -> dict[str, str]:
    """Run what is not finished; why a cell failed, by its name."""
    waiting, failed, working = list(cells), {}, []
    said = False
    try:
        with console.bar("cells", len(cells)) as bar:
            while waiting or working:
                # Others may have finished some: runs before, or another machine.
                waiting = [cell for cell in waiting if not cell.finished]
                open_ = {cell.name for cell in [*waiting, *(work.cell for work in working)]}
                ready = [cell for cell in waiting if cell.needs not in open_]
                for cell in [cell for cell in ready if cell.needs in failed]:
                    waiting.remove(cell)
                    ready.remove(cell)
                    failed[cell.name] = f"{cell.needs} failed"
                free = [cell for cell in ready if not in_use(cell.folder)]
                for cell in free[: jobs - len(working)]:
                    waiting.remove(cell)
                    console.say(f"{cell.name}: starts")
                    try:
                        working.append(_begin(cell, times))
                    except OSError as error:  # a full disk, no memory for a process
                        failed[cell.name] = str(error)
                if waiting and not working and not free and not said:
                    console.say(f"{waiting[0].folder} is in other hands; waiting for it")
                    said = True
                names = ", ".join(work.cell.name for work in working)
                bar.update(len(cells) - len(waiting) - len(working), names)
                if working or waiting:
                    time.sleep(_PAUSE)
                for work in [work for work in working if work.process.poll() is not None]:
                    working.remove(work)
                    fault = _end(work, times)
                    if fault is None:
                        console.say(f"{work.cell.name}: finished")
                    elif in_use(work.cell.folder) or IN_USE in fault:
                        waiting.append(work.cell)
                    else:
                        failed[work.cell.name] = fault
                        console.say(f"{work.cell.name}: failed: {fault}")
    finally:
        for work in working:
            work.process.terminate()
        for work in working:  # the same command may follow at once, and would find them in use
            work.process.wait()
    return failed


def _begin(cell: Cell, times: Path) -> _Work:
    content = cell.recipe.model_dump(mode="json", exclude_unset=True)
    write(cell.file, "\n".join(as_toml(content)) + "\n")
    _note(times, {"cell": cell.name})
    program = [sys.executable, "-m", "harprune", "run", str(cell.file), "--out", str(cell.folder)]
    with open(cell.said, "wb") as said:
        process = subprocess.Popen(
            [*program, "--until", cell.until], stdin=subprocess.DEVNULL, stdout=said, stderr=said
        )
    return _Work(cell, process, time.monotonic())


def _end(work: _Work, times: Path) -> str | None:
    """What went wrong, if anything did."""
    _note(times, {"cell": work.cell.name, "seconds": time.monotonic() - work.started})
    code = work.process.returncode
    if code == 0 or work.cell.finished:
        return None
    if code < 0:
        return f"its process was killed by signal {-code}, as for lack of memory"
    lines = work.cell.said.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.strip()]
    return said[-1].removeprefix("harprune: ") if said else f"its process ended with {code}"


def _note(times: Path, entry: Mapping[str, Any]) -> None:
    with open(times, "a") as file:  # one short line, which no other writer can part
        file.write(json.dumps(entry) + "\n")


def _seconds(times: Path) -> dict[str, float]:
    """What each cell took, over all times it was begun; none where one was not seen to its end."""
    begun: dict[str, int] = {}
    taken: dict[str, list[float]] = {}
    for line in times.read_bytes().splitlines() if times.exists() else ():
        match _entry(line):
            case {"cell": str(name), "seconds": float(seconds)}:
                taken.setdefault(name, []).append(seconds)
            case {"cell": str(name)}:
                begun[name] = begun.get(name, 0) + 1
    return {name: sum(all_) for name, all_ in taken.items() if len(all_) == begun.get(name)}


def _entry(line: bytes) -> Any:
    """What a line says; None where it was cut off, as by a full disk."""
    try:
        return json.loads(line)
    except ValueError:
        return None


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
