# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side for people: comparison.md with its plots, and the same as .json."""

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harprune.files import to_json, write
from harprune.reporting import comparison_plots
from harprune.reporting.comparison import compare_runs
from harprune.reporting.comparison_tables import (
    FEW,
    cost_table,
    made_table,
    missing_table,
    paired_table,
    pooled_table,
    rows_table,
    warnings_table,
)
from harprune.reporting.document import Document, Plot, Section
from harprune.reporting.groups import DENSE
from harprune.reporting.plots import to_svg
from harprune.reporting.summary import AUTOATTACK
from harprune.reporting.tables import (
    flatten,
    format_budgets,
    format_density,
)


def write_comparison(
    folders: Sequence[str | Path],
    out_md: str | Path,
    *,
    title: str,
    note: str,
    command: str,
    makes_runs: bool = False,
    baseline: str | None = None,
    labels: Sequence[str] | None = None,
    seconds: Sequence[float | None] | None = None,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    without_allocation: Container[str] = (),
    failed: Mapping[str, str] = MappingProxyType({}),
    to_come: Sequence[str] = (),
    awaited: str | None = None,
) -> dict[str, Any]:
    """Write `out_md`, and beside it the same as .json and plots as .svg; returns the comparison.

    Args:
        folders: finished run folders.
        note: what a reader should know first; may be empty.
        command: what makes this file again.
        makes_runs: it makes the runs too, so that their own commands need not be shown.
        baseline, labels, seconds, complete, without_allocation: see `compare_runs`.
        failed: runs that should be here and are not, with the reason.
        to_come: runs that should be here and were not run yet.
        awaited: what is to be the baseline as soon as a run of it is finished.

    Raises:
        ValueError: see `require_free` and `compare_runs`.
    """
    out = Path(out_md)
    require_free(out)
    comparison = {"title": title, "note": note, "command": command}
    comparison |= compare_runs(
        folders,
        baseline=baseline,
        labels=labels,
        seconds=seconds,
        complete=complete,
        without_allocation=without_allocation,
    )
    comparison |= {"makes_runs": makes_runs, "failed": dict(failed)}
    comparison |= {"to_come": list(to_come), "awaited": awaited}
    pictures = dict(_pictures(out, comparison))
    # First what says of the others that they are a comparison's, and may be replaced by the next.
    write(out.with_suffix(".json"), to_json(comparison))
    for plot in pictures.values():
        write(out.with_name(plot.path), plot.svg)
    write(out, _document(comparison, pictures).markdown())
    return comparison


def require_free(out: Path) -> None:
    """Refuse a place where a comparison would replace anything but an earlier one.

    Raises:
        ValueError: it is no Markdown file, it lies in a run folder, or a file beside it that would
            be written is there and of no comparison.
    """
    if out.suffix != ".md":
        raise ValueError(f"a comparison is written to a Markdown file, not to {out}; end it in .md")
    for folder in out.absolute().parents:
        if (folder / "recipe.json").exists():
            raise ValueError(f"{out} lies in the run folder {folder}; name a file elsewhere")
    table = out.with_suffix(".json")
    if _is_comparison(table):
        return
    for path in (table, out.with_suffix(".svg"), *map(out.with_name, _plots_of(out))):
        if path.exists():
            raise ValueError(
                f"{path} would be written beside {out}, but it is there and of no comparison; name "
                "another file"
            )


def _is_comparison(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"title", "protocol", "rows"} <= content.keys()


def _plots_of(out: Path) -> tuple[str, str]:
    """The names of the plots beside the first one: over density, and of strategies."""
    return f"{out.stem}-density.svg", f"{out.stem}-strategies.svg"


def _pictures(out: Path, comparison: Mapping[str, Any]) -> Iterator[tuple[str, Plot]]:
    """What there is to see, by the section that shows it."""
    title = comparison["title"]
    over_density, of_strategies = _plots_of(out)
    picture = to_svg(comparison_plots.points_by_row, comparison["rows"])
    drawn = "clean and robust" if _has_autoattack(comparison) else "clean"
    yield "result", Plot(out.with_suffix(".svg").name, f"{title}: {drawn} accuracy", picture)
    rows = [row for row in comparison["rows"] if row["density"] < 1.0]
    if len({row["density"] for row in rows}) > 1:
        baseline = comparison["baseline"]
        picture = to_svg(comparison_plots.accuracy_over_density, comparison["rows"], baseline)
        yield "density", Plot(over_density, f"{title}: accuracy over density", picture)
    least = min(row["density"] for row in rows)
    sparsest = [row for row in rows if row["density"] == least]
    strategies = {row["configuration"]: row["layers"] for row in sparsest}
    picture = to_svg(comparison_plots.strategies, strategies)
    caption = f"{title}: densities per layer at {format_budgets(sparsest)}, first seed"
    yield "strategies", Plot(of_strategies, caption, picture)


def _document(comparison: Mapping[str, Any], pictures: Mapping[str, Plot]) -> Document:
    protocol = "; ".join(
        f"{key}: {flatten(value)}" for key, value in comparison["protocol"].items()
    )
    robust = (
        "AutoAttack is the robust accuracy"
        if _has_autoattack(comparison)
        else "none is AutoAttack's, so none is a robust accuracy"
    )
    explained = (
        f"Protocol: {protocol}. Test accuracy in %, mean ± sample standard deviation over seeds; "
        f"{robust}."
    )
    return Document(
        title=comparison["title"],
        lead=tuple(filter(None, (comparison["note"], explained))),
        warnings=tuple(_warned(comparison["warnings"])),
        sections=tuple(_sections(comparison, pictures)),
    )


def _warned(warnings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len(warnings) > FEW:
        raised = len({(w["configuration"], w["density"], w["seed"]) for w in warnings})
        yield f"{raised} runs have warnings or failed checks; see Warnings and failed checks."
        return
    for w in warnings:
        where = f"{w['configuration']}, {w['budget']}, seed {w['seed']}"
        yield f"{where}, {w['model']}: {w['warning']}"


def _sections(comparison: Mapping[str, Any], pictures: Mapping[str, Plot]) -> Iterator[Section]:
    yield Section("Result", rows_table(comparison), pictures["result"])
    if comparison["failed"] or comparison["to_come"]:
        yield Section("Missing", missing_table(comparison))
    if "density" in pictures:
        yield Section("Accuracy over density", plot=pictures["density"])
    yield Section("What it costs", cost_table(comparison), text=_COST)
    yield Section("Where weights are kept", plot=pictures["strategies"])
    if comparison["baseline"] is not None:
        yield _difference_section(comparison)
    elif comparison["awaited"] is not None:
        name = comparison["awaited"]
        yield Section(f"Against {name}", text=f"There is no finished run of {name} yet.")
    if len(comparison["warnings"]) > FEW:
        yield Section("Warnings and failed checks", warnings_table(comparison))
    script = comparison["command"]
    if not comparison["makes_runs"]:
        held = [run["environment"] for run in comparison["runs"]]
        commands = [e.get("command") for run in held for e in (run, *run.get("continued", []))]
        script = "\n".join([*dict.fromkeys(filter(None, commands)), script])
    yield Section("How this was made", made_table(comparison), code=script)


def _difference_section(comparison: Mapping[str, Any]) -> Section:
    """Several seeds in one row; one seed with its test."""
    name = comparison["baseline"]
    weights = all(row["budget"] == format_density(row["density"]) for row in comparison["paired"])
    share = "density" if weights else "share of what the budget counts"
    start = f"Difference to {name} at the same {share}"
    if name != DENSE and any(pair["configuration"] == DENSE for pair in comparison["paired"]):
        start += " (of the dense network, to those pruned to the density named)"
    if any(len(row["seeds"]) > 1 for row in comparison["pooled"]):
        text = (
            f"{start}, over pairs of the same image and seed: percentage points with the 95 % "
            "interval over images, which seeds that agree do not narrow. It takes the trained "
            "networks as given, for images are drawn and seeds are not; how much another seed "
            "would change a difference, the sample standard deviation over seeds beside it tells. "
            "Where the seeds disagree about its sign, it is no verdict about methods. "
            f"{_each_alone(len(comparison['pooled']))}The tests of each seed are in the JSON file."
        )
        return Section(f"Against {name}", pooled_table(comparison), text=text)
    text = (
        f"{start} and seed, on the same images: percentage points with the paired 95 % interval, "
        "and the exact McNemar test. They take the trained networks as given: images are drawn, "
        f"seeds are not. {_each_alone(len(comparison['paired']))}"
    ).rstrip()
    table = paired_table(comparison)
    none = " There is no pair measured on the same images."
    return Section(f"Against {name}", table, text=text if table else text + none)


def _has_autoattack(comparison: Mapping[str, Any]) -> bool:
    return any(AUTOATTACK in row["measures"] for row in comparison["rows"])


def _each_alone(count: int) -> str:
    """What 95 % means where a table has so many intervals."""
    if count < 2:
        return ""
    return (
        f"Each interval stands alone at 95 %: of the {count} here {count / 20:.2g} miss the true "
        "difference on average. "
    )


_COST = (
    "Multiply-adds of one image, as a share of the dense network's; passes, each one image forward "
    "and back, of the stages of pruning and finetuning: attacks, steps, the two further "
    "validations of Flying Bird+ and what MAD, SNIP and GraSP score with (the last two as far as a "
    "run's records have them). Not counted are a forward pass alone, a third of one; the "
    "validation that selects epochs, alike for all; SynFlow's rounds, one image each; and the "
    "batch norm of averaged weights, 16 batches an epoch. Where it is known, the wall-clock time "
    "of the run with its attacks and without a dense network that it shares, in minutes, the "
    "median over seeds, which depends on what else the machine did."
)
