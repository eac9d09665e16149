"""The report: one self-contained page, ``report.html``, from everything the other stages wrote."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from causvid import build, progress, registry, runs, weights
from causvid.data.video import encode_mp4
from causvid.eval import report as page
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.stages.sample import SPLIT

CAPTIONS, FPS, CRF, LONG_CRF = 6, 8, 20, 24
WIDTH = 160  # pixels that a video is enlarged to, at least
MARKS = ("colour", "shape", "direction")


@register("stage", "report")
class Report:
    """Renders the page."""

    name = "report"

    def title(self, spec: Spec) -> list[Any]:
        """What the page shows of where the spec comes from."""
        return [spec.name, spec.differences()]

    def reads(self, spec: Spec) -> tuple[str, ...]:
        return tuple(key for key in spec.data if key not in ("runtime", "sweep"))

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        ode = ("ode_init",) if spec["init"]["name"] == "ode" else ()
        ode = ("ode_pairs", *ode) if ode and not spec["ode_init.pairs"] else ode
        return ("teacher", *ode, "distill", "sample_teacher", "sample_start", "sample", "evaluate")

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return (page.TEMPLATE, page.STYLE)

    def run(self, context: Context) -> None:
        spec = context.spec
        judged = _json(context.inputs["evaluate"] / "scores.json")
        with progress.bar("report", len(judged["captions"][:CAPTIONS]) + 1) as show:
            samples = []
            for row in sample_rows(context, judged):
                samples.append(row)
                show(len(samples), "videos")
            rollouts = list(rollout_rows(context, judged))
        findings = page.Findings(
            name=spec.name,
            about=spec["about"],
            spec_yaml=yaml.safe_dump(plain(spec.data), sort_keys=False, default_flow_style=None, width=100),
            differences=[(key, short(base), short(own)) for key, base, own in spec.differences()],
            has_base=spec.base is not None,
            metrics=_json(context.inputs["evaluate"] / "metrics.json"),
            timings=_json(context.inputs["sample"] / "timings.json"),
            full_steps=spec["teacher_sampling.steps"],
            teacher_steps=spec["evaluation.teacher_steps"],
            student_steps=len(build.student_times(spec)),
            causal=spec["student.causal"],
            rollout_factor=spec["evaluation.rollout_factor"],
            samples=samples,
            rollouts=rollouts,
            training=dict(trainings(context)),
            stages=list(stage_records(context)),
            metric_notes={m["name"]: documentation("metric", m["name"]) for m in spec["evaluation.metrics"]},
            environment=plain(runs.environment()),
            train_stream_mismatch=build.train_stream_mismatch(spec, build.World(spec).latent_shape[0]),
        )
        weights.write_bytes(context.folder / "report.html", page.render(findings).encode())


def plain(value: Any) -> Any:
    """Components, tuples and the like as YAML and JSON know them."""
    return json.loads(json.dumps(value, default=str))


def short(value: Any) -> str:
    """A value of the spec on one line, as YAML; a dash where there is none."""
    text = yaml.safe_dump(plain(value), default_flow_style=True, width=1000)
    return "–" if value is None else text.removesuffix("...\n").strip()


def documentation(group: str, name: str) -> str:
    return inspect.getdoc(registry.find(group, name).target) or ""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def mp4(video: Tensor, crf: int = CRF) -> bytes:
    """A small inline video of ``f c h w``."""
    return encode_mp4(video, FPS, max(1, -(-WIDTH // video.shape[-1])), crf)


def marks(scores: Mapping[str, Any], arm: str, number: int, prefix: str = "") -> list[tuple[str, bool]]:
    """What was judged of one video, as (name, right)."""
    return [(prefix + name, bool(scores[arm][name][number])) for name in MARKS if name in scores.get(arm, {})]


def sample_rows(context: Context, judged: Mapping[str, Any]) -> Iterator[page.Row]:
    """The first captions, each with the videos of every arm that there is."""
    spec = context.spec
    steps, few = spec["teacher_sampling.steps"], len(build.student_times(spec))
    captions = judged["captions"][:CAPTIONS]
    world = build.World(spec)
    pixels, _ = world.pixels(range(len(captions)), SPLIT)
    videos = {"real": (("truth", "decoded" if world.holds_latents else "rendered"), pixels)}
    for arm, label, count, stage in (
        (f"teacher_{steps}", "teacher", steps, "sample_teacher"),
        ("untrained", "untrained", few, "sample_start"),
        ("ode_init", "ODE init", few, "sample_start"),
        ("student", "student", few, "sample"),
    ):
        path = context.inputs[stage] / f"{arm}.safetensors"
        if path.is_file():
            tensors, _ = weights.read_tensors(path)
            videos[arm] = ((label, f"{count} step{'s' * (count != 1)}"), tensors["videos"][:CAPTIONS])
    for number, caption in enumerate(captions):
        cells = [
            page.Cell(*label, mp4(arm_videos[number]), marks(judged["scores"], arm, number))
            for arm, (label, arm_videos) in videos.items()
        ]
        yield page.Row(caption, cells)


def rollout_rows(context: Context, judged: Mapping[str, Any]) -> Iterator[page.Row]:
    """Whole long rollouts, marked at both ends; none of a student that does not stream."""
    path = context.inputs["sample"] / "rollout.safetensors"
    if path.is_file():
        for number, video in enumerate(weights.read_tensors(path)[0]["whole"]):
            ends = [(end, marks(judged["scores"], f"rollout_{end}", number)) for end in ("first", "last")]
            found = [(f"{end} part", all(right for _, right in each)) for end, each in ends if each]
            caption = judged["captions"][number]
            yield page.Row(caption, [page.Cell("student", caption, mp4(video, LONG_CRF), found)])


def trainings(context: Context) -> Iterator[tuple[str, page.Training]]:
    """Curves of the stages that trained."""
    spec = context.spec
    losses = {"teacher": "teacher_training.loss", "ode_init": "ode_init.loss", "distill": "loss"}
    sections = {"teacher": "teacher_training"}
    for stage, loss in losses.items():
        path = context.inputs.get(stage, Path()) / "curves.jsonl"
        if stage in context.inputs and path.is_file():
            name = spec[loss]["name"]
            summary = documentation("loss", name).split("\n")[0]
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            total = spec[sections.get(stage, stage)]["iterations"]
            yield stage, page.Training(rows, total, f"{name}: {summary}")


def stage_records(context: Context) -> Iterator[page.StageRecord]:
    """Identity, inputs and time of every stage, and at the end of this one."""
    for name, folder in context.inputs.items():
        done, record = _json(folder / "DONE"), _json(folder / "record.json")
        finished = (folder / "DONE").stat().st_mtime if done else None
        yield page.StageRecord(
            name, folder.name, tuple(record.get("inputs", ())), done.get("seconds"),
            "" if finished is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(finished)),
            done.get("environment") or {},
        )  # fmt: skip
    yield page.StageRecord("report", context.folder.name, tuple(context.inputs), None, "this page, which reads all")
