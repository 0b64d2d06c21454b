# SPDX-License-Identifier: Apache-2.0
"""Commands that make runs: `run` by a recipe, `prune` without one, `compare` by a grid."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from harprune.cli.options import (
    IMAGES,
    NETWORKS,
    Device,
    Epsilon,
    Execution,
    Folder,
    Json,
    Norm,
    Out,
    Set,
    out_option,
    print_json,
)

Stage = Literal["pretrain", "prune", "finetune", "attack", "report"]


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML); `harprune recipe` writes one.")],
    out: Out,
    overrides: Set = [],
    until: Annotated[Stage, typer.Option(help="Stop when this stage is done.")] = "report",
    execution: Execution = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run a recipe through all stages: pretrain, prune, finetune, attack, report.

    Give the same command again to continue after an interruption.

    Example: harprune run recipes/digits.toml --out runs/digits --set seed=1
    """
    from harprune.recipe.text import read_recipe, settings

    said = {"execution.backend": execution, "execution.device": device}
    resolved = read_recipe(recipe, settings(said, overrides))
    source = recipe.read_text(encoding="utf-8-sig")
    _run(resolved, out, overrides, source=source, until=until, as_json=as_json)


def prune(
    model: Annotated[str, typer.Option(help=f"Network: {NETWORKS}.")],
    weights: Annotated[Path, typer.Option(help="Its robust weights (safetensors or state dict).")],
    data: Annotated[str, typer.Option(help=f"Data set: {IMAGES}.")],
    density: Annotated[float, typer.Option(help="Fraction of the weights to keep, as 0.01.")],
    out: Out,
    data_dir: Folder = None,
    norm: Norm = None,
    epsilon: Epsilon = None,
    method: Annotated[
        str | None, typer.Option(help="As method.name of a recipe; harp when absent.")
    ] = None,
    prune_epochs: Annotated[
        int | None, typer.Option(help="Epochs of the method's stage; 20 when absent.")
    ] = None,
    finetune_epochs: Annotated[
        int | None, typer.Option(help="Epochs of finetuning; 100 when absent.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides all randomness; 0 when absent.")] = None,
    overrides: Set = [],
    execution: Execution = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Prune *your* robust network, without writing a recipe.

    Anything else a recipe can say goes through --set, as in
    `--set finetune.learning_rate=0.02 --set attack.size=1000`.

    Example: harprune prune --model resnet18 --weights robust.pt --data cifar10 --density 0.01
    --out runs/mine
    """
    from harprune.recipe.text import make_recipe, settings

    said = {
        "seed": seed,
        "data.name": data,
        "data.folder": data_dir and str(data_dir),
        "model.name": model,
        "model.weights": str(weights),
        "threat.norm": norm,
        "threat.epsilon": epsilon,
        "budget.density": density,
        "method.name": method,
        "prune.epochs": prune_epochs,
        "finetune.epochs": finetune_epochs,
        "execution.backend": execution,
        "execution.device": device,
    }
    content = {"name": f"{model}-{method or 'harp'}"}
    resolved = make_recipe(content, settings(said, overrides), source="harprune prune")
    _run(resolved, out, overrides, as_json=as_json)


def compare(
    grid: Annotated[
        Path,
        typer.Argument(
            help="What to compare (TOML): a base recipe, methods, densities, seeds; "
            "`harprune recipe --grid` prints every key."
        ),
    ],
    out: Annotated[Path, out_option("The folder of all runs: made, or continued.")],
    jobs: Annotated[int, typer.Option(help="Runs at work at a time, each a process.")] = 1,
    density: Annotated[
        list[float],
        typer.Option(help="Only this one of the grid's densities; may be given several times."),
    ] = [],
    method: Annotated[
        list[str],
        typer.Option(help="Only this one of the grid's methods; may be given several times."),
    ] = [],
    overrides: Set = [],
    as_json: Json = False,
) -> None:
    """Run every method at every density with every seed, and write one table of all.

    Each cell is an ordinary run in its own folder, and the cells of a seed share a dense network.
    The same command goes on after an interruption; a run that fails stops no other, and is named
    in the table. On machines that share the folder, give each the same command.

    Example: harprune compare recipes/compare/digits.toml --out runs/compare

    harprune recipe --grid > grid.toml

    harprune compare grid.toml --out runs/mine --jobs 2 --set execution.threads=1
    """
    from harprune.grid import compare
    from harprune.run.environment import command_line

    found = compare.compare(
        grid,
        out,
        command=command_line(),
        jobs=jobs,
        overrides=overrides,
        densities=density,
        methods=method,
    )
    if as_json:
        print_json(found)
    else:
        for name, why in found["failed"].items():
            typer.echo(f"{name}: {why}", err=True)
        typer.echo(out / "comparison.md")
    if found["failed"]:
        raise typer.Exit(1)


def _run(
    recipe,
    out: Path,
    overrides: list[str],
    *,
    source: str = "",
    until: str = "report",
    as_json: bool,
) -> None:
    from harprune.run.environment import command_line
    from harprune.run.opening import open_run
    from harprune.run.stages import run_until

    command = command_line()
    with open_run(recipe, out, overrides=overrides, source=source, command=command) as opened:
        content = run_until(opened, until)
    if as_json:
        print_json(content)
