# SPDX-License-Identifier: Apache-2.0
"""The report of one run: report.json for machines, report.md and report.html for people.

A report is a function of the run folder: written twice, it has the same bits.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from harprune.files import to_json, write
from harprune.reporting import plots
from harprune.reporting.document import Document, Plot, Section
from harprune.reporting.records import ATTACKED, GIVEN_IN_PYTHON, RunRecord, read_run
from harprune.reporting.summary import AUTOATTACK, summarise
from harprune.reporting.tables import (
    Table,
    checks_table,
    flatten,
    format_budget,
    format_measure,
    format_percent,
    layers_table,
    results_table,
    stages_table,
    title_of,
)


def write_report(run_folder: str | Path) -> dict[str, Any]:
    """Write `report/` in a run folder, finished or not, and return the content of report.json.

    Raises:
        ValueError: `run_folder` is no run folder or a file in it is garbled.
    """
    run = read_run(run_folder)
    pictures = _plots(run)
    summary = summarise(run)
    summary["plots"] = {name: plot.path for name, plot in pictures.items()}
    document = _document(summary, pictures)
    folder = run.folder / "report"
    for plot in pictures.values():
        write(folder / plot.path, plot.svg)
    write(folder / "report.md", document.markdown())
    write(folder / "report.html", document.html())
    write(folder / "report.json", to_json(summary))
    return summary


def _plots(run: RunRecord) -> dict[str, Plot]:
    drawn = {}
    if run.attacked:
        drawn["accuracy"] = _plot(
            "accuracy",
            "Test accuracy, clean and under each attack",
            plots.accuracy_bars,
            run.attacked,
        )
    if run.audit:
        drawn["density"] = _plot(
            "density", "Weights kept in each layer", plots.density_per_layer, run.audit
        )
    if any(epoch.density is not None for epoch in run.of_stage("prune")):
        caption = "The prune stage: gamma, penalty and density over epochs"
        course = run.of_stage("prune"), run.section("budget")
        drawn["prune"] = _plot("prune", caption, plots.prune_course, *course)
    if run.epochs:
        caption = "Validation accuracy over epochs; of pruning, before the cut to the budget"
        drawn["validation"] = _plot("validation", caption, plots.validation_course, run.epochs)
    return drawn


def _plot(name: str, caption: str, draw: Any, *data: Any) -> Plot:
    return Plot(f"plots/{name}.svg", caption, plots.to_svg(draw, *data))


def _document(summary: Mapping[str, Any], pictures: Mapping[str, Plot]) -> Document:
    return Document(
        title=f"{summary['recipe']}: {summary['method']} at {format_budget(summary)}",
        lead=tuple(_lead(summary)),
        warnings=tuple(_warnings(summary)),
        sections=tuple(_sections(summary, pictures)),
    )


def _lead(summary: Mapping[str, Any]) -> Iterator[str]:
    threat = flatten(summary["threat"])
    python = summary["data"] == GIVEN_IN_PYTHON
    where = f"Model {summary['model']} on {'images ' if python else ''}{summary['data']}"
    yield f"{where}; threat: {threat}; seed {summary['seed']}."
    if python and not summary["results"]:
        yield _NOT_ATTACKED
    robust = _robust(summary)
    if robust and robust["finetuned"]:
        size = robust["finetuned"]["size"]
        pruned = f"pruned and finetuned {format_measure(robust['finetuned'])} %"
        dense = f", dense {format_measure(robust['dense'])} %" if robust["dense"] else ""
        if robust["dense"] and robust["dense"]["size"] != size:
            dense += f" (of {robust['dense']['size']:,} images)"
        yield f"Robust accuracy (AutoAttack, {size:,} test images): {pruned}{dense}."
    if summary["results"]:
        yield (
            "In brackets: 95 % intervals. Differences are paired, image by image. Any attack but "
            "AutoAttack only bounds the robust accuracy from above."
        )


_NOT_ATTACKED = (
    "No attack was run, for harprune.prune is given no test images. To have one, call "
    "harprune.evaluate(pruned.model, test, out=...) with this folder's attack/finetuned, and then "
    "harprune report."
)


def _robust(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((r for r in summary["results"] if r["measure"] == AUTOATTACK), None)


def _warnings(summary: Mapping[str, Any]) -> Iterator[str]:
    for check in summary["checks"]:
        if not check["passed"]:
            name, model = check["check"], title_of(check["model"])
            yield f"check '{name}' FAILED on the {model} model: {check['detail']}"
    for said in summary["warnings"]:
        yield f"the {title_of(said['model'])} model: {said['warning']}"
    for flag in summary["flags"]:
        yield f"flag raised on the {title_of(flag['model'])} model: {flag['flag']}"
    if summary["results"] and not _robust(summary):
        yield "AutoAttack was not run: no number here is a robust accuracy."
    if summary["missing"]:
        yield f"this run is not complete; missing: {', '.join(summary['missing'])}."


def _sections(summary: Mapping[str, Any], pictures: Mapping[str, Plot]) -> Iterator[Section]:
    if results := results_table(summary):
        yield Section("Result", results, pictures["accuracy"])
        yield Section("Attacks in detail", _attacks_table(summary))
    if checks := checks_table(summary):
        failed = sum(not check["passed"] for check in summary["checks"])
        yield Section("Checks", checks, text=f"{failed} of {len(checks.rows)} failed.")
    if layers := layers_table(summary):
        audit = summary["audit"]
        counted = f"{audit['kept']:,} of {audit['total']:,} {audit['denominator']} are kept"
        text = "; ".join([counted, *map(_allowed, audit["bounds"])]) + "."
        yield Section("Where the weights are", layers, pictures["density"], text)
    if "prune" in pictures:
        yield Section("How the densities were found", plot=pictures["prune"])
    text = (
        "Accuracy on validation images of the network that a stage leaves; before the cut to the "
        "budget, and where a run did not keep that, in the selected epoch, or in the last one "
        "where no selection is known. Passes are images sent through and back in all epochs, and "
        "before them to score weights."
    )
    yield Section("Training", stages_table(summary), pictures.get("validation"), text)
    yield Section("How this was made", _made_table(summary))


def _allowed(bound: Mapping[str, Any]) -> str:
    spent = "" if bound["spent"] is None else f", and {bound['spent']:,} are spent"
    return f"{bound['bound']} allows {bound['allowed']:,} {bound['unit']}{spent}"


def _attacks_table(summary: Mapping[str, Any]) -> Table:
    rows = tuple(
        (title_of(result["measure"]), title_of(model), *_detail(result[model]))
        for result in summary["results"]
        for model in ATTACKED
        if result[model]
    )
    header = ("attack", "model", "correct", "balanced accuracy %", "definition")
    return Table(header, rows, numeric=False)


def _detail(measure: Mapping[str, Any]) -> tuple[str, str, str]:
    correct = f"{measure['correct']:,} of {measure['size']:,}"
    after = [f"{part} {format_percent(share)}" for part, share in (measure["parts"] or {}).items()]
    definition = measure["attack"] or ""
    parts = f"; accuracy after its parts: {', '.join(after)}" if after else ""
    return correct, format_percent(measure["balanced"]), definition + parts


def _made_table(summary: Mapping[str, Any]) -> Table:
    made = {"recipe": summary["recipe"], "seed": summary["seed"], **summary["environment"]}
    return Table(
        ("", ""), tuple((key, flatten(value)) for key, value in made.items()), numeric=False
    )
