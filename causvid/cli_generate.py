"""``causvid generate``: videos from finished runs, or from given weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from causvid.errors import UserError

app = typer.Typer()


@app.command(no_args_is_help=True)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.")] = None,
    run: Annotated[str | None, typer.Option(help="A spec that was run, or the folder of its run.")] = None,
    spec: Annotated[str | None, typer.Option(help="A spec to sample from given weights, such as wan/causal.")] = None,
    weights: Annotated[Path | None, typer.Option(help="With --spec: the folder of Wan2.1.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="With --spec: the transformer's weights; default those in --weights.")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Which model of a model.pt, such as generator_ema.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with one prompt a line, instead of PROMPT.")] = None,
    out: Annotated[Path, typer.Option(help="The mp4 to write, or a folder for several.")] = Path("clip.mp4"),
    frames: Annotated[int | None, typer.Option(min=1, help="Pixel frames; default the training length.")] = None,
    rollouts: Annotated[
        int | None, typer.Option(min=1, help="Long video of so many overlapping rollouts, as the release makes it.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of the noise; may be given several times.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt; default the spec's.")] = None,
    height: Annotated[int | None, typer.Option(min=16, help="Pixels; a multiple of 16.")] = None,
    width: Annotated[int | None, typer.Option(min=16, help="Pixels; a multiple of 16.")] = None,
    fps: Annotated[int | None, typer.Option(min=1, help="Frames per second of the mp4; 8, or 16 with --spec.")] = None,
    scale: Annotated[int, typer.Option(min=1, help="With --run: pixels of the mp4 per pixel of the video.")] = 8,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --spec: a change to the spec.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="With --spec: default an accelerator, if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default fp32 on a CPU, else bf16.")] = None,
    runs: Annotated[Path, typer.Option("--runs", envvar="CAUSVID_RUNS", help="Folder of all results.")] = Path("runs"),
) -> None:
    """Stream a video from a distilled student of a run, or sample any spec from given weights.

    [bold]Examples[/]

    causvid generate "a red circle moves left" --run tiny/causvid --out clip.mp4

    causvid generate "a blue square moves up" --frames 120 --out long.mp4

    causvid generate "a red fox in the snow" --spec wan/causal --weights Wan2.1-T2V-1.3B --model model.pt

    causvid generate --prompts prompts.txt --spec wan/teacher_unipc --weights Wan2.1-T2V-1.3B --out videos
    """
    if run and spec:
        raise UserError("--run and --spec exclude each other: a video is made from a run, or from given weights")
    if (prompt is None) == (prompts is None):
        raise UserError("give a prompt, or a file of them with --prompts")
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

        number = seed[0] if seed else 0
        print(generation.generate(str(prompt), run or "tiny/causvid", out, frames, number, fps or 8, scale, runs))
        return
    if weights is None:
        raise UserError("--spec needs --weights, the folder of Wan2.1; 'causvid weights' says what belongs in it")
    from causvid import wan_generation

    sizes = {"world.dataset.height": height, "world.dataset.width": width}
    overrides = [f"{key}={value}" for key, value in sizes.items() if value is not None]
    request = wan_generation.Request(
        spec, weights, [prompt] if prompt is not None else wan_generation.read_prompts(prompts or Path()), out,
        [*(change or []), *overrides], model, part, seed or [0], frames, rollouts, fps or 16, runs / "text",
        device or _device(), dtype, negative,
    )  # fmt: skip
    print(wan_generation.generate(request))


def _device() -> str:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return str(found) if found is not None else "cpu"
