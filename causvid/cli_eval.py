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
    prompts: Annotated[Path, typer.Option(help="VBench_full_info.json, the same form, or one prompt a line.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("evaluation"),
    dimension: Annotated[list[str] | None, typer.Option(help="A dimension; may be given again. Default all.")] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Videos of each prompt.")] = 5,
    long_compat: Annotated[Literal["clean", "upstream"], typer.Option(help="How long videos are cut.")] = "clean",
    as_json: JsonOption = False,
) -> None:
    """Judge a folder of videos in the dimensions that need no weights; goes on where it was stopped.

    Files that can't be judged are listed, are no zeros, and make the exit status 3.

    [bold]Example[/]

    causvid eval videos clips/ --prompts VBench_full_info.json --out evaluation
    """
    from causvid import progress, weights
    from causvid.eval import judging, results, suites
    from causvid.eval.clips import Policy

    suite = suites.read_suite(prompts)
    with results.Store(out / "rows.jsonl") as store, progress.bar("judge", 1) as show:
        found = judging.judge_folder(
            folder, suite, store, Policy(long_compat), per_prompt, dimension,
            lambda done, total: show(done, f"of {total} videos"),
        )  # fmt: skip
    weights.write_json(out / "results.json", found.as_json())
    known = {name: score for name, score in found.scores.items() if score is not None}
    results.write_upstream(out / "upstream_eval_results.json", known, found.rows)
    for name, problem in found.problems:
        progress.console.print(f"left out: '{name}' {problem}", highlight=False, soft_wrap=True, markup=False)
    if found.absent:
        progress.console.print(f"absent: {len(found.absent)} videos, as '{found.absent[0]}'", markup=False)
    path = out / "results.json"
    print(json.dumps(json.loads(path.read_text())) if as_json else path)
    if found.problems or found.absent:
        raise typer.Exit(PARTIAL)
