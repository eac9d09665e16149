"""The commands ``causvid data ...``: from raw clips and captions to a store of latents."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from causvid.errors import UserError

if TYPE_CHECKING:
    from causvid.data.tally import Tally

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich",
    help="Raw clips and captions to a store of latents. Paths may be addresses too: s3://, gs://, hf://, memory://. "
    "Each command ends with counts: given = done + skipped + quarantined. Exit status: 0 all went through, 3 some were "
    "put aside, each with its reason in OUTPUT/quarantine.jsonl, 2 bad use. Stopped, it goes on with the same command.",
)  # fmt: skip

Source = Annotated[str, typer.Argument(metavar="INPUT", help="A manifest (.csv, .json, .jsonl), or a folder of clips.")]
Target = Annotated[str, typer.Argument(metavar="OUTPUT", help="A folder; what is there already is not done again.")]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")]
Root = Annotated[str | None, typer.Option(help="What the manifest's paths are relative to; default its own folder.")]
Workers = Annotated[int, typer.Option(min=0, max=1024, help="Processes at a time; 0 takes one per core.")]


def _number(value: float) -> float:
    if math.isnan(value):  # which no range refuses
        raise typer.BadParameter("expected a number, got nan")
    return value


Seconds = Annotated[
    float,
    typer.Option(
        min=1,
        max=1e6,
        callback=_number,
        help="How long fetching a clip, or decoding it, may take; else it is put aside.",
    ),
]


def _end(tally: Tally, target: str, as_json: bool, listed: bool = True, **more: Any) -> None:
    """Say what became of everything, and exit with 0, or 3 when something was put aside.

    Args:
        listed: whether all that was put aside stands in a file in the target.
    """
    from causvid.progress import console

    counts = tally.as_json()
    if as_json and not listed:
        more["quarantine"] = tally.quarantine
    if not as_json:
        console.print(", ".join(f"{value} {name}" for name, value in counts.items()), highlight=False)
    if not as_json or not listed:
        for row in tally.quarantine[:5]:
            console.print(f"  {row['clip']}: {row['reason']}", markup=False, highlight=False, soft_wrap=True)
        if len(tally.quarantine) > 5:
            where = f": {target}/quarantine.jsonl" if listed else "; 'causvid data verify STORE FOLDER' lists all"
            console.print(f"  and {len(tally.quarantine) - 5} more{where}", markup=False, soft_wrap=True)
    print(json.dumps({**counts, "output": target, **more}) if as_json else target)
    if tally.status:
        raise typer.Exit(tally.status)


@app.command(no_args_is_help=True)
def download(
    source: Source,
    target: Target,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Transfers at a time.")] = 8,
    seconds: Seconds = 3600.0,
    root: Root = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the clips that a manifest names into a folder, with their captions and checksums.

    INPUT may be the name of a released artefact as well, such as causvid-latents; a wrong name lists all.

    [bold]Examples[/]

    causvid data download s3://bucket/clips.csv raw

    causvid data download causvid-latents released
    """
    from causvid.data import artefacts, steps

    if source.startswith("causvid-") and not Path(source).exists():
        return _end(artefacts.fetch(source, target), target, as_json)
    return _end(steps.download(source, target, workers, root, seconds), target, as_json)


@app.command(no_args_is_help=True)
def process(
    source: Source,
    target: Target,
    height: Annotated[int, typer.Option(help="Pixels, an even number.")] = 480,
    width: Annotated[int, typer.Option(help="Pixels, an even number.")] = 832,
    frames: Annotated[int, typer.Option(help="Frames of every clip; shorter ones are put aside.")] = 81,
    fps: Annotated[float, typer.Option(help="Frames per second, resampled in time.")] = 16.0,
    aspect: Annotated[
        float, typer.Option(help="Put aside clips whose aspect ratio is off by more than this factor.")
    ] = 2.0,
    crf: Annotated[int, typer.Option(help="x264's quality: 0 loses nothing, 17 nothing that shows.")] = 17,
    also: Annotated[
        str, typer.Option(metavar="HxW,...", help="Further sizes; a clip takes the one most like it.")
    ] = "",
    pictures: Annotated[bool, typer.Option("--pictures", help="Take still pictures, as clips of one frame.")] = False,
    workers: Workers = 0,
    seconds: Seconds = 300.0,
    root: Root = None,
    as_json: JsonOption = False,
) -> None:
    """Make clips of one form: resampled in time, upright, resized with antialiasing, cropped, h264.

    [bold]Examples[/]

    causvid data process raw clips

    causvid data process captions.json clips --height 32 --width 32 --frames 23 --fps 8
    """
    from causvid.data import steps
    from causvid.data.clips import Wanted

    try:
        sizes = tuple(_size(each) for each in also.split(",") if each)
        wanted = Wanted(height, width, frames, fps, aspect, crf, sizes, pictures)
    except ValueError as error:
        raise UserError(f"data process: {error}") from error
    _end(steps.process(source, target, wanted, workers, seconds, root), target, as_json)


def _size(text: str) -> tuple[int, int]:
    height, by, width = text.strip().lower().partition("x")
    if not by or not height.isascii() or not height.isdigit() or not width.isascii() or not width.isdigit():
        raise ValueError(f"also: expected sizes as in 480x832,832x480, got '{text}'")
    return int(height), int(width)


@app.command(no_args_is_help=True)
def encode(
    source: Source,
    target: Target,
    codec: Annotated[
        str, typer.Option(help="A name, or '{name: ..., option: ...}'; see 'causvid list codec'.")
    ] = "identity",
    text_encoder: Annotated[str, typer.Option(help="The same; see 'causvid list text_encoder'.")] = "words",
    weights: Annotated[
        Path | None, typer.Option(help="Folder of their weights, where they have any; 'causvid weights' lists it.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where they compute: cpu, auto (an accelerator, if there is one).")
    ] = "cpu",
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes that decode ahead.")] = 1,
    seconds: Seconds = 300.0,
    root: Root = None,
    as_json: JsonOption = False,
) -> None:
    """Encode clips and captions to latents and text embeddings; under torchrun each process takes its share.

    [bold]Examples[/]

    causvid data encode clips latents --codec '{name: time_fold, frames: 2}' --text-encoder '{name: words, length: 12}'

    torchrun --nproc-per-node 8 -m causvid.cli data encode clips latents --codec wan_vae --text-encoder umt5
    --weights Wan2.1-T2V-1.3B --device auto
    """
    from causvid.data import encode as encoding
    from causvid.data import manifest

    captions = (clip.caption for clip in manifest.read(source, root).clips)
    rank, world = _place()
    parts, identity = _encoders({"codec": codec, "text_encoder": text_encoder}, captions, weights, device)
    tally = encoding.encode(
        source, target, parts["codec"], parts["text_encoder"], identity, rank, world, workers, seconds, root
    )
    if tally is not None:  # under torchrun the first tells of all
        _end(tally, target, as_json)


def _place() -> tuple[int, int]:
    """This process's number among how many, as torchrun and others say in the environment."""
    told = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    if not all(each.isascii() and each.isdigit() for each in told) or int(told[0]) >= int(told[1]):
        raise UserError(f"RANK and WORLD_SIZE: expected 0 <= RANK < WORLD_SIZE, got {told[0]!r} and {told[1]!r}")
    return int(told[0]), int(told[1])


def _encoders(
    told: dict[str, Any], captions: Iterable[str], folder: Path | None = None, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Codec and text encoder as a spec names them, and what identifies them: names, options, source, digests of files.

    Raises:
        UserError: no such component, options that it does not take, or weights that are missing.
    """
    import torch
    import yaml

    from causvid import build, fingerprint, registry, weights, world
    from causvid.schema import World
    from causvid.validate import section

    try:
        given = {name: yaml.safe_load(text) if isinstance(text, str) else text for name, text in told.items()}
    except yaml.YAMLError as error:
        raise UserError(f"--codec and --text-encoder: not YAML: {error}") from error
    errors: list[str] = []
    bound = section(World, {"dataset": "shapes", **given}, "", errors)
    if errors:
        raise UserError("\n".join(errors))
    place = world.existing(device, "--device")
    if place.type != "cpu" and place.index is None:  # under torchrun each process has its own
        place = torch.device(place.type, int(os.environ.get("LOCAL_RANK") or 0))
    vocabulary = sorted({word for caption in captions for word in caption.lower().split()})
    outside = {"weights": folder, "device": place, "store": weights.cache_folder() / "text"}
    takers = [name for name in told if "weights" in registry.find(name, bound[name]["name"]).signature.parameters]
    if folder is not None and not takers:
        raise UserError(f"--weights: {' and '.join(repr(bound[name]['name']) for name in told)} take no weights")
    parts, identity = {}, {}
    for name in told:
        parts[name] = build.construct(bound[name], vocabulary=vocabulary, **outside)
        sources = getattr(parts[name], "sources", None)
        if sources is not None and not sources:
            raise UserError(f"{name} '{bound[name]['name']}' needs weights: say with --weights where they are")
        identity[name] = fingerprint.identity(bound[name], sources or ())
    return parts, identity


@app.command(no_args_is_help=True)
def pack(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="Latents, a store, or an LMDB of the released layout.")
    ],
    target: Target,
    shards: Annotated[int, typer.Option(min=1, max=1024, help="LMDB files of the store, read as one.")] = 1,
    shape: Annotated[str, typer.Option(metavar="N,N,...", help="Released layout: shape of a row, if not stored.")] = "",
    times: Annotated[str, typer.Option(metavar="T,T,...", help="Released ODE pairs: times of the states.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Put latents into a store: LMDB with checksums. Converts the released layout, merges and splits stores.

    [bold]Examples[/]

    causvid data pack latents store

    causvid data pack mixkit_ode_lmdb pairs --times 1,0.7568,0.5217,0
    """
    from causvid.data import pack as packing

    try:
        sizes = [int(n) for n in shape.split(",")] if shape else []
        moments = [float(n) for n in times.split(",")] if times else []
    except ValueError as error:
        raise UserError(f"--shape and --times: expected numbers with commas between them: {error}") from error
    _end(packing.pack(source, target, shards, sizes, moments), target, as_json)


@app.command(no_args_is_help=True)
def verify(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A store.")],
    target: Annotated[str | None, typer.Argument(metavar="OUTPUT", help="Folder for the damaged rows' list.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every row of a store against its checksum, and the whole against its digest.

    [bold]Example[/]

    causvid data verify store
    """
    from causvid.data import pack as packing

    tally, found = packing.verify(source, target)
    _end(tally, target or source, as_json, target is not None, digest=found["digest"])


@app.command(no_args_is_help=True)
def inspect(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="A store.")],
    target: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder for contact_sheet.png.")] = ".",
    rows: Annotated[int, typer.Option(min=1, max=1000, help="Rows on the sheet.")] = 12,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of the codec's weights; without, the sheet shows three latent channels.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a store holds, and write a contact sheet of its first rows.

    [bold]Example[/]

    causvid data inspect store sheets
    """
    from causvid.data import contact_sheet
    from causvid.progress import console

    tally, found = contact_sheet.inspect(source, target, rows, lambda header: _decoder(header, weights))
    if not as_json:
        told = {"codec": found["header"].get("codec"), "text encoder": found["header"].get("text_encoder"), **found}
        for name, value in told.items():
            if name not in ("header", "damaged", "kind"):
                console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    _end(tally, f"{target.rstrip('/')}/contact_sheet.png", as_json, False, summary=found)


def _decoder(header: Mapping[str, Any], folder: Path | None) -> Any:
    """The decoder of a store's codec, or None where it can't be built here.

    Raises:
        UserError: the folder does not hold the weights that made the store.
    """
    made = dict(header.get("codec") or {"name": "unknown"})
    told = {key: value for key, value in made.items() if key not in ("source", "files")}
    try:
        parts, identity = _encoders({"codec": told}, [], folder)
    except UserError:
        if folder is None:
            return None
        raise
    if folder is not None and identity["codec"]["files"] != made.get("files"):
        raise UserError(f"--weights: what {folder} holds are not the weights that the store was made with")
    return parts["codec"].decode
