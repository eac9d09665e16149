"""``causvid sweep``: every arm of a sweep, here or on a cluster, and the page that compares them."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from causvid.errors import UserError

app = typer.Typer()
PARTIAL = 3  # exit status: done in part


@app.command(no_args_is_help=True)
def sweep(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="A name under experiments/, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the spec, as in student.steps=2.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", envvar="CAUSVID_RUNS", help="Folder of all results.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Only say how far each arm is.")] = False,
    launcher: Annotated[
        Literal["local", "slurm", "submitit"] | None,
        typer.Option(
            help="local: several arms at a time, as processes. slurm: one array of jobs. submitit: such jobs on this "
            "machine, to try it. Default: one arm after another, here."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="With --launcher: how many arms run at once.")] = 2,
    cluster_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of submitit, as slurm_partition=gpu, timeout_min=600."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be started or submitted.")] = False,
    across_protocols: Annotated[
        bool, typer.Option("--across-protocols", help="Compare arms that were judged differently; every table says so.")
    ] = False,
) -> None:
    """Run every arm of a spec's sweep, and compare them on a page; stages that arms share run once.

    An arm that fails does not stop the others; the exit status is then 3. A sweep that was stopped goes on.

    [bold]Examples[/]

    causvid sweep ablations/steps

    causvid sweep ablations/init seed=1 --launcher local --workers 4

    causvid sweep ablations/steps --launcher slurm --cluster-option slurm_partition=gpu --cluster-option timeout_min=600
    """
    from causvid import comparison, experiment, launch

    given, root = overrides or [], runs.resolve()
    if status:
        rows = experiment.sweep_status(spec, given, runs)
        for row in rows if not as_json else []:
            first, *more = row["next"].split("; ")
            why = f"{first}; and {len(more)} more reasons" if len(more) > 1 else row["next"]
            print(f"{row['done']:>3} of {row['stages']} stages  {row['label']}  {why}".rstrip())
        if as_json:
            print(json.dumps(rows))
        return
    if launcher in (None, "local") and cluster_option:
        raise UserError("--cluster-option: only with --launcher slurm or submitit")
    if launcher is None and not dry_run:
        arms = experiment.sweep(spec, given, runs)
    else:
        work = launch.works(spec, given)
        name = "local" if launcher == "submitit" else "slurm"
        if dry_run and launcher != "slurm":
            for each in work:
                print(shlex.join(each.command(root)))
            return
        if launcher == "local":
            threads = max(1, len(os.sched_getaffinity(0)) // workers)
            errors = launch.local(work, root, workers, threads)
        else:
            made = launch.executor(root, name, cluster_option or [], workers, dry_run)
            if dry_run:
                print(launch.scripts(work, made))
                return
            errors = launch.cluster(work, root, made)
        arms = comparison.finished(spec, given, root, errors)
    path = comparison.write(spec, arms, root, across_protocols)
    print(json.dumps(json.loads(path.read_text())) if as_json else path)
    if any(arm.error for arm in arms):
        raise typer.Exit(PARTIAL)
