# SPDX-License-Identifier: Apache-2.0
"""What several commands share: their options, and results as JSON."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from harprune.kernels import Backend


def _path(text: str) -> Path:
    """What --out names; empty text, which `Path` takes for the current folder, names nothing."""
    if not text:
        raise typer.BadParameter("it is empty; name a place, as runs/mine")
    return Path(text)


def out_option(help: str) -> Any:
    """--out, by its meaning in a command."""
    return typer.Option("--out", "-o", parser=_path, metavar="<Path>", help=help)


NETWORKS = (
    "a name that `harprune doctor` lists, module:function of yours, torchvision:NAME or timm:NAME"
)
IMAGES = "digits, cifar10, ..., folder, or module:function of yours"

Set = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a recipe value; as often as you like. `harprune recipe` lists the keys.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result, and nothing else, as JSON on stdout.")
]
Out = Annotated[Path, out_option("The run folder: made, or continued where it stopped.")]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="Where the data files lie; $HARPRUNE_DATA or the user's cache if absent."
    ),
]
Norm = Annotated[
    Literal["linf", "l2"] | None,
    typer.Option(help="Norm that bounds the perturbation; linf when absent."),
]
Epsilon = Annotated[
    str | None, typer.Option(help="Radius for images in [0, 1], as 0.031; 8/255 when absent.")
]
Execution = Annotated[
    Backend | None,
    typer.Option(help="Run masked networks on the sparse CPU kernels, or in torch alone."),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option(help="Where everything runs; as the recipe says when absent."),
]


def print_json(content: Any) -> None:
    """The result, and nothing else, on stdout."""
    from harprune.files import to_json

    typer.echo(to_json(content), nl=False)
