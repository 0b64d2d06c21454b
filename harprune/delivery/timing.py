# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: seconds, what they depend on, and rows for people and machines."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from harprune.files import write
from harprune.kernels import native
from harprune.run.environment import environment_of


def circumstances() -> dict:
    """What a time depends on besides a benchmark's options."""
    environment, kernels = environment_of(""), native.best()
    machine = environment["machine"]
    return {
        "threads": torch.get_num_threads(),
        "commit": environment["commit"],
        "machine": f"{machine['processor']}, {machine['cores']} cores, {machine['system']}",
        "kernels": None if kernels is None else kernels.name,
        "torch": torch.__version__,
    }


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds that one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    told: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """The seconds of each call in each round; in a round they take turns.

    Between two calls `told` hears the name of the one that was timed.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call))
            told(name)
    return taken


def summary(own: Sequence[float], reference: Sequence[float]) -> dict:
    """Median and extremes of the rounds, and how many times the reference's speed."""
    return {
        "rounds": len(own),
        "seconds": statistics.median(own),
        "min": min(own),
        "max": max(own),
        "ratio": speed(own, reference),
    }


def speed(own: Sequence[float], reference: Sequence[float]) -> float:
    """The median of the ratios within each round; above 1 where `own` is faster."""
    return statistics.median(b / a for a, b in zip(own, reference, strict=True))


def table(rows: Sequence[Mapping], columns: Sequence[str]) -> list[str]:
    """The lines of a table of these columns, the head first."""
    cells = [list(columns), *([_cell(row[c]) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(f"{c:>{w}}" for c, w in zip(line, widths)) for line in cells]


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_rows(path: Path | None, rows: Sequence[Mapping]) -> None:
    """The rows as JSON, where a path is given; written anew whenever there are more."""
    if path is not None:
        write(path, json.dumps(rows, indent=1) + "\n")
