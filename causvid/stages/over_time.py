"""The spec's own metrics over a suite's long videos, window by window: curves beside those of the judges."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import reduce
from torch import Tensor

from causvid import build
from causvid.eval import drift
from causvid.eval.clips import LONG_SECONDS, bounds
from causvid.eval.footage import Footage
from causvid.eval.pooling import Judged
from causvid.eval.suites import RECORD
from causvid.stages.sample import from_bytes

BATCH = 64  # videos that are judged at once


def truth_over_time(
    folder: Path, prompts: Mapping[str, str], metrics: Sequence[Any], world: build.World
) -> dict[str, list[dict[str, float]]]:
    """Curves of every per-video measure, in windows of the training length; none of short videos.

    Only where the metrics know the captions' truth, as in the tiny world: they get the suite's prompts.
    """
    if not world.dataset.vocabulary or not prompts:
        return {}
    scale = int(json.loads((folder / RECORD).read_text())["scale"])
    length = world.codec.pixel_frames(world.latent_shape[0])
    rows: dict[str, list[Judged]] = {}
    names = sorted(prompts)
    for start in range(0, len(names), BATCH):
        part = names[start : start + BATCH]
        for at, window in windows(folder, part, length, scale):
            for metric in metrics:
                for key, values in metric(window, [prompts[name] for name in part]).items():
                    if values.ndim == 1:
                        rows.setdefault(key, []).extend(
                            Judged(name, round(1000 * at), float(value), length, at)
                            for name, value in zip(part, values.float().tolist(), strict=True)
                        )
    return drift.curves(rows)


def windows(folder: Path, names: Sequence[str], length: int, scale: int) -> list[tuple[float, Tensor]]:
    """(second, videos ``b f 3 h w`` in [-1, 1]) of successive windows of long videos of one length."""
    footage = [Footage(folder / name) for name in names]
    try:
        if not footage or footage[0].seconds < LONG_SECONDS or len({each.count for each in footage}) != 1:
            return []
        out = []
        for start, stop in bounds(footage[0].count, length):
            frames = [torch.from_numpy(each.frames(start, stop)[..., ::-1].copy()) for each in footage]
            small = reduce(torch.stack(frames).float(), "b f (h a) (w c) d -> b f d h w", "mean", a=scale, c=scale)
            out.append((start / footage[0].fps, from_bytes(small)))
        return out
    finally:
        for each in footage:
            each.close()
