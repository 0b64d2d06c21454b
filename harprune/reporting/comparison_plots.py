# SPDX-License-Identifier: Apache-2.0
"""The plots of a comparison; `plots.to_svg` makes files of them."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harprune.reporting.plots import (
    BLACK,
    GREEN,
    PALE,
    RED,
    new_figure,
    new_panels,
    positive,
    shortened,
    text_length,
)
from harprune.reporting.tables import format_budgets, format_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACCURACIES = {"clean": (GREEN, "o", -0.13), "autoattack": (RED, "s", 0.13)}
"""Colour, marker and place beside the middle of a row."""


def points_by_row(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Configurations of a comparison below each other, a panel for each density.

    Args:
        rows: of a comparison. Each seed is a faint point, their mean a strong one with its sample
            standard deviation; of one dense network, or one for each seed, the mean is a dashed
            level.
    """
    pruned, dense = _parted(rows)
    configurations = list(dict.fromkeys(row["configuration"] for row in pruned))
    densities = list(dict.fromkeys(row["density"] for row in pruned))
    labels = [_wrapped(name, 32) for name in configurations]
    height = 0.9 + max(0.3, 0.1 + 0.13 * _lines(labels)) * len(configurations)
    figure, panels = new_panels(len(densities), 3.4 + 2.3 * len(densities), height, across=True)
    for axes, density in zip(panels, densities, strict=True):
        known = {row["configuration"]: row for row in pruned if row["density"] == density}
        for name, (colour, marker, shift) in _ACCURACIES.items():
            for place, configuration in enumerate(configurations):
                values = _percentages(known.get(configuration), name)
                if values:
                    where = [place + shift] * len(values)
                    axes.plot(values, where, marker, color=colour, alpha=0.3, markersize=4)
                    _mean_point(axes, values, place + shift, colour, marker)
            level = _percentages(dense, name)
            if level:
                axes.axvline(sum(level) / len(level), color=colour, linewidth=1, linestyle="--")
        axes.set_title(_wrapped(format_budgets(list(known.values())), 32), fontsize=8.5)
        axes.set_xlabel("test accuracy in %")
    panels[0].set_yticks(range(len(configurations)), labels)
    panels[0].set_ylim(len(configurations) - 0.5, -0.5)
    _legend_above(figure, pruned, dense)
    return figure


def accuracy_over_density(
    rows: Sequence[Mapping[str, Any]], baseline: str | None = None
) -> "Figure":
    """Clean and robust accuracy against density, a small panel for each configuration.

    Args:
        rows: of a comparison; the mean over seeds is drawn with its sample standard deviation, a
            lone row of density 1 as a dashed level.
        baseline: a configuration or a method whose lines stand in every panel in grey.
    """
    pruned, dense = _parted(rows)
    lines: dict[str, list[Mapping[str, Any]]] = {}
    ordered = sorted(pruned, key=lambda row: row["density"])
    for row in ordered:
        lines.setdefault(row["configuration"], []).append(row)
    reference = lines.get(baseline or "") or [row for row in ordered if row["method"] == baseline]
    names = list(dict.fromkeys(row["configuration"] for row in pruned))
    titles = [_wrapped(name, 24) for name in names]
    columns, height = min(5, len(names)), 1.56 + 0.14 * _lines(titles)
    figure, panels = new_panels(
        len(names), 1.2 + 1.8 * columns, height, across=True, columns=columns
    )
    for axes, configuration, title in zip(panels, names, titles, strict=False):
        for name, (colour, marker, _) in _ACCURACIES.items():
            if reference:
                _course(axes, reference, name, color=PALE)
            _course(axes, lines[configuration], name, color=colour, marker=marker)
            level = _percentages(dense, name)
            if level:
                axes.axhline(sum(level) / len(level), color=colour, linewidth=0.8, linestyle="--")
        axes.set_title(title, fontsize=8.5)
        _density_ticks(axes, sorted({row["density"] for row in pruned}))
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    weights = all(row["budget"] == format_density(row["density"]) for row in pruned)
    figure.supxlabel("weights kept" if weights else "share that the budget allows", fontsize=9)
    figure.supylabel("test accuracy in %", fontsize=9)
    _legend_above(figure, pruned, dense, baseline if reference else None)
    return figure


def _course(axes: "Axes", rows: Sequence[Mapping[str, Any]], name: str, **look: Any) -> None:
    """One accuracy over the densities of one configuration."""
    known = [row for row in rows if name in row["measures"]]
    axes.errorbar(
        [row["density"] for row in known],
        [100 * row["measures"][name]["mean"] for row in known],
        [100 * (row["measures"][name]["spread"] or 0.0) for row in known],
        capsize=2,
        linewidth=1.2,
        **look,
    )


def strategies(densities: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Fraction kept in each layer: a row of per cents for each configuration, darker where more.

    Args:
        densities: of the layers that each configuration prunes; where it does not prune one that
            another does, the place is hatched.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    layers = _united(list(densities.values()))
    shares = [[100 * kept.get(layer, math.nan) for layer in layers] for kept in densities.values()]
    least = min((s for row in shares for s in row if s > 0), default=1.0)
    whole = any(math.isnan(share) for row in shares for share in row)
    title = ["weights kept in %", *(["hatched: not pruned"] if whole else [])]
    labels = [_wrapped(name, 32) for name in densities]
    row_height = max(0.26, 0.04 + 0.13 * _lines(labels))
    width = 0.5 + text_length(labels, 8) + 0.45 * len(layers)
    height = 0.43 + 0.17 * len(title) + text_length(layers, 7) + row_height * len(densities)
    figure, axes = new_figure(max(3.0, width), height)
    bounds = LogNorm(min(least, 99.0), 100.0)
    axes.imshow([positive(row) for row in shares], aspect="auto", cmap="Blues", norm=bounds)
    for place, row in enumerate(shares):
        for layer, share in enumerate(row):
            if math.isnan(share):
                look = {"facecolor": "none", "edgecolor": PALE, "hatch": "////", "linewidth": 0}
                axes.add_patch(Rectangle((layer - 0.5, place - 0.5), 1, 1, **look))
                continue
            strong = share > 0 and bounds(share) > 0.6
            axes.text(
                layer,
                place,
                f"{share:.2g}" if share < 99.5 else "100",
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if strong else BLACK,
            )
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.set_yticks(range(len(densities)), labels)
    axes.grid(visible=False)
    axes.set_title("\n".join(title))
    return figure


def _united(members: Sequence[Iterable[str]]) -> list[str]:
    """The names of all members in their order: one that the first lacks follows its predecessor."""
    found: list[str] = []
    for names in members:
        place = 0
        for name in names:
            if name not in found:
                found.insert(place, name)
            place = found.index(name) + 1
    return found


def _parted(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], Mapping[str, Any] | None]:
    """The pruned rows of a comparison, and the dense one; None where there are several."""
    pruned = [row for row in rows if row["density"] < 1.0]
    dense = [row for row in rows if row["density"] == 1.0]
    return pruned, dense[0] if len(dense) == 1 else None


def _wrapped(label: str, width: int) -> str:
    """`label` in lines of at most `width` characters."""
    return textwrap.fill(label, width, break_on_hyphens=False)


def _lines(labels: Sequence[str]) -> int:
    """The most lines that one of `labels` has."""
    return max(label.count("\n") + 1 for label in labels)


def _percentages(row: Mapping[str, Any] | None, name: str) -> list[float]:
    """An accuracy of a row of a comparison, seed by seed."""
    measure = row["measures"].get(name) if row else None
    return [100 * value for value in measure["values"]] if measure else []


def _mean_point(axes: "Axes", values: list[float], height: float, colour: str, marker: str) -> None:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    axes.errorbar(mean, height, xerr=spread, fmt=marker, color=colour, capsize=3, markersize=6.5)


def _legend_above(
    figure: "Figure",
    rows: Sequence[Mapping[str, Any]],
    dense: Mapping[str, Any] | None,
    baseline: str | None = None,
) -> None:
    """What the colours of the accuracies in `rows` mean, above all panels, which stay as high."""
    from matplotlib.lines import Line2D

    names = {"clean": "clean", "autoattack": "AutoAttack"}
    looks = [
        Line2D([], [], color=colour, marker=marker, label=names[name])
        for name, (colour, marker, _) in _ACCURACIES.items()
        if any(name in row["measures"] for row in rows)
    ]
    if dense is not None:
        fewer = dense["images"] if dense["images"] != rows[0]["images"] else []
        label = f"dense ({' or '.join(map(str, fewer))} images)" if fewer else "dense"
        looks += [Line2D([], [], color=BLACK, linestyle="--", linewidth=1, label=label)]
    if baseline is not None:
        looks += [Line2D([], [], color=PALE, label=shortened(baseline, 24))]
    # In a row as many as have room: some line and the longest label each.
    widest = 0.45 + text_length([str(look.get_label()) for look in looks], 9)
    columns = max(1, min(len(looks), int(figure.get_figwidth() / widest)))
    figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(looks) / columns))
    figure.legend(handles=looks, loc="outside upper left", ncols=columns)


def _density_ticks(axes: "Axes", densities: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each density, and its per cent where there is room."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log")
    span, last, labels = math.log(densities[-1] / densities[0]), 0.0, []
    for density in densities:
        room = not last or math.log(density / last) > 0.25 * span
        labels.append(f"{100 * density:g} %" if room else "")
        last = density if room else last
    axes.set_xticks(densities, labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
