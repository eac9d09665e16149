"""Which position along time a frame takes when a block looks at it.

Keys are kept unrotated, so a policy may place a key differently for every block that sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from causvid.attention.masks import Pattern
from causvid.registry import register


class Position(Protocol):
    """A position policy."""

    def place(self, frames: Tensor, visible: Tensor) -> Tensor:
        """Positions of ``frames`` (int64) for a block that sees the frames ``visible`` (ascending, unique)."""
        ...

    def independent_of_query(self, pattern: Pattern) -> bool:
        """Whether one rotation per key, at its absolute position, serves every query of a pass."""
        ...


@register("position", "absolute")
@dataclass(frozen=True)
class Absolute:
    """A frame's position is its index in the video, without bound."""

    def place(self, frames: Tensor, visible: Tensor) -> Tensor:
        return frames

    def independent_of_query(self, pattern: Pattern) -> bool:
        return True


@register("position", "window_relative")
@dataclass(frozen=True)
class WindowRelative:
    """A frame's position is its rank among the frames that the block sees, so positions never leave the window.

    Without sinks the visible frames are consecutive and the ranks differ from absolute positions by a constant, which
    rotary attention does not see; with sinks the gap between sinks and window is closed.
    """

    def place(self, frames: Tensor, visible: Tensor) -> Tensor:
        return torch.searchsorted(visible, frames)

    def independent_of_query(self, pattern: Pattern) -> bool:
        seen = ({pattern.frame_of(slot) for slot in group.keys} for group in pattern.groups)
        return all(max(frames) - min(frames) + 1 == len(frames) for frames in seen)
