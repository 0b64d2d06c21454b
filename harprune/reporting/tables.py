# SPDX-License-Identifier: Apache-2.0
"""The tables of a report, and how its numbers are written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from harprune.reporting.summary import AUTOATTACK

ABSENT = "–"  # noqa: RUF001 - an en dash, as tables have it

_COSTS = {"multiply-adds": "multiply-adds", "mixed": "a mix of weights and multiply-adds"}

_TITLES = {
    "dense": "dense",
    "pruned": "pruned",
    "finetuned": "pruned and finetuned",
    "clean": "clean accuracy",
    AUTOATTACK: "AutoAttack (the robust accuracy)",
}


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; rows numbered in `strong` are set in bold.

    The first column is aligned to the left, and the others too unless `numeric`.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    numeric: bool = True

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        rule = [":--", *["--:" if self.numeric else ":--"] * (len(self.header) - 1)]
        body = [
            [f"**{cell}**" if number in self.strong and cell else cell for cell in row]
            for number, row in enumerate(self.rows)
        ]
        return "\n".join(
            "| " + " | ".join(map(_cell, row)) + " |" for row in [self.header, rule, *body]
        )

    def lines(self) -> list[str]:
        """The table in aligned columns, for a terminal."""
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        sides = ["<", *(">" if self.numeric else "<" for _ in widths[1:])]
        return [
            "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
            for row in (self.header, *self.rows)
        ]


def title_of(name: str) -> str:
    """How a model, measure or attack is called for people."""
    return _TITLES.get(name, name)


def short_title_of(measure: str) -> str:
    """The same of a measure or attack where there is little room."""
    return "AutoAttack" if measure == AUTOATTACK else measure


def format_density(density: float | None) -> str:
    """0.01 -> `1 % kept (99 % sparse)`."""
    if density is None:
        return ABSENT
    kept = Decimal(f"{100 * density:.4g}")
    return f"{_plain(kept)} % kept ({_plain(100 - kept)} % sparse)"


def format_budget(section: Mapping[str, Any]) -> str:
    """A recipe's [budget]: `format_density` where it counts weights alone, else of what a share."""
    density, cost = section.get("density"), section.get("cost", "parameters")
    bound = section.get("multiply_adds")
    if density is None or cost == "parameters":
        text = format_density(density)
    else:
        text = f"{format_share(density)} of {_COSTS[cost]}"
    return text if bound is None else f"{text}, at most {format_share(bound)} of multiply-adds"


def format_budgets(rows: Sequence[Mapping[str, Any]]) -> str:
    """The budget of a comparison's rows of one density; where they count other things, its share.

    Args:
        rows: with "density" and the "budget" in words.
    """
    budgets = {row["budget"] for row in rows}
    share = format_share(rows[0]["density"])
    return budgets.pop() if len(budgets) == 1 else f"{share}, budgets differ"


def format_share(fraction: float) -> str:
    """0.0125 -> `1.25 %`."""
    return f"{_plain(Decimal(f'{100 * fraction:.4g}'))} %"


def format_percent(fraction: float | None) -> str:
    return ABSENT if fraction is None else f"{100 * fraction:.2f}"


def format_measure(measure: Mapping[str, Any] | None) -> str:
    """Accuracy in per cent with its 95 % interval."""
    if measure is None:
        return ABSENT
    low, high = measure["interval"]
    return f"{100 * measure['accuracy']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def format_difference(paired: Mapping[str, Any] | None) -> str:
    """Difference in percentage points with its paired 95 % interval."""
    if paired is None:
        return ABSENT
    low, high = paired["interval"]
    return f"{100 * paired['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def format_p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def format_kept(kept: int, total: int) -> str:
    return f"{kept:,} / {total:,}"


def counted(count: int, what: str) -> str:
    """1, "image" -> `1 image`; 2 -> `2 images`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def flatten(value: Any) -> str:
    """A nested value of environment.json as one phrase."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key} {flatten(item)}" for key, item in value.items() if item is not None
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(flatten, value))
    return ABSENT if value is None else str(value)


def results_table(summary: Mapping[str, Any]) -> Table | None:
    """Clean accuracy, AutoAttack, other attacks and weights kept, dense against finetuned."""
    results = summary["results"]
    if not results:
        return None
    rows = [_result_row(result) for result in results]
    rows += [_kept_row(summary["audit"])] if summary["audit"] else []
    header = ("%", "dense", "pruned and finetuned", "difference", "n")
    strong = frozenset(i for i, result in enumerate(results) if result["measure"] == AUTOATTACK)
    return Table(header, tuple(rows), strong)


def _result_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    models = [result[model] for model in ("dense", "finetuned")]
    sizes = list(dict.fromkeys(f"{model['size']:,}" for model in models if model))
    if len(sizes) > 1 and result["difference"]:
        sizes[-1] += f", {result['difference']['size']:,} in both"
    return (
        title_of(result["measure"]),
        *map(format_measure, models),
        format_difference(result["difference"]),
        " / ".join(sizes),
    )


def _kept_row(audit: Mapping[str, Any]) -> tuple[str, ...]:
    total = audit["total"]
    kept = format_kept(audit["kept"], total)
    return (f"{audit['denominator']} kept", format_kept(total, total), kept, "", "")


def checks_table(summary: Mapping[str, Any]) -> Table | None:
    """Every check, the failed ones first and in bold."""
    checks = summary["checks"]
    if not checks:
        return None
    rows = tuple(
        (title_of(c["model"]), c["check"], "passed" if c["passed"] else "FAILED", c["detail"])
        for c in checks
    )
    failed = frozenset(number for number, check in enumerate(checks) if not check["passed"])
    return Table(("model", "check", "verdict", "detail"), rows, failed, numeric=False)


def stages_table(summary: Mapping[str, Any]) -> Table:
    """How far training went, and the epoch (from 1) that was selected on validation images.

    A finished stage has the accuracies of the network that it left. Those of pruning before the
    cut to the budget stand in a row of their own, alone where a run did not keep the others.
    """
    rows = tuple(row for name, stage in summary["stages"].items() for row in _stage(name, stage))
    header = ("stage", "state", "epochs", "selected", "clean %", "robust %", "passes")
    return Table(header, rows)


def _stage(name: str, stage: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    unfinished = "unfinished" if stage["epochs"] else "not started"
    cut = name == "prune" and stage["finished"] and stage["epochs"] > 0
    shown = stage["left"] or ({} if cut else stage)
    yield (
        name,
        "finished" if stage["finished"] else unfinished,
        str(stage["epochs"]),
        ABSENT if stage["selected"] is None else str(stage["selected"] + 1),
        format_percent(shown.get("clean")),
        format_percent(shown.get("robust")),
        f"{stage['passes']:,}" if stage["passes"] is not None else ABSENT,
    )
    if cut:
        accuracies = format_percent(stage["clean"]), format_percent(stage["robust"])
        yield ("before the cut to the budget", "", "", "", *accuracies, "")


def layers_table(summary: Mapping[str, Any]) -> Table | None:
    """Weights kept per layer."""
    if not summary["audit"]:
        return None
    layers = summary["audit"]["layers"].items()
    rows = tuple(
        (n, f"{c['kept']:,}", f"{c['total']:,}", f"{100 * c['density']:.3g}") for n, c in layers
    )
    return Table(("layer", "kept", "of", "% kept"), rows)


def _plain(number: Decimal) -> str:
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
