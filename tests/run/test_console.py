# SPDX-License-Identifier: Apache-2.0
"""A bar that shows what is said, where one can be drawn; lines where not, and in the log."""

import io
from threading import active_count
from types import SimpleNamespace

import pytest
from rich.console import Console as RichConsole

from harprune.run import console
from harprune.run.console import Bar, Console


class Terminal(io.StringIO):
    """Text that says it is a terminal, or is not."""

    def __init__(self, terminal: bool = True):
        super().__init__()
        self.isatty = lambda: terminal


def rich_console(terminal: bool) -> RichConsole:
    return RichConsole(file=Terminal(terminal), width=120, highlight=False, _environ={})


@pytest.mark.parametrize("terminal", [True, False])
def test_brackets_in_a_name_are_no_markup(terminal):
    rich = rich_console(terminal)
    bar = Bar(rich, "a [/b] name", 3, every=0.0)
    bar.update(0, "on [bold]")
    bar.update(2, "on [bold]")
    bar.close()
    assert "a [/b] name" in rich.file.getvalue()


@pytest.mark.parametrize(
    ("environment", "terminal"),
    [({"TERM": "dumb"}, True), ({"FORCE_COLOR": "1"}, False), ({"TTY_COMPATIBLE": "0"}, True)],
)
def test_where_no_bar_can_be_drawn_there_are_plain_lines(environment, terminal):
    rich = RichConsole(file=Terminal(terminal), highlight=False, _environ=environment)
    bar = Bar(rich, "prune", 3, every=0.0)
    bar.update(1)
    bar.close()
    assert rich.file.getvalue().splitlines()[0] == "prune 1/3"
    assert "\r" not in rich.file.getvalue() and "━" not in rich.file.getvalue()


def test_a_bar_is_drawn_by_its_updates_alone():
    before = active_count()
    bar = Bar(rich_console(terminal=True), "prune", 3)
    assert active_count() == before
    bar.close()


def test_colons_in_a_line_are_no_emoji(monkeypatch):
    for term in ("xterm", "dumb"):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr("sys.stderr", Terminal())
        screen = Console()
        screen.say("net:100:loss")
        with screen.bar("bar", 3) as bar:
            bar._every = 0.0
            bar.update(1, "mine:100:loss")
        said = screen._rich.file.getvalue()
        assert "net:100:loss" in said and "mine:100:loss" in said


@pytest.mark.parametrize("terminal", [True, False])
def test_the_log_says_once_how_much_time_is_left(monkeypatch, terminal):
    clock, noted = [0.0], []
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    bar = Bar(rich_console(terminal), "prune", 100, every=30.0, note=noted.append)
    for clock[0], done in ((20.0, 1), (25.0, 2), (45.0, 6), (90.0, 15)):
        bar.update(done, "loss 1")
    bar.close()
    assert noted == ["prune 6/100, 7:50 left, loss 1"]
    assert bar.left(100) == ""


def test_each_attack_has_a_pace_of_its_own(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    bar = Bar(RichConsole(file=io.StringIO()), "attack", 100)
    for clock[0], done in ((1.0, 50), (2.0, 100), (62.0, 50)):
        bar.update(done)
    assert bar.left(50) == ", 1:00 left"
