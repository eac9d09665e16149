"""Commands about Wan2.1's weights; ``cli.py`` adds them to the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command(no_args_is_help=True)
def convert(
    source: Annotated[Path, typer.Argument(help="Weights in any layout: a file or a folder.")],
    target: Annotated[Path, typer.Argument(help="What to write; it must not exist.")],
    layout: Annotated[str, typer.Option(help="ours, official, diffusers or causvid.")],
    config: Annotated[
        str | None, typer.Option(help="Size: wan_1_3b, wan_14b or a config.json; default the source's.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="Model to take of several: generator, generator_ema, critic.")
    ] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Most GB of one file.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")] = False,
) -> None:
    """Convert a Wan2.1 transformer's weights between layouts, and certify that nothing changed.

    [bold]Examples[/]

    causvid convert Wan2.1-T2V-1.3B wan-diffusers --layout diffusers

    causvid convert model.pt student --layout ours --config wan_1_3b --part generator
    """
    from causvid import convert as conversion
    from causvid.progress import console

    certificate = conversion.convert(source, target, layout, config, part, int(shard_gb * 1e9))
    console.print(
        f"certificate: {certificate['tensors']} tensors, {certificate['unequal_tensors']} unequal, "
        f"max abs difference of outputs {certificate['max_abs_difference']:g}",
        highlight=False,
    )
    print(json.dumps(certificate) if as_json else certificate["path"])
