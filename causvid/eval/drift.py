"""Quality over time: each dimension's score clip by clip, from seconds to minutes, and the end against the start.

What goes wrong in long rollouts shows here: drift (any score that falls), saturation (colours that grow ever stronger)
and motion collapse (a picture that comes to rest).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from causvid.eval.pooling import Judged
from causvid.eval.statistics import interval

MOTION, SATURATION = "proxy_dynamics", "proxy_saturation"
AT_REST = 0.25  # of the speed of a video's first clip, below which its motion has collapsed
GROWN = 1.25  # of the saturation of a video's first clip, above which its colours have run away


def ordered(rows: Sequence[Judged]) -> dict[str, list[Judged]]:
    """Clips that have a score, by video, in order of time; of videos with two clips or more."""
    out: dict[str, list[Judged]] = {}
    for row in sorted(rows, key=lambda row: (row.video, row.clip)):
        if row.score is not None:
            out.setdefault(row.video, []).append(row)
    return {video: clips for video, clips in out.items() if len(clips) > 1}


def curves(rows: Mapping[str, Sequence[Judged]]) -> dict[str, list[dict[str, float]]]:
    """For each dimension the mean over videos of the clips that begin at each second, with its 95% interval."""
    out = {}
    for name, judged in rows.items():
        at: dict[float, list[float]] = {}
        for clips in ordered(judged).values():
            for clip in clips:
                at.setdefault(round(clip.seconds, 3), []).append(float(clip.score or 0.0))
        if at:
            out[name] = [_point(second, values) for second, values in sorted(at.items())]
    return out


def _point(second: float, values: Sequence[float]) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    low, high = interval(tensor) if len(values) > 1 else (math.nan, math.nan)
    return {"seconds": second, "mean": float(tensor.mean()), "low": low, "high": high, "videos": len(values)}


def summary(rows: Mapping[str, Sequence[Judged]]) -> dict[str, dict[str, float]]:
    """For each dimension the mean of first and last clips, and of their difference with its 95% interval over videos.

    ``collapsed`` is the share of videos whose last clip moves with less than AT_REST of the first one's speed,
    ``saturated`` that of those whose colours are more than GROWN times as strong.
    """
    out: dict[str, dict[str, float]] = {}
    for name, judged in rows.items():
        ends = [(float(c[0].score or 0.0), float(c[-1].score or 0.0)) for c in ordered(judged).values()]
        if not ends:
            continue
        first, last = torch.tensor(ends, dtype=torch.float64).unbind(1)
        low, high = interval(last - first) if len(ends) > 1 else (math.nan, math.nan)
        out[name] = {"first": float(first.mean()), "last": float(last.mean()), "change": float((last - first).mean()),
                     "low": low, "high": high, "videos": len(ends)}  # fmt: skip
        if name == MOTION:
            out[name]["collapsed"] = float((last < AT_REST * first).double().mean())
        if name == SATURATION:
            out[name]["saturated"] = float((last > GROWN * first).double().mean())
    return out
