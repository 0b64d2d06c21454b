# SPDX-License-Identifier: Apache-2.0
"""How fast a deployed network runs beside the same network in other runtimes.

Every runtime gets the shrunk network; the others multiply its zeros. Before anything is timed,
each must compute the same logits. Rounds take turns, caches are warm, and the reference is the
fastest of the other runtimes, never the slowest.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from harprune.delivery.export import export_recipe
from harprune.delivery.runtimes import OWN, OWN_AVX2, RUNTIMES, Candidate, candidates, started
from harprune.delivery.source import find_source
from harprune.delivery.timing import circumstances, interleaved, seconds, summary
from harprune.deploy import artifact
from harprune.deploy.interchange import Runner
from harprune.deploy.module import Module
from harprune.deploy.network import Network
from harprune.reporting.plots import BLACK, BLUE, PALE
from harprune.reporting.tables import ABSENT, Table, counted
from harprune.run.console import Console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = 1e-3
"""Largest difference of a logit, as a share of the largest, between runtimes in float32."""
_ROUND = 0.05
"""Seconds that one round of a runtime takes at least: what is faster is called several times."""


def network_of(source: str | Path) -> Network:
    """The network of an artifact, or of a run folder, shrunk.

    Raises:
        ValueError: it is neither.
    """
    source = Path(source)
    with tempfile.TemporaryDirectory() as folder:
        path = source
        if source.is_dir() or source.suffix == ".safetensors":
            path = Path(folder) / "network.hpn"
            export_recipe(find_source(source).recipe, path)
        elif not artifact.recognised(source):
            raise ValueError(
                f"{source} is neither an .hpn file nor a run folder; `harprune export` makes "
                "such a file of a finished run"
            )
        return artifact.load(path)


def rows(
    network: Network,
    *,
    batches: Sequence[int] = (1, 64),
    runtimes: Sequence[str] | None = None,
    rounds: int = 10,
    threads: int = 1,
    processes: bool = True,
    console: Console | None = None,
) -> Iterator[dict]:
    """A row for each number of images and runtime, with the circumstances.

    `milliseconds` are those of a batch, the median of the rounds between `min` and `max`; `ratio`
    is the median of how many times as fast as `reference` it was in the same round; `kernels` are
    those of this package that the runtime used, None in other runtimes.

    Args:
        runtimes: some of `RUNTIMES`; when absent, all that are installed but for AVX2 alone.
        processes: also start one for each runtime and batch, and note the seconds from importing
            the runtime to its first answer, and the peak memory.
        console: says which runtimes are left out and why, and shows how far it is, between two
            measurements.

    Raises:
        ValueError: an unknown runtime or one that is not installed, or runtimes that differ.
    """
    unknown = set(runtimes or ()) - RUNTIMES.keys()
    if unknown:
        raise ValueError(f"runtime {min(unknown)!r} is unknown; choose among {', '.join(RUNTIMES)}")
    console = console or Console(quiet=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = dict(candidates(network, Path(folder), runtimes, threads, console))
            total = len(batches) * len(made) * (rounds + processes)
            with console.bar("bench deploy", total) as bar:
                done = count(1)
                for batch in batches:

                    def told(name: str, batch: int = batch) -> None:
                        bar.update(next(done), f"batch {batch}, {name}")

                    yield from _batch(
                        made, network, batch, rounds, threads, processes, told, console
                    )
    finally:
        torch.set_num_threads(before)


def _batch(
    made: Mapping[str, Candidate],
    network: Network,
    batch: int,
    rounds: int,
    threads: int,
    processes: bool,
    told: Callable[[str], None],
    console: Console,
) -> Iterator[dict]:
    random = np.random.default_rng(0)
    images = random.random((batch, *network.input_shape), np.float32)
    expected = Module(network)(torch.from_numpy(images)).detach().numpy()
    calls, repeats = {}, {}
    for name, candidate in made.items():
        _require_same(name, candidate.run(images), expected)
        once = min(seconds(lambda c=candidate: c.run(images)) for _ in range(3))
        repeats[name] = max(1, round(_ROUND / once))
        calls[name] = _repeated(candidate.run, images, repeats[name])
    taken = {
        name: [own / repeats[name] for own in round_]
        for name, round_ in interleaved(calls, rounds, told).items()
    }
    others = [name for name in made if name not in (OWN, OWN_AVX2)] or [next(iter(made))]
    reference = min(others, key=lambda name: statistics.median(taken[name]))
    for name, own in taken.items():
        found = summary(own, taken[reference])
        start = peak = None
        if processes:
            start, peak = started(name, made[name].file, images.shape, threads, console)
            told(name)
        yield {
            "runtime": name,
            "batch": batch,
            "milliseconds": 1e3 * found["seconds"],
            "min": 1e3 * found["min"],
            "max": 1e3 * found["max"],
            "images_per_second": batch / found["seconds"],
            "ratio": found["ratio"],
            "reference": reference,
            "rounds": rounds,
            "calls_per_round": repeats[name],
            "file_bytes": made[name].file.stat().st_size,
            "start_seconds": start,
            "peak_bytes": peak,
            "kept_weights": sum(len(v) for v in network.values.values()),
            **circumstances(),
            "kernels": made[name].kernels,
        }


def _repeated(run: Runner, images: np.ndarray, times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            run(images)

    return calls


def _require_same(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(found - expected).max() / (np.abs(expected).max() or 1.0)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{name}: its logits differ by {difference:.1e} of the largest; its times mean nothing"
        )


def lines(found: Sequence[Mapping]) -> list[str]:
    """The rows for people: a table for each number of images."""
    said = []
    for batch in dict.fromkeys(row["batch"] for row in found):
        own = [row for row in found if row["batch"] == batch]
        first = own[0]
        said.append(
            f"{counted(batch, 'image')} at a time, {counted(first['threads'], 'thread')}, median "
            f"of {counted(first['rounds'], 'round')}; speed in times that of {first['reference']}"
        )
        said += [*_table(own).lines(), ""]
    return said[:-1]


def _table(own: Sequence[Mapping]) -> Table:
    header = ("runtime", "ms", "least", "most", "images/s", "speed")
    header += ("file MB", "first answer s", "peak MB")
    keys = {"milliseconds": 1, "min": 1, "max": 1, "images_per_second": 1, "ratio": 1}
    keys |= {"file_bytes": 1e6, "start_seconds": 1, "peak_bytes": 1e6}
    rows = [
        (row["runtime"], *(_number(row[key], unit) for key, unit in keys.items())) for row in own
    ]
    return Table(header, tuple(rows))


def _number(value: float | None, unit: float) -> str:
    """Three digits that count, never an exponent."""
    if value is None:
        return ABSENT
    places = max(0, 2 - math.floor(math.log10(value / unit)))
    return f"{value / unit:,.{places}f}"


def plot(found: Sequence[Mapping]) -> "Figure":
    """Milliseconds of each runtime, a panel for each number of images; lines span the rounds."""
    import matplotlib.pyplot as plt

    batches = list(dict.fromkeys(row["batch"] for row in found))
    figure, panels = plt.subplots(1, len(batches), figsize=(3.6 * len(batches), 2.4), squeeze=False)
    for axes, batch in zip(panels[0], batches):
        own = [row for row in found if row["batch"] == batch]
        names = [row["runtime"] for row in own]
        middle = [row["milliseconds"] for row in own]
        spread = [
            [row["milliseconds"] - row["min"] for row in own],
            [row["max"] - row["milliseconds"] for row in own],
        ]
        colours = [BLUE if name == OWN else PALE for name in names]
        axes.barh(names, middle, xerr=spread, color=colours, ecolor=BLACK)
        axes.invert_yaxis()
        axes.set_title(f"batch {batch}")
        axes.set_xlabel("milliseconds")
    return figure
