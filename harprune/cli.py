# SPDX-License-Identifier: Apache-2.0
"""The command line. Heavy imports stay inside the commands, so that `--help` answers at once."""

import errno
import inspect
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from harprune.kernels import Backend

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


def _path(text: str) -> Path:
    """What --out names; empty text, which `Path` takes for the current folder, names nothing."""
    if not text:
        raise typer.BadParameter("it is empty; name a place, as runs/mine")
    return Path(text)


def _out(help: str):
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
Out = Annotated[Path, _out("The run folder: made, or continued where it stopped.")]
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
Stage = Literal["pretrain", "prune", "finetune", "attack", "report"]

bench = typer.Typer(no_args_is_help=True, help="Time what was deployed, side by side with others.")
app.add_typer(bench, name="bench")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_INTERRUPTED, _TERMINATED = 130, 143
_Usage: Any = typer.BadParameter.__mro__[1]  # what every fault in a command line derives from


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


@app.command(epilog="Example: harprune run recipes/digits.toml --out runs/digits --set seed=1")
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML); `harprune recipe` writes one.")],
    out: Out,
    overrides: Set = [],  # noqa: B006 - typer copies it
    until: Annotated[Stage, typer.Option(help="Stop when this stage is done.")] = "report",
    execution: Execution = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run a recipe through all stages: pretrain, prune, finetune, attack, report.

    Give the same command again to continue after an interruption.
    """
    from harprune.recipe.text import read_recipe, settings

    said = {"execution.backend": execution, "execution.device": device}
    resolved = read_recipe(recipe, settings(said, overrides))
    source = recipe.read_text(encoding="utf-8-sig")
    _run(resolved, out, overrides, source=source, until=until, as_json=as_json)


@app.command(
    epilog="Example: harprune prune --model resnet18 --weights robust.pt --data cifar10 "
    "--density 0.01 --out runs/mine"
)
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
    overrides: Set = [],  # noqa: B006
    execution: Execution = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Prune *your* robust network, without writing a recipe.

    Anything else a recipe can say goes through --set, as in
    `--set finetune.learning_rate=0.02 --set attack.size=1000`.
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


@app.command(
    epilog="Example: harprune evaluate runs/digits --attack pgd-20\n\n"
    "  harprune evaluate --model resnet18 --weights robust.pt --data cifar10 --size 1000"
)
def evaluate(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="A finished run folder, or one of its networks: images, threat and whatever is "
            "not said here are the run's.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Without a run, the network: {NETWORKS}, or an .hpn file that `harprune export` "
            "made."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"Its data set: {IMAGES}.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Its weights: a network of a run, or others'.")
    ] = None,
    out: Annotated[Path | None, _out("Keep per-image outcomes here, and resume.")] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Outcomes that --out kept before, of the same images, attacks, threat and seed: "
            "say on how many images these differ. Exit code 1 if on more than one in a hundred."
        ),
    ] = None,
    data_dir: Folder = None,
    norm: Norm = None,
    epsilon: Epsilon = None,
    attack: Annotated[
        list[str],
        typer.Option(
            help="fgsm, pgd-STEPS, cw-STEPS, apgd-ce, apgd-dlr or autoattack; repeat for several. "
            "none for clean accuracy alone. autoattack when absent."
        ),
    ] = [],  # noqa: B006
    size: Annotated[
        int | None, typer.Option(help="Number of test images; all when absent.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Draws the images and starts the attacks; 0 when absent.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images attacked at a time; 250 when absent.")
    ] = None,
    overrides: Set = [],  # noqa: B006
    execution: Execution = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure clean accuracy and robustness of a network on test images.

    Robust accuracy means autoattack; the other attacks only bound it from above.
    """
    from harprune.delivery.source import find_source
    from harprune.outcomes import REPEATED, differing, load_evaluation
    from harprune.recipe.text import make_recipe, settings
    from harprune.run.evaluate import evaluate_recipe

    if (source is None) == (model is None) or (source is None) == (data is None):
        raise ValueError(
            "name either a run folder, or a network by --model and its images by --data"
        )
    if source is not None and weights is not None:
        raise ValueError(f"--weights {weights} beside {source}, whose weights are its own")
    said = {
        "data.folder": data_dir and str(data_dir),
        "threat.norm": norm,
        "threat.epsilon": epsilon,
        "attack.attacks": [] if attack == ["none"] else attack or None,
        "attack.size": size,
        "attack.seed": seed,
        "attack.batch_size": batch_size,
        "execution.backend": execution,
        "execution.device": device,
    }
    if source is not None:
        recipe = find_source(source, settings(said, overrides)).recipe
    else:
        said |= {"data.name": data, "model.name": model, "model.weights": weights and str(weights)}
        content = {"name": f"{model}-evaluation", "attack": {"attacks": ["autoattack"]}}
        recipe = make_recipe(content, settings(said, overrides), source="harprune evaluate")
    if against is not None and out is not None and against.resolve() == out.resolve():
        raise ValueError(f"--against and --out both name {out}; keep what is new in another folder")
    # Read now: the attacks may take hours.
    before = None if against is None else load_evaluation(against)
    result = evaluate_recipe(recipe, out, against=against)
    if not as_json:
        for line in result.lines():
            typer.echo(line)
    changed = {} if before is None else differing(before, result)
    if as_json:
        record = asdict(result)
        del record["outcomes"]
        _print_json(record if before is None else {**record, "differing": changed})
    else:
        for name, count in changed.items():
            typer.echo(f"{name}: {count} of {result.size} images differ from {against}")
    if any(count > REPEATED * result.size for count in changed.values()):
        raise typer.Exit(1)


@app.command(
    epilog="Example: harprune export runs/digits --out digits.hpn\n\n"
    "  harprune export robust.pt --model resnet18 --data cifar10 --format onnx --out robust.onnx"
)
def export(
    source: Annotated[
        Path, typer.Argument(help="A finished run folder, one of its files, or other weights.")
    ],
    out: Annotated[Path, _out("The file to write, or to replace.")],
    format: Annotated[
        Literal["artifact", "onnx", "torch"],
        typer.Option(
            help="artifact: harprune's own sparse file (.hpn). onnx: ONNX. torch: a program of "
            "torch.export."
        ),
    ] = "artifact",
    values: Annotated[
        Literal["fp32", "fp16", "int8"],
        typer.Option(help="How weights are stored; int8 ONNX computes in int8 too."),
    ] = "fp32",
    model: Annotated[
        str | None, typer.Option(help="Network of other weights, as for `harprune evaluate`.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set of other weights: size and names of classes.")
    ] = None,
    data_dir: Folder = None,
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Write a pruned network as one file that runs elsewhere, once it is seen to compute the same.

    Batch norm is folded, and what cannot matter is removed; of a network that the sparse kernels do
    not know ONNX and torch hold the whole. `harprune.deploy.load` runs an .hpn file on a CPU at the
    cost of its kept weights, without torch.
    """
    from harprune.delivery.export import Format, export_recipe
    from harprune.delivery.source import Source, find_source
    from harprune.deploy.artifact import Values
    from harprune.recipe.text import make_recipe, settings

    if (model is None) != (data is None):
        raise ValueError("--model and --data describe other weights together; give both or none")
    said = {"data.folder": data_dir and str(data_dir)}
    if model is None:
        found = find_source(source, settings(said, overrides))
    else:
        said |= {"data.name": data, "model.name": model, "model.weights": str(source)}
        content = {"name": f"{model}-export"}
        recipe = make_recipe(content, settings(said, overrides), source="harprune export")
        found = Source(recipe, {})
    result = export_recipe(
        found.recipe,
        out,
        format=Format(format),
        values=Values(values),
        metadata=found.metadata,
    )
    if as_json:
        _print_json(result.as_dict())
    else:
        typer.echo("\n".join(result.lines()))


@bench.command("deploy", epilog="Example: harprune bench deploy mine.hpn --batch 1 --threads 2")
def bench_deploy(
    source: Annotated[
        Path, typer.Argument(help="An exported .hpn file, or a finished run folder.")
    ],
    batch: Annotated[
        list[int],
        typer.Option(min=1, help="Images at a time; repeat for several. 1 and 64 when absent."),
    ] = [],  # noqa: B006
    runtime: Annotated[
        list[str],
        typer.Option(
            help="harprune, 'harprune avx2', onnxruntime, openvino, torch or 'torch compiled'; "
            "repeat for several. All but the second, where installed, when absent."
        ),
    ] = [],  # noqa: B006
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds in which the runtimes take turns.")
    ] = 10,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each runtime.")] = 1,
    processes: Annotated[
        bool,
        typer.Option(help="Also start a process for each runtime: time to answer, peak memory."),
    ] = True,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the times to this file: .svg, .pdf or .png.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a network on the sparse kernels and on other runtimes; all must agree first."""
    from harprune.delivery import latency
    from harprune.files import write
    from harprune.reporting.plots import picture, require_picture
    from harprune.run.console import Console

    if plot is not None:
        require_picture(plot)
    network = latency.network_of(source)
    found = list(
        latency.rows(
            network,
            batches=batch or (1, 64),
            runtimes=runtime or None,
            rounds=rounds,
            threads=threads,
            processes=processes,
            console=Console(),
        )
    )
    if plot is not None:
        write(plot, picture(plot, latency.plot, found))
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(latency.lines(found)))


@app.command(
    epilog="Example: harprune report runs/harp-* runs/hydra-* --out results.md --baseline hydra"
)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, finished or not; files that a pattern names beside them are passed "
            "over."
        ),
    ],
    out: Annotated[
        Path | None, _out("Compare the runs in this Markdown file; nothing in them changes.")
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
        _print_json(content)
    else:
        typer.echo("\n".join(said))


def _lines_of_report(folder: str, found: dict) -> list[str]:
    """Where a run's report lies, and what the run lacks; of a stage under way, how far it is."""
    begun = {stage: state["epochs"] for stage, state in found["stages"].items() if state["epochs"]}
    missing = [f"{n} (epochs done: {begun[n]})" if n in begun else n for n in found["missing"]]
    lines = [str(Path(folder) / "report" / "report.html")]
    lines += [f"{folder} is not finished; to come: {', '.join(missing)}"] if missing else []
    return lines


@app.command(
    epilog="Example: harprune record runs/mine --out board --method HARP --key Zhao2023Holistic "
    "--title 'Holistic Adversarially Robust Pruning' --authors 'Qi Zhao, Christian Wressnegger' "
    "--link https://openreview.net/forum?id=sAJDi9lD06L --venue 'ICLR 2023'"
)
def record(
    folder: Annotated[Path, typer.Argument(help="A finished run folder.")],
    out: Annotated[Path, _out("The folder for the files.")],
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
    """
    from harprune.delivery.leaderboards import Paper, write_entries

    paper = Paper(method, key, title, authors, link, venue, additional_data)
    found = write_entries(folder, out, paper)
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(f"{board}: {what}" for board, what in found.items()))


@app.command(
    epilog="Example: harprune compare recipes/compare/digits.toml --out runs/compare\n\n"
    "  harprune recipe --grid > grid.toml\n\n"
    "  harprune compare grid.toml --out runs/mine --jobs 2 --set execution.threads=1"
)
def compare(
    grid: Annotated[
        Path,
        typer.Argument(
            help="What to compare (TOML): a base recipe, methods, densities, seeds; "
            "`harprune recipe --grid` prints every key."
        ),
    ],
    out: Annotated[Path, _out("The folder of all runs: made, or continued.")],
    jobs: Annotated[int, typer.Option(help="Runs at work at a time, each a process.")] = 1,
    density: Annotated[
        list[float],
        typer.Option(help="Only this one of the grid's densities; may be given several times."),
    ] = [],  # noqa: B006
    method: Annotated[
        list[str],
        typer.Option(help="Only this one of the grid's methods; may be given several times."),
    ] = [],  # noqa: B006
    overrides: Set = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Run every method at every density with every seed, and write one table of all.

    Each cell is an ordinary run in its own folder, and the cells of a seed share a dense network.
    The same command goes on after an interruption; a run that fails stops no other, and is named
    in the table. On machines that share the folder, give each the same command.
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
        _print_json(found)
    else:
        for name, why in found["failed"].items():
            typer.echo(f"{name}: {why}", err=True)
        typer.echo(out / "comparison.md")
    if found["failed"]:
        raise typer.Exit(1)


@app.command(epilog="Example: harprune data cifar10 --data-dir ~/data")
def data(
    name: Annotated[
        str,
        typer.Argument(
            help="cifar10, cifar100, svhn, mnist, fashion_mnist, tiny_imagenet; digits is built in."
        ),
    ],
    data_dir: Folder = None,
) -> None:
    """Download a data set's official files, checked, and say what is in them."""
    from harprune.training.data import load_dataset

    dataset = load_dataset(name, data_dir, download=True)
    typer.echo(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images "
        f"of shape {tuple(dataset.shape)}, {dataset.num_classes} classes"
    )


@app.command(epilog="Example: harprune recipe > mine.toml\n\n  harprune recipe --grid > grid.toml")
def recipe(
    grid: Annotated[
        bool, typer.Option("--grid", help="The keys of what `harprune compare` takes instead.")
    ] = False,
) -> None:
    """Print every key of a recipe with its meaning and default, as a TOML file to start from."""
    from harprune.grid.schema import describe_grid
    from harprune.recipe.pruning import method_notes
    from harprune.recipe.text import describe

    lines = describe_grid() if grid else describe(notes={"method": method_notes()})
    typer.echo("\n".join(lines))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what is missing and what will be used."""
    from harprune.doctor import diagnose

    findings = diagnose()
    if as_json:
        _print_json(findings)
    else:
        width = max(map(len, findings))
        typer.echo("\n".join(f"{name:<{width}}  {value}" for name, value in findings.items()))


# Below the first paragraph of a docstring typer would keep its line breaks, at any width.
for _each in (*app.registered_commands, *bench.registered_commands):
    _paragraphs = (inspect.getdoc(_each.callback) or "").split("\n\n")
    _each.help = "\n\n".join(" ".join(lines.split()) for lines in _paragraphs)


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
        _print_json(content)


def _print_json(content) -> None:
    from harprune.files import to_json

    typer.echo(to_json(content), nl=False)


class _Terminated(BaseException):
    """SIGTERM, as an exception: whoever is at work cleans up, as after Ctrl-C."""


def main() -> None:
    """Entry point: a user's error is one line and exit code 2, never a traceback."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _guarded()
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code)


def _terminate(*_: object) -> None:
    raise _Terminated


def _guarded() -> int:
    try:
        code = app(prog_name="harprune", standalone_mode=False) or 0
    except _Usage as error:
        command = error.ctx.command_path if error.ctx else "harprune"
        fault = error.format_message().replace("Value error, ", "").rstrip(".")
        return _fail(f"{fault}; see `{command} --help`", 2)
    except OSError as error:
        from harprune.files import Unwritten

        said = isinstance(error, Unwritten) or error.errno not in _FULL
        way = "" if said else "; make room and give the same command again"
        return _fail(f"{error}{way}", 2)
    except ValueError as error:
        return _fail(str(error), 2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        way = "lower the batch_size of this stage; where it has begun, choose another --out"
        return _fail(f"{error}; {way}", 2)
    except _Terminated:
        return _fail("ended by SIGTERM; give the same command again to go on", _TERMINATED)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        return _fail("interrupted; give the same command again to go on", code)
    return code


def _fail(text: str, code: int) -> int:
    print(f"harprune: {' '.join(text.split())}", file=sys.stderr)
    return code
