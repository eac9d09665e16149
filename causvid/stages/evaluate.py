"""Judgement of all samples by the spec's metrics: ``metrics.json`` (flat), and ``scores.json`` (per video).

Suites that ``eval`` names are judged from their files: ``SUITE/results.json`` with the rows beside it, and
``suites.json`` with all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causvid import build, progress, tracking, weights
from causvid.eval import evaluate_suite, reference
from causvid.eval.benchmarks import Suite
from causvid.eval.judges import wanted
from causvid.eval.judging import Evaluation
from causvid.eval.results import prompts_digest
from causvid.eval.static_filter import told
from causvid.eval.statistics import interval
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.stages.over_time import truth_over_time
from causvid.stages.sample import SPLIT, from_bytes
from causvid.stages.suites import metrics_of, prompts_of, suites_of
from causvid.types import SetMetric


@register("stage", "evaluate")
class Evaluate:
    """Judges teacher, untrained, ODE-initialised and distilled student, real data, long rollouts, and the suites."""

    name = "evaluate"

    def facts(self, spec: Spec) -> list[Any]:
        """Who can judge: a suite that was judged without weights is judged again when they are there."""
        return [
            [suite.static_filter, reference.state(wanted(suite.dimensions), suite.folder, suite.static_filter > 0)]
            for suite in suites_of(spec)
        ]

    def reads(self, spec: Spec) -> tuple[str, ...]:
        return (
            "world",
            "evaluation.metrics",
            "evaluation.samples",
            "evaluation.rollout_samples",
            "teacher_sampling",
            "eval",
        )

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ("sample_teacher", "sample_start", "sample", *(["sample_suites"] if suites_of(spec) else []))

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return ()

    def run(self, context: Context) -> None:
        spec = context.spec
        world = build.World(spec)
        pixels, captions = world.pixels(range(spec["evaluation.samples"]), SPLIT)
        metrics = judges_of(metrics_of(spec), world, pixels, captions)
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
                        # The places in these have the law of a clip's first frame.
                        for key in ("start_gap", "caption_gap"):
                            over_set.pop(key, None)
                    numbers.update(summary(name, each, over_set))
                show(number + 1)
        full = f"teacher_{spec['teacher_sampling.steps']}"
        for key in [key for key in numbers if key.startswith(f"{full}.")]:
            numbers["teacher." + key.removeprefix(f"{full}.")] = numbers[key]
        for end in ("first", "last"):
            if f"rollout_{end}.ok" in numbers:
                numbers[f"student.ok_{end}_tenth"] = numbers[f"rollout_{end}.ok"]
        judged = {suite.name: judge(context, suite, world, metrics) for suite in suites_of(spec)}
        for name, found in judged.items():
            numbers.update(suite_numbers(name, found))
        if judged:
            weights.write_json(context.folder / "suites.json", judged)
        protocol = {
            "captions": prompts_digest(captions), "samples": len(captions),
            "rollouts": spec["evaluation.rollout_samples"], "metrics": [dict(m) for m in metrics_of(spec)],
        }  # fmt: skip
        weights.write_json(
            context.folder / "scores.json", {"captions": captions, "scores": scores, "protocol": protocol}
        )
        weights.write_json(context.folder / "metrics.json", numbers)
        tracking.log(context, numbers, captions, scores, judged)


def judges_of(metrics: Sequence[Any], world: build.World, pixels: Tensor, captions: Sequence[str]) -> list[Any]:
    """Metrics from their options, told of the world's ranges and the captions' real videos where they ask for them."""
    ranges = {name: getattr(world.dataset, name, None) for name in ("speed", "radius")}
    made = [build.construct(metric, **ranges) for metric in metrics]
    return [m.knowing(pixels, captions) if hasattr(m, "knowing") else m for m in made]


def judge(context: Context, suite: Suite, world: build.World, metrics: list[Any]) -> dict[str, Any]:
    """A suite's results, with the truth metrics over time where the world knows the truth of its captions."""
    spec, out = context.spec, context.folder / suite.name
    prompts = prompts_of(suite, world, spec["evaluation.samples"])
    videos = context.inputs["sample_suites"] / suite.name
    others = sorted(set(context.folder.parent.glob(f"*/{suite.name}/rows.jsonl")) - {out / "rows.jsonl"})
    with progress.bar(f"judge {suite.name}", suite.videos(prompts)) as show:
        found: Evaluation = evaluate_suite.evaluate(
            videos, prompts, out, suite.policy, suite.per_prompt, suite.dimensions, suite.folder, others,
            show=lambda done, total: show(done), static_filter=suite.static_filter,
        )  # fmt: skip
    if found.unjudged:
        context.say(
            f"{suite.name}: {len(found.unjudged)} dimensions are not judged; 'causvid doctor vbench --long' says what "
            "they lack"
        )
    if found.sifted:
        context.say(f"{suite.name}: {told(found.sifted)}")
    for name, problem in found.problems:
        context.say(f"{suite.name}: left out: '{name}' {problem}")
    results = json.loads((out / "results.json").read_text())
    results["over_time"] = truth_over_time(videos, found.prompts, metrics, world) | results["over_time"]
    return results


def suite_numbers(name: str, found: dict[str, Any]) -> dict[str, float]:
    """A suite's scores as ``student.SUITE.DIMENSION`` with intervals over videos, and its totals where computable."""
    out: dict[str, float] = {}
    for dimension, score in {**found["scores"], **found["proxies"]}.items():
        if score is None:
            continue
        each = [row["score"] for row in found["videos"][dimension] if row["score"] is not None]
        low, high = interval(torch.tensor(each))
        key = f"student.{name}.{dimension}"
        out |= {key: score, f"{key}.low": low, f"{key}.high": high}
    totals = {key: found["totals"][key] for key in ("total", "quality", "semantic")}
    return out | {f"student.{name}.{key}": value for key, value in totals.items() if value is not None}


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
