"""What a person sees while a command runs: lines, tables and progress, all on standard error."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

PLAIN_SECONDS = 10.0


class Advance(Protocol):
    """Moves a progress display on."""

    def __call__(self, amount: int, note: str = "") -> None:
        """Add `amount` units; `note` is a short text such as the loss."""


def say(text: str = "") -> None:
    """Print one line to standard error."""
    print(text, file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows as plain aligned text, the first column to the left and all others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


@contextmanager
def progress(label: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
    """Show progress over `total` units: a bar on a terminal, a plain line now and then elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total, completed=done, note="")
            yield lambda amount, note="": bar.update(task, advance=amount, note=note)
        return

    shown = time.monotonic()

    def advance(amount: int, note: str = "") -> None:
        nonlocal done, shown
        done += amount
        if time.monotonic() - shown >= PLAIN_SECONDS and done < total:
            shown = time.monotonic()
            say(f"{label}: {done:,} of {total:,} {unit}{'  ' + note if note else ''}")

    yield advance
