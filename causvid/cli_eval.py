"""``causvid eval``: scores of files, and their totals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

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


@app.command(no_args_is_help=True)
def videos(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Videos, named PROMPT-INDEX.mp4.")],
    prompts: Annotated[
        Path | None, typer.Option(help="VBench_full_info.json, the same form, or one prompt a line; default VBench's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("evaluation"),
    dimension: Annotated[list[str] | None, typer.Option(help="A dimension; may be given again. Default all.")] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Videos of each prompt.")] = 5,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of the judges' weights: all that is there judges, too.")
    ] = None,
    device: Annotated[str, typer.Option(help="Of the reference judge.")] = "cpu",
    long_compat: Annotated[Literal["clean", "upstream"], typer.Option(help="How long videos are cut.")] = "clean",
    semantic: Annotated[bool, typer.Option("--semantic", help="Cut long videos at scene changes first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Judge a folder of videos, in the dimensions that need no weights, and with --weights in all; goes on after a stop.

    Files that can't be judged are listed, are no zeros, and make the exit status 3. So do dimensions, with --weights.

    [bold]Examples[/]

    causvid eval videos clips/ --prompts prompts.txt --out evaluation

    causvid eval videos clips/ --weights ~/.cache/vbench
    """
    from causvid import progress
    from causvid.eval import evaluate_suite, reference, suites
    from causvid.eval.clips import Policy

    suite = suites.read_suite(prompts or reference.prompts_file())
    with progress.bar("judge", 1) as show:
        found = evaluate_suite.evaluate(
            folder, suite, out, Policy(long_compat, semantic), per_prompt, dimension, weights, (), device,
            lambda done, total: show(done, f"of {total} videos"),
        )  # fmt: skip
    for name, problem in found.problems:
        progress.say(f"left out: '{name}' {problem}")
    for name, reason in found.unjudged.items() if weights else ():
        progress.say(f"not judged: {name}: {reason}")
    if found.absent:
        progress.say(f"absent: {len(found.absent)} videos, as '{found.absent[0]}'")
    path = out / "results.json"
    print(json.dumps(json.loads(path.read_text())) if as_json else path)
    if found.problems or found.absent or (weights and found.unjudged):
        raise typer.Exit(PARTIAL)
