"""Attention over a masked pass, in three ways that give the same numbers.

A kernel turns a ``Pass`` (who sees whom, at which positions, on which token grid) into a plan once per forward, and
applies the plan in every layer to unrotated queries and keys, ``b heads s d``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from causvid.attention import rope
from causvid.attention.masks import Pattern, Rule
from causvid.attention.positions import Position
from causvid.registry import register


@dataclass(frozen=True)
class Grid:
    """Token grid and head geometry of a pass: what rotary tables are made from."""

    height: int
    width: int
    head_dim: int
    theta: float
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    def rotations(self, positions: Tensor) -> Tensor:
        """Rotations of every token of frames at these positions, ``(f n) d/2``."""
        return rope.table(positions.to(self.device), self.height, self.width, self.head_dim, self.theta, self.dtype)


HORIZON = 256  # frames over which a rule is asked whether it leaves gaps, before any clip is known
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Kernel(Protocol):
    """Plans attention for a masked pass; ``check`` refuses by name what the kernel can't express."""

    def check(self, rule: Rule, position: Position) -> None: ...
    def plan(self, pattern: Pattern, position: Position, grid: Grid) -> Attend: ...


def _refuse_per_block_positions(kernel: str, rule: Rule, position: Position) -> None:
    if not position.independent_of_query(Pattern(rule, HORIZON)):
        raise ValueError(
            f"kernel '{kernel}' rotates each key once, but position '{type(position).__name__}' under mask "
            f"'{type(rule).__name__}' places keys differently for every block; use kernel 'blockwise'"
        )


def _once(pattern: Pattern, grid: Grid) -> Tensor:
    """Rotations of all slots at their absolute positions."""
    return grid.rotations(pattern.frame_of(torch.arange(pattern.slots)))


@lru_cache(maxsize=64)
def _blockwise_plan(
    pattern: Pattern, position: Position, grid: Grid
) -> tuple[Tensor | None, list[tuple[slice, slice | Tensor, Tensor | None, Tensor | None]]]:
    """Shared rotations (or None), and per group: query tokens, key tokens, and rotations of its own (or None)."""
    n = grid.tokens_per_frame
    shared = _once(pattern, grid) if position.independent_of_query(pattern) else None
    steps: list[tuple[slice, slice | Tensor, Tensor | None, Tensor | None]] = []
    for group in pattern.groups:
        start, stop = group.queries
        query_rotations = key_rotations = None
        if shared is None:
            query_frames = pattern.frame_of(torch.arange(start, stop))
            key_frames = pattern.frame_of(torch.tensor(group.keys))
            visible = key_frames.unique()
            query_rotations = grid.rotations(position.place(query_frames, visible))
            key_rotations = grid.rotations(position.place(key_frames, visible))
        steps.append(
            (slice(start * n, stop * n), key_tokens(group.keys, n, grid.device), query_rotations, key_rotations)
        )
    return shared, steps


def key_tokens(keys: tuple[int, ...], n: int, device: torch.device) -> slice | Tensor:
    """Tokens of slots, ``n`` each: a slice (no copy) where the slots are consecutive."""
    first, last = keys[0], keys[-1]
    if last - first + 1 == len(keys):
        return slice(first * n, (last + 1) * n)
    slots = torch.tensor(keys, device=device)
    return (slots[:, None] * n + torch.arange(n, device=device)).flatten()


@register("kernel", "blockwise")
@dataclass(frozen=True)
class Blockwise:
    """One unmasked SDPA per group of queries that see the same keys: no work on masked pairs, exact positions.

    With a block-causal mask it does about half of a dense mask's work, forward and backward.
    """

    def check(self, rule: Rule, position: Position) -> None:
        """Every combination can be expressed."""

    def plan(self, pattern: Pattern, position: Position, grid: Grid) -> Attend:
        shared, steps = _blockwise_plan(pattern, position, grid)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if shared is not None:
                q, k = rope.rotate(q, shared), rope.rotate(k, shared)
            parts = []
            for queries, keys, query_rotations, key_rotations in steps:
                q_part, k_part, v_part = q[:, :, queries], k[:, :, keys], v[:, :, keys]
                if query_rotations is not None and key_rotations is not None:
                    q_part, k_part = rope.rotate(q_part, query_rotations), rope.rotate(k_part, key_rotations)
                parts.append(F.scaled_dot_product_attention(q_part, k_part, v_part))
            return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

        return attend


@lru_cache(maxsize=16)
def _dense_plan(pattern: Pattern, grid: Grid) -> tuple[Tensor, Tensor | None]:
    mask = pattern.dense(grid.tokens_per_frame, grid.device)
    return _once(pattern, grid), None if bool(mask.all()) else mask


@register("kernel", "sdpa")
@dataclass(frozen=True)
class Sdpa:
    """One SDPA over all tokens with a dense boolean mask: simple, and quadratic in memory."""

    def check(self, rule: Rule, position: Position) -> None:
        _refuse_per_block_positions("sdpa", rule, position)

    def plan(self, pattern: Pattern, position: Position, grid: Grid) -> Attend:
        self.check(pattern.rule, position)
        rotations, mask = _dense_plan(pattern, grid)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(rope.rotate(q, rotations), rope.rotate(k, rotations), v, mask)

        return attend


@lru_cache(maxsize=16)
def _flex_plan(pattern: Pattern, grid: Grid) -> tuple[Tensor, object]:
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = pattern.slots * grid.tokens_per_frame
    mask = create_block_mask(
        pattern.mask_mod(grid.tokens_per_frame), None, None, tokens, tokens, device=str(grid.device)
    )
    return _once(pattern, grid), mask


@register("kernel", "flex")
@dataclass(frozen=True)
class Flex:
    """PyTorch's flex attention with a block-sparse mask from the same predicate; compiled on a GPU.

    On the CPU it runs eagerly, forward only: training there is refused.

    Args:
        compile: compile the kernel; default: on any device but the CPU.
    """

    compile: bool | None = None

    def check(self, rule: Rule, position: Position) -> None:
        _refuse_per_block_positions("flex", rule, position)

    def plan(self, pattern: Pattern, position: Position, grid: Grid) -> Attend:
        from torch.nn.attention.flex_attention import flex_attention

        self.check(pattern.rule, position)
        rotations, mask = _flex_plan(pattern, grid)
        on_cpu = grid.device.type == "cpu"
        kernel = _compiled_flex() if (self.compile if self.compile is not None else not on_cpu) else flex_attention

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if on_cpu and torch.is_grad_enabled() and q.requires_grad:
                raise ValueError("kernel 'flex' has no backward on the CPU; train with kernel 'blockwise' or 'sdpa'")
            return kernel(rope.rotate(q, rotations), rope.rotate(k, rotations), v, block_mask=mask)  # type: ignore[return-value]

        return attend


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # type: ignore[return-value]
