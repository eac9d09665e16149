"""The size of clips without any clips: what a spec needs that only samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from causvid.errors import UserError
from causvid.registry import register


@register("dataset", "canvas")
class Canvas:
    """Height, width and frames of clips to be made; it holds no data and no prompts.

    Args:
        frames: pixel frames of a clip.
        height, width: pixels.
    """

    vocabulary: tuple[str, ...] = ()
    holds_clips = False

    def __init__(self, frames: int = 81, height: int = 480, width: int = 832) -> None:
        if min(frames, height, width) < 1:
            raise ValueError(f"frames, height and width must be at least 1, got {frames}, {height} and {width}")
        self.pixel_shape = (frames, 3, height, width)

    def batch(self, indices: Sequence[int], split: str = "train") -> tuple[Tensor, list[str]]:
        """There is nothing to draw from.

        Raises:
            UserError: always.
        """
        raise UserError("dataset 'canvas' holds no clips: it is for sampling; set world.dataset to train or evaluate")
