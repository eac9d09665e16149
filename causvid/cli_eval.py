"""``causvid eval``: scores of files, and their totals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from causvid.errors import UserError

StaticFilterOption = Annotated[
    int,
    typer.Option(
        min=0,
        help="Videos of each prompt of temporal flickering (upstream: 25), of which the first 5 static ones are "
        "judged, by upstream's filter, which needs RAFT. 0: no filter.",
    ),
]
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

    scores = vbench.read_scores(file)
    totals = vbench.aggregate(scores)
    if warning := vbench.out_of_range(scores):
        progress.console.print(f"warning: {file}: {warning}", highlight=False, soft_wrap=True)
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
    static_filter: StaticFilterOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Judge a folder of videos, in the dimensions that need no weights, with --weights in all; goes on after a stop.

    Files that can't be judged are listed, are no zeros, and make the exit status 3. So do dimensions, with --weights.

    [bold]Examples[/]

    causvid eval videos clips/ --prompts prompts.txt --out evaluation

    causvid eval videos clips/ --weights ~/.cache/vbench
    """
    from causvid import progress
    from causvid.eval import evaluate_suite, reference, suites
    from causvid.eval.clips import Policy
    from causvid.eval.static_filter import told

    suite = suites.read_suite(prompts or reference.prompts_file())
    with progress.bar("judge", 1) as show:
        found = evaluate_suite.evaluate(
            folder, suite, out, Policy(long_compat, semantic), per_prompt, dimension, weights, (), device,
            lambda done, total: show(done, f"of {total} videos"), static_filter,
        )  # fmt: skip
    if found.sifted:
        progress.say(told(found.sifted))
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


@app.command(no_args_is_help=True)
def sample(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A spec that was run; with --weights any spec.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the spec: which run, or which arm of a sweep."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the videos.")] = Path("videos"),
    suite: Annotated[Literal["vbench", "vbench_long"], typer.Option(help="Which suite.")] = "vbench_long",
    prompts: Annotated[
        Path | None, typer.Option(help="VBench_full_info.json, the same form, or one prompt a line; default VBench's.")
    ] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Videos of each prompt.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of vbench_long: least length of a video.")] = 5.0,
    fps: Annotated[float, typer.Option(min=1, help="Frames per second.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts.")] = None,
    static_filter: StaticFilterOption = 0,
    shard: Annotated[
        str, typer.Option(help="Part K of N, as 0/4: as many processes as you like share a folder.")
    ] = "0/1",
    weights: Annotated[Path | None, typer.Option(help="The folder of Wan2.1, to sample from given weights.")] = None,
    model: Annotated[Path | None, typer.Option(help="With --weights: the transformer's weights.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The same, as 'generate' has it.")
    ] = None,
    device: Annotated[str, typer.Option(help="With --weights: where to compute.")] = "cpu",
    runs: Annotated[Path, typer.Option("--runs", envvar="CAUSVID_RUNS", help="Folder of all results.")] = Path("runs"),
) -> None:
    """Sample a suite's prompts into files named as VBench wants them; goes on after a stop, and splits into shards.

    [bold]Examples[/]

    causvid eval sample tiny/causvid --out videos --limit 4

    causvid eval sample ablations/steps student.steps=2 --out videos

    causvid eval sample wan/causal --weights Wan2.1-T2V-1.3B --model model.pt --out videos --shard 0/8
    """
    from causvid import progress, suite_generation
    from causvid.eval import benchmarks, sampling

    given = {
        "prompts": None if prompts is None else str(prompts), "per_prompt": per_prompt, "fps": fps, "limit": limit,
        "static_filter": static_filter,
    }  # fmt: skip
    found = benchmarks.vbench(**given) if suite == "vbench" else benchmarks.vbench_long(seconds=seconds, **given)
    order = suite_generation.Order(found, out, sampling.shard_of(shard))
    changes = [*(overrides or []), *(change or [])]
    if weights is None:
        if model:
            raise UserError("--model: only with --weights; without them the student of a run is sampled")
        made = suite_generation.from_run(order, spec, runs, changes)
    else:
        from causvid.wan_generation import Request

        made = suite_generation.from_weights(order, Request(spec, weights, [], out, changes, model, device=device))
    progress.say(f"made {made} videos")
    print(out.resolve())


@app.command(no_args_is_help=True)
def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="results.json of judged folders, or upstream's.")
    ],
    across_protocols: Annotated[
        bool,
        typer.Option(
            "--across-protocols", help="Lay results of different protocols or videos side by side, marked so."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Lay results side by side: scores and totals of each, and the difference of each to the first.

    Videos of one model each: a difference says nothing of another training of it, so there is no verdict. Files of
    upstream's evaluation hold no protocol, and need --across-protocols.

    [bold]Example[/]

    causvid eval compare one/results.json other/results.json
    """
    from causvid.eval import side_by_side

    table = side_by_side.compare(files, across_protocols)
    print(json.dumps(table) if as_json else side_by_side.text(table))


@app.command(no_args_is_help=True)
def power(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP.json", help="What 'causvid sweep' wrote of a pilot.")],
    arm: Annotated[int, typer.Option(min=1, help="Which arm is the pilot, as numbered on the page.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Before a run: the least difference that 2, 3, 5 and 10 training seeds would find in 80% of cases, by a pilot.

    The pilot is an arm of two training seeds or more, on the prompts that will be used.

    [bold]Example[/]

    causvid eval power runs/sweeps/0123456789abcdef.json
    """
    from causvid.eval import side_by_side

    table = side_by_side.power(sweep, arm)
    print(json.dumps(table) if as_json else side_by_side.power_text(table))
