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
    from causvid.tensor_files import some

    certificate = conversion.convert(source, target, layout, config, part, int(shard_gb * 1e9))
    console.print(
        f"certificate: {certificate['tensors']} tensors "
        f"({', '.join(f'{count} {name}' for name, count in certificate['dtypes'].items())}), "
        f"{certificate['unequal_tensors']} unequal, "
        f"max abs difference of outputs {certificate['max_abs_difference']:g}",
        highlight=False,
    )
    if certificate["retyped_tensors"]:
        console.print(
            f"{len(certificate['retyped_tensors'])} tensors of the source have a wider type here, and the same values: "
            "layout 'ours' holds queries, keys and values as one tensor, and theirs are of different types "
            f"({some(certificate['retyped_tensors'])})", highlight=False, soft_wrap=True,
        )  # fmt: skip
    print(json.dumps(certificate) if as_json else certificate["path"])


@app.command(no_args_is_help=True)
def weights(
    name: Annotated[
        str, typer.Argument(metavar="SPEC", help="A spec under wan/; or wan_1_3b, wan_14b, causvid, preview.")
    ],
    folder: Annotated[Path, typer.Option("--weights", help="Folder of the weights.")] = Path("weights"),
    fetch: Annotated[bool, typer.Option("--fetch", help="Fetch what is missing; else nothing is fetched.")] = False,
    origin: Annotated[
        str | None, typer.Option("--from", help="With --fetch: URI of the folder; default where it is published.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare digests, where they are known.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")] = False,
) -> None:
    """Say which files a spec of Wan2.1 needs, which are there, and fetch them if asked to; 3 if some are missing.

    [bold]Examples[/]

    causvid weights wan/causal --weights Wan2.1-T2V-1.3B

    causvid weights causvid --weights causvid-weights --fetch
    """
    from causvid import wan_weights
    from causvid.progress import console

    rows = wan_weights.survey(name, folder, verify)
    if fetch:
        wan_weights.fetch(rows, origin)
    for row in rows:
        size = "size unknown" if row["bytes"] is None else f"{row['bytes']:,} bytes"
        state = row["state"] if row["state"] == "there" else row["state"].upper()
        console.print(f"{state:<12} {row['where']}  ({size}, {row['licence']})", highlight=False, soft_wrap=True)
    missing = [row for row in rows if row["state"] != "there"]
    if missing:
        source, file = missing[0]["source"], missing[0]["file"]
        place = wan_weights.page_of(source if len(missing) == 1 else source.removesuffix(f"/{file}"))
        console.print(
            f"{len(missing)} missing or not whole: run this again with --fetch, or download them from {place} on a "
            "machine with a network and put them at these paths; --fetch --from URI takes them from any place that "
            "fsspec reads",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if wan_weights.needs_student(name):
        console.print(
            "To sample it, give a student's weights with --model, too: one of your own, or what CausVid released "
            "('causvid weights causvid --weights DIR')", highlight=False, soft_wrap=True,
        )  # fmt: skip
    print(json.dumps(rows) if as_json else folder.resolve())
    if missing:
        raise typer.Exit(3)
