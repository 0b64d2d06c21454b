# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a run works: a bar with time left, and the same as lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_REDRAW = 0.1  # seconds: as often as rich draws a bar


class Bar:
    """Progress of one piece of work; `update(done, text)` as often as you like.

    Into a terminal it draws a bar. Into a file it prints a plain line at most every
    `every` seconds.
    """

    def __init__(self, console: RichConsole, title: str, total: int, *, every: float = 30.0):
        self._title, self._total, self._every = title, total, every
        self._started = self._printed = time.monotonic()
        self._first: int | None = None
        self._plain = not console.is_terminal
        self._console = console
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task(title, total=total, text="")
        if not self._plain:
            self._progress.start()

    @property
    def due(self) -> bool:
        """Whether an update would show: for who must pay for the text, as an accelerator does."""
        wait = self._every if self._plain else _REDRAW
        return self._first is None or time.monotonic() - self._printed >= wait

    def update(self, done: int, text: str = "") -> None:
        if self._first is None:
            self._first = done
        if not self._plain:
            self._printed = time.monotonic()
            self._progress.update(self._task, completed=done, text=text)
        elif time.monotonic() - self._printed >= self._every:
            self._printed = time.monotonic()
            left = self._left(done)
            line = f"{self._title} {done}/{self._total}{left} {text}".rstrip()
            self._console.print(line, markup=False)

    def update_of(self, done: int, total: int, text: str) -> None:
        """`update`, for work that says its own total."""
        self.update(done, text)

    def _left(self, done: int) -> str:
        worked = done - (self._first or 0)
        if worked <= 0:
            return ""
        seconds = (time.monotonic() - self._started) / worked * (self._total - done)
        return f", {_duration(seconds)} left"

    def close(self) -> None:
        if not self._plain:
            self._progress.stop()


class Console:
    """Says things to the terminal (standard error) and, in a run, to its log file."""

    def __init__(self, log: Path | None = None, *, quiet: bool = False):
        self._rich = RichConsole(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._log = log

    def say(self, text: str) -> None:
        """One line, on the screen and in the log."""
        self._rich.print(text, markup=False)
        if self._log is not None:
            with open(self._log, "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A bar that disappears when the work is done."""
        bar = Bar(self._rich, title, total)
        try:
            yield bar
        finally:
            bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
