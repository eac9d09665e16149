"""Rotary position embedding over (frame, height, width), as unit complex numbers.

The head's d / 2 complex pairs are split as (d - 4 (d // 6), 2 (d // 6), 2 (d // 6)) / 2 over frame, height and width
(Wan2.1). Positions are arguments, so nothing is bounded by a table's length, and a frame's position may be any real.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def split_pairs(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs given to frame, height and width; they add up to ``head_dim / 2``.

    Raises:
        ValueError: the head's width is odd or below 6 (each axis needs a pair).
    """
    if head_dim % 2 or head_dim < 6:
        raise ValueError(f"head width must be even and at least 6, got {head_dim}")
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def _rotations(positions: Tensor, pairs: int, theta: float) -> Tensor:
    rates = theta ** -(torch.arange(pairs, dtype=torch.float64, device=positions.device) / pairs)
    angles = positions.to(torch.float64)[:, None] * rates
    return torch.polar(torch.ones_like(angles), angles)


def table(frames: Tensor, height: int, width: int, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Rotations for every token of the given frames: complex, ``(f h w) d/2``.

    Args:
        frames: position of each frame, ``f``, any real numbers.
        height, width: tokens along each axis.
        head_dim: width of a head.
        theta: base of the geometric series of rates.
        dtype: real type of the tensors to be rotated; angles are always computed in fp64.
    """
    pairs_f, pairs_h, pairs_w = split_pairs(head_dim)
    device = frames.device
    count = frames.shape[0]
    shape = (count, height, width)
    parts = (
        _rotations(frames, pairs_f, theta)[:, None, None].expand(*shape, -1),
        _rotations(torch.arange(height, device=device), pairs_h, theta)[None, :, None].expand(*shape, -1),
        _rotations(torch.arange(width, device=device), pairs_w, theta)[None, None].expand(*shape, -1),
    )
    complex_type = torch.complex128 if dtype == torch.float64 else torch.complex64
    return rearrange(torch.cat(parts, dim=-1), "f h w d -> (f h w) d").to(complex_type)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate consecutive pairs of the last axis; ``x`` is ``b heads s d``, rotations ``s d/2``."""
    real = x if x.dtype in (torch.float32, torch.float64) else x.float()
    pairs = torch.view_as_complex(rearrange(real, "... (d two) -> ... d two", two=2).contiguous())
    return rearrange(torch.view_as_real(pairs * rotations), "... d two -> ... (d two)").to(x.dtype)
