"""The command line. Paths and JSON are plain lines on stdout, last; progress and messages go to stderr."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from causvid import cli_data, cli_eval, cli_generate, cli_serve, cli_sweep, cli_vbench, cli_wan
from causvid.errors import UserError

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Distil slow bidirectional video diffusion into fast causal streaming, from experiment specs.",
    epilog="Start with [bold]causvid run tiny/causvid[/]; see the components with [bold]causvid list[/].",
)  # fmt: skip
app.add_typer(cli_generate.app)
app.add_typer(cli_serve.app)
app.add_typer(cli_wan.app)
app.add_typer(cli_sweep.app)

app.add_typer(cli_eval.app, name="eval")
app.add_typer(cli_vbench.app, name="vbench")
app.add_typer(cli_vbench.doctor, name="doctor")

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A name under experiments/, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the spec, as in student.steps=2.")
]
RunsOption = Annotated[Path, typer.Option("--runs", envvar="CAUSVID_RUNS", help="Folder of all results.")]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")]
DEFAULT_RUNS = Path("runs")


@app.command(no_args_is_help=True)
def run(
    spec: SpecArgument, overrides: Overrides = None, runs: RunsOption = DEFAULT_RUNS, as_json: JsonOption = False
) -> None:
    """Run what is not done yet of an experiment; the last line on stdout is the path of its report or folder.

    [bold]Examples[/]

    causvid run tiny/causvid

    causvid run tiny/causvid student.steps=2 --json

    causvid run my_spec.yaml runtime.threads=1

    torchrun --nproc-per-node 8 -m causvid run wan/causal_dmd runtime.weights=Wan2.1-T2V-1.3B
    """
    from causvid import experiment, ranks

    outcome = experiment.run(spec, overrides or [], runs)
    if ranks.first():
        print(json.dumps(outcome.as_json()) if as_json else outcome.report or outcome.run)


@app.command(no_args_is_help=True)
def plan(
    spec: SpecArgument, overrides: Overrides = None, runs: RunsOption = DEFAULT_RUNS, as_json: JsonOption = False
) -> None:
    """Say what a run would do, stage by stage, why, and what it costs; nothing is executed, and no GPU is needed.

    [bold]Examples[/]

    causvid plan tiny/causvid student.steps=2

    causvid plan wan/causal_dmd runtime.gpus=1 runtime.memory=24GB
    """
    from causvid import experiment
    from causvid.progress import say

    rows, costs = experiment.explained(spec, overrides or [], runs)
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['stage']:<15} {row['identity'] or 'not kept':<16}  {row['state']}")
    for line in costs:
        say(line)


@app.command(name="list")
def list_components(
    group: Annotated[str | None, typer.Argument(help="A group, such as loss; default all of them.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List registered components, or those of one group.

    [bold]Example[/]

    causvid list loss
    """
    from causvid import registry

    groups = [group] if group else sorted(registry.GROUPS)
    found = [component for name in groups for component in registry.components(name).values()]
    if as_json:
        print(json.dumps([{"group": c.group, "name": c.name, "summary": c.summary, "where": c.where} for c in found]))
        return
    for component in found:
        print(f"{component.group + '.' + component.name:<34} {component.summary}")


@app.command(no_args_is_help=True)
def show(name: Annotated[str, typer.Argument(metavar="GROUP.NAME", help="A component, such as loss.dmd.")]) -> None:
    """Show a component: what it does, its options, and where it is written.

    [bold]Example[/]

    causvid show loss.dmd
    """
    from causvid import experiment

    print(experiment.describe(name))


@app.command()
def check(
    specs: Annotated[list[str] | None, typer.Argument(metavar="[SPEC]...", help="Default: all shipped specs.")] = None,
) -> None:
    """Check specs without running them; every error is told.

    [bold]Example[/]

    causvid check tiny/causvid my_spec.yaml
    """
    from causvid import experiment

    for name in experiment.check(specs or []):
        print(f"{name}: ok")


@app.command(no_args_is_help=True)
def report(spec: SpecArgument, overrides: Overrides = None, runs: RunsOption = DEFAULT_RUNS) -> None:
    """Render the report of a finished run again, and print its path.

    [bold]Example[/]

    causvid report tiny/causvid
    """
    from causvid import experiment

    print(experiment.render_report(spec, overrides or [], runs))


app.add_typer(cli_data.app, name="data")


# Commands that keep what they have done; what the others had begun is gone.
GOES_ON = ("run", "sweep", "data", "eval")


class Stopped(BaseException):
    """SIGINT or SIGTERM. Not a KeyboardInterrupt, which the command-line library would turn into status 1."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: errors of use end with status 2 and one message, an interruption with 75."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app(arguments)
    except UserError as error:
        _end(2, str(error))
    except Stopped:
        command = next(iter(sys.argv[1:] if arguments is None else arguments), "")
        how = "goes on from what is done" if command in GOES_ON else "does it again"
        _end(75, f"stopped; the same command {how}")
    except OSError as error:
        _end(2, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")


def _stop(signal_number: int, frame: Any) -> None:
    raise Stopped


def _end(status: int, message: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]error:[/] " + message.replace("[", r"\["))
    sys.exit(status)


if __name__ == "__main__":
    main()
