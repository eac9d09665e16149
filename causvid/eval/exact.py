"""What VBench computes without weights, exactly as it does: temporal flickering.

Frames are ``f h w 3`` uint8, in any order of the channels: the mean does not depend on it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from causvid.data.video import to_bytes
from causvid.eval.dimensions import Dimension, quality
from causvid.registry import register


class FrameDimension(Dimension):
    """A dimension that this package computes from the frames alone."""

    imports = ()

    @abstractmethod
    def score(self, frames: np.ndarray) -> float:
        """The raw score of one video, ``f h w 3`` uint8, at least two frames."""


def enough(frames: np.ndarray) -> None:
    """Refuse what says nothing about time.

    Raises:
        ValueError: not ``f h w 3`` uint8, or fewer than two frames.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are 'f h w 3' uint8, got {frames.shape} {frames.dtype}")
    if len(frames) < 2:
        raise ValueError(f"a video needs at least two frames to be judged over time, got {len(frames)}")


def flickering(frames: np.ndarray) -> float:
    """(255 - mean absolute difference of successive frames) / 255: 1 is still.

    Upstream takes each pair's mean over float32 pixels; whole numbers up to 255 are exact in both.

    Raises:
        ValueError: fewer than two frames.
    """
    enough(frames)
    pairs = zip(frames[:-1], frames[1:], strict=True)
    differences = [np.abs(after.astype(np.int16) - before).mean(dtype=np.float64) for before, after in pairs]
    return float((255.0 - np.mean(differences)) / 255.0)


@register("dimension", "temporal_flickering")
class TemporalFlickering(FrameDimension):
    """(255 - mean absolute difference of successive frames) / 255, exact here; only its filter of videos needs RAFT."""

    scale = quality(0.6293)
    fidelity = "exact"
    suite = "temporal_flickering"

    def score(self, frames: np.ndarray) -> float:
        return flickering(frames)


def frames_of(video: Tensor) -> np.ndarray:
    """``f c h w`` in [-1, 1] as ``f h w 3`` uint8."""
    return rearrange(to_bytes(video).expand(-1, 3, -1, -1), "f c h w -> f h w c").contiguous().cpu().numpy()


def judge(dimensions: dict[str, FrameDimension], videos: Tensor) -> dict[str, Tensor]:
    """Scores ``b`` of each dimension, of videos ``b f c h w``."""
    rows = [{name: dimension.score(frames_of(video)) for name, dimension in dimensions.items()} for video in videos]
    return {name: torch.tensor([row[name] for row in rows]) for name in dimensions}


@register("metric", "vbench_exact")
class Exact:
    """VBench's dimensions that need no weights, exact: ``temporal_flickering``. Of decoded, never encoded, frames."""

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Per-video scores, each ``b``."""
        return judge({"temporal_flickering": TemporalFlickering()}, videos)

    def over_set(self, scores: dict[str, Tensor]) -> dict[str, float]:
        return {}
