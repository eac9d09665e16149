"""What a stream keeps and where it places it, chosen at inference: cache policies, and the bytes that they take.

A policy turns the mask that a model was trained with into the visibility rule of the stream, and names the positions.
Blocks stay those of training. A rule other than the trained one is a legal choice, and a mismatch between training and
streaming (decision 8): measure before you trust it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from causvid.attention.masks import BlockCausal, Rule, SinkWindow, SlidingWindow
from causvid.attention.positions import Absolute, Position, WindowRelative
from causvid.registry import register

Positions = Literal["absolute", "window_relative"]


class CachePolicy(Protocol):
    """A cache policy; ``frames`` is the length of a training clip in latents."""

    def rule(self, mask: Rule, frames: int) -> Rule: ...
    def place(self) -> Position | None: ...


def _blocks(mask: Rule) -> tuple[int, int]:
    """(frames of a block, of the first one)."""
    first, second = mask.block_range(0), mask.block_range(1)
    return second[1] - second[0], first[1] - first[0]


def _position(name: Positions) -> Position:
    return WindowRelative() if name == "window_relative" else Absolute()


@register("cache_policy", "trained")
@dataclass(frozen=True)
class Trained:
    """The mask and the positions that the model was trained with."""

    def rule(self, mask: Rule, frames: int) -> Rule:
        return mask

    def place(self) -> Position | None:
        return None


@register("cache_policy", "full")
@dataclass(frozen=True)
class Full:
    """Everything is kept: memory and time per block grow with the stream.

    Args:
        position: ``absolute`` or ``window_relative``; without a gap in what is seen the two are the same.
    """

    position: Positions = "absolute"

    def rule(self, mask: Rule, frames: int) -> Rule:
        return BlockCausal(*_blocks(mask))

    def place(self) -> Position | None:
        return _position(self.position)


@register("cache_policy", "window")
@dataclass(frozen=True)
class Window:
    """A rolling window: the last latent frames up to the block's end, the block included; of any length, at one size.

    Args:
        window_frames: latent frames of the window; default the length of a training clip.
        position: ``absolute`` or ``window_relative``; without a gap in what is seen the two are the same.
    """

    window_frames: int | None = None
    position: Positions = "absolute"

    def rule(self, mask: Rule, frames: int) -> Rule:
        return SlidingWindow(*_blocks(mask), window_frames=self.window_frames or frames)

    def place(self) -> Position | None:
        return _position(self.position)


@register("cache_policy", "sink_window")
@dataclass(frozen=True)
class SinkAndWindow:
    """A rolling window, and the stream's first frames for ever (attention sinks).

    Args:
        window_frames: latent frames of the window; default what a block saw in training, by the mask's window or the
            length of a clip, less the sink, and a block at least: the oldest frames are replaced by the first.
        sink_frames: latent frames of the sink; default one block.
        position: ``window_relative`` closes the gap between sink and window, ``absolute`` lets it grow without bound.
    """

    window_frames: int | None = None
    sink_frames: int | None = None
    position: Positions = "window_relative"

    def rule(self, mask: Rule, frames: int) -> Rule:
        size, first = _blocks(mask)
        sink = self.sink_frames or first
        seen = min(frames, getattr(mask, "window_frames", frames) + getattr(mask, "sink_frames", 0))
        return SinkWindow(size, first, self.window_frames or max(size, seen - sink), sink)

    def place(self) -> Position | None:
        return _position(self.position)


@dataclass(frozen=True)
class Footprint:
    """What a stream's keys and values are made of, and so how many bytes they take, before any is allocated.

    Attributes:
        layers, width: layers of the network, and width of its attention.
        tokens: tokens of a latent frame.
        item: bytes of a number.
        batch: streams side by side.
    """

    layers: int
    width: int
    tokens: int
    item: int
    batch: int = 1

    @property
    def frame(self) -> int:
        """Bytes of one latent frame's keys and values in all layers."""
        return 2 * self.batch * self.layers * self.tokens * self.width * self.item

    def after(self, rule: Rule, blocks: int) -> int:
        """Bytes that the cache holds when ``blocks`` blocks are committed: what the next block may see of them.

        It never falls as a stream goes on, so that of the last block is the most.
        """
        if not blocks:
            return 0
        return self.frame * len(rule.kept(blocks - 1, range(rule.block_range(blocks - 1)[1])))
