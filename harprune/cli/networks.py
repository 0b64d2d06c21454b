# SPDX-License-Identifier: Apache-2.0
"""Commands that take a network: `evaluate` and `export` it, and `bench deploy`, its speed."""

from dataclasses import asdict
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
    Set,
    out_option,
    print_json,
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
    out: Annotated[Path | None, out_option("Keep per-image outcomes here, and resume.")] = None,
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
    ] = [],
    size: Annotated[
        int | None, typer.Option(help="Number of test images; all when absent.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Draws the images and starts the attacks; 0 when absent.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images attacked at a time; 250 when absent.")
    ] = None,
    overrides: Set = [],
    execution: Execution = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure clean accuracy and robustness of a network on test images.

    Robust accuracy means autoattack; the other attacks only bound it from above.

    Example: harprune evaluate runs/digits --attack pgd-20

    harprune evaluate --model resnet18 --weights robust.pt --data cifar10 --size 1000
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
        if result.attacks:
            typer.echo(f"attacked under {result.threat}")
    changed = {} if before is None else differing(before, result)
    if as_json:
        record = asdict(result)
        del record["outcomes"]
        print_json(record if before is None else {**record, "differing": changed})
    else:
        for name, count in changed.items():
            typer.echo(f"{name}: {count} of {result.size} images differ from {against}")
    if any(count > REPEATED * result.size for count in changed.values()):
        raise typer.Exit(1)


def export(
    source: Annotated[
        Path, typer.Argument(help="A finished run folder, one of its files, or other weights.")
    ],
    out: Annotated[Path, out_option("The file to write, or to replace.")],
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
    overrides: Set = [],
    as_json: Json = False,
) -> None:
    """Write a pruned network as one file that runs elsewhere, once it is seen to compute the same.

    Batch norm is folded, and what cannot matter is removed; of a network that the sparse kernels do
    not know ONNX and torch hold the whole. `harprune.deploy.load` runs an .hpn file on a CPU at the
    cost of its kept weights, without torch.

    Example: harprune export runs/digits --out digits.hpn

    harprune export robust.pt --model resnet18 --data cifar10 --format onnx --out robust.onnx
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
        print_json(result.as_dict())
    else:
        typer.echo("\n".join(result.lines()))


def bench_deploy(
    source: Annotated[
        Path, typer.Argument(help="An exported .hpn file, or a finished run folder.")
    ],
    batch: Annotated[
        list[int],
        typer.Option(min=1, help="Images at a time; repeat for several. 1 and 64 when absent."),
    ] = [],
    runtime: Annotated[
        list[str],
        typer.Option(
            help="harprune, 'harprune avx2', onnxruntime, openvino, torch or 'torch compiled'; "
            "repeat for several. All but the second, where installed, when absent."
        ),
    ] = [],
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
    """Time a network on the sparse kernels and on other runtimes; all must agree first.

    Example: harprune bench deploy mine.hpn --batch 1 --threads 2
    """
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
        print_json(found)
    else:
        typer.echo("\n".join(latency.lines(found)))
