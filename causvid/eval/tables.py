"""What the report says in numbers: arms, measures, tables, and when fewer teacher steps are as good as all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from causvid.eval import charts
from causvid.eval.statistics import Share, difference

# How far a teacher cut to fewer steps may fall behind the student and still be called equal.
FIDELITY_TOLERANCE = 1.0  # dB
CONTRAST_TOLERANCE = 0.05

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Measure:
    """A column of the metric tables: what it is called, in which unit, and what it says."""

    key: str
    heading: str
    unit: str
    digits: int
    meaning: str


CAPTION = (
    Measure("ok", "ok", "share", 3, "share judged right: of shapes, colour, shape and direction all as captioned"),
    Measure("colour", "colour", "share", 3, "share whose shape has the captioned colour"),
    Measure("shape", "shape", "share", 3, "share whose coverage fits the captioned kind of shape"),
    Measure("direction", "direction", "share", 3, "share that move in the captioned direction"),
)
PICTURE = (
    Measure(
        "fidelity",
        "fidelity",
        "dB",
        1,
        "PSNR against the clean rendering of what was fitted; higher is better, where contrast is near 1",
    ),
    Measure(
        "contrast", "contrast", "ratio", 2, "amplitude of the ground's texture over the true one; 0 is blurred away"
    ),
    Measure("overlap", "overlap", "IoU", 3, "how well the seen shape covers the best-fitting template; 1 is best"),
    Measure(
        "trajectory",
        "trajectory",
        "px",
        2,
        "rms distance of the shape from uniform straight motion; 0 is best, 16 where no shape is seen",
    ),
    Measure("speed", "speed", "px/frame", 2, "fitted speed; right where it is the real data's, neither high nor low"),
)
SET = (
    Measure("size_gap", "size", "gap", 3, "distance of the sizes from their true law"),
    Measure("speed_gap", "speed", "gap", 3, "distance of the speeds from their true law"),
    Measure("ground_gap", "ground", "gap", 3, "distance of the ground's grey levels from their true law"),
    Measure("start_gap", "start", "gap", 3, "distance of the starting places from their true law"),
    Measure(
        "texture_gap", "texture", "gap", 3, "how alike the textures of two videos are, above chance; 1 is the same"
    ),
    Measure("caption_gap", "caption", "gap", 3, "how far the spread among videos of one caption is from the true one"),
)
TABLES = (
    ("Is the caption true?", CAPTION),
    ("Is it drawn and does it move as in the world?", PICTURE),
    ("Is the set as varied as the world?", SET),
)
GAP_NOTE = (
    "A gap from a law is the Wasserstein-1 distance, in units of its range; 0 is best, and a finite set of real "
    "videos has one too: the first row is the floor. A student that makes few kinds of video has large gaps: "
    "one texture for all shows in texture, one clip per caption in texture and caption."
)
FREE = ("size", "ground", "start_x", "start_y")  # judged as gaps over the set; their means say nothing


@dataclass(frozen=True)
class Verdict:
    """Whether the teacher at fewer steps is as good as the student, and if not, why."""

    steps: int
    equal: bool
    reasons: tuple[str, ...]


def _share(metrics: Metrics, arm: str) -> Share | None:
    share, low, high = (metrics.get(f"{arm}.ok{end}") for end in ("", ".low", ".high"))
    return None if share is None or low is None or high is None else (share, low, high)


def verdicts(metrics: Metrics, full: int, counts: Sequence[int]) -> list[Verdict]:
    """Compare the teacher at each of ``counts`` steps below ``full`` with the student, fewest first.

    Equal: the 95% interval of the teacher's ``ok`` less the student's does not lie below 0, the teacher's fidelity is
    at most FIDELITY_TOLERANCE below the student's, and its contrast at most CONTRAST_TOLERANCE further from 1. A
    measure that either lacks is not asked; without ``ok`` nothing can be said.
    """
    out = []
    for steps in sorted({count for count in counts if count < full}):
        cut, wanted = (_share(metrics, arm) for arm in (f"teacher_{steps}", "student"))
        if cut is None or wanted is None:
            continue
        within = difference(cut, wanted)[1] >= 0
        reasons = [] if within else [f"ok is {cut[0]:.3f}, against {wanted[0]:.3f}"]
        best, here = (metrics.get(f"{arm}.fidelity") for arm in ("student", f"teacher_{steps}"))
        if best is not None and here is not None and here < best - FIDELITY_TOLERANCE:
            reasons.append(f"fidelity is {best - here:.1f} dB lower")
        best, here = (metrics.get(f"{arm}.contrast") for arm in ("student", f"teacher_{steps}"))
        if best is not None and here is not None and abs(here - 1) > abs(best - 1) + CONTRAST_TOLERANCE:
            reasons.append(f"contrast is {here:.2f}, against {best:.2f}")
        out.append(Verdict(steps, not reasons, tuple(reasons)))
    return out


def fewest_equal(judged: Sequence[Verdict], full: int) -> int:
    """Fewest teacher steps that are as good as the student; ``full`` where no smaller count is."""
    return min([verdict.steps for verdict in judged if verdict.equal], default=full)


def arms(metrics: Metrics, full: int) -> list[tuple[str, str]]:
    """(arm, label) of every arm that was judged, in the order of the tables."""
    found = dict.fromkeys(key.split(".")[0] for key in metrics)
    found.pop("teacher", None)  # the full teacher once more, under a name that does not change
    cuts = sorted((int(m[1]) for arm in found if (m := re.fullmatch(r"teacher_(\d+)", arm))), reverse=True)
    cuts.sort(key=lambda steps: steps != full)
    names = {"real": "real data"} | {f"teacher_{n}": f"teacher, {n} step{'s' * (n != 1)}" for n in cuts}
    names |= {"untrained": "untrained", "ode_init": "ODE init", "student": "student"}
    names |= {"rollout_first": "rollout, first", "rollout_last": "rollout, last"}
    names |= {arm: arm.replace("_", " ") for arm in found if arm not in names}
    return [(arm, label) for arm, label in names.items() if arm in found]


def kind(arm: str) -> str:
    """Which colour an arm has on the page."""
    return "student" if arm.startswith(("student", "rollout")) else "real" if arm == "real" else "other"


def digits(value: float | None, places: int) -> str:
    """Text of a number; a dash where it is unknown."""
    return "–" if value is None else f"{value:.{places}f}".replace("-", "−")


def seconds(value: float | None) -> str:
    """Readable duration."""
    if value is None:
        return "unknown"
    if value < 1:
        return f"{1000 * value:.0f} ms"
    if value < 100:
        return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def ratio(value: float | None) -> str:
    """Text of a ratio, as in 4.5×."""
    if value is None:
        return "–"
    return f"{value:.{2 if value < 2 else 1 if value < 100 else 0}f}×"


def tables(metrics: Metrics, full: int) -> list[dict[str, Any]]:
    """The metric tables: arms as rows, measures as columns; measures that no arm has are left out."""
    shown = arms(metrics, full)
    known = {measure.key for _, group in TABLES for measure in group} | set(FREE)
    other = dict.fromkeys(key.split(".", 1)[1] for key in metrics if "." in key)
    known |= {"ok_first_tenth", "ok_last_tenth"}  # of the student: rows of their own
    rest = [key for key in other if key not in known and not key.endswith((".low", ".high"))]
    groups = [*TABLES, ("Other measures", tuple(Measure(key, key.replace("_", " "), "", 3, "") for key in rest))]
    out = []
    for title, group in groups:
        columns = [m for m in group if any(f"{arm}.{m.key}" in metrics for arm, _ in shown)]
        rows = [
            {
                "label": label,
                "kind": kind(arm),
                "cells": [
                    {
                        "value": digits(metrics.get(f"{arm}.{m.key}"), m.digits),
                        "interval": span(metrics, f"{arm}.{m.key}", m.digits),
                    }
                    for m in columns
                ],
            }
            for arm, label in shown
            if any(f"{arm}.{m.key}" in metrics for m in columns)
        ]
        if columns:
            note = GAP_NOTE if any(m.key.endswith("_gap") for m in columns) else ""
            out.append({"title": title, "columns": columns, "rows": rows, "note": note})
    return out


def span(metrics: Metrics, key: str, places: int) -> str:
    """Text of a mean's interval; empty where there is none."""
    low, high = metrics.get(f"{key}.low"), metrics.get(f"{key}.high")
    return "" if low is None or high is None else f"{digits(low, places)}–{digits(high, places)}"


def interval_charts(metrics: Metrics, full: int) -> list[charts.Intervals]:
    """``ok``, fidelity and contrast of every arm, drawn with their intervals."""
    out = []
    for key, title, label, places in (
        ("ok", "ok", "share of videos", 2),
        ("fidelity", "Fidelity", "PSNR, dB", 1),
        ("contrast", "Contrast", "texture amplitude over the true one", 2),
    ):
        rows = []
        for arm, name in arms(metrics, full):
            mean, low, high = (metrics.get(f"{arm}.{key}{end}") for end in ("", ".low", ".high"))
            if mean is not None and low is not None and high is not None:
                rows.append((name, kind(arm), mean, low, high))
        bounds = (0.0, 1.0) if key == "ok" else None
        out.append(charts.intervals(title, label, rows, bounds, places))
    return [chart for chart in out if chart]
