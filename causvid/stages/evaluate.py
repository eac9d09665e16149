"""Judgement of all samples by the spec's metrics: ``metrics.json`` (flat), and ``scores.json`` (per video)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from causvid import build, progress, weights
from causvid.eval.statistics import interval
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.stages.sample import SPLIT, from_bytes
from causvid.types import SetMetric


@register("stage", "evaluate")
class Evaluate:
    """Judges teacher, untrained, ODE-initialised and distilled student, real data, and long rollouts."""

    name = "evaluate"

    def reads(self, spec: Spec) -> tuple[str, ...]:
        return (
            "world",
            "evaluation.metrics",
            "evaluation.samples",
            "evaluation.rollout_samples",
            "teacher_sampling",
        )

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ("sample_teacher", "sample_start", "sample")

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return ()

    def run(self, context: Context) -> None:
        spec = context.spec
        world = build.World(spec)
        metrics = [build.construct(metric) for metric in spec["evaluation.metrics"]]
        pixels, captions = world.pixels(range(spec["evaluation.samples"]), SPLIT)
        metrics = [m.knowing(pixels, captions) if hasattr(m, "knowing") else m for m in metrics]
        arms: dict[str, Tensor] = {"real": pixels, **read_arms(context)}
        numbers: dict[str, float] = {}
        scores: dict[str, dict[str, list[float]]] = {}
        with progress.bar("evaluate", len(arms)) as show:
            for number, (name, videos) in enumerate(arms.items()):
                for metric in metrics:
                    values = metric(videos, captions[: len(videos)])
                    each = {key: value for key, value in values.items() if value.ndim == 1}
                    scores.setdefault(name, {}).update({key: value.float().tolist() for key, value in each.items()})
                    judges_sets = isinstance(metric, SetMetric) and len(videos) > 1
                    over_set = metric.over_set(values) if judges_sets else {}
                    if name == "rollout_last":
                        over_set.pop("start_gap", None)  # its law is that of a clip's first frame
                    numbers.update(summary(name, each, over_set))
                show(number + 1)
        full = f"teacher_{spec['teacher_sampling.steps']}"
        for key in [key for key in numbers if key.startswith(f"{full}.")]:
            numbers["teacher." + key.removeprefix(f"{full}.")] = numbers[key]
        for end in ("first", "last"):
            if f"rollout_{end}.ok" in numbers:
                numbers[f"student.ok_{end}_tenth"] = numbers[f"rollout_{end}.ok"]
        weights.write_json(context.folder / "scores.json", {"captions": captions, "scores": scores})
        weights.write_json(context.folder / "metrics.json", numbers)


def read_arms(context: Context) -> dict[str, Tensor]:
    """Videos in [-1, 1] of every arm that was sampled."""
    arms: dict[str, Tensor] = {}
    for stage in ("sample_teacher", "sample_start", "sample"):
        for path in sorted(context.inputs[stage].glob("*.safetensors")):
            tensors, _ = weights.read_tensors(path)
            if "videos" in tensors:
                arms[path.stem] = from_bytes(tensors["videos"])
            else:
                arms["rollout_first"] = from_bytes(tensors["first"])
                arms["rollout_last"] = from_bytes(tensors["last"])
    return arms


def summary(arm: str, values: dict[str, Tensor], over_set: dict[str, float]) -> dict[str, float]:
    """``arm.metric`` means with the ends of their 95% intervals, and the set's own numbers."""
    out: dict[str, float] = {}
    for key, value in values.items():
        low, high = interval(value)
        out |= {
            f"{arm}.{key}": float(value.float().mean()),
            f"{arm}.{key}.low": low,
            f"{arm}.{key}.high": high,
        }
    return out | {f"{arm}.{key}": value for key, value in over_set.items()}
