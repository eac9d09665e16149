"""What an evaluation found, for outside loggers: scalars, curves over time, tables and videos. Off unless a spec asks.

Training's numbers go through ``runtime.loggers`` as they are produced; these are of the ``evaluate`` stage, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from causvid import weights
from causvid.data.video import write_mp4
from causvid.runs import Context

VIDEOS = 8  # of the student's held-out clips, and of each suite
FPS = 8
MARKED = (".low", ".high")


def wanted(context: Context) -> Mapping[str, Any] | None:
    """The options of the spec's wandb logger; None where it names none."""
    return next((each for each in context.spec["runtime.loggers"] if each["name"] == "wandb"), None)


def log(
    context: Context,
    numbers: Mapping[str, float],
    captions: Sequence[str],
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    suites: Mapping[str, Mapping[str, Any]],
) -> None:
    """Log an evaluation to Weights & Biases where ``runtime.loggers`` names it; offline needs no account.

    Args:
        numbers: the flat metrics.
        captions, scores: of the held-out clips, by arm and measure.
        suites: results of each suite.
    """
    options = wanted(context)
    if options is None:
        return
    import wandb

    run = wandb.init(
        project=options["project"], mode=options["mode"], dir=str(context.folder), job_type="evaluate",
        name=f"{context.spec.name} evaluate", config=dict(context.spec.data), reinit="create_new",
    )  # fmt: skip
    try:
        run.summary.update({name: value for name, value in numbers.items() if not name.endswith(MARKED)})
        run.log({"metrics": metrics_table(wandb, numbers)})
        run.log({"held_out": scores_table(wandb, captions, scores.get("student", {}))})
        run.log({"videos/held_out": clips(wandb, context, captions)})
        for suite, results in suites.items():
            run.log(
                {suite: suite_table(wandb, results), f"videos/{suite}": suite_videos(wandb, context, suite, results)}
            )
            for name, points in results["over_time"].items():
                run.define_metric(f"{suite}/over_time/{name}", step_metric="seconds")
                for point in points:
                    run.log({"seconds": point["seconds"], f"{suite}/over_time/{name}": point["mean"]})
    finally:
        run.finish()


def metrics_table(wandb: Any, numbers: Mapping[str, float]) -> Any:
    """One row an arm and measure, with its interval."""
    rows = [
        [*name.split(".", 1), value, numbers.get(f"{name}.low"), numbers.get(f"{name}.high")]
        for name, value in numbers.items()
        if not name.endswith(MARKED)
    ]
    return wandb.Table(columns=["arm", "measure", "mean", "low", "high"], data=rows)


def scores_table(wandb: Any, captions: Sequence[str], scores: Mapping[str, Sequence[float]]) -> Any:
    """One row a held-out clip of the student."""
    columns = list(scores)
    count = min((len(values) for values in scores.values()), default=0)
    return wandb.Table(
        columns=["caption", *columns], data=[[captions[i], *(scores[c][i] for c in columns)] for i in range(count)]
    )


def suite_table(wandb: Any, results: Mapping[str, Any]) -> Any:
    """One row a video and dimension of a suite."""
    rows = [
        [name, row["video"], row["prompt"], row["score"]] for name, each in results["videos"].items() for row in each
    ]
    return wandb.Table(columns=["dimension", "video", "prompt", "score"], data=rows)


def clips(wandb: Any, context: Context, captions: Sequence[str]) -> list[Any]:
    """The student's first held-out clips."""
    videos = weights.read_tensors(context.inputs["sample"] / "student.safetensors")[0]["videos"][:VIDEOS]
    out = []
    for number, video in enumerate(videos):
        path = context.folder / "logged" / f"{number:02d}.mp4"
        write_mp4(path, video, FPS, max(1, -(-128 // video.shape[-1])))
        out.append(_video(wandb, path, captions[number]))
    return out


def suite_videos(wandb: Any, context: Context, suite: str, results: Mapping[str, Any]) -> list[Any]:
    """The first videos of a suite."""
    rows = next(iter(results["videos"].values()), [])[:VIDEOS]
    folder = context.inputs["sample_suites"] / suite
    return [_video(wandb, folder / row["video"], row["prompt"]) for row in rows]


def _video(wandb: Any, path: Path, caption: str) -> Any:
    return wandb.Video(str(path), caption=caption, format="mp4")
