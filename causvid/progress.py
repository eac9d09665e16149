"""What a person sees while work goes on: progress bars and messages, all on stderr."""

from __future__ import annotations

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


class Bar(Protocol):
    def __call__(self, done: int, note: str = "") -> None: ...


@contextmanager
def bar(title: str, total: int) -> Iterator[Bar]:
    """A progress bar; call it with what is done so far and a short note. Quiet where stderr is not a terminal."""
    columns = (
        TextColumn("{task.description:<14}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=False) as progress:
        task = progress.add_task(title, total=total, note="")

        def update(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield update
