# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run works: a bar with time left, and the same as lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_REDRAW = 0.1  # seconds between two drawings of a bar, at least


class Bar:
    """Progress of one piece of work; `update(done, text)` as often as you like.

    Into a terminal it draws a bar. Into a file, or where TERM is dumb, it prints a plain line at
    most every `every` seconds. The first line that can say how much time is left goes to `note` as
    well.
    """

    def __init__(
        self,
        console: RichConsole,
        title: str,
        total: int,
        *,
        every: float = 30.0,
        note: Callable[[str], None] = lambda line: None,
    ):
        self._title, self._total, self._every = title, total, every
        self._began = self._printed = time.monotonic()
        self._first: int | None = None
        self._note: Callable[[str], None] | None = note
        self._plain = not _draws(console)
        self._console = console
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}", markup=False),
        )
        # Drawn by `update` alone: a thread that draws would take time from what is being timed.
        self._progress = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._task = self._progress.add_task(title, total=total, text="")
        if not self._plain:
            self._progress.start()

    @property
    def due(self) -> bool:
        """Whether an update would show: for who must pay for the text, as an accelerator does."""
        wait = self._every if self._plain else _REDRAW
        return self._first is None or time.monotonic() - self._printed >= wait

    def update(self, done: int, text: str = "") -> None:
        now = time.monotonic()
        if self._first is None:  # what came before it, and the slow first step, say nothing of pace
            self._first, self._started = done, now
        elif done < self._done:  # the next of several attacks on the same images
            self._first, self._started = 0, self._at
        self._done, self._at = done, now
        left = self.left(done)
        line = f"{self._title} {done}/{self._total}{left}{text and f', {text}'}"
        if not self._plain:
            drawn = now - self._printed >= _REDRAW
            self._printed = now if drawn else self._printed
            self._progress.update(self._task, completed=done, text=text, refresh=drawn)
        elif now - self._printed >= self._every:
            self._printed = now
            self._console.print(line, markup=False)
        if left and self._note and now - self._began >= self._every:
            self._note(line)
            self._note = None

    def update_of(self, done: int, total: int, text: str) -> None:
        """`update`, for work that says its own total."""
        self.update(done, text)

    def left(self, done: int) -> str:
        """`, 1:20 left` at the pace so far; empty before there is a pace, and at the end."""
        if self._first is None or not self._first < done < self._total:
            return ""
        pace = (time.monotonic() - self._started) / (done - self._first)
        return f", {_duration(pace * (self._total - done))} left"

    def close(self) -> None:
        if not self._plain:
            self._progress.stop()


class Console:
    """Says things to the terminal (standard error) and, in a run, to its log file."""

    def __init__(self, log: Path | None = None, *, quiet: bool = False):
        self._rich = RichConsole(
            file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True, emoji=False
        )
        self._log = log

    def say(self, text: str) -> None:
        """One line, on the screen and in the log."""
        self._rich.print(text, markup=False)
        self._keep(text)

    def _keep(self, text: str) -> None:
        if self._log is not None:
            with open(self._log, "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A bar that disappears when the work is done."""
        bar = Bar(self._rich, title, total, note=self._keep)
        try:
            yield bar
        finally:
            bar.close()


def _draws(console: RichConsole) -> bool:
    """Whether a bar can be drawn; FORCE_COLOR, which rich believes, makes no terminal of a file."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


def roughly(seconds: float) -> str:
    """`2 minutes`, `7 hours`, `4 days`, for what more digits would say too exactly."""
    units = {"days": 86_400, "hours": 3_600, "minutes": 60}
    unit = next((u for u, size in units.items() if seconds >= 2 * size), "minutes")
    return f"{seconds / units[unit]:.0f} {unit}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
