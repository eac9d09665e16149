"""``causvid vbench`` and ``causvid doctor``: the reference judge's environment, and what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Upstream VBench, the reference judge.")
doctor = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Say what is ready and what is missing.")
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")]
PARTIAL = 3


@app.callback()
def _group() -> None:
    """Upstream VBench, the reference judge."""


@doctor.callback()
def _doctor_group() -> None:
    """Say what is ready and what is missing."""


@app.command()
def setup() -> None:
    """Make the environment of upstream VBench, once per user (about 3 minutes, 2.2 GB); goes on where it was stopped.

    [bold]Example[/]

    causvid vbench setup
    """
    from causvid import progress
    from causvid.eval import reference

    print(reference.setup(lambda text: progress.console.print(text, soft_wrap=True, highlight=False)))


@doctor.command(name="vbench")
def vbench(
    weights: Annotated[Path | None, typer.Option(help="Folder of the weights; default as upstream's.")] = None,
    long: Annotated[bool, typer.Option("--long", help="Also what long videos need.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say for every dimension: ready, or which file or import is missing. Downloads nothing; 3 if any is not ready.

    [bold]Example[/]

    causvid doctor vbench
    """
    from causvid.eval import reference

    found = reference.doctor(weights or reference.weights_folder(), long)
    if as_json:
        print(json.dumps({name: [[need.name, need.what] for need in needs] for name, needs in found.items()}))
    else:
        for name, needs in found.items():
            print(f"{name:<24} " + ("ready" if not needs else "; ".join(f"{n.name} {n.what}" for n in needs)))
    if any(found.values()):
        raise typer.Exit(PARTIAL)
