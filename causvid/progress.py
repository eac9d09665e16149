"""What a person sees while work goes on: progress bars and messages, all on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)
QUIET_SECONDS = 30.0  # between two lines of a bar where stderr is not a terminal


def say(text: str) -> None:
    """One line for a person, not wrapped, so that paths stay whole."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def silence() -> None:
    """Say nothing from here on: of several processes one speaks."""
    console.quiet = True


class Bar(Protocol):
    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A progress bar; call it with what is done so far and a short note. Off a terminal it is a line now and then."""
    columns = (
        TextColumn("{task.description:<14}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=False) as progress:
        task = progress.add_task(title, total=total, note="")
        told = time.monotonic()

        def update(done: int, note: str = "") -> None:
            nonlocal told
            progress.update(task, completed=done, note=note)
            if not console.is_terminal and time.monotonic() - told >= QUIET_SECONDS:
                told = time.monotonic()
                say(f"{title}: {done} of {total} {note}".rstrip())

        yield update
