# SPDX-License-Identifier: Apache-2.0
"""All commands in the order of the help, which comes at once: heavy imports stay inside them."""

import inspect
import os
from collections.abc import Callable
from typing import Annotated

import typer

from harprune.cli import networks, preparation, records, runs

# Torch reads this when it is loaded. Its idle threads would else spin for some milliseconds, on the
# very cores that the kernels' threads want next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Prune adversarially robust networks to 1 % of their weights, and measure how robust they "
        "still are.\n\nEvery command can be repeated safely: in the folder of --out what is done "
        "is not done again, and what was interrupted goes on."
    ),
    epilog=(
        "Start here (a few minutes on a laptop):\n\n"
        "  harprune run recipes/digits.toml --out runs/digits\n\n"
        "  harprune recipe > mine.toml\n\n"
        "  harprune run mine.toml --out runs/mine --set budget.density=0.01"
    ),
)
bench = typer.Typer(no_args_is_help=True, help="Time what was deployed, side by side with others.")
app.add_typer(bench, name="bench")


def _version(asked: bool) -> None:
    if asked:
        from harprune import __version__

        typer.echo(f"harprune {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it, and stop.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _add(group: typer.Typer, command: Callable[..., None], name: str | None = None) -> None:
    """A command with its docstring as help, which ends with examples from "Example:" on."""
    about, example, more = (inspect.getdoc(command) or "").partition("Example: ")
    group.command(name, help=_flowing(about), epilog=_flowing(example + more) or None)(command)


def _flowing(text: str) -> str:
    """Paragraphs without line breaks, which typer would keep at any width."""
    return "\n\n".join(" ".join(lines.split()) for lines in text.strip().split("\n\n"))


for _command in (
    runs.run,
    runs.prune,
    networks.evaluate,
    networks.export,
    records.report,
    records.record,
    runs.compare,
    preparation.data,
    preparation.recipe,
    preparation.doctor,
):
    _add(app, _command)
_add(bench, networks.bench_deploy, "deploy")
