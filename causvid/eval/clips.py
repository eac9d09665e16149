"""VBench-Long's handling of long videos: clips, first frames, and the mapping that joins its slow and fast branch.

A long video is cut into clips that are judged as usual (slow branch). For subject and background the clips' first
frames make a second video (fast branch); its score is mapped to the slow branch's range and averaged with it.

``long_compat: upstream`` does as VBench 0.1.5 does, to be comparable with published numbers; ``clean`` does it right.
Where they differ is said at each function. Every report stamps which was used.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from causvid.errors import UserError
from causvid.eval.dimensions import Dimension, Weights, dimensions

Compat = Literal["upstream", "clean"]
SLOW_WEIGHT = FAST_WEIGHT = 0.5
LONG_SECONDS = 5.0  # videos of this length and more are long
# Data of the judges, like weights: not part of VBench's wheel. Digests of the files in VBench at 45e79ec.
TABLES = {
    "subject_consistency": Weights(
        "long/subject_mapping_table.yaml", "VBench, vbench2_beta_long/configs", 2373,
        "ad6c730b772577d573594ce1ace40e7a70c29ed6b026325589697061cdb86269",
    ),
    "background_consistency": Weights(
        "long/background_mapping_table.yaml", "VBench, vbench2_beta_long/configs", 2380,
        "47cc19bd7f22907e7c6515f0181d2c032187842d5d1686a238d0341ac2e5a440",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """How long videos are cut. ``reencode``: clips are encoded lossily before they are judged, as upstream does.

    ``semantic``: at scene cuts first, so that no clip shows two scenes; see :mod:`causvid.eval.scenes`.
    """

    compat: Compat = "clean"
    semantic: bool = False

    @property
    def reencode(self) -> bool:
        return self.compat == "upstream"

    @property
    def label(self) -> str:
        judged = "clips re-encoded" if self.reencode else "clips of decoded frames"
        return f"long_compat={self.compat}, {judged}{', cut at scenes' if self.semantic else ''}"

    def seconds(self, dimension: str, prompt_dimensions: Sequence[str]) -> int:
        """Length of the clips in which a prompt's video is judged.

        Clean: the dimension's own. Upstream: the longest that any dimension of the prompt asks for, so that aesthetic
        and imaging quality are judged on 10 s clips because their prompts are those of overall consistency.

        Raises:
            UserError: a dimension that is unknown.
        """
        known: Mapping[str, type[Dimension]] = dimensions()
        asked = [dimension, *prompt_dimensions] if self.compat == "upstream" else [dimension]
        for name in asked:
            if name not in known:
                raise UserError(f"no clip length is known for dimension '{name}'")
        return max(known[name].clip_seconds for name in asked)

    def clip_frames(self, fps: float, seconds: int) -> int:
        """Frames of a clip: the nearest whole number; upstream cuts the rate itself down, so 29.97 fps becomes 29.

        Raises:
            UserError: a rate that is not positive and finite: upstream fails on these with a TypeError.
        """
        if not math.isfinite(fps) or fps <= 0:
            raise UserError(f"a frame rate of {fps} is not usable; write the video with a constant positive rate")
        frames = int(fps) * seconds if self.compat == "upstream" else round(fps * seconds)
        if frames < 1:
            raise UserError(f"a frame rate of {fps} leaves no frame in a clip of {seconds} s")
        return frames


def bounds(frames: int, length: int) -> list[tuple[int, int]]:
    """[start, stop) of each clip. A rest is extended backwards to a whole clip; a short video is one clip.

    81 frames in clips of 32: [0, 32), [32, 64), [49, 81).

    Raises:
        ValueError: no frames.
    """
    if frames < 1 or length < 1:
        raise ValueError(f"clips need at least one frame, got {frames} in clips of {length}")
    if frames < length:
        return [(0, frames)]
    whole = [(start, start + length) for start in range(0, frames - length + 1, length)]
    return whole if frames % length == 0 else [*whole, (frames - length, frames)]


def first_frames(cuts: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Bounds of the fast branch's frames, the first of each clip in order; none of a single clip, which has no branch.

    Clips are known by their bounds. Upstream goes by file names cut at the first ``_``, and so loses the fast branch of
    prompts that hold one; and by the order in which a folder lists them.
    """
    return tuple((start, start + 1) for start, _ in cuts) if len(cuts) > 1 else ()


@dataclass(frozen=True)
class Mapping101:
    """A table from fast to slow scores: ``fast`` ascending, ``slow`` beside it."""

    fast: tuple[float, ...]
    slow: tuple[float, ...]

    def __call__(self, score: float) -> float:
        """Linear between the points; the end values beyond them."""
        place = bisect_left(self.fast, score)
        if place == 0:
            return self.slow[0]
        if place == len(self.fast):
            return self.slow[-1]
        low, high = self.fast[place - 1], self.fast[place]
        return self.slow[place - 1] + (self.slow[place] - self.slow[place - 1]) * (score - low) / (high - low)


def read_mapping(path: Path) -> Mapping101:
    """The table of upstream's YAML: 101 lines ``fast: slow`` over [0, 1].

    Raises:
        UserError: no such file, or not 101 ascending points.
    """
    try:
        table = yaml.safe_load(path.read_text("utf-8"))
        points = sorted((float(fast), float(slow)) for fast, slow in table.items())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; copy it from {TABLES['subject_consistency'].source}") from error
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a mapping of 101 numbers: {error}") from error
    fast, slow = zip(*points, strict=True) if points else ((), ())
    if len(points) != 101 or fast != tuple(n / 100 for n in range(101)) or list(slow) != sorted(slow):
        raise UserError(f"{path} must hold 101 points 0.00 to 1.00 with ascending values, got {len(points)}")
    return Mapping101(fast, slow)


def fuse(slow: float, fast: float | None, mapping: Mapping101, policy: Policy) -> float:
    """One score of a long video from both branches; the slow one alone where there is a single clip.

    A fast score of 0 is a score: the clips have nothing in common, and it counts as its mapped value. Upstream takes a
    mapped 0 for a missing branch, and drops it.
    """
    if fast is None:
        return slow
    mapped = mapping(fast)
    if policy.compat == "upstream" and mapped == 0:
        return slow
    return SLOW_WEIGHT * slow + FAST_WEIGHT * mapped
