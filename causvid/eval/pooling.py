"""From clips to videos to one raw score of a dimension.

Rows are pooled after all of them are there, so the number of processes that made them can't matter. Upstream pools
within each process: subject and background are weighted by frame on one GPU and by video on several, and appearance
style takes only a video's last frame on several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from causvid.eval.clips import Compat
from causvid.eval.dimensions import Pooling


@dataclass(frozen=True)
class Judged:
    """The score of one clip. None: the judge has nothing to say (no object to have a colour), which is not 0."""

    video: str
    clip: int
    score: float | None
    frames: int = 1
    seconds: float = 0.0  # where in the video the clip begins


def per_video(rows: Iterable[Judged]) -> dict[str, float | None]:
    """Mean over each video's clips that have a score, clips weighing the same; None where none has."""
    clips: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row.video, row.clip)):
        scores = clips.setdefault(row.video, [])
        if row.score is not None:
            if not math.isfinite(row.score):
                raise ValueError(f"the score of {row.video}, clip {row.clip}, is {row.score}")
            scores.append(row.score)
    return {video: sum(scores) / len(scores) if scores else None for video, scores in clips.items()}


def pool(rows: Iterable[Judged], rule: Pooling, compat: Compat = "clean") -> float | None:
    """The raw score of a dimension over all videos; None where nothing was judged.

    ``clips_then_videos``: videos weigh the same, whatever their length. ``found_only``: so do those of them that have a
    score; upstream divides by zero where none has. ``frames``: as ``clips_then_videos``; under ``upstream`` each pair
    of frames weighs the same, as on one GPU.

    Raises:
        ValueError: a clip without a score where the rule does not allow one.
    """
    rows = list(rows)
    silent = [row for row in rows if row.score is None]
    if silent and rule != "found_only":
        raise ValueError(f"{silent[0].video}, clip {silent[0].clip}, has no score")
    if rule == "frames" and compat == "upstream":
        pairs = [(row.frames - 1, row.score) for row in rows if row.score is not None and row.frames > 1]
        total = sum(count for count, _ in pairs)
        return sum(count * score for count, score in pairs) / total if total else None
    scores = [score for score in per_video(rows).values() if score is not None]
    return sum(scores) / len(scores) if scores else None
