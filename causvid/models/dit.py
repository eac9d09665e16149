"""The one video diffusion transformer of this project, in the design of Wan2.1 (arXiv 2503.20314), at any size.

Patch embedding, 3D rotary positions, per-frame AdaLN time modulation, RMS-normalised queries and keys, and text
cross-attention. The same weights run bidirectionally, causally in one masked pass, teacher-forced, and streaming with
a cache; which of these is decided by the mask and by what is passed to ``forward``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from causvid.attention import rope
from causvid.attention.cache import KVCache, LayerKV
from causvid.attention.kernels import Attend, Blockwise, Grid, Kernel, key_tokens
from causvid.attention.masks import Bidirectional, Pattern, Rule
from causvid.attention.positions import Absolute, Position
from causvid.models.blocks import Block, sinusoid
from causvid.registry import register
from causvid.types import DenoiserOutput, Text


@register("model", "dit")
class VideoDiT(nn.Module):
    """Wan-design video diffusion transformer.

    Args:
        channels: latent channels.
        dim: width of the network.
        ffn_dim: width of the feed-forward layer.
        heads: attention heads; ``dim / heads`` must be even and at least 6.
        layers: number of blocks.
        text_dim: width of the text encoder's embeddings.
        patch: (height, width) of a patch; a latent frame is one patch long.
        freq_dim: width of the sinusoidal time features.
        time_scale: factor on t before the sinusoid (Wan: 1000).
        prediction: what the network's output means, ``velocity`` (Wan) or ``x0``.
        cross_norm: normalise tokens before cross-attention (Wan: yes).
        theta: base of the rotary rates.
        eps: epsilon of every normalisation.
        precision: type in which matrix products and attention are computed (autocast); default that of the weights.
        mask: visibility rule of a masked pass; also that of streams.
        position: position policy along time.
        kernel: how a masked pass is computed.

    Raises:
        ValueError: the geometry does not fit, or the kernel can't express mask and positions.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        ffn_dim: int,
        heads: int,
        layers: int,
        text_dim: int,
        patch: Sequence[int] = (2, 2),
        freq_dim: int = 256,
        time_scale: float = 1000.0,
        prediction: Literal["velocity", "x0"] = "velocity",
        cross_norm: bool = True,
        theta: float = 10000.0,
        eps: float = 1e-6,
        mask: Rule | None = None,
        position: Position | None = None,
        kernel: Kernel | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim ({dim}) is not a multiple of heads ({heads})")
        if prediction not in ("velocity", "x0"):
            raise ValueError(f"prediction must be 'velocity' or 'x0', got '{prediction}'")
        if freq_dim % 2:
            raise ValueError(f"freq_dim must be even, got {freq_dim}: it is half cosines, half sines")
        rope.split_pairs(dim // heads)
        self.channels, self.layers, self.head_dim = channels, layers, dim // heads
        self.patch: tuple[int, int] = (patch[0], patch[1])
        self.freq_dim, self.time_scale, self.theta = freq_dim, time_scale, theta
        self.prediction: Literal["velocity", "x0"] = prediction
        self.mask: Rule = mask or Bidirectional()
        self.position: Position = position or Absolute()
        self.kernel: Kernel = kernel or Blockwise()
        self.kernel.check(self.mask, self.position)
        self.precision = precision
        values = channels * self.patch[0] * self.patch[1]
        self.patch_embed = nn.Linear(values, dim)
        self.text_embed = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embed = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_project = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, ffn_dim, heads, eps, cross_norm) for _ in range(layers))
        self.head_norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.head_modulation = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.head = nn.Linear(dim, values)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.head.weight)

    def new_cache(self, rule: Rule | None = None) -> KVCache:
        """An empty cache for a stream under ``rule``, by default the model's own mask."""
        return KVCache(rule or self.mask)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        *,
        context: Tensor | None = None,
        cache: KVCache | None = None,
        commit: bool = False,
        positions: Tensor | None = None,
        return_features: Sequence[int] = (),
    ) -> DenoiserOutput:
        """Denoise ``x`` at time ``t``.

        Args:
            x: noisy latents, ``b f c h w``; under a cache, the frames of the stream's next block, or of several next
                blocks that are denoised together: each sees the earlier ones as they are given here.
            t: time of each frame, ``b f``, in [0, 1].
            text: prompts' embeddings.
            context: clean latents of the same frames, ``b f c h w``: the teacher-forcing pass [clean | noisy], of
                which the noisy half is returned.
            cache: past of a stream; without one, a single masked pass over all frames.
            commit: put this block's keys and values into a new cache, returned with the output.
            positions: index of the first frame (0-dim), without a cache; default 0.
            return_features: layers after which to return the tokens, ``b f n d`` each.

        Raises:
            ValueError: shapes that do not fit the patch, the text or the cache.
        """
        if cache is not None and context is not None:
            raise ValueError("teacher forcing is a masked pass: context and cache exclude each other")
        if context is not None and not self.mask.causal:
            raise ValueError("teacher forcing needs a causal mask: with any other, no frame sees the context")
        if positions is not None and cache is not None:
            raise ValueError("positions are for a masked pass: a stream's follow from its cache")
        if commit and cache is None:
            raise ValueError("commit needs a cache")
        frames = self._check(x, t, text)
        with self._computing(x.device):
            prediction, after, features = self._denoise(x, t, text, context, cache, commit, positions, return_features)
        kept = tuple(each[:, -frames:].to(x.dtype) for each in features)
        return DenoiserOutput(x, t, prediction.to(x.dtype), self.prediction, after, kept)

    def _computing(self, device: torch.device) -> AbstractContextManager:
        """The type of the computation; there is none where tensors hold no numbers."""
        if self.precision is None or device.type == "meta":
            return nullcontext()
        return torch.autocast(device.type, self.precision)

    def _denoise(
        self, x: Tensor, t: Tensor, text: Text, context: Tensor | None, cache: KVCache | None, commit: bool,
        positions: Tensor | None, return_features: Sequence[int],
    ) -> tuple[Tensor, KVCache | None, list[Tensor]]:  # fmt: skip
        """(prediction, cache after it, tokens after the wanted layers, those of a context before the frames' own)."""
        frames, height, width = x.shape[1], x.shape[3] // self.patch[0], x.shape[4] // self.patch[1]
        grid = Grid(height, width, self.head_dim, self.theta, x.dtype, x.device)
        tokens, modulation, hidden_t = self._embed(x, t)
        if context is not None:
            clean, clean_modulation, _ = self._embed(context, torch.zeros_like(t))
            tokens, modulation = (
                torch.cat([clean, tokens], 1),
                torch.cat([clean_modulation, modulation], 1),
            )
        masked = None
        if cache is None:
            first = 0 if positions is None else int(positions)
            pattern = Pattern(self.mask, frames, context is not None, first)
            masked = self.kernel.plan(pattern, self.position, grid)
        embedded = None
        fresh: list[LayerKV] = []
        features: list[Tensor] = []
        memo = cache.cross if cache is not None and not torch.is_grad_enabled() else None
        for index, block in enumerate(cast(Iterable[Block], self.blocks)):
            known = memo.get(text, index) if memo else None
            if known is None and embedded is None:
                embedded = self._embed_text(text, context is not None)
            attend = masked or self._stream(cast(KVCache, cache), index, frames, grid, commit)
            tokens, kv, text_kv = block(tokens, modulation, attend, embedded if known is None else known)
            if memo and known is None:
                memo.put(text, index, text_kv)
            if commit:
                fresh.append(kv)
            if index in return_features:
                features.append(tokens)
        prediction = self._head(tokens[:, -frames:], hidden_t, height, width)
        after = cache.committed(tuple(fresh), frames) if commit and cache is not None else cache
        return prediction, after, features

    def _check(self, x: Tensor, t: Tensor, text: Text) -> int:
        """Frames of inputs that fit."""
        if x.ndim != 5 or x.shape[2] != self.channels:
            raise ValueError(f"latents must be 'b f {self.channels} h w', got shape {tuple(x.shape)}")
        batch, frames, _, height, width = x.shape
        if height % self.patch[0] or width % self.patch[1]:
            raise ValueError(f"latent size {height}x{width} is not a multiple of the patch {self.patch}")
        if t.shape != (batch, frames):
            raise ValueError(f"t must be 'b f' = {(batch, frames)}, got shape {tuple(t.shape)}")
        shape = text.embeddings.shape
        if shape[0] != batch or (len(shape) == 4 and shape[1] != frames):
            raise ValueError(f"text of shape {tuple(shape)} does not fit {batch} clips of {frames} frames")
        return frames

    def _embed(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``b f n d``, block modulation ``b f 6 d`` and the head's time ``b f d``."""
        patches = rearrange(
            x,
            "b f c (h p) (w q) -> b f (h w) (c p q)",
            p=self.patch[0],
            q=self.patch[1],
        )
        hidden = self.time_embed(sinusoid(t * self.time_scale, self.freq_dim).to(x.dtype))
        return (
            self.patch_embed(patches),
            rearrange(self.time_project(hidden), "b f (parts d) -> b f parts d", parts=6),
            hidden,
        )

    def _embed_text(self, text: Text, twice: bool) -> Tensor:
        embedded = self.text_embed(text.embeddings)
        if embedded.ndim == 3:
            return embedded
        return rearrange(torch.cat([embedded, embedded], 1) if twice else embedded, "b f l d -> (b f) l d")

    def _head(self, tokens: Tensor, hidden_t: Tensor, height: int, width: int) -> Tensor:
        shift, scale = (hidden_t[:, :, None] + self.head_modulation).unsqueeze(2).unbind(3)
        out = self.head(self.head_norm(tokens) * (1 + scale) + shift)
        return rearrange(
            out,
            "b f (h w) (p q c) -> b f c (h p) (w q)",
            h=height,
            w=width,
            p=self.patch[0],
            q=self.patch[1],
        )

    def _stream(self, cache: KVCache, layer: int, frames: int, grid: Grid, commit: bool) -> Attend:
        """Attention of the next blocks over what the cache keeps and themselves: no mask is needed."""
        cache.check_block(frames, several=not commit)
        past = cache.read(layer)
        plan = _stream_plan(
            cache.rule, cache.position or self.position, cache.frames, cache.next_frame, cache.next_frame + frames, grid
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k = torch.cat([*(pair[0] for pair in past), k], dim=2)
            v = torch.cat([*(pair[1] for pair in past), v], dim=2)
            parts = []
            for queries, keys, query_rotations, key_rotations in plan:
                rotated = rope.rotate(q[:, :, queries], query_rotations), rope.rotate(k[:, :, keys], key_rotations)
                parts.append(F.scaled_dot_product_attention(*rotated, v[:, :, keys]))
            return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

        return attend


@lru_cache(maxsize=16)
def _stream_plan(
    rule: Rule, position: Position, kept: tuple[int, ...], start: int, stop: int, grid: Grid
) -> list[tuple[slice, slice | Tensor, Tensor, Tensor]]:
    """For each block of the frames [start, stop): tokens of its queries and keys, and their rotations."""
    n, frames, plan, first = grid.tokens_per_frame, (*kept, *range(start, stop)), [], start
    while first < stop:
        last = min(rule.block_range(int(rule.block_of(first)))[1], stop)
        seen = tuple(i for i, frame in enumerate(frames) if bool(rule.sees(last - 1, frame)))
        visible = torch.tensor([frames[i] for i in seen])
        rotations = grid.rotations(position.place(visible, visible))
        keys = key_tokens(seen, n, grid.device)
        queries = slice((first - start) * n, (last - start) * n)
        plan.append((queries, keys, rotations[-(last - first) * n :], rotations))
        first = last
    return plan
