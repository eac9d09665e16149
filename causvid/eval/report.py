"""The report page: pure functions from plain data to one self-contained HTML page.

What the page says about the data is decided here; ``charts.py`` lays out the drawings, ``report.html.j2`` the page.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from causvid.eval import charts
from causvid.eval.tables import (
    CONTRAST_TOLERANCE,
    FIDELITY_TOLERANCE,
    Metrics,
    Verdict,
    digits,
    fewest_equal,
    interval_charts,
    ratio,
    seconds,
    span,
    tables,
    verdicts,
)

TEMPLATE, STYLE = (Path(__file__).with_name(name) for name in ("report.html.j2", "report.css"))

# What is drawn along the y axis of a logged number, and a word on how to read it.
AXES = {
    "loss": ("loss", ""),
    "gradient_norm": ("L2 norm, before clipping", ""),
    "x0_error": ("mean squared error of x0", "By band of the noise level t, from the value given up to the next."),
    "gradient": ("rms over elements", "What moves the student: fake minus real score, normalised."),
    "normaliser": ("mean absolute distance", "Of the student's samples from the real score's estimate."),
    "fake_score_loss": ("denoising loss", "On the student's samples, at the last update of each turn."),
    "discriminator_loss": ("loss", "At the last update of each turn."),
}
# The chart of each measure that a monitor logs as ``held_out.MEASURE``; the others stay in the file of curves.
HELD_OUT = {
    **dict.fromkeys(("ok", "colour", "shape", "direction"), "held-out pairs"),
    "fidelity": "held-out fidelity",
    "contrast": "held-out contrast",
}
AXES |= {
    "held-out pairs": ("share", "Of a few held-out pairs of caption and noise, sampled as at the end."),
    "held-out fidelity": ("dB", ""),
    "held-out contrast": ("1 is sharp", ""),
}
DMD_LOSS = "For DMD half the mean square of its gradient: no distance to a goal, so it need not fall."


@dataclass(frozen=True)
class Cell:
    """One video of the page, with what was judged true of it."""

    label: str
    detail: str
    mp4: bytes
    marks: Sequence[tuple[str, bool]] = ()

    @property
    def source(self) -> str:
        return "data:video/mp4;base64," + base64.b64encode(self.mp4).decode()


@dataclass(frozen=True)
class Row:
    """Videos of one caption, side by side."""

    caption: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Training:
    """Curves of a training stage: one mapping of numbers per step, as logged."""

    rows: Sequence[Mapping[str, Any]]
    total: int
    loss: str


@dataclass(frozen=True)
class StageRecord:
    """A finished stage; unknown times are None."""

    name: str
    identity: str
    inputs: Sequence[str] = ()
    seconds: float | None = None
    finished: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """Everything that the page shows, as plain data.

    ``metrics`` holds ``arm.measure`` means with ``.low`` and ``.high``; ``timings`` is the sample stage's.
    """

    name: str
    about: str
    spec_yaml: str
    differences: Sequence[tuple[str, str, str]]
    has_base: bool
    metrics: Metrics
    timings: Metrics
    full_steps: int
    teacher_steps: Sequence[int]
    student_steps: int
    causal: bool
    rollout_factor: int
    samples: Sequence[Row]
    rollouts: Sequence[Row]
    training: Mapping[str, Training]
    stages: Sequence[StageRecord]
    metric_notes: Mapping[str, str]
    environment: Mapping[str, Any]
    train_stream_mismatch: str = ""


def headline(findings: Findings, equal: int | None) -> list[dict[str, str]]:
    """The numbers that a reader wants first: value, what it is, and a detail."""
    m, t, full = findings.metrics, findings.timings, findings.full_steps
    teacher, student = m.get("teacher.ok"), m.get("student.ok")
    tiles = [
        ("Teacher ok", digits(teacher, 3), f"{full} steps · {span(m, 'teacher.ok', 3)}", teacher),
        ("Student ok", digits(student, 3), f"{findings.student_steps} steps · {span(m, 'student.ok', 3)}", student),
    ]
    share = student / teacher if student is not None and teacher else None
    tiles.append(("Student over teacher", digits(share, 3), "ratio of their ok", share))
    for key, what in (("latency", "to the first frames"), ("throughput", "whole clips")):
        value, other = t.get(f"{key}_ratio"), t.get(f"{key}_ratio_vs_{equal}")
        detail = f"{what}, against the {full}-step teacher"
        if other is not None:
            detail += f"; {ratio(other)} against {equal} steps, its fewest that are as good as the student"
        tiles.append((f"{key.capitalize()} ratio", ratio(value), detail, value))
    first, last = m.get("student.ok_first_tenth"), m.get("student.ok_last_tenth")
    value = f"{digits(first, 3)} → {digits(last, 3)}"
    length = f"of rollouts {findings.rollout_factor}× the training length"
    tiles.append(("ok, first → last part", value, length, first))
    return [{"label": a, "value": b, "detail": c.removesuffix(" · ")} for a, b, c, known in tiles if known is not None]


def latency(findings: Findings, judged: Sequence[Verdict], equal: int | None) -> list[dict[str, str]]:
    """Rows of the latency table: the student, the full teacher, and the teacher at fewer steps."""
    t, verdict = findings.timings, {v.steps: v for v in judged}
    if t.get("clip_s") is None:
        return []
    first, clip, full = t.get("latency_s"), t["clip_s"] or 0.0, findings.full_steps
    rows = [{
        "label": f"student, {findings.student_steps} steps", "kind": "student", "first": seconds(first),
        "clip": seconds(clip), "sooner": "", "faster": "", "quality": "",
    }]  # fmt: skip
    for steps in sorted({full, *findings.teacher_steps}, key=lambda n: (n != full, -n)):
        end = "" if steps == full else f"_vs_{steps}"
        sooner, faster = t.get(f"latency_ratio{end}"), t.get(f"throughput_ratio{end}")
        if faster is None:
            continue
        found = verdict.get(steps)
        quality = "" if found is None else _said(found, equal)
        took = seconds(t["teacher_s"] if steps == full and t.get("teacher_s") is not None else clip * faster)
        rows.append({
            "label": f"teacher, {steps} steps", "kind": "equal" if steps == equal != full else "other", "first": took,
            "clip": took, "sooner": ratio(sooner), "faster": ratio(faster), "quality": quality,
        })  # fmt: skip
    return rows


def _said(verdict: Verdict, equal: int | None) -> str:
    if not verdict.equal:
        return "; ".join(verdict.reasons)
    return "as good, and the fewest steps that are" if verdict.steps == equal else "as good"


def training_charts(stage: str, training: Training) -> list[charts.Chart]:
    """A chart for each number that a stage logged; numbers named ``NAME_t0.25`` share the chart of NAME."""
    grouped: dict[str, dict[str, list[charts.Point]]] = {}
    for row in training.rows:
        for key, value in row.items():
            if key == "step" or not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            banded = re.fullmatch(r"(.+)_(t\d+\.\d+)", key)
            name, label = (banded[1], banded[2].replace("t", "t ", 1)) if banded else (key, key)
            judged = key.removeprefix("held_out.")
            if judged != key:
                if judged not in HELD_OUT:
                    continue
                name, label = HELD_OUT[judged], judged
            grouped.setdefault(name, {}).setdefault(label, []).append((float(row["step"]), float(value)))
    grouped = {name: dict(sorted(series.items())) for name, series in grouped.items()}
    order = sorted(
        grouped,
        key=lambda name: (name != "loss", "held-out" in name, not name.endswith("loss"), "gradient_norm" in name),
    )
    drawn = []
    for name in order:
        title = "student loss" if stage == "distill" and name == "loss" else name.replace("_", " ")
        axis = AXES.get(name) or (AXES["gradient_norm"] if name.endswith("gradient_norm") else ("value", ""))
        note = DMD_LOSS if name == "loss" and "gradient" in grouped else axis[1]
        step = "update of the student" if stage == "distill" else "training step"
        title = title[0].upper() + title[1:]
        may_log = name not in HELD_OUT.values()  # shares and decibels are read on a plain axis
        bounds = (0.0, 1.0) if axis[0] == "share" else (-math.inf, math.inf)
        drawn.append(
            charts.curves(title, axis[0], step, grouped[name], training.total, note, may_log=may_log, bounds=bounds)
        )
    return [chart for chart in drawn if chart]


def stage_graph(stages: Sequence[StageRecord]) -> charts.Graph:
    """The stages in the order they ran; what the last one, the report, reads is not drawn: it reads all."""
    rows = [
        (s.name, s.identity, "" if s.name == "report" else seconds(s.seconds), s.finished, s.seconds) for s in stages
    ]
    return charts.graph(rows, {stage.name: stage.inputs for stage in stages if stage.name != "report"})


def environments(stages: Sequence[StageRecord], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What results may depend on, once for all stages that share it; the report's own first."""
    groups: dict[str, dict[str, Any]] = {_ordered(now): {"stages": ["report"], "facts": _facts(now)}}
    for stage in stages:
        if stage.environment:
            group = groups.setdefault(_ordered(stage.environment), {"stages": [], "facts": _facts(stage.environment)})
            group["stages"].append(stage.name)
    return list(groups.values())


def _ordered(environment: Mapping[str, Any]) -> str:
    """The same text for the same environment, whether it was read from a record or is this process's."""
    return json.dumps(environment, sort_keys=True)


def _facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    packages = environment.get("packages") or {}
    facts = [("Packages", ", ".join(f"{k} {v}" for k, v in packages.items() if v))]
    names = {"python": "Python", "machine": "Machine", "threads": "Threads", "commit": "Commit"}
    facts += [(label, str(environment[key])) for key, label in names.items() if environment.get(key) is not None]
    return [(label, value) for label, value in facts if value]


def render(findings: Findings) -> str:
    """The page."""
    full = findings.full_steps
    judged = verdicts(findings.metrics, full, findings.teacher_steps)
    equal = fewest_equal(judged, full) if judged else None
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE.name).render(
        f=findings,
        c=charts,
        tiles=headline(findings, equal),
        tables=tables(findings.metrics, full),
        intervals=interval_charts(findings.metrics, full),
        latency=latency(findings, judged, equal),
        equal=equal,
        fidelity_tolerance=FIDELITY_TOLERANCE,
        contrast_tolerance=CONTRAST_TOLERANCE,
        training={name: training_charts(name, training) for name, training in findings.training.items()},
        graph=stage_graph(findings.stages),
        environments=environments(findings.stages, findings.environment),
    )
