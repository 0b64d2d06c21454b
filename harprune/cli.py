# SPDX-License-Identifier: Apache-2.0
"""The command line. Heavy imports stay inside the commands, so that `--help` answers at once."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Prune adversarially robust networks to 1 % of their weights, and prove that they stay "
        "robust.\n\nStart with `harprune run recipes/digits.toml --out runs/digits`. Every command "
        "can be repeated safely: what is done is not done again, what was interrupted goes on."
    ),
)

Set = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a recipe value.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The run folder, made or continued.")]
Folder = Annotated[
    Path | None, typer.Option("--data-dir", help="Where the data files lie; the cache when absent.")
]
Epsilon = Annotated[str, typer.Option(help="Radius for images in [0, 1], as 8/255 or 0.031.")]
Norm = Annotated[str, typer.Option(help="linf or l2.")]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML); see recipes/.")],
    out: Out,
    overrides: Set = [],  # noqa: B006 - typer copies it
    until: Annotated[
        str, typer.Option(help="Stop after pretrain, prune, finetune, attack or report.")
    ] = "report",
    as_json: Json = False,
) -> None:
    """Run a recipe through all stages: pretrain, prune, finetune, attack, report.

    Give the same command again to continue after an interruption.
    """
    from harprune.pipeline.recipe import read_recipe

    resolved = read_recipe(recipe, overrides)
    _run(resolved, out, source=recipe.read_text(), until=until, as_json=as_json)


@app.command()
def prune(
    model: Annotated[str, typer.Option(help="Network: a name, module:function, torchvision:NAME.")],
    weights: Annotated[Path, typer.Option(help="Its robust weights (safetensors or state dict).")],
    data: Annotated[str, typer.Option(help="Data set: a name or module:function.")],
    density: Annotated[float, typer.Option(help="Fraction of the weights to keep, as 0.01.")],
    out: Out,
    data_dir: Folder = None,
    norm: Norm = "linf",
    epsilon: Epsilon = "8/255",
    method: Annotated[str, typer.Option(help="harp, hydra, magnitude or random.")] = "harp",
    prune_epochs: Annotated[int, typer.Option(help="Epochs of the method's stage.")] = 20,
    finetune_epochs: Annotated[int, typer.Option(help="Epochs of finetuning.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides all randomness.")] = 0,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Prune *your* robust network, without writing a recipe.

    Anything else a recipe can say goes through --set, as in
    `--set model.mean='[0.49, 0.48, 0.45]' --set attack.size=1000`.
    """
    from harprune.pipeline.recipe import make_recipe

    content = {
        "name": f"{model}-{method}",
        "seed": seed,
        "data": {"name": data, **({"folder": str(data_dir)} if data_dir else {})},
        "model": {"name": model, "weights": str(weights)},
        "threat": {"norm": norm, "epsilon": epsilon},
        "budget": {"density": density},
        "method": {"name": method},
        "prune": {"epochs": prune_epochs},
        "finetune": {"epochs": finetune_epochs},
    }
    resolved = make_recipe(content, overrides, source="harprune prune")
    _run(resolved, out, source=json.dumps(content, indent=1), as_json=as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Network: a name, module:function, torchvision:NAME.")],
    weights: Annotated[Path, typer.Option(help="Its weights: an artifact of a run, or others'.")],
    data: Annotated[str, typer.Option(help="Data set: a name or module:function.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep per-image outcomes here, and resume.")
    ] = None,
    data_dir: Folder = None,
    norm: Norm = "linf",
    epsilon: Epsilon = "8/255",
    attack: Annotated[
        list[str], typer.Option(help="fgsm, pgd-20, cw-20, apgd-ce, apgd-dlr, autoattack.")
    ] = ["autoattack"],  # noqa: B006
    size: Annotated[
        int | None, typer.Option(help="Number of test images; all when absent.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the images and starts the attacks.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images attacked at a time.")] = 250,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Measure clean accuracy and robustness of a network on test images."""
    from harprune.pipeline.api import evaluate_recipe
    from harprune.pipeline.recipe import make_recipe

    content = {
        "name": f"{model}-evaluation",
        "data": {"name": data, **({"folder": str(data_dir)} if data_dir else {})},
        "model": {"name": model, "weights": str(weights)},
        "threat": {"norm": norm, "epsilon": epsilon},
        "attack": {"attacks": attack, "size": size, "seed": seed, "batch_size": batch_size},
    }
    recipe = make_recipe(content, overrides, source="harprune evaluate")
    result = evaluate_recipe(recipe, out)
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=1))
    else:
        for line in result.lines():
            typer.echo(line)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Compare the runs in this Markdown file.")
    ] = None,
    title: Annotated[str, typer.Option(help="Heading of the comparison.")] = "Comparison",
    note: Annotated[str, typer.Option(help="What a reader of the comparison should know.")] = "",
    baseline: Annotated[
        str | None, typer.Option(help="Method to test the others against, pair by pair.")
    ] = None,
    tensorboard: Annotated[bool, typer.Option(help="Also write TensorBoard event files.")] = False,
    as_json: Json = False,
) -> None:
    """Write the report of each run; with --out, one table that compares them."""
    from harprune.pipeline.run import command_line
    from harprune.reporting.comparison import write_comparison
    from harprune.reporting.report import write_report
    from harprune.reporting.tensorboard import write_tensorboard

    content = {str(folder): write_report(folder) for folder in runs}
    if tensorboard:
        for folder in runs:
            write_tensorboard(folder)
    if out is not None:
        write_comparison(
            runs, out, title=title, note=note, command=command_line(), baseline=baseline
        )
    if as_json:
        typer.echo(json.dumps(content, indent=1))
    else:
        typer.echo("\n".join(str(folder / "report" / "report.html") for folder in runs))


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="cifar10, cifar100, svhn, mnist, fashion_mnist.")],
    data_dir: Folder = None,
) -> None:
    """Download a data set's official files, checked, and say what is in them."""
    from harprune.training.data import load_dataset

    dataset = load_dataset(name, data_dir, download=True)
    typer.echo(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images "
        f"of shape {tuple(dataset.shape)}, {dataset.num_classes} classes"
    )


@app.command()
def recipe() -> None:
    """Print every key of a recipe with its meaning and default, as a TOML file to start from."""
    from harprune.pipeline.recipe import describe

    typer.echo("\n".join(describe()))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what is missing and what will be used."""
    from harprune.pipeline.doctor import diagnose

    findings = diagnose()
    if as_json:
        typer.echo(json.dumps(findings, indent=1))
    else:
        width = max(map(len, findings))
        typer.echo("\n".join(f"{name:<{width}}  {value}" for name, value in findings.items()))


def _run(recipe, out: Path, *, source: str, until: str = "report", as_json: bool) -> None:
    from harprune.pipeline.run import Run, command_line
    from harprune.pipeline.stages import open_workshop, run_until

    with Run(out, recipe, source=source, command=command_line()) as folder:
        content = run_until(open_workshop(folder), until)
    if as_json:
        typer.echo(json.dumps(content, indent=1))


def main() -> None:
    """Entry point: a user's error is one line and exit code 2, never a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split())
        sys.exit(_fail(f"harprune: {text}", 2))
    except KeyboardInterrupt:
        sys.exit(_fail("harprune: interrupted; give the same command again to go on", 130))


def _fail(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code
