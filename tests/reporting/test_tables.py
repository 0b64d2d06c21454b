# SPDX-License-Identifier: Apache-2.0
"""How numbers are written, and Markdown that keeps its shape."""

import pytest

from harprune.reporting.tables import (
    Table,
    counted,
    flatten,
    format_density,
    format_p,
    format_percent,
)


@pytest.mark.parametrize(
    ("density", "text"),
    [
        (0.01, "1 % kept (99 % sparse)"),
        (0.001, "0.1 % kept (99.9 % sparse)"),
        (0.1, "10 % kept (90 % sparse)"),
        (0.0125, "1.25 % kept (98.75 % sparse)"),
        (0.05 * 3, "15 % kept (85 % sparse)"),
        (0.00001, "0.001 % kept (99.999 % sparse)"),
        (1.0, "100 % kept (0 % sparse)"),
        (None, "–"),  # noqa: RUF001
    ],
)
def test_density_is_written_as_the_field_does(density, text):
    assert format_density(density) == text


def test_one_is_no_plural():
    assert [counted(n, "thread") for n in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]


def test_small_numbers():
    assert format_percent(0.12345) == "12.35"  # 12.345 lies above its double
    assert format_p(0.00001) == "< 0.0001"
    assert format_p(0.0312) == "0.0312"


def test_flatten_leaves_out_what_is_not_there():
    machine = {"cores": 2, "accelerator": None, "libraries": ["a", "b"]}
    assert flatten(machine) == "cores 2, libraries a, b"


def test_markdown_escapes_what_would_break_a_row():
    table = Table(("a", "b"), (("x|y", "two\nlines"), ("strong", "")), frozenset({1}))
    assert table.markdown() == (
        "| a | b |\n| :-- | --: |\n| x\\|y | two lines |\n| **strong** |  |"
    )


def test_a_table_for_the_terminal_is_aligned():
    table = Table(("%", "dense", "pruned"), (("clean", "98.00", "7.00"), ("kept", "10 / 10", "")))
    assert table.lines() == ["%        dense  pruned", "clean    98.00    7.00", "kept   10 / 10"]
