# SPDX-License-Identifier: Apache-2.0
"""Time deployed networks beside other runtimes, by network, density and allocation.

    python bench/deploy.py --json results/deploy.json --plot results/deploy.svg
    python bench/deploy.py --arch resnet18 --density 0.01 --allocation erk --batch 1 --rounds 20

Networks have random weights, pruned by magnitude; what a runtime takes does not depend on what
they have learned. Each is shrunk, and all runtimes get the shrunk one. In the JSON rows `ratio` is
to the fastest of the others in the same round, and `reference` names it. Networks whose mask cuts
the logits off from the image are named and skipped: nothing about them is worth a time.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.attack import network
from bench.measuring import write_rows
from harprune.delivery import latency
from harprune.delivery.runtimes import OWN, RUNTIMES
from harprune.deploy.network import Network
from harprune.deploy.shrink import shrink
from harprune.files import write
from harprune.reporting.plots import BLUE, GREY, ORANGE, PURPLE, picture, require_picture
from harprune.reporting.tables import format_density
from harprune.sparsity.audit import audit, connected
from harprune.sparsity.execution import require_backend
from harprune.sparsity.extraction import extract
from harprune.sparsity.layers import prunable_layers

_COLOURS = {"uniform": GREY, "erk": ORANGE, "lamp": PURPLE, None: BLUE}


def rows(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each network, density, allocation, batch and runtime."""
    for arch in options.arch:
        for density in options.density:
            for allocation in options.allocation if density < 1.0 else [None]:
                model = network(arch, options.width, density, allocation)
                same = {"arch": arch, "width": options.width, "density": density}
                same |= {"allocation": allocation, "kept": audit(prunable_layers(model)).kept}
                if not connected(model, torch.rand(2, 3, 32, 32)):
                    print(f"{arch} {allocation} {density}: disconnected, skipped", file=sys.stderr)
                    continue
                smaller, _ = shrink(Network(*extract(model, torch.rand(1, 3, 32, 32))))
                for row in latency.rows(
                    smaller,
                    batches=options.batch,
                    runtimes=options.runtime,
                    rounds=options.rounds,
                    threads=options.threads,
                    processes=not options.no_processes,
                ):
                    yield same | row


def name_of(row: dict) -> str:
    """The network of a row, in words."""
    how = f", {row['allocation']}" if row["allocation"] else ""
    width = "" if row["width"] is None else f" of width {row['width']}"
    kept = format_density(row["density"])
    return f"{row['arch']}{width}, {kept}{how}: {row['kept']:,} weights"


def draw(found: Sequence[dict]):
    """Speed over the fastest other runtime against density, a panel for each batch."""
    import matplotlib.pyplot as plt

    own = [row for row in found if row["runtime"] == OWN]
    batches = list(dict.fromkeys(row["batch"] for row in own))
    figure, panels = plt.subplots(1, len(batches), figsize=(4 * len(batches), 3.2), squeeze=False)
    for axes, batch in zip(panels[0], batches):
        for arch, style in zip(dict.fromkeys(row["arch"] for row in own), ("-o", "--s", ":^")):
            for allocation, colour in _COLOURS.items():
                points = [
                    (row["density"], row["ratio"])
                    for row in own
                    if (row["batch"], row["arch"], row["allocation"]) == (batch, arch, allocation)
                ]
                if points:
                    label = f"{arch}, {allocation or 'dense'}"
                    axes.plot(*zip(*sorted(points)), style, color=colour, label=label)
        axes.axhline(1.0, color=GREY, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"batch {batch}")
        axes.set_xlabel("weights kept")
        axes.set_ylabel("times the fastest other runtime")
        axes.legend()
    return figure


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--arch", nargs="+", default=["resnet18", "vgg16_bn"], help="networks for 32 x 32 images")
    add("--width", type=int, help="channels of the first stage; else the usual")
    add("--density", type=float, nargs="+", default=[0.1, 0.05, 0.01, 0.001], help="kept share")
    add("--allocation", nargs="+", default=["uniform", "erk", "lamp"], help="of the density")
    add("--batch", type=int, nargs="+", default=[1, 64], help="images in a batch")
    add(
        "--runtime",
        nargs="+",
        choices=list(RUNTIMES),
        help="some of these; all that are installed, but for AVX2 alone, when absent",
    )
    add("--threads", type=int, default=1, help="CPU threads of each runtime")
    add("--rounds", type=int, default=10, help="interleaved rounds")
    add("--no-processes", action="store_true", help="start none for time to answer and memory")
    add("--json", type=Path, help="also write the rows here")
    add("--plot", type=Path, help="also draw speed against density to this .svg, .pdf or .png")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options, found = parse(arguments), []
    require_backend("sparse")
    if options.plot is not None:
        require_picture(options.plot)
    for name, own in groupby(rows(options), key=name_of):
        start = len(found)
        for row in own:
            found.append(row)
            write_rows(options.json, found)
        print(name, *latency.lines(found[start:]), "", sep="\n", flush=True)
    if options.plot is not None:
        write(options.plot, picture(options.plot, draw, found))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"deploy: {error}")
