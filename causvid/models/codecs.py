"""Codecs: pixels to latents and back, ``b f c h w`` both."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from causvid.registry import register
from causvid.types import Streamed, VaeState

STARTED = VaeState(("started",))  # all that these codecs keep of a stream


@register("codec", "identity")
class Identity:
    """Latents are pixels, one for one."""

    scale = 1

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)

    def encode_block(self, pixels: Tensor, state: VaeState) -> Streamed:
        return Streamed(pixels, STARTED)

    def decode_block(self, latents: Tensor, state: VaeState) -> Streamed:
        return Streamed(self.decode(latents), STARTED)

    def pixel_frames(self, latent_frames: int) -> int:
        return latent_frames

    def latent_frames(self, pixel_frames: int) -> int:
        return pixel_frames

    def latent_channels(self, pixel_channels: int) -> int:
        return pixel_channels


@register("codec", "time_fold")
class TimeFold:
    """Folds runs of frames into channels: 1 + k (n - 1) frames for n latents, like a causal video VAE, without loss.

    The first frame stands alone (repeated k times), so a clip of one frame is an image.

    Args:
        frames: k, pixel frames per latent.
    """

    scale = 1

    def __init__(self, frames: int = 4) -> None:
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        self.frames = frames

    def encode(self, pixels: Tensor) -> Tensor:
        """``b 1+k(n-1) c h w`` -> ``b n (k c) h w``."""
        self.latent_frames(pixels.shape[1])
        first = pixels[:, :1].expand(-1, self.frames, -1, -1, -1)
        return rearrange(torch.cat([first, pixels[:, 1:]], dim=1), "b (n k) c h w -> b n (k c) h w", k=self.frames)

    def decode(self, latents: Tensor) -> Tensor:
        """``b n (k c) h w`` -> ``b 1+k(n-1) c h w``; the first latent's k copies are averaged."""
        frames = rearrange(latents, "b n (k c) h w -> b (n k) c h w", k=self.frames)
        first = frames[:, : self.frames].mean(1, keepdim=True)
        return torch.cat([first, frames[:, self.frames :]], dim=1).clamp(-1, 1)

    def encode_block(self, pixels: Tensor, state: VaeState) -> Streamed:
        """The next frames of a stream: 1 + k n at its start, k n after it.

        Raises:
            ValueError: a number of frames that does not fold.
        """
        if not state.features:
            return Streamed(self.encode(pixels), STARTED)
        if not pixels.shape[1] or pixels.shape[1] % self.frames:
            raise ValueError(f"a stream goes on with {self.frames} n frames, not {pixels.shape[1]}")
        return Streamed(rearrange(pixels, "b (n k) c h w -> b n (k c) h w", k=self.frames), STARTED)

    def decode_block(self, latents: Tensor, state: VaeState) -> Streamed:
        """The next latents of a stream; the first of all gives one frame, every other k."""
        if not state.features:
            return Streamed(self.decode(latents), STARTED)
        frames = rearrange(latents, "b n (k c) h w -> b (n k) c h w", k=self.frames)
        return Streamed(frames.clamp(-1, 1), STARTED)

    def pixel_frames(self, latent_frames: int) -> int:
        return 1 + self.frames * (latent_frames - 1)

    def latent_frames(self, pixel_frames: int) -> int:
        """Latents of a clip.

        Raises:
            ValueError: a number of frames that is not 1 + k (n - 1).
        """
        if pixel_frames < 1 or (pixel_frames - 1) % self.frames:
            raise ValueError(f"clips need 1 + {self.frames} n frames, got {pixel_frames}")
        return 1 + (pixel_frames - 1) // self.frames

    def latent_channels(self, pixel_channels: int) -> int:
        return pixel_channels * self.frames
