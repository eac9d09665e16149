"""Proxies: what can be said of motion, consistency and sharpness without weights, with OpenCV alone.

For smoke runs, and to see that a pipeline works. A proxy's name begins with ``proxy_``, it has no scale, and so it can
never enter a total. None is a VBench score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from causvid.errors import UserError
from causvid.eval.exact import FrameDimension, enough, judge
from causvid.registry import register

SIDE = 256  # pixels of the shorter side for which flow is given
LEAST_SIDE = 64  # below it frames are enlarged: DIS matches patches of 8 pixels on a pyramid
TOP = 0.05  # share of the fastest pixels, as VBench's dynamic degree takes it
BINS = 8  # per channel


def opencv() -> Any:
    """The module ``cv2``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise UserError("proxies need OpenCV: pip install 'causvid[eval]'") from error
    return cv2


def _grey(frames: np.ndarray) -> list[np.ndarray]:
    cv2 = opencv()
    side = min(frames.shape[1:3])
    scale = max(1, -(-LEAST_SIDE // side))
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    if scale == 1:
        return grey
    return [cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR) for image in grey]


def flows(frames: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(frame, next frame, flow ``h w 2`` in pixels) of successive grey frames (dense inverse search)."""
    cv2 = opencv()
    enough(frames)
    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = _grey(frames)
    # A flow buffer would seed the next search; without one every pair stands alone.
    return [
        (before, after, solver.calc(before, after, None)) for before, after in zip(grey[:-1], grey[1:], strict=True)
    ]


@register("dimension", "proxy_dynamics")
class Dynamics(FrameDimension):
    """Proxy of dynamic degree: mean speed of the fastest 5% of pixels (DIS flow), pixels per frame at 256 pixels."""

    fidelity = "proxy"

    def score(self, frames: np.ndarray) -> float:
        speeds = []
        for _, after, flow in flows(frames):
            speed = np.sort(np.linalg.norm(flow, axis=-1).ravel())
            count = max(1, int(len(speed) * TOP))
            speeds.append(float(speed[-count:].mean()) * SIDE / min(after.shape))
        return float(np.mean(speeds))


@register("dimension", "proxy_smoothness")
class Smoothness(FrameDimension):
    """Proxy of motion smoothness: 1 - mean absolute error of each frame warped to its predecessor by DIS flow."""

    fidelity = "proxy"

    def score(self, frames: np.ndarray) -> float:
        cv2, errors = opencv(), []
        for before, after, flow in flows(frames):
            rows, columns = np.mgrid[: before.shape[0], : before.shape[1]].astype(np.float32)
            warped = cv2.remap(
                after, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            errors.append(float(np.abs(warped.astype(np.float32) - before).mean()) / 255)
        return 1 - float(np.mean(errors))


@register("dimension", "proxy_consistency")
class Consistency(FrameDimension):
    """Proxy of subject and background consistency: overlap of colour histograms with the previous and first frame."""

    fidelity = "proxy"

    def score(self, frames: np.ndarray) -> float:
        enough(frames)
        cells = (frames.astype(np.int64) * BINS) // 256
        codes = (cells[..., 0] * BINS + cells[..., 1]) * BINS + cells[..., 2]
        shares = np.stack([np.bincount(code.ravel(), minlength=BINS**3) / code.size for code in codes])
        previous = np.minimum(shares[1:], shares[:-1]).sum(1)
        first = np.minimum(shares[1:], shares[:1]).sum(1)
        return float(((previous + first) / 2).mean())


@register("dimension", "proxy_sharpness")
class Sharpness(FrameDimension):
    """Proxy of imaging quality: mean over frames of the standard deviation of the Laplacian, grey levels in [0, 1]."""

    fidelity = "proxy"

    def score(self, frames: np.ndarray) -> float:
        cv2 = opencv()
        grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float64) / 255 for frame in frames]
        return float(np.mean([cv2.Laplacian(image, cv2.CV_64F).std() for image in grey]))


@register("dimension", "proxy_saturation")
class Saturation(FrameDimension):
    """Proxy of how strong colours are: mean over pixels of the largest minus the smallest channel, in [0, 1]."""

    fidelity = "proxy"

    def score(self, frames: np.ndarray) -> float:
        return float((frames.max(-1).astype(np.int16) - frames.min(-1)).mean() / 255)


@register("metric", "vbench_proxies")
class Proxies:
    """Weight-free proxies of motion, smoothness, consistency and sharpness; never part of a VBench total."""

    def __init__(self) -> None:
        opencv()

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Per-video scores, each ``b``."""
        known: dict[str, FrameDimension] = {
            "proxy_dynamics": Dynamics(), "proxy_smoothness": Smoothness(),
            "proxy_consistency": Consistency(), "proxy_sharpness": Sharpness(),
        }  # fmt: skip
        return judge(known, videos)

    def over_set(self, scores: dict[str, Tensor]) -> dict[str, float]:
        return {}
