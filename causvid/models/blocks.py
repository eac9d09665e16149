"""Parts of the video transformer: self-attention, text cross-attention, and the block that holds them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from causvid.attention.cache import LayerKV
from causvid.attention.kernels import Attend


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features of ``t`` (any shape): cosines, then sines, ``... width``, rates 10000^(-2i/width)."""
    half = width // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.to(torch.float64)[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SelfAttention(nn.Module):
    """Self-attention with fused projections and queries and keys normalised over the full width."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim, eps=eps)
        self.k_norm = nn.RMSNorm(dim, eps=eps)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attend: Attend) -> tuple[Tensor, LayerKV]:
        """``b s d`` -> the same, and the unrotated (k, v) of these tokens, ``b heads s d/heads``."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(y, "b s (k d) -> b k s d", k=self.heads) for y in (self.q_norm(q), self.k_norm(k), v))
        return self.out(rearrange(attend(q, k, v), "b k s d -> b s (k d)")), (k, v)


class CrossAttention(nn.Module):
    """Attention to the text; keys and values depend on the prompt alone and can be kept."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.q_norm = nn.RMSNorm(dim, eps=eps)
        self.k_norm = nn.RMSNorm(dim, eps=eps)
        self.out = nn.Linear(dim, dim)

    def project(self, text: Tensor) -> LayerKV:
        """Keys and values of the text, ``b l d`` -> two of ``b heads l d/heads``."""
        k, v = self.kv(text).chunk(2, dim=-1)
        k, v = (rearrange(y, "b l (k d) -> b k l d", k=self.heads) for y in (self.k_norm(k), v))
        return k, v

    def forward(self, x: Tensor, kv: LayerKV) -> Tensor:
        q = rearrange(self.q_norm(self.q(x)), "b s (k d) -> b k s d", k=self.heads)
        return self.out(rearrange(F.scaled_dot_product_attention(q, *kv), "b k s d -> b s (k d)"))


class Block(nn.Module):
    """Self-attention, text cross-attention and feed-forward, modulated per frame by time."""

    def __init__(self, dim: int, ffn_dim: int, heads: int, eps: float, cross_norm: bool) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.self_attention = SelfAttention(dim, heads, eps)
        self.cross_norm = nn.LayerNorm(dim, eps=eps) if cross_norm else nn.Identity()
        self.cross_attention = CrossAttention(dim, heads, eps)
        self.ffn_norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(ffn_dim, dim),
        )
        self.modulation = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, time: Tensor, attend: Attend, text: Tensor | LayerKV
    ) -> tuple[Tensor, LayerKV, LayerKV]:
        """One block; returns tokens, the keys and values of these tokens, and those of the text.

        Args:
            x: tokens, ``b f n d``.
            time: modulation from time, ``b f 6 d``.
            attend: planned self-attention.
            text: the embedded text, ``b l d``, or its keys and values from before; their batch is b, or b f where the
                text differs per frame. All of a block's weights are used in here: that is where shards are gathered.
        """
        frames = x.shape[1]
        text = self.cross_attention.project(text) if isinstance(text, Tensor) else text
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (time + self.modulation).unsqueeze(2).unbind(3)
        hidden = rearrange(self.self_norm(x) * (1 + scale) + shift, "b f n d -> b (f n) d")
        hidden, kv = self.self_attention(hidden, attend)
        x = x + gate * rearrange(hidden, "b (f n) d -> b f n d", f=frames)
        tokens = self.cross_norm(x)
        per_frame = text[0].shape[0] != x.shape[0]
        apart = "(b f) n d" if per_frame else "b (f n) d"
        seen = self.cross_attention(rearrange(tokens, f"b f n d -> {apart}"), text)
        x = x + rearrange(seen, f"{apart} -> b f n d", f=frames)
        hidden = self.ffn(self.ffn_norm(x) * (1 + ffn_scale) + ffn_shift)
        return x + ffn_gate * hidden, kv, text
