"""A tiny decoder of Wan2.1's latents for live preview, in the layout of TAEHV's ``taew2_1.pth`` (decoder alone).

It is built from public facts: names, shapes and order of layers of that file, whose count of values fits its published
size (11,315,539 in fp16 with the encoder). Its weights could not be had: how good its pictures are is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from causvid.errors import UserError
from causvid.models.layouts import fill, same, shapes_of
from causvid.models.wan_vae import CHANNELS, FRAMES, SCALE, WanVae
from causvid.registry import register
from causvid.tensor_files import TensorFiles, open_tensors
from causvid.types import Streamed, VaeState

STEM = "taew2_1"
WIDTHS = (256, 128, 64, 64)


def _conv(before: int, after: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=bias)


class Bound(nn.Module):
    """Latents softly kept within [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class Memory(nn.Module):
    """A residual block on a frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, before], 1)) + x)


class Grow(nn.Module):
    """One frame becomes ``times``."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(width, width * times, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.conv(x), "n (k c) h w -> (n k) c h w", k=self.times)


class Decoder(nn.Module):
    """Three levels, each twice as large as the one before, of which the last two double the frames too.

    The number of a layer in ``decoder`` is part of its weights' names.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = [Bound(), _conv(CHANNELS, widths[0]), nn.ReLU()]
        for level, times in enumerate((1, 2, 2)):
            layers += [Memory(widths[level]) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(widths[level], times)]
            layers += [_conv(widths[level], widths[level + 1], bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3))

    def forward(self, x: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Frames in [0, 1] of latents ``b f c h w``, four each, and the last inputs of the blocks with memory.

        Args:
            state: those inputs from the latents before; empty at the start, where they are zero.
        """
        batch = x.shape[0]
        x, memories, kept = rearrange(x, "b f c h w -> (b f) c h w"), iter(state), []
        for layer in self.decoder:
            if not isinstance(layer, Memory):
                x = layer(x)
                continue
            frames = rearrange(x, "(b f) c h w -> b f c h w", b=batch)
            first = next(memories) if state else torch.zeros_like(frames[:, :1])
            kept.append(frames[:, -1:].clone())
            x = layer(x, rearrange(torch.cat([first, frames[:, :-1]], 1), "b f c h w -> (b f) c h w"))
        return rearrange(x, "(b f) c h w -> b f c h w", b=batch).clamp(0, 1), tuple(kept)


@register("codec", "tiny_wan_vae")
class TinyWanVae:
    """A tiny decoder of Wan2.1's latents, for live preview: it decodes alone, in streams and whole clips.

    Args:
        widths: channels of its levels (as released; tests use less).
        weights: folder with ``taew2_1.pth`` or ``taew2_1.safetensors``, or a file; read on first use.
        device, dtype: where and in which type it computes.
    """

    scale = SCALE

    def __init__(
        self,
        widths: Sequence[int] = WIDTHS,
        weights: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths are four whole numbers from 1, got {list(widths)}")
        self.widths, self.weights, self.device, self.dtype = tuple(widths), weights, device, dtype

    @cached_property
    def network(self) -> nn.Module:
        """The decoder with its weights.

        Raises:
            UserError: they are missing, or do not fit.
        """
        if self.weights is None:
            raise UserError("codec 'tiny_wan_vae' needs taew2_1.pth: say where with --weights, or by runtime.weights")
        with torch.device("meta"):
            network = self.empty()
        files = _WithoutEncoder(open_tensors(self.weights, STEM))
        what = f"a tiny decoder of widths {self.widths}"
        return (
            fill(network, same(shapes_of(network)), files, what, self.dtype, self.device).eval().requires_grad_(False)
        )

    def empty(self) -> Decoder:
        """The decoder with fresh weights."""
        return Decoder(self.widths)

    def encode(self, pixels: Tensor) -> Tensor:
        """There is no encoder.

        Raises:
            UserError: always.
        """
        raise UserError("codec 'tiny_wan_vae' decodes alone; encode with wan_vae")

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents ``b n 16 h w`` -> ``b 1+4(n-1) 3 8h 8w`` in [-1, 1]."""
        return self.decode_block(latents, VaeState()).value

    @torch.no_grad()
    def decode_block(self, latents: Tensor, state: VaeState) -> Streamed:
        """Decode the next latents of a stream; the first of all gives one frame, every other four."""
        pixels, kept = self.network(latents.to(self.device, self.dtype), state.features)
        start = 0 if state.features else FRAMES - 1
        return Streamed(pixels[:, start:].float() * 2 - 1, VaeState(kept))

    pixel_frames = WanVae.pixel_frames
    latent_frames = WanVae.latent_frames
    latent_channels = WanVae.latent_channels


class _WithoutEncoder(TensorFiles):
    """A file without its encoder, which is not used; whatever else it holds is told as unknown."""

    def __init__(self, files: TensorFiles) -> None:
        names = [name for name in files.shapes if not name.startswith("encoder.")]
        super().__init__(files.path, {n: files.shapes[n] for n in names}, {n: files.dtypes[n] for n in names})
        self._files = files

    def read(self, name: str) -> Tensor:
        return self._files.read(name)
