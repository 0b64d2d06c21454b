# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side under one protocol: seeds averaged, methods compared image by image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from types import MappingProxyType
from typing import Any

from harprune.files import to_json, write
from harprune.nested import differences
from harprune.pairing import PairedDifference, paired_difference, pooled_difference
from harprune.reporting import plots
from harprune.reporting.document import Document, Plot, Section
from harprune.reporting.records import WORST_CASE, Attacked, Run, read_run
from harprune.reporting.summary import AUTOATTACK, measure_order
from harprune.reporting.tables import (
    ABSENT,
    Table,
    flatten,
    format_density,
    format_difference,
    format_kept,
    format_p,
)

DENSE = "dense"

_FREE = (*("name", "seed", "data.folder", "model.weights", "attack.dense", "attack.dense_size"),)
"""Keys in which recipes of one configuration and density may differ, beside those of execution."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    method: str
    configuration: str
    density: float
    runs: Mapping[int, Run]
    seconds: Sequence[float | None]


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
    failed: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write `out_md`, and beside it the same as .json and plots as .svg; returns the comparison.

    Args:
        folders: finished run folders.
        note: what a reader should know first; may be empty.
        command: what makes this file again.
        makes_runs: it makes the runs too, so that their own commands need not be shown.
        baseline, labels, seconds, complete: see `compare_runs`.
        failed: runs that should be here and are not, with the reason.
    """
    out = Path(out_md)
    if out.suffix != ".md":
        raise ValueError(f"a comparison is written to a Markdown file, not to {out}; end it in .md")
    comparison = {"title": title, "note": note, "command": command}
    comparison |= compare_runs(
        folders, baseline=baseline, labels=labels, seconds=seconds, complete=complete
    )
    comparison |= {"makes_runs": makes_runs, "failed": dict(failed)}
    pictures = dict(_pictures(out, comparison))
    for plot in pictures.values():
        write(out.with_name(plot.path), plot.svg)
    write(out.with_suffix(".json"), to_json(comparison))
    write(out, _document(comparison, pictures).markdown())
    return comparison


def _pictures(out: Path, comparison: Mapping[str, Any]) -> Iterator[tuple[str, Plot]]:
    """What there is to see, by the section that shows it."""
    title = comparison["title"]
    picture = plots.to_svg(plots.points_by_row, comparison["rows"])
    yield (
        "result",
        Plot(out.with_suffix(".svg").name, f"{title}: clean and robust accuracy", picture),
    )
    rows = [row for row in comparison["rows"] if row["configuration"] != DENSE]
    if len({row["density"] for row in rows}) > 1:
        baseline = comparison["baseline"]
        picture = plots.to_svg(plots.accuracy_over_density, comparison["rows"], baseline)
        name = f"{out.stem}-density.svg"
        yield "density", Plot(name, f"{title}: accuracy over density", picture)
    least = min(row["density"] for row in rows)
    strategies = {r["configuration"]: r["layers"] for r in rows if r["density"] == least}
    picture = plots.to_svg(plots.strategies, strategies)
    caption = f"{title}: densities per layer at {format_density(least)}, first seed"
    yield "strategies", Plot(f"{out.stem}-strategies.svg", caption, picture)


def compare_runs(
    folders: Sequence[str | Path],
    *,
    baseline: str | None = None,
    labels: Sequence[str] | None = None,
    seconds: Sequence[float | None] | None = None,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> dict[str, Any]:
    """Runs grouped over seeds: mean and sample standard deviation of accuracies, exact counts.

    Args:
        folders: finished run folders of one data set, model and threat, measured on as many images.
        baseline: a configuration ("hydra + erk"), a method ("hydra") or "dense", against which
            the others of the same density are tested, seed by seed, on the same images.
        labels: what each run's configuration is called; said by its recipe when absent.
        seconds: what each run took, where that is known.
        complete: gives a recipe of an earlier version the keys that came since.

    Raises:
        ValueError: a run is unfinished, protocols differ, a seed occurs twice in one configuration,
            runs of one configuration and density differ in more than their seed, or the baseline is
            unknown.
    """
    runs = [read_run(folder) for folder in folders]
    if not runs:
        raise ValueError("nothing to compare; name one run folder or more")
    protocol = _protocol(runs)
    labels = labels or [_configuration(run) for run in runs]
    took = dict(zip((run.folder for run in runs), seconds or [None] * len(runs), strict=True))
    groups = _groups(runs, labels, took)
    for group in groups:
        _require_alike(group, complete)
    rows = [_dense_row(runs), *map(_row, groups)]
    return {
        "protocol": protocol,
        "rows": [row for row in rows if row],
        "baseline": baseline,
        "paired": [] if baseline is None else list(_paired(groups, baseline)),
        "pooled": [] if baseline is None else list(_pooled(groups, baseline)),
        "warnings": list(_warnings(groups)),
        "runs": [_made(run, label) for run, label in zip(runs, labels, strict=True)],
    }


def _protocol(runs: Sequence[Run]) -> dict[str, Any]:
    """What all runs must have in common for a comparison to mean anything."""
    protocols = [_protocol_of(run) for run in runs]
    for run, protocol in zip(runs, protocols, strict=True):
        for key, value in protocol.items():
            if value != protocols[0][key]:
                ours, first = flatten(value), flatten(protocols[0][key])
                raise ValueError(
                    f"{run.folder} has {key} {ours} but {runs[0].folder} has {first}; "
                    "compare runs of one protocol"
                )
    # The architecture's usual width goes without saying.
    return {k: v for k, v in protocols[0].items() if k != "width" or v is not None}


def _protocol_of(run: Run) -> dict[str, Any]:
    if run.audit is None or "finetuned" not in run.attacked:
        lacking = [stage for stage in run.missing if stage != "attack/dense"]
        raise ValueError(
            f"{run.folder} is not finished ({', '.join(lacking) or 'audit.json'} missing); "
            "finish it by the command that began it"
        )
    return {
        "data": run.section("data").get("name"),
        "model": run.section("model").get("name"),
        "width": run.section("model").get("width"),
        "threat": run.threat,
        "images": _finetuned(run).evaluation.size,
    }


def _groups(
    runs: Sequence[Run], labels: Sequence[str], took: Mapping[Path, float | None]
) -> list[Group]:
    """Runs by configuration and density, in order of appearance."""
    found: dict[tuple[str, float], dict[int, Run]] = {}
    for run, configuration in zip(runs, labels, strict=True):
        density = _density(run)
        members = found.setdefault((configuration, density), {})
        seed = run.recipe.get("seed", 0)
        if seed in members:
            raise ValueError(
                f"{members[seed].folder} and {run.folder} are both {configuration} at density "
                f"{density} with seed {seed}; "
                "compare runs that differ in method, allocation, density or seed"
            )
        members[seed] = run
    return [
        Group(
            _method(next(iter(members.values()))),
            configuration,
            density,
            members,
            [took[run.folder] for run in members.values()],
        )
        for (configuration, density), members in found.items()
    ]


def _require_alike(group: Group, complete: Callable) -> None:
    """Raises ValueError where an average over seeds would be one over different recipes."""
    first, *others = group.runs.values()
    for run in others:
        found = differences(complete(run.recipe), complete(first.recipe))
        for key, ours, theirs in found:
            if key in _FREE or key.startswith("execution."):
                continue
            raise ValueError(
                f"{run.folder} has {key} = {ours!r} but {first.folder} has {theirs!r}, and both "
                f"are {group.configuration} at density {group.density}; compare only runs that "
                "differ in their seed alone as one configuration"
            )


def _density(run: Run) -> float:
    density = run.section("budget").get("density")
    if not isinstance(density, float | int):
        raise ValueError(f"{run.folder / 'recipe.json'} has no budget.density; restore the file")
    return float(density)


def _method(run: Run) -> str:
    return str(run.section("method").get("name", "unknown"))


def _configuration(run: Run) -> str:
    """`hydra + erk`; with what else the recipe sets for the method or prunes other than weights."""
    method, budget = dict(run.section("method")), run.section("budget")
    method.pop("name", None)
    allocation = method.pop("allocation", None) or budget.get("allocation")
    granularity = budget.get("granularity", "weight")
    options = [f"{key}={value}" for key, value in sorted(method.items())]
    options += [f"{granularity}s"] if granularity != "weight" else []
    label = f"{_method(run)} + {allocation}" if allocation else _method(run)
    return f"{label} ({', '.join(options)})" if options else label


def _finetuned(run: Run) -> Attacked:
    return run.attacked["finetuned"]


def _row(group: Group) -> dict[str, Any]:
    runs = group.runs.values()
    audits = [run.audit for run in runs if run.audit]
    return {
        "configuration": group.configuration,
        "density": group.density,
        "seeds": list(group.runs),
        "measures": _measures([_finetuned(run) for run in runs]),
        "kept": [audit.kept for audit in audits],
        "total": audits[0].total,
        "denominator": audits[0].denominator,
        "multiply_adds": [a.multiply_adds["kept"] for a in audits if a.multiply_adds],
        "dense_multiply_adds": (audits[0].multiply_adds or {}).get("dense"),
        "passes": [_passes(run) for run in runs],
        "seconds": list(group.seconds),
        "layers": {name: layer.density for name, layer in audits[0].layers.items()},
    }


def _passes(run: Run) -> int:
    """Forward and backward passes of single images, in all stages after the dense network."""
    return sum(max((e.passes for e in run.of_stage(s)), default=0) for s in ("prune", "finetune"))


def _dense_row(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The dense networks; of one that several runs attacked, the evaluation on most images."""
    distinct: dict[Any, Run] = {}
    for run in sorted(runs, key=_images_of_dense, reverse=True):
        if DENSE in run.attacked:
            distinct.setdefault(_digest_of_dense(run), run)
    known = [run for run in runs if run in distinct.values()]
    audits = [run.audit for run in known if run.audit]
    if not known:
        return None
    return {
        "configuration": DENSE,
        "density": 1.0,
        "seeds": [run.recipe.get("seed", 0) for run in known],
        "measures": _measures([run.attacked[DENSE] for run in known]),
        "kept": [audit.total for audit in audits],
        "total": audits[0].total,
        "denominator": audits[0].denominator,
        "images": sorted({_images_of_dense(run) for run in known}),
    }


def _images_of_dense(run: Run) -> int:
    return run.attacked[DENSE].evaluation.size if DENSE in run.attacked else 0


def _digest_of_dense(run: Run) -> Any:
    """What tells dense networks apart; by their results where an earlier version kept no digest."""
    evaluation = run.attacked[DENSE].evaluation
    counted = ((name, m.correct, m.size) for name, m in evaluation.measures.items())
    return evaluation.identity.get("model") or (run.recipe.get("seed", 0), *counted)


def _measures(attacked: Sequence[Attacked]) -> dict[str, Any]:
    """Mean and sample standard deviation of each accuracy that every member has."""
    known = [member.evaluation.measures for member in attacked]
    shared = [name for name in known[0] if all(name in measures for measures in known)]
    return {
        name: _statistics([measures[name].accuracy for measures in known])
        for name in measure_order(shared)
    }


def _statistics(values: list[float]) -> dict[str, Any]:
    return {
        "values": values,
        "mean": fmean(values),
        "spread": stdev(values) if len(values) > 1 else None,
    }


@dataclass(frozen=True)
class Pair:
    """A configuration, or the dense network, beside the baseline of its density, with one seed."""

    configuration: str
    density: float
    seed: int
    first: Attacked
    second: Attacked

    @property
    def point(self) -> dict[str, Any]:
        return {"configuration": self.configuration, "density": self.density}

    def difference(self, name: str) -> PairedDifference | None:
        return paired_difference(self.first.outcomes, self.second.outcomes, name)


def _pairs(groups: Sequence[Group], baseline: str) -> Iterator[Pair]:
    """Each configuration against the baseline of its density, seed by seed.

    Where the baseline is pruned, the dense network that it began with stands in its own place.
    """
    names = [DENSE, *dict.fromkeys(n for g in groups for n in (g.method, g.configuration))]
    if baseline not in names:
        raise ValueError(
            f"baseline {baseline!r} is not among the runs; choose one of: {', '.join(names)}"
        )
    for group in groups:
        reference = None if baseline == DENSE else _reference(groups, group.density, baseline)
        for seed, run in group.runs.items():
            ours, dense = _finetuned(run), _dense_of(run, groups)
            name, first, second = group.configuration, dense, ours
            if reference is group:
                name, first, second = DENSE, ours, dense
            elif baseline != DENSE:
                beside = reference.runs.get(seed) if reference else None
                first = _finetuned(beside) if beside else None
            if first and second:
                yield Pair(name, group.density, seed, first, second)


def _dense_of(run: Run, groups: Sequence[Group]) -> Attacked | None:
    """The dense network under attack; of runs that start from the same weights one attacks it."""
    model = run.section("model")
    same = (r for g in groups for r in g.runs.values() if r.section("model") == model)
    known = (run, *same) if model.get("weights") else (run,)
    return next((r.attacked[DENSE] for r in known if DENSE in r.attacked), None)


def _paired(groups: Sequence[Group], baseline: str) -> Iterator[dict[str, Any]]:
    """The difference to the baseline with each seed."""
    for pair in _pairs(groups, baseline):
        for name in ("clean", AUTOATTACK):
            paired = pair.difference(name)
            if paired:
                measured = {"seed": pair.seed, "measure": name}
                yield pair.point | measured | paired.as_dict()


def _pooled(groups: Sequence[Group], baseline: str) -> Iterator[dict[str, Any]]:
    """The difference to the baseline over all seeds that both have."""
    found: dict[tuple[str, float], list[Pair]] = {}
    for pair in _pairs(groups, baseline):
        found.setdefault((pair.configuration, pair.density), []).append(pair)
    for pairs in found.values():
        for name in ("clean", AUTOATTACK):
            pooled = pooled_difference([(p.first.outcomes, p.second.outcomes) for p in pairs], name)
            if pooled:
                seeds = [pair.seed for pair in pairs if pair.difference(name)]
                yield pairs[0].point | {"measure": name, "seeds": seeds} | pooled.as_dict()


def _reference(groups: Sequence[Group], density: float, baseline: str) -> Group | None:
    same = [group for group in groups if group.density == density]
    found = [group for group in same if baseline == group.configuration]
    found = found or [group for group in same if baseline == group.method]
    if len(found) > 1:
        names = ", ".join(group.configuration for group in found)
        raise ValueError(
            f"baseline {baseline!r} names several configurations; choose one of: {names}"
        )
    return found[0] if found else None


def _warnings(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Failed checks and flags of every evaluation."""
    for group in groups:
        for seed, run in group.runs.items():
            where = {"configuration": group.configuration, "density": group.density, "seed": seed}
            for model, attacked in run.attacked.items():
                for name, check in attacked.evaluation.checks.items():
                    if not check.passed:
                        said = f"check '{name}' FAILED: {check.detail}"
                        yield where | {"model": model, "warning": said}
                for flag in attacked.evaluation.flags:
                    yield where | {"model": model, "warning": flag}


def _made(run: Run, configuration: str) -> dict[str, Any]:
    made = {
        "run": run.folder.name,
        "seed": run.recipe.get("seed"),
        "configuration": configuration,
    }
    return made | {
        "density": run.section("budget").get("density"),
        "environment": dict(run.environment),
    }


def _document(comparison: Mapping[str, Any], pictures: Mapping[str, Plot]) -> Document:
    protocol = "; ".join(
        f"{key}: {flatten(value)}" for key, value in comparison["protocol"].items()
    )
    explained = (
        f"Protocol: {protocol}. Test accuracy in %, mean ± sample standard deviation over seeds; "
        "AutoAttack is the robust accuracy."
    )
    return Document(
        title=comparison["title"],
        lead=tuple(filter(None, (comparison["note"], explained))),
        warnings=tuple(_warned(comparison["warnings"])),
        sections=tuple(_sections(comparison, pictures)),
    )


_FEW = 5
"""As many warnings stand above the result, and runs in a cell of a table; of more the number."""


def _warned(warnings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len(warnings) > _FEW:
        raised = len({(w["configuration"], w["density"], w["seed"]) for w in warnings})
        yield f"checks failed or flags were raised in {raised} runs; see Flags and failed checks."
        return
    for w in warnings:
        where = f"{w['configuration']}, {format_density(w['density'])}, seed {w['seed']}"
        yield f"{where}, {w['model']}: {w['warning']}"


def _sections(comparison: Mapping[str, Any], pictures: Mapping[str, Plot]) -> Iterator[Section]:
    yield Section("Result", _rows_table(comparison), pictures["result"])
    if comparison["failed"]:
        rows = tuple(comparison["failed"].items())
        yield Section("Missing", Table(("run", "why"), rows, numeric=False))
    if "density" in pictures:
        yield Section("Accuracy over density", plot=pictures["density"])
    yield Section("What it costs", _cost_table(comparison), text=_COST)
    yield Section("Where weights are kept", plot=pictures["strategies"])
    if comparison["baseline"] is not None:
        yield _difference_section(comparison)
    if len(comparison["warnings"]) > _FEW:
        yield Section("Flags and failed checks", _warnings_table(comparison["warnings"]))
    script = comparison["command"]
    if not comparison["makes_runs"]:
        held = [run["environment"] for run in comparison["runs"]]
        commands = [e.get("command") for run in held for e in (run, *run.get("continued", []))]
        script = "\n".join([*dict.fromkeys(filter(None, commands)), script])
    yield Section("How this was made", _made_table(comparison), code=script)


def _difference_section(comparison: Mapping[str, Any]) -> Section:
    """Several seeds in one row; one seed with its test."""
    name = comparison["baseline"]
    start = f"Difference to {name} at the same density"
    if name != DENSE and any(pair["configuration"] == DENSE for pair in comparison["paired"]):
        start += " (of the dense network, to those pruned to the density named)"
    if any(len(row["seeds"]) > 1 for row in comparison["pooled"]):
        text = (
            f"{start}, over pairs of the same image and seed: percentage points with the 95 % "
            "interval over images, which seeds that agree do not narrow. The tests of each seed "
            "are in the JSON file."
        )
        return Section(f"Against {name}", _pooled_table(comparison), text=text)
    text = (
        f"{start} and seed, on the same images: percentage points with the paired 95 % interval, "
        "and the exact McNemar test."
    )
    table = _paired_table(comparison["paired"])
    none = " There is no pair measured on the same images."
    return Section(f"Against {name}", table, text=text if table else text + none)


def _rows_table(comparison: Mapping[str, Any]) -> Table:
    named = ("clean", AUTOATTACK, *(n for row in comparison["rows"] for n in row["measures"]))
    known = measure_order(dict.fromkeys(named))
    measures = [name for name in known if name != WORST_CASE]
    rows = tuple(
        (
            _named(row, comparison["protocol"]["images"]),
            format_density(row["density"]) if row["configuration"] != DENSE else "100 % kept",
            ", ".join(map(str, row["seeds"])),
            *(_mean(row["measures"].get(name)) for name in measures),
            _kept(row),
        )
        for row in comparison["rows"]
    )
    titles = ("AutoAttack" if name == AUTOATTACK else name for name in measures)
    header = ("configuration", "density", "seeds", *titles, "weights kept / total")
    return Table(header, rows)


def _named(row: Mapping[str, Any], images: int) -> str:
    """A dense network may have been attacked on fewer images than the pruned ones."""
    own = row.get("images", [images])
    counts = " or ".join(f"{count:,}" for count in own)
    return row["configuration"] + ("" if own == [images] else f" ({counts} images)")


def _kept(row: Mapping[str, Any]) -> str:
    least, most = min(row["kept"]), max(row["kept"])
    return ("" if least == most else f"{least:,} to ") + format_kept(most, row["total"])


_COST = (
    "Multiply-adds of one image, as a share of the dense network's; forward and backward passes of "
    "single images while pruning and finetuning; and, where it is known, the wall-clock time of "
    "the run with its attacks and without a dense network that it shares, in minutes, the median "
    "over seeds, which depends on what else the machine did."
)


def _cost_table(comparison: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            row["configuration"],
            format_density(row["density"]),
            _shares(row["multiply_adds"], row["dense_multiply_adds"]),
            f"{fmean(row['passes']):,.0f}",
            _minutes(row["seconds"]),
        )
        for row in comparison["rows"]
        if row["configuration"] != DENSE
    )
    return Table(("configuration", "density", "multiply-adds", "passes", "minutes"), rows)


def _shares(kept: Sequence[int], dense: int | None) -> str:
    return ABSENT if not kept or not dense else f"{100 * fmean(kept) / dense:.2f} %"


def _minutes(seconds: Sequence[float | None]) -> str:
    known = [value for value in seconds if value is not None]
    return f"{median(known) / 60:.1f}" if known else ABSENT


def _mean(statistics: Mapping[str, Any] | None) -> str:
    if statistics is None:
        return "not run"
    spread = statistics["spread"]
    return f"{100 * statistics['mean']:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _paired_table(paired: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = tuple(
        (
            pair["configuration"],
            format_density(pair["density"]),
            str(pair["seed"]),
            "AutoAttack" if pair["measure"] == AUTOATTACK else pair["measure"],
            format_difference(pair),
            f"{pair['won']:,} / {pair['lost']:,}",
            format_p(pair["p_value"]),
            f"{pair['size']:,}",
        )
        for pair in paired
    )
    header = ("configuration", "density", "seed", "accuracy", "difference", "won / lost", "p", "n")
    return Table(header, rows) if rows else None


def _pooled_table(comparison: Mapping[str, Any]) -> Table:
    """A row for each configuration and density; in how many seeds its AutoAttack is the higher."""
    found: dict[tuple[str, float], dict[str, Mapping[str, Any]]] = {}
    for row in comparison["pooled"]:
        found.setdefault((row["configuration"], row["density"]), {})[row["measure"]] = row
    higher: dict[tuple[str, float], int] = {}
    for pair in comparison["paired"]:
        if pair["measure"] == AUTOATTACK and pair["difference"] > 0:
            point = pair["configuration"], pair["density"]
            higher[point] = higher.get(point, 0) + 1
    rows = tuple(
        (
            configuration,
            format_density(density),
            *(format_difference(known.get(name)) for name in ("clean", AUTOATTACK)),
            f"{higher.get((configuration, density), 0)} of {len(known[AUTOATTACK]['seeds'])}"
            if AUTOATTACK in known
            else ABSENT,
        )
        for (configuration, density), known in found.items()
    )
    header = ("configuration", "density", "clean", "AutoAttack", "seeds with more AutoAttack")
    return Table(header, rows)


def _warnings_table(warnings: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each configuration and density with all that was raised there."""
    found: dict[tuple[str, float], list[str]] = {}
    for w in warnings:
        said = f"seed {w['seed']}, {w['model']}: {w['warning']}"
        found.setdefault((w["configuration"], w["density"]), []).append(said)
    rows = tuple(
        (configuration, format_density(density), "; ".join(said))
        for (configuration, density), said in found.items()
    )
    return Table(("configuration", "density", "raised"), rows, numeric=False)


def _successive(environment: Mapping[str, Any], key: str) -> str:
    """A value of the environment; several where a run was continued under another one."""
    every = [flatten(e.get(key)) for e in (environment, *environment.get("continued", []))]
    return ", then ".join(v for i, v in enumerate(every) if i == 0 or v != every[i - 1])


def _made_table(comparison: Mapping[str, Any]) -> Table:
    """What the runs were made with; where they agree it is said once."""
    rows = []
    for key in ("commit", "python", "versions", "machine"):
        found: dict[str, list[str]] = {}
        for run in comparison["runs"]:
            found.setdefault(_successive(run["environment"], key), []).append(run["run"])
        for value, runs in found.items():
            named = ", ".join(runs) if len(runs) <= _FEW else f"{len(runs)} runs"
            rows.append((key, value, "all" if len(found) == 1 else named))
    return Table(("", "", "runs"), tuple(rows), numeric=False)
