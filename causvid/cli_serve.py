"""``causvid serve``: a page to play with a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from causvid.errors import UserError

app = typer.Typer()


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to bind; others than this machine's need --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    viewers: Annotated[int, typer.Option(min=1, max=256, help="Pages at once; each has a stream of its own.")] = 8,
    token: Annotated[str | None, typer.Option(envvar="CAUSVID_TOKEN", help="A secret in the page's address.")] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Another name under which the server is reached, as behind a proxy.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="A spec that was run, or the folder of its run, to begin with.")
    ] = None,
    spec: Annotated[
        str | None, typer.Option(help="A spec to stream from given weights, such as wan/causal_window.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="With --spec: the folder of Wan2.1.")] = None,
    model: Annotated[Path | None, typer.Option(help="With --spec: the student's weights.")] = None,
    part: Annotated[str | None, typer.Option(help="Which model of a model.pt, such as generator_ema.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --spec: a change to the spec.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="With --spec: default an accelerator, if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="With --spec: bf16, fp16 or fp32.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="Of the process that computes; 0 takes every core.")] = 0,
    runs: Annotated[Path, typer.Option("--runs", envvar="CAUSVID_RUNS", help="Folder of all results.")] = Path("runs"),
) -> None:
    """Serve a page with a live stream: prompts, pictures, a webcam, branches, a record. Needs causvid\\[serve].

    The last line on stdout is the page's address. Without a run it streams the tiny world's causal teacher.

    [bold]Examples[/]

    causvid serve

    causvid serve --spec wan/causal_window --weights Wan2.1-T2V-1.3B --model model.pt
    """
    local = ("127.0.0.1", "localhost", "::1")
    if host not in local and not token:
        raise UserError(f"--host {host} lets other machines in: give a --token, which the page's address then carries")
    if run and spec:
        raise UserError("--run and --spec exclude each other; the page lists every finished run anyway")
    if spec is not None and weights is None:
        raise UserError("--spec needs --weights, the folder of Wan2.1; 'causvid weights' says what belongs in it")
    from causvid.serve.checkpoints import found
    from causvid.serve.run import listen

    given = _given(run, spec, weights, model, part, change or [], device, dtype, runs)
    checkpoints = found(runs, given)
    if not checkpoints:
        raise UserError("there is nothing to stream: no finished run, and no causal teacher that ships")
    names = (*local, *([host] if host not in ("0.0.0.0", "::") else []), *(name or []))
    listen(checkpoints, host, port, viewers, names, token, threads)


def _given(
    run: str | None, spec: str | None, weights: Path | None, model: Path | None, part: str | None, change: list[str],
    device: str | None, dtype: str | None, runs: Path,
) -> Any:  # fmt: skip
    """The checkpoint that the command line names."""
    from causvid.serve.checkpoints import Checkpoint

    if run is not None:
        from causvid import generation

        return Checkpoint(f"run {run}", run=generation.run_folder(run, runs))
    if spec is None or weights is None:
        return None
    from causvid import wan_generation

    request = wan_generation.Request(
        spec, weights, (), Path(), change, model, part, store=runs / "text",
        device=device or "auto", dtype=dtype,
    )  # fmt: skip
    return Checkpoint(spec, wan=request, prompt="a red fox in the snow", fps=16)
