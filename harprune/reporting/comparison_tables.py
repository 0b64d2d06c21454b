# SPDX-License-Identifier: Apache-2.0
"""The tables of a comparison, each made of what `compare_runs` found."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean, median
from typing import Any

from harprune.outcomes import WORST_CASE
from harprune.reporting.summary import AUTOATTACK, measure_order
from harprune.reporting.tables import (
    ABSENT,
    Table,
    flatten,
    format_difference,
    format_kept,
    format_p,
    short_title_of,
)

FEW = 5
"""As many warnings stand above the result, and runs in a cell of a table; of more the number."""


def rows_table(comparison: Mapping[str, Any]) -> Table:
    """A row for each configuration and budget: accuracies over seeds, and what is kept."""
    known = measure_order(name for row in comparison["rows"] for name in row["measures"])
    measures = [name for name in known if name != WORST_CASE]
    rows = tuple(
        (
            _named(row, comparison["protocol"]["images"]),
            row["budget"],
            ", ".join(map(str, row["seeds"])),
            *(_mean(row["measures"].get(name), len(row["seeds"])) for name in measures),
            _kept(row),
        )
        for row in comparison["rows"]
    )
    titles = map(short_title_of, measures)
    header = ("configuration", "budget", "seeds", *titles, "weights kept / total")
    return Table(header, rows)


def _named(row: Mapping[str, Any], images: int) -> str:
    """A dense network may have been attacked on fewer images than the pruned ones."""
    own = row["images"]
    counts = " or ".join(f"{count:,}" for count in own)
    return row["configuration"] + ("" if own == [images] else f" ({counts} images)")


def _mean(measured: Mapping[str, Any] | None, seeds: int) -> str:
    """An accuracy over seeds, which says so where some of the row's `seeds` lack it."""
    if measured is None:
        return "not run"
    spread, known = measured["spread"], len(measured["seeds"])
    text = f"{100 * measured['mean']:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
    return text if known == seeds else f"{text} ({known} of {seeds} seeds)"


def _kept(row: Mapping[str, Any]) -> str:
    least, most = min(row["kept"]), max(row["kept"])
    return ("" if least == most else f"{least:,} to ") + format_kept(most, row["total"])


def cost_table(comparison: Mapping[str, Any]) -> Table:
    """A row for each pruned one: its multiply-adds, passes and minutes."""
    rows = tuple(
        (
            row["configuration"],
            row["budget"],
            _shares(row["multiply_adds"], row["dense_multiply_adds"]),
            f"{fmean(row['passes']):,.0f}",
            _minutes(row["seconds"]),
        )
        for row in comparison["rows"]
        if row["density"] < 1.0
    )
    return Table(("configuration", "budget", "multiply-adds", "passes", "minutes"), rows)


def _shares(kept: Sequence[int], dense: int | None) -> str:
    return ABSENT if not kept or not dense else f"{100 * fmean(kept) / dense:.2f} %"


def _minutes(seconds: Sequence[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return f"{median(known) / 60:.1f}" if known else ABSENT


def missing_table(comparison: Mapping[str, Any]) -> Table:
    """A row for each run that failed, and one for all that are still to come."""
    rows, to_come = list(comparison["failed"].items()), comparison["to_come"]
    if to_come:
        more = f" and {len(to_come) - FEW} more" if len(to_come) > FEW else ""
        rows.append((", ".join(to_come[:FEW]) + more, "not run yet"))
    return Table(("run", "why"), tuple(rows), numeric=False)


def paired_table(comparison: Mapping[str, Any]) -> Table | None:
    """A row for each difference to the baseline with one seed; None where there is none."""
    rows = tuple(
        (
            pair["configuration"],
            pair["budget"],
            str(pair["seed"]),
            short_title_of(pair["measure"]),
            format_difference(pair),
            f"{pair['won']:,} / {pair['lost']:,}",
            format_p(pair["p_value"]),
            f"{pair['size']:,}",
        )
        for pair in comparison["paired"]
    )
    header = ("configuration", "budget", "seed", "accuracy", "difference", "won / lost", "p", "n")
    return Table(header, rows) if rows else None


def pooled_table(comparison: Mapping[str, Any]) -> Table:
    """A row for each configuration and budget; in how many seeds its AutoAttack is the higher."""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in comparison["pooled"]:
        found.setdefault((row["configuration"], row["budget"]), {})[row["measure"]] = row
    higher = Counter(
        (pair["configuration"], pair["budget"])
        for pair in comparison["paired"]
        if pair["measure"] == AUTOATTACK and pair["difference"] > 0
    )
    rows = tuple(
        (
            configuration,
            budget,
            *(cell for name in ("clean", AUTOATTACK) for cell in _over_seeds(known.get(name))),
            f"{higher[configuration, budget]} of {len(known[AUTOATTACK]['seeds'])}"
            if AUTOATTACK in known
            else ABSENT,
        )
        for (configuration, budget), known in found.items()
    )
    header = ("configuration", "budget", "clean", "over seeds", "AutoAttack", "over seeds")
    header = (*header, "seeds with more AutoAttack")
    # Without AutoAttack there is nothing in the last three columns.
    columns = len(header) if any(AUTOATTACK in known for known in found.values()) else 4
    return Table(header[:columns], tuple(row[:columns] for row in rows))


def _over_seeds(pooled: Mapping[str, Any] | None) -> tuple[str, str]:
    """A difference with its interval, and its standard deviation over seeds."""
    spread = pooled["spread"] if pooled else None
    return format_difference(pooled), ABSENT if spread is None else f"± {100 * spread:.2f}"


def warnings_table(comparison: Mapping[str, Any]) -> Table:
    """A row for each configuration and budget with all that was raised there."""
    found: dict[tuple[str, str], list[str]] = {}
    for w in comparison["warnings"]:
        said = f"seed {w['seed']}, {w['model']}: {w['warning']}"
        found.setdefault((w["configuration"], w["budget"]), []).append(said)
    rows = tuple(
        (configuration, budget, "; ".join(said)) for (configuration, budget), said in found.items()
    )
    return Table(("configuration", "budget", "raised"), rows, numeric=False)


def made_table(comparison: Mapping[str, Any]) -> Table:
    """What the runs were made with; where they agree it is said once."""
    rows = []
    for key in ("commit", "python", "versions", "machine"):
        found: dict[str, list[str]] = {}
        for run in comparison["runs"]:
            found.setdefault(_successive(run["environment"], key), []).append(run["run"])
        for value, runs in found.items():
            named = ", ".join(runs) if len(runs) <= FEW else f"{len(runs)} runs"
            rows.append((key, value, "all" if len(found) == 1 else named))
    return Table(("", "", "runs"), tuple(rows), numeric=False)


def _successive(environment: Mapping[str, Any], key: str) -> str:
    """A value of the environment; several where a run was continued under another one."""
    every = [flatten(e.get(key)) for e in (environment, *environment.get("continued", []))]
    return ", then ".join(value for value, _ in groupby(every))
