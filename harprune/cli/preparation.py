# SPDX-License-Identifier: Apache-2.0
"""Commands before a run: `data` to have, a `recipe` to start from, `doctor` for what is there."""

from typing import Annotated

import typer

from harprune.cli.options import Folder, Json, print_json


def data(
    name: Annotated[
        str,
        typer.Argument(
            help="cifar10, cifar100, svhn, mnist, fashion_mnist, tiny_imagenet; digits is built in."
        ),
    ],
    data_dir: Folder = None,
) -> None:
    """Download a data set's official files, checked, and say what is in them.

    Example: harprune data cifar10 --data-dir ~/data
    """
    from harprune.training.data import load_dataset

    dataset = load_dataset(name, data_dir, download=True)
    typer.echo(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images "
        f"of shape {tuple(dataset.shape)}, {dataset.num_classes} classes"
    )


def recipe(
    grid: Annotated[
        bool, typer.Option("--grid", help="The keys of what `harprune compare` takes instead.")
    ] = False,
) -> None:
    """Print every key of a recipe with its meaning and default, as a TOML file to start from.

    Example: harprune recipe > mine.toml

    harprune recipe --grid > grid.toml
    """
    from harprune.grid.schema import describe_grid
    from harprune.recipe.pruning import method_notes
    from harprune.recipe.text import describe

    lines = describe_grid() if grid else describe(notes={"method": method_notes()})
    typer.echo("\n".join(lines))


def doctor(as_json: Json = False) -> None:
    """Say what is installed, what is missing and what will be used."""
    from harprune.cli.diagnosis import diagnose

    findings = diagnose()
    if as_json:
        print_json(findings)
    else:
        width = max(map(len, findings))
        typer.echo("\n".join(f"{name:<{width}}  {value}" for name, value in findings.items()))
