# SPDX-License-Identifier: Apache-2.0
"""The plots of a report, drawn with matplotlib: quiet, readable, told apart without colour.

Each function returns a matplotlib figure; `to_svg` and `picture` make it a file, the same bits each
time.
Hues are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harprune.files import require_writable
from harprune.outcomes import Evaluation, Measure
from harprune.reporting.records import STAGES, Audit, Epoch
from harprune.reporting.summary import measure_order
from harprune.reporting.tables import short_title_of, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
RED, GREY, PALE, BLACK = "#D55E00", "#8A8A8A", "#BDBDBD", "#222222"

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "harprune",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": BLACK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
}
_ALLOCATIONS = {
    "erk": ("ERK", ORANGE, "s"),
    "lamp": ("LAMP", PURPLE, "^"),
    "uniform": ("uniform", GREY, ""),
}
_COUNTED = {
    "parameters": "weights kept",
    "multiply-adds": "multiply-adds kept",
    "mixed": "mixed cost kept",
}
_MANY = 1000
"""A logarithmic axis of less than so many times is labelled at 1, 2 and 5, one of more at 1."""
_MOST_LABELS = 100
"""Layers named side by side in the widest figure; of more every second, third, ... one."""
_MODELS = {"dense": PALE, "finetuned": BLUE}
_UNDATED: dict[str, dict] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
"""The kinds of picture, by their suffix, and what keeps the date out of each."""


def to_svg(draw: Callable[..., "Figure"], *data: Any) -> bytes:
    """What `draw(*data)` draws, as SVG without a date or random names."""
    return picture("picture.svg", draw, *data)


def picture(path: str | Path, draw: Callable[..., "Figure"], *data: Any) -> bytes:
    """What `draw(*data)` draws, in the format that the suffix of `path` names."""
    import matplotlib

    stream, kind = io.BytesIO(), _kind(path)
    with matplotlib.rc_context(_STYLE):
        draw(*data).savefig(stream, format=kind, metadata=_UNDATED[kind])
    return stream.getvalue()


def require_picture(path: str | Path) -> None:
    """Say before the work, not after it, that `path` cannot become a picture.

    Raises:
        ValueError: its suffix names none, or the file cannot be written.
    """
    if _kind(path) not in _UNDATED:
        known = ", ".join(f".{kind}" for kind in _UNDATED)
        raise ValueError(f"{path} names no kind of picture; let it end in one of {known}")
    require_writable(path)


def _kind(path: str | Path) -> str:
    return Path(path).suffix.lower().removeprefix(".")


def density_per_layer(audit: Audit) -> "Figure":
    """Fraction kept in each layer, beside what ERK, LAMP and uniform allocation would keep."""
    names = list(audit.layers)
    places = range(len(names))
    labels = [shortened(name, 48) for name in names]
    size = 7.5 if len(names) < 40 else 6
    width = min(13.0, max(6.4, 1.6 + 0.3 * len(names)))
    figure, axes = new_figure(width, 3.2 + text_length(labels, size))
    for name, (label, colour, marker) in _ALLOCATIONS.items():
        if name in audit.allocations:
            shares = [audit.allocations[name].get(layer, math.nan) for layer in names]
            style = {"color": colour, "marker": marker, "linewidth": 1.1, "markersize": 3.5}
            axes.plot(places, positive(shares), "--", label=label, **style)
    kept = [layer.density for layer in audit.layers.values()]
    axes.plot(places, positive(kept), "-o", color=BLUE, label="this run", linewidth=2, zorder=3)
    _mark_empty(axes, places, kept)
    _density_axis(axes)
    every = math.ceil(len(names) / _MOST_LABELS)
    axes.set_xticks(places[::every], labels[::every], rotation=90, fontsize=size)
    axes.set_ylabel("weights kept")
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] != "this run")
    _legend(axes, [handles[i] for i in order], columns=5)
    return figure


def prune_course(epochs: Sequence[Epoch], budget: Mapping[str, Any]) -> "Figure":
    """Penalty weight gamma, penalty and global density over the epochs of the prune stage.

    `budget` is the recipe's section, which says what the density is a share of.
    """
    quantities = ("gamma", "penalty", "density")
    known = [name for name in quantities if any(getattr(e, name) is not None for e in epochs)]
    figure, panels = new_panels(len(known), 6.4, 1.0 + 1.35 * len(known))
    for axes, name, colour in zip(panels, known, (ORANGE, PURPLE, BLUE), strict=False):
        values = [math.nan if getattr(e, name) is None else getattr(e, name) for e in epochs]
        places = [e.epoch + 1 for e in epochs]
        shown = positive(values) if name == "density" else values
        axes.plot(places, shown, "-o", color=colour, markersize=3)
        counted = _COUNTED[budget.get("cost", "parameters")]
        axes.set_ylabel({"gamma": "γ", "density": counted}.get(name, name))  # noqa: RUF001
        if name == "density":
            if budget.get("density") is not None:
                label = "budget" if budget.get("multiply_adds") is None else "first of two bounds"
                axes.axhline(
                    budget["density"], color=BLACK, linewidth=1, linestyle="--", label=label
                )
            _mark_empty(axes, places, values)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(loc="upper right")
            _density_axis(axes)
        else:
            axes.set_ylim(bottom=0)
    met = [e.epoch + 1 for e in epochs if e.budget_met]
    for axes in panels if met else ():
        axes.axvline(met[0], color=GREEN, linewidth=1, linestyle=":")
    if met:
        panels[0].set_title(f"budget first met in epoch {met[0]}", color=GREEN)
    _epoch_axis(panels[-1], epochs)
    figure.align_ylabels(panels)
    return figure


def validation_course(epochs: Sequence[Epoch]) -> "Figure":
    """Clean and robust accuracy on validation images, epoch by epoch, a panel per stage.

    The selected epoch of a stage is marked where it is known.
    """
    stages = {s: [e for e in epochs if e.stage == s] for s in STAGES}
    stages = {stage: known for stage, known in stages.items() if known}
    figure, panels = new_panels(len(stages), 2.6 + 2.3 * len(stages), 3.0, across=True)
    for axes, (stage, known) in zip(panels, stages.items(), strict=True):
        places = [epoch.epoch + 1 for epoch in known]
        axes.plot(
            places, [100 * e.clean for e in known], "-o", color=GREEN, label="clean", markersize=3
        )
        robust = [100 * e.robust for e in known]
        axes.plot(
            places, robust, "--s", color=RED, label="under the selecting attack", markersize=3
        )
        for epoch in (e.epoch + 1 for e in known if e.selected):
            axes.axvline(epoch, color=GREY, linewidth=1, linestyle=":", label="selected epoch")
        axes.set_title(stage)
        _epoch_axis(axes, known)
    panels[0].set_ylabel("validation accuracy in %")
    panels[0].set_ylim(0, 100)
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(handles=list(lines.values()), loc="outside upper right", ncols=len(lines))
    return figure


def accuracy_bars(evaluations: Mapping[str, Evaluation]) -> "Figure":
    """Test accuracy, clean and under each attack, with 95 % intervals; a bar for each model."""
    measures = measure_order(n for e in evaluations.values() for n in ("clean", *e.attacks))
    figure, axes = new_figure(6.8, 0.9 + 0.62 * len(measures))
    height = 0.8 / len(evaluations)
    for row, (model, evaluation) in enumerate(evaluations.items()):
        shift = (row - (len(evaluations) - 1) / 2) * height
        known = {i + shift: evaluation.measures.get(m) for i, m in enumerate(measures)}
        _bars(axes, {place: m for place, m in known.items() if m}, 0.92 * height, model)
    axes.set_yticks(range(len(measures)), [short_title_of(name) for name in measures])
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("test accuracy in %, with 95 % interval")
    _legend(axes, columns=2)
    return figure


def _bars(axes: "Axes", measures: Mapping[float, Measure], height: float, model: str) -> None:
    """One model's bars, each at its place on the vertical axis."""
    for place, measure in measures.items():
        value, (low, high) = 100 * measure.accuracy, (100 * end for end in measure.interval)
        axes.barh(place, value, height, color=_MODELS[model])
        axes.plot([low, high], [place, place], "-|", color=BLACK, linewidth=1, markersize=5)
        axes.text(max(high, value) + 1, place, f"{value:.1f}", va="center", fontsize=8)
    axes.barh(0, 0, color=_MODELS[model], label=title_of(model))


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def new_panels(
    count: int, width: float, height: float, *, across: bool = False, columns: int | None = None
) -> "tuple[Figure, list[Axes]]":
    """Panels below each other with one x axis, or across, in rows of `columns`, with one y axis.

    `height` is that of the figure, or of each row of `columns`.
    """
    from matplotlib.figure import Figure

    if columns is None:
        rows, columns = (1, count) if across else (count, 1)
    else:
        rows = math.ceil(count / columns)
        height = 0.8 + rows * height
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=not across, sharey=across)
    return figure, list(grid.flat)


def _mark_empty(axes: "Axes", places: Sequence[float], kept: Sequence[float]) -> None:
    """A cross at the foot of the axes wherever nothing is kept."""
    empty = [place for place, share in zip(places, kept, strict=True) if share == 0]
    if empty:
        foot = axes.get_xaxis_transform()
        axes.plot(empty, [0.02] * len(empty), "x", color=RED, transform=foot, label="nothing kept")


def _density_axis(axes: "Axes") -> None:
    """Densities on a logarithmic axis, in per cent; for axes that hold all they will."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    if not math.isfinite(axes.dataLim.minposy):  # there is nothing but zeros
        axes.set_ylim(0.001, 1)
    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if high < _MANY * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _epoch_axis(axes: "Axes", epochs: Sequence[Epoch]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, max(epoch.epoch for epoch in epochs) + 1.5)
    axes.set_xlabel("epoch")


def _legend(axes: "Axes", handles: Sequence[Any] | None = None, *, columns: int) -> None:
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2
    )


def text_length(labels: Sequence[str], size: float) -> float:
    """About the longest line of `labels`, in inches, set in `size` points."""
    return max(len(line) for label in labels for line in label.split("\n")) * 0.6 * size / 72


def shortened(label: str, width: int) -> str:
    """`label` in at most `width` characters: the middle of a longer one is left out."""
    if len(label) <= width:
        return label
    start = (width - 3) // 2
    return f"{label[:start]}...{label[start + 3 - width :]}"


def positive(values: Sequence[float]) -> list[float]:
    """A logarithmic axis has no place for zero."""
    return [value if value > 0 else math.nan for value in values]
