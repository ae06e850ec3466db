"""Terminal output of a command: lines, bars and tables. Text is printed literally: no markup, no escape sequences."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from finetune.utils.format import visible
from finetune.utils.progress import Bar, SilentBar, position

PLAIN_SECONDS = 15.0  # between two lines of a bar that is not on a terminal


class Quiet(Console):
    """Console that prints nothing more once its reader is gone (`| tee` dies of the same Ctrl-C); the work continues.

    On a closed pipe rich itself exits with status 1, from whichever line was printing.
    """

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True


class RichBar:
    """A live bar on a terminal."""

    def __init__(self, console: Console, label: str, total: int | None) -> None:
        self._progress = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(visible(label), total=total, note="")
        self._progress.start()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move by `steps`."""
        self._progress.update(self._task, advance=steps, note=visible(note))

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()


class PlainBar:
    """A line every PLAIN_SECONDS, for logs, notebooks and CI."""

    def __init__(self, console: Console, label: str, total: int | None) -> None:
        self._console, self._label, self._total = console, label, total
        self._done = 0
        self._from: int | None = None  # position at the first report: a resumed training does not start at 0
        self._start = self._last = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count, and print if the last line is old enough."""
        self._done += steps
        now = time.monotonic()
        if self._from is None:
            self._from = self._done if steps > 1 else 0
        if now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        left = ""
        if self._total and self._done > self._from:
            left = f", {(now - self._start) * (self._total - self._done) / (self._done - self._from):.0f} s left"
        where = position(self._label, self._done, self._total)
        self._console.print(visible(f"  {where}{left} {note}".rstrip()), highlight=False, markup=False)

    def close(self) -> None:
        """Do nothing: a line stays where it is."""


class Screen:
    """Progress output: rich on a terminal, plain lines elsewhere, nothing on ranks above 0."""

    def __init__(self, *, silent: bool = False) -> None:
        self._console = Quiet(stderr=True, soft_wrap=True)
        self._silent = silent

    def say(self, line: str) -> None:
        """One line."""
        if not self._silent:
            self._console.print(visible(line), highlight=False, markup=False)

    def bar(self, label: str, total: int | None) -> Bar:
        """Return a live bar if stderr is a terminal, else one of plain lines."""
        if self._silent:
            return SilentBar()
        kind = RichBar if self._console.is_terminal else PlainBar
        return kind(self._console, label, total)


def print_error(message: str) -> None:
    """Print an error on stderr."""
    Quiet(stderr=True, soft_wrap=True).print(visible(message), style="bold red", highlight=False, markup=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; as wide as its cells need when stdout is not a terminal."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    table = Table(title=Text(visible(title)), title_justify="left")
    for name in columns:
        table.add_column(Text(visible(name)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    console.print(table)
