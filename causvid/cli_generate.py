"""``causvid generate``: videos from finished runs, or from given weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from causvid.errors import UserError

app = typer.Typer()
STREAM: dict[str, Any] = {"rich_help_panel": "What happens in the stream"}
GIVEN: dict[str, Any] = {"rich_help_panel": "From given weights: with --spec"}


@app.command(no_args_is_help=True)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    run: Annotated[str | None, typer.Option(help="A spec that was run, or the folder of its run.")] = None,
    spec: Annotated[str | None, typer.Option(help="A spec to sample from given weights, such as wan/causal.")] = None,
    weights: Annotated[Path | None, typer.Option(help="The folder of Wan2.1.", **GIVEN)] = None,
    model: Annotated[
        Path | None, typer.Option(help="The transformer's weights; default those in --weights.", **GIVEN)
    ] = None,
    part: Annotated[str | None, typer.Option(help="Which model of a model.pt, such as generator_ema.", **GIVEN)] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line, instead of PROMPT.", **GIVEN)
    ] = None,
    out: Annotated[Path, typer.Option(help="The mp4 to write, or a folder for several.")] = Path("clip.mp4"),
    frames: Annotated[int | None, typer.Option(min=1, help="Pixel frames; default the training length.")] = None,
    rollouts: Annotated[
        int | None,
        typer.Option(min=1, help="Long video of so many overlapping rollouts, as the release makes it.", **GIVEN),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of the noise; may be given several times.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt; default the spec's.", **GIVEN)] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Pixels; a multiple of 16.", **GIVEN)] = None,
    width: Annotated[int | None, typer.Option(min=16, help="Pixels; a multiple of 16.", **GIVEN)] = None,
    fps: Annotated[int | None, typer.Option(min=1, help="Frames per second of the mp4; 8, or 16 with --spec.")] = None,
    scale: Annotated[int, typer.Option(min=1, help="With --run: pixels of the mp4 per pixel of the video.")] = 8,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to the spec.", **GIVEN)
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default an accelerator, if there is one.", **GIVEN)] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; default fp32 on a CPU, else bf16.", **GIVEN)
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", envvar="CAUSVID_RUNS", help="Folder of all results.")] = Path("runs"),
    prompts_at: Annotated[
        str | None, typer.Option(metavar="FRAME:PROMPT;...", help="Prompts that change in mid-stream.", **STREAM)
    ] = None,
    on_prompt: Annotated[
        str | None, typer.Option(help="What a new prompt does to the context: keep, recache or cut.", **STREAM)
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from.", **STREAM)] = None,
    image_as: Annotated[
        str | None, typer.Option(help="How it is taken: alone, first or still (docs/streaming.md).", **STREAM)
    ] = None,
    video: Annotated[
        str | None, typer.Option(metavar="PATH|URI", help="A video to restyle; anything fsspec opens.", **STREAM)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Time it is noised to, 0 to 1: 1 keeps nothing of it.", **STREAM)
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Cache policy, by name or with options; default the spec's.", **STREAM)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of a block.", **STREAM)] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Write while it is made: an mp4 that grows, or '--out -'.", **STREAM)
    ] = False,
    record: Annotated[Path | None, typer.Option(help="Write a session file, which replays exactly.", **STREAM)] = None,
    replay: Annotated[Path | None, typer.Option(help="A session file to make again and check.", **STREAM)] = None,
) -> None:
    """Stream a video from a distilled student of a run, or sample any spec from given weights.

    [bold]Examples[/]

    causvid generate "a red circle moves left" --run tiny/causvid --out clip.mp4

    causvid generate "a blue square moves up" --frames 120 --out long.mp4

    causvid generate "a red fox in the snow" --spec wan/causal --weights Wan2.1-T2V-1.3B --model model.pt

    causvid generate --prompts-at "0:a red circle moves left;48:a blue circle moves left" --frames 96

    causvid generate "a red circle moves left" --frames 9600 --stream --out - | ffplay -f rawvideo \
      -pixel_format rgb24 -video_size 256x256 -

    causvid generate --prompts prompts.txt --spec wan/teacher_unipc --weights Wan2.1-T2V-1.3B --out videos
    """
    if run and spec:
        raise UserError("--run and --spec exclude each other: a video is made from a run, or from given weights")
    if sum(given is not None for given in (prompt, prompts, prompts_at, replay)) != 1:
        raise UserError("give a prompt, or a file of them with --prompts, or --prompts-at, or --replay")
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty: say what the video shows")
    told = {"policy": on_prompt, "image": image, "how": image_as, "video": video, "strength": strength,
            "cache": cache, "steps": steps, "record": record}  # fmt: skip
    script = _script(prompt, prompts_at, replay, frames, seed, told)
    if (script is not None or stream) and (prompts is not None or rollouts is not None or len(seed or []) > 1):
        raise UserError("what happens in a stream is told of one video: without --prompts, --rollouts, several seeds")
    if str(out) == "-" and not stream:
        raise UserError("--out - writes raw frames to stdout: add --stream")
    if spec is None:
        only = {"--weights": weights, "--model": model, "--part": part, "--prompts": prompts, "--rollouts": rollouts,
                "--negative": negative, "--height": height, "--width": width, "--set": change, "--device": device,
                "--dtype": dtype}  # fmt: skip
        given = [name for name, value in only.items() if value is not None]
        if given:
            raise UserError(f"{', '.join(given)}: only with --spec, which samples from given weights")
        if seed and len(seed) > 1:
            raise UserError("several seeds: only with --spec")
        from causvid import generation

        number, name = seed[0] if seed else 0, run or "tiny/causvid"
        made = generation.generate(str(prompt), name, out, frames, number, fps or 8, scale, runs, script, stream)
        return _tell(made, out)
    if weights is None:
        raise UserError("--spec needs --weights, the folder of Wan2.1; 'causvid weights' says what belongs in it")
    from causvid import wan_generation

    sizes = {"world.dataset.height": height, "world.dataset.width": width}
    overrides = [f"{key}={value}" for key, value in sizes.items() if value is not None]
    request = wan_generation.Request(
        spec, weights, wan_generation.read_prompts(prompts) if prompts else [prompt or ""], out,
        [*(change or []), *overrides], model, part, seed or [0], frames, rollouts, fps or 16, runs / "text",
        device or "auto", dtype, negative, script, stream,
    )  # fmt: skip
    _tell(wan_generation.generate(request), out)


def _tell(made: Path, out: Path) -> None:
    """The path on stdout, unless the frames are there."""
    if str(out) != "-":
        print(made)


def _script(
    prompt: str | None, prompts_at: str | None, replay: Path | None, frames: int | None, seed: list[int] | None,
    told: dict[str, Any],
) -> Any:  # fmt: skip
    """What happens in the stream, where anything is told of it."""
    told = {name: value for name, value in told.items() if value is not None}
    if not told and prompts_at is None and replay is None:
        return None
    needs = {"policy": ("--on-prompt", prompts_at, "--prompts-at"), "how": ("--image-as", told.get("image"), "--image"),
             "strength": ("--strength", told.get("video"), "--video")}  # fmt: skip
    for name, (option, given, other) in needs.items():
        if name in told and given is None:
            raise UserError(f"{option} says how {other} is taken: give that too")
    if replay is not None and (told or frames or seed):
        raise UserError("--replay makes a recorded stream again: all that happens in it is in the file")
    import yaml

    from causvid.streaming.moment import HOWS, POLICIES
    from causvid.streaming.script import Script
    from causvid.streaming.sources import read_prompts_at

    for name, accepted in (("policy", POLICIES), ("how", HOWS)):
        if told.get(name, accepted[0]) not in accepted:
            raise UserError(f"{needs[name][0]}: '{told[name]}' is not accepted; accepted: {', '.join(accepted)}")
    if "cache" in told:
        try:
            told["cache"] = yaml.safe_load(told["cache"])
        except yaml.YAMLError as error:
            raise UserError(f"--cache: {told['cache']} is neither a name nor a mapping: {error}") from error
    at = read_prompts_at(prompts_at) if prompts_at is not None else ((0, prompt or ""),)
    return Script(at, frames, seed[0] if seed else 0, replay=replay, **told)
