"""``causvid eval``: scores of files, and their totals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Judge videos and aggregate scores (VBench).")
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")]
PARTIAL = 3  # exit status: done in part


@app.command(no_args_is_help=True)
def aggregate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON of {dimension: score}, or upstream's results.")],
    as_json: JsonOption = False,
) -> None:
    """Quality, semantic and total score of VBench from its dimensions, in percent.

    Scores are all percent if any is over 1, else all fractions. Without all sixteen what can't be computed is null, and
    the exit status is 3.

    [bold]Example[/]

    causvid eval aggregate scores.json --json
    """
    from causvid import progress
    from causvid.eval import aggregate as vbench

    totals = vbench.aggregate(vbench.read_scores(file))
    if totals.missing:
        progress.console.print(totals.note, highlight=False, soft_wrap=True)
    out = totals.as_json()
    if as_json:
        print(json.dumps(out))
    else:
        for name in ("total", "quality", "semantic"):
            print(f"{name:<9}" + ("not computable" if out[name] is None else f"{out[name]:.2f}"))
    if totals.missing:
        raise typer.Exit(PARTIAL)
