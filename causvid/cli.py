"""The command line. Results for machines are plain lines on stdout; everything for eyes goes to stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Distil slow bidirectional video diffusion into fast causal streaming, from experiment specs.",
    epilog="Start with [bold]causvid run tiny/causvid[/]; see what there is with [bold]causvid list[/].",
)  # fmt: skip

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="A name under experiments/, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the spec: student.steps=2.")
]
RunsOption = Annotated[Path, typer.Option("--runs", envvar="CAUSVID_RUNS", help="Folder of all results.")]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON line on stdout.")]
DEFAULT_RUNS = Path("runs")


@app.command()
def run(
    spec: SpecArgument, overrides: Overrides = None, runs: RunsOption = DEFAULT_RUNS, as_json: JsonOption = False
) -> None:
    """Run an experiment: only what is not done yet. The last line on stdout is the report's path.

    causvid run tiny/causvid

    causvid run tiny/causvid student.steps=2 --json
    """
    from causvid import experiment

    outcome = experiment.run(spec, overrides or [], runs)
    print(json.dumps(outcome.as_json()) if as_json else outcome.report)


def main() -> None:
    """Entry point: errors of use end with status 2 and one message, an interrupt with 75."""
    from causvid.errors import UserError

    try:
        app()
    except UserError as error:
        _complain(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        _complain("stopped; the same command goes on where this one was")
        sys.exit(75)
