"""The commands ``causvid data ...``: from raw clips and captions to a store of latents."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from causvid.errors import UserError

if TYPE_CHECKING:
    from causvid.data.tally import Tally

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich",
    help="Raw clips and captions to latents. Paths may be addresses as well: s3://, gs://, hf://, memory://.",
)  # fmt: skip

Source = Annotated[str, typer.Argument(metavar="INPUT", help="A manifest (.csv, .json, .jsonl), or a folder.")]
Target = Annotated[str, typer.Argument(metavar="OUTPUT", help="A folder; what is there already is not done again.")]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")]
Workers = Annotated[int, typer.Option(min=0, max=1024, help="Processes at a time; 0 takes one per core.")]
Seconds = Annotated[float, typer.Option(min=1, help="How long one clip may take.")]


def _end(tally: Tally, target: str, as_json: bool, **more: Any) -> None:
    """Say what became of everything, and exit with 0, or 3 when something was put aside."""
    from causvid.progress import console

    counts = tally.as_json()
    if not as_json:
        console.print(", ".join(f"{value} {name}" for name, value in counts.items()), highlight=False)
        for row in tally.quarantine[:5]:
            console.print(f"  {row['clip']}: {row['reason']}", markup=False, highlight=False, soft_wrap=True)
        if len(tally.quarantine) > 5:
            console.print(f"  and {len(tally.quarantine) - 5} more: {target}/quarantine.jsonl", markup=False)
    print(json.dumps({**counts, "output": target, **more}) if as_json else target)
    if tally.status:
        raise typer.Exit(tally.status)


@app.command(no_args_is_help=True)
def download(
    source: Source,
    target: Target,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Transfers at a time.")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Copy the clips that a manifest names into a folder, with their captions and checksums.

    [bold]Example[/]

    causvid data download s3://bucket/clips.csv raw
    """
    from causvid.data import steps

    _end(steps.download(source, target, workers), target, as_json)


@app.command(no_args_is_help=True)
def process(
    source: Source,
    target: Target,
    height: Annotated[int, typer.Option(help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(help="Pixels.")] = 832,
    frames: Annotated[int, typer.Option(help="Frames of every clip; shorter ones are put aside.")] = 81,
    fps: Annotated[float, typer.Option(help="Frames per second, resampled in time.")] = 16.0,
    aspect: Annotated[float, typer.Option(help="Put aside clips whose aspect ratio is off by more than this.")] = 2.0,
    crf: Annotated[int, typer.Option(help="x264's quality: 0 loses nothing, 17 nothing that shows.")] = 17,
    workers: Workers = 0,
    seconds: Seconds = 300.0,
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
        wanted = Wanted(height, width, frames, fps, aspect, crf)
    except ValueError as error:
        raise UserError(f"data process: {error}") from error
    _end(steps.process(source, target, wanted, workers, seconds), target, as_json)
