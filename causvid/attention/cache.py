"""What streaming keeps: unrotated keys and values of past blocks, as immutable tensors.

A cache is read while a block is denoised and written once, when the block is committed; committing returns a new cache
and leaves the old one untouched. That makes a cache safe under autograd and activation recomputation, lets a stream be
forked by keeping a reference, and lets eviction be a filter over frames that the visibility rule decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor

from causvid.attention.masks import Rule
from causvid.attention.positions import Position
from causvid.registry import register
from causvid.types import Text

LayerKV = tuple[Tensor, Tensor]


@register("cache", "rule")
@dataclass(frozen=True)
class KVCache:
    """Keys and values that later blocks may see under ``rule``; everything else is forgotten at commit.

    Args:
        rule: visibility of the stream; defaults to the model's own mask where a model makes the cache.
        position: position policy of the stream; default the model's own.

    Attributes:
        blocks: one entry per kept frame range: its frames and, per layer, (k, v) of ``b heads (f n) d``.
        next_block, next_frame: where the stream goes on.
    """

    rule: Rule
    blocks: tuple[tuple[tuple[int, ...], tuple[LayerKV, ...]], ...] = ()
    next_block: int = 0
    next_frame: int = 0
    cross: CrossMemo = field(default_factory=lambda: CrossMemo(), compare=False)
    position: Position | None = None

    def __post_init__(self) -> None:
        if not self.rule.causal:
            raise ValueError(f"mask '{type(self.rule).__name__}' has no stream, so it has no cache")

    @property
    def frames(self) -> tuple[int, ...]:
        """Indices of the kept frames, ascending."""
        return tuple(frame for frames, _ in self.blocks for frame in frames)

    @property
    def bytes(self) -> int:
        """Bytes held in keys and values."""
        return sum(k.nbytes + v.nbytes for _, layers in self.blocks for k, v in layers)

    def forked(self) -> KVCache:
        """The same past with a memo of its own, so that two streams with two prompts do not push each other out."""
        return replace(self, cross=CrossMemo())

    def at(self, block: int) -> KVCache:
        """The same keys and values, going on at a later block: what lies between is not seen.

        Raises:
            ValueError: an earlier block.
        """
        if block < self.next_block:
            raise ValueError(f"the stream stands at block {self.next_block}, so it can't go on at {block}")
        return replace(self, next_block=block, next_frame=self.rule.block_range(block)[0])

    def read(self, layer: int) -> list[LayerKV]:
        """Kept (k, v) of a layer, oldest first."""
        return [layers[layer] for _, layers in self.blocks]

    def check_block(self, count: int, several: bool = False) -> None:
        """Accept only the frames that come next: one block, or the short last one.

        Args:
            several: accept more blocks than one: they are denoised together, and none of them is kept.

        Raises:
            ValueError: more frames than the next block holds, or none.
        """
        start, stop = self.rule.block_range(self.next_block)
        if self.next_frame != start:
            raise ValueError(f"block {self.next_block - 1} was short, so it was the last: the stream has ended")
        if not 1 <= count <= (count if several else stop - start):
            raise ValueError(f"block {self.next_block} takes 1 to {stop - start} frames, got {count}")

    def committed(self, layers: tuple[LayerKV, ...], count: int) -> KVCache:
        """A new cache with the block's keys and values, less what no later block sees.

        Args:
            layers: (k, v) per layer, ``b heads (f n) d``.
            count: frames of the block.
        """
        self.check_block(count)
        frames = tuple(range(self.next_frame, self.next_frame + count))
        kept = set(self.rule.kept(self.next_block, [*self.frames, *frames]))
        blocks = []
        # Copies: the values are a view of the fused projection, of which they would keep all three parts alive.
        fresh = tuple((k.contiguous(), v.contiguous()) for k, v in layers)
        for block_frames, block_layers in [*self.blocks, (frames, fresh)]:
            stay = [i for i, frame in enumerate(block_frames) if frame in kept]
            if len(stay) == len(block_frames):
                blocks.append((block_frames, block_layers))
            elif stay:
                rows = tuple(_take_frames(kv, stay, len(block_frames)) for kv in block_layers)
                blocks.append((tuple(block_frames[i] for i in stay), rows))
        return replace(self, blocks=tuple(blocks), next_block=self.next_block + 1, next_frame=self.next_frame + count)


def _take_frames(kv: LayerKV, stay: list[int], count: int) -> LayerKV:
    """Rows of the frames that stay, copied so that the rest of the block can be freed."""
    index = torch.tensor(stay, device=kv[0].device)
    k, v = (rearrange(x, "b k (f n) d -> b k f n d", f=count).index_select(2, index) for x in kv)
    return rearrange(k, "b k f n d -> b k (f n) d"), rearrange(v, "b k f n d -> b k (f n) d")


class CrossMemo:
    """Cross-attention keys and values of one prompt, computed once per stream; a new ``Text`` replaces them.

    Used only without gradient: weights do not change within a stream.
    """

    def __init__(self) -> None:
        self._text: Text | None = None
        self._layers: dict[int, LayerKV] = {}

    def get(self, text: Text, layer: int) -> LayerKV | None:
        return self._layers.get(layer) if self._text is text else None

    def put(self, text: Text, layer: int, kv: LayerKV) -> None:
        if self._text is not text:
            self._text, self._layers = text, {}
        self._layers[layer] = kv
