"""Who sees whom: one predicate, from which every mask, block slice and cache eviction is derived.

A rule divides frames into blocks and says whether a query frame sees a key frame. The answer is constant over the
queries of a block. Windows are anchored at the block's nominal end, count the block itself and exclude sinks. Nothing
else in causvid decides visibility or what a streaming cache may forget, but since.py for a stream that begins anew.

Predicates are plain integer arithmetic, so they work on Python ints, on tensors, and inside flex attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from causvid.registry import register


class Rule(ABC):
    """Which key frames a query frame sees. ``causal`` rules can be streamed block by block."""

    causal: bool = True

    @abstractmethod
    def block_of(self, frame: Any) -> Any:
        """Index of the block that holds a frame."""

    @abstractmethod
    def block_range(self, block: int) -> tuple[int, int]:
        """Frames [start, stop) of a block, at its nominal size.

        Raises:
            ValueError: the rule has no stream.
        """

    @abstractmethod
    def sees(self, query: Any, key: Any) -> Any:
        """Whether the query frame sees the key frame."""

    def blocks(self, frames: int) -> list[tuple[int, int]]:
        """Blocks [start, stop) of a clip of ``frames`` frames; the last may be short."""
        starts = [i for i in range(frames) if i == 0 or self.block_of(i) != self.block_of(i - 1)]
        return list(zip(starts, [*starts[1:], frames], strict=True))

    def kept(self, block: int, frames: Iterable[int]) -> list[int]:
        """Of the given frames, those that a block after ``block`` may still see: what a cache must hold.

        Visibility of a fixed key only ever ends as the query moves on, so asking the next block is enough.
        """
        following = self.block_range(block + 1)[0]
        return [frame for frame in frames if self.sees(following, frame)]


@register("mask", "bidirectional")
@dataclass(frozen=True)
class Bidirectional(Rule):
    """Every frame sees every frame: the teacher's mask. It has no stream."""

    causal = False

    def block_of(self, frame: Any) -> Any:
        return frame * 0

    def block_range(self, block: int) -> tuple[int, int]:
        raise ValueError("the bidirectional mask has no stream: every frame needs every later one")

    def sees(self, query: Any, key: Any) -> Any:
        return query == query  # true, in the type of the arguments


@register("mask", "block_causal")
@dataclass(frozen=True)
class BlockCausal(Rule):
    """Frames see their own block and all earlier ones (CausVid, sec. 4.1).

    Args:
        block_frames: latent frames of a block.
        first_block_frames: latent frames of the first block; default the same.
    """

    block_frames: int = 3
    first_block_frames: int | None = None

    def __post_init__(self) -> None:
        if self.block_frames < 1:
            raise ValueError(f"block_frames must be at least 1, got {self.block_frames}")
        if not 1 <= self._first <= self.block_frames:
            raise ValueError(f"first_block_frames must be 1 to block_frames ({self.block_frames}), got {self._first}")

    @property
    def _first(self) -> int:
        return self.block_frames if self.first_block_frames is None else self.first_block_frames

    def block_of(self, frame: Any) -> Any:
        return (frame + self.block_frames - self._first) // self.block_frames

    def block_range(self, block: int) -> tuple[int, int]:
        stop = block * self.block_frames + self._first
        return max(0, stop - self.block_frames), stop

    def _end(self, frame: Any) -> Any:
        """First frame after the block of ``frame``."""
        return self.block_of(frame) * self.block_frames + self._first

    def sees(self, query: Any, key: Any) -> Any:
        return key < self._end(query)


@register("mask", "sliding_window")
@dataclass(frozen=True)
class SlidingWindow(BlockCausal):
    """Block causal, limited to the last ``window_frames`` frames up to the block's end, the block included.

    Args:
        window_frames: latent frames of the window; at least one block.
    """

    window_frames: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_frames < self.block_frames:
            raise ValueError(f"window_frames ({self.window_frames}) is below block_frames ({self.block_frames})")

    def sees(self, query: Any, key: Any) -> Any:
        end = self._end(query)
        return (key < end) & (key >= end - self.window_frames)


@register("mask", "sink_window")
@dataclass(frozen=True)
class SinkWindow(SlidingWindow):
    """A sliding window, and beside it the first ``sink_frames`` frames for ever (attention sinks).

    Args:
        sink_frames: first latent frames that stay visible; not counted in the window.
    """

    sink_frames: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink_frames < 1:
            raise ValueError(
                f"sink_frames must be at least 1, got {self.sink_frames}; without sinks use sliding_window"
            )

    def sees(self, query: Any, key: Any) -> Any:
        end = self._end(query)
        return (key < end) & ((key >= end - self.window_frames) | (key < self.sink_frames))


@dataclass(frozen=True)
class Group:
    """Queries that see the same keys: slots [start, stop), and the slots they see in ascending order."""

    queries: tuple[int, int]
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Pattern:
    """Visibility of one masked pass over slots, where a slot is a frame in a role.

    A plain pass has one slot per frame. The teacher-forcing pass ``[clean | noisy]``, derived from any rule, has two:
    clean slots see clean slots by the rule; a noisy slot sees its own noisy block, and of the earlier blocks the clean
    slots that the rule shows it (a block denoised over a context that was committed clean).

    Args:
        rule: the visibility rule.
        count: frames of the clip.
        teacher_forcing: whether clean slots stand before the noisy ones.
        first_frame: index of the first frame.
    """

    rule: Rule
    count: int
    teacher_forcing: bool = False
    first_frame: int = 0

    @property
    def slots(self) -> int:
        return self.count * (2 if self.teacher_forcing else 1)

    def frame_of(self, slot: Any) -> Any:
        """Frame that a slot holds."""
        return slot % self.count + self.first_frame

    def visible(self, query: Any, key: Any) -> Any:
        """Whether the query slot sees the key slot."""
        query_frame, key_frame = self.frame_of(query), self.frame_of(key)
        sees = self.rule.sees(query_frame, key_frame)
        if not self.teacher_forcing:
            return sees
        query_noisy, key_noisy = query >= self.count, key >= self.count
        same_block = self.rule.block_of(query_frame) == self.rule.block_of(key_frame)
        from_noisy = query_noisy & ((key_noisy & same_block) | (~key_noisy & sees & ~same_block))
        return from_noisy | (~query_noisy & ~key_noisy & sees)

    def matrix(self, device: torch.device | str = "cpu") -> Tensor:
        """The predicate written out: bool, ``slots slots``, queries first."""
        slot = torch.arange(self.slots, device=device)
        return self.visible(slot[:, None], slot[None, :]).expand(self.slots, self.slots)

    def dense(self, tokens_per_frame: int, device: torch.device | str = "cpu") -> Tensor:
        """The mask of tokens: bool, ``s s`` with s = slots x tokens per frame."""
        return self.matrix(device).repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)

    def mask_mod(self, tokens_per_frame: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The predicate in the form that flex attention takes."""

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.visible(query // tokens_per_frame, key // tokens_per_frame)

        return visible

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Runs of queries that see the same keys."""
        rows = self.matrix()
        groups: list[Group] = []
        start = 0
        for slot in range(1, self.slots + 1):
            if slot == self.slots or not torch.equal(rows[slot], rows[start]):
                groups.append(Group((start, slot), tuple(rows[start].nonzero().flatten().tolist())))
                start = slot
        return tuple(groups)
