# SPDX-License-Identifier: Apache-2.0
"""A grid of methods, densities and seeds on one recipe: each cell an ordinary run, then one table.

A cell is a process that repeats `harprune run` on a recipe written down for it, so it resumes, a
finished one costs nothing, and one that fails takes no other with it. On several machines the same
command on each is enough, where they share the folder under the same path and its file locks: a run
folder can be in one process's hands only.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harprune.files import make_folder, write
from harprune.grid.cells import Cell, cells_of, require_same_recipe
from harprune.grid.schema import read_grid
from harprune.recipe.text import as_toml, completed
from harprune.reporting.comparison_report import require_free, write_comparison
from harprune.run.console import Console
from harprune.run.lock import IN_USE, in_use

_PAUSE = 0.5
"""Seconds between two looks at what is going on."""


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
        require_same_recipe(cell)
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
