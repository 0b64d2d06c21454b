# SPDX-License-Identifier: Apache-2.0
"""Commands that read finished runs: `report` on them, `record` for leaderboards."""

from pathlib import Path
from typing import Annotated

import typer

from harprune.cli.options import Json, out_option, print_json


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, finished or not; files that a pattern names beside them are passed "
            "over."
        ),
    ],
    out: Annotated[
        Path | None, out_option("Compare the runs in this Markdown file; nothing in them changes.")
    ] = None,
    title: Annotated[
        str | None, typer.Option(help='Heading of the comparison; "Comparison" when absent.')
    ] = None,
    note: Annotated[
        str | None, typer.Option(help="What a reader of the comparison should know.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Method to test the others against, pair by pair.")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard event files.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the report of each run, or with --out one table that compares them.

    Of an unfinished run the report holds what there is, and the command says what is to come.

    Example: harprune report runs/harp-* runs/hydra-* --out results.md --baseline hydra
    """
    from harprune.recipe.pruning import WITHOUT_ALLOCATION
    from harprune.recipe.text import completed
    from harprune.reporting.comparison_report import write_comparison
    from harprune.reporting.report import write_report
    from harprune.reporting.tensorboard import write_tensorboard
    from harprune.run.environment import command_line

    of_comparison = {"--title": title, "--note": note, "--baseline": baseline}
    for option, value in of_comparison.items() if out is None else ():
        if value is not None:
            raise ValueError(f"{option} {value!r} is of a comparison; name its file by --out")
    folders = [run for run in runs if not run.is_file()]
    if not folders:
        raise ValueError(f"{runs[0]} is a file; name run folders")
    if out is None:
        content = {str(folder): write_report(folder) for folder in folders}
        said = [line for name, found in content.items() for line in _lines_of_report(name, found)]
    else:
        content = write_comparison(
            folders,
            out,
            title=title or "Comparison",
            note=note or "",
            command=command_line(),
            baseline=baseline,
            complete=completed,
            without_allocation=WITHOUT_ALLOCATION,
        )
        said = [str(out)]
    if tensorboard:
        for folder in folders:
            write_tensorboard(folder)
    if as_json:
        print_json(content)
    else:
        typer.echo("\n".join(said))


def _lines_of_report(folder: str, found: dict) -> list[str]:
    """Where a run's report lies, and what the run lacks; of a stage under way, how far it is."""
    begun = {stage: state["epochs"] for stage, state in found["stages"].items() if state["epochs"]}
    missing = [f"{n} (epochs done: {begun[n]})" if n in begun else n for n in found["missing"]]
    lines = [str(Path(folder) / "report" / "report.html")]
    lines += [f"{folder} is not finished; to come: {', '.join(missing)}"] if missing else []
    return lines


def record(
    folder: Annotated[Path, typer.Argument(help="A finished run folder.")],
    out: Annotated[Path, out_option("The folder for the files.")],
    method: Annotated[str, typer.Option(help="The method's short name, as HARP.")],
    key: Annotated[
        str, typer.Option(help="First author, year, first word of the title: Zhao2023Holistic.")
    ],
    title: Annotated[str, typer.Option(help="Of the paper.")],
    authors: Annotated[str, typer.Option(help="Of the paper.")],
    link: Annotated[str, typer.Option(help="To the paper.")],
    venue: Annotated[str, typer.Option(help="Where it appeared, as 'ICLR 2023'.")],
    additional_data: Annotated[
        bool, typer.Option("--additional-data", help="It learned from more than the training set.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write what public leaderboards ask of a network; nothing is sent anywhere.

    A RobustBench record, and for the Adversarial Pruning Benchmark a state dict and the filled-in
    form. What breaks a board's rules is not written for it.

    Example: harprune record runs/mine --out board --method HARP --key Zhao2023Holistic --title
    'Holistic Adversarially Robust Pruning' --authors 'Qi Zhao, Christian Wressnegger' --link
    https://openreview.net/forum?id=sAJDi9lD06L --venue 'ICLR 2023'
    """
    from harprune.delivery.leaderboards import Paper, write_entries

    paper = Paper(method, key, title, authors, link, venue, additional_data)
    found = write_entries(folder, out, paper)
    if as_json:
        print_json(found)
    else:
        typer.echo("\n".join(f"{board}: {what}" for board, what in found.items()))
