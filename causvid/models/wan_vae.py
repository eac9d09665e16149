"""The causal video VAE of Wan2.1 as a codec, whole clips and streaming, on diffusers' network and the official weights.

The network takes one latent frame at a time and keeps the last features of every convolution along time. Those
features are a ``VaeState`` here: a value that is passed in and returned, so that a stream may stop, go on and fork.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from causvid.errors import UserError
from causvid.models import libraries
from causvid.models.layouts import Link, check, fill, same, shapes_of
from causvid.registry import register
from causvid.tensor_files import TensorFiles, open_tensors
from causvid.types import Streamed, VaeState

STEM = "Wan2.1_VAE"
CHANNELS, FRAMES, SCALE = 16, 4, 8
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
_RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
             "conv_shortcut": "shortcut"}  # fmt: skip
_OUTER = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}
_RESNETS = 3  # of each level of the decoder: one more than the encoder's


@dataclass(frozen=True)
class Work:
    """What coding a clip takes.

    Attributes:
        flops: of all its convolutions, and of attention's projections.
        state: bytes that a stream keeps.
        most: bytes that it works on at its peak, beside the weights and one state.
    """

    flops: float
    state: float
    most: float


def official_name(name: str) -> str:
    """The original name of a parameter of diffusers' network."""
    side, _, rest = name.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return f"{'conv1' if side == 'quant_conv' else 'conv2'}.{rest}"
    first, *parts = rest.split(".")
    if first in _OUTER:
        return ".".join([side, _OUTER[first], *parts])
    if first == "mid_block":
        kind, index, *parts = parts
        return _residual([side, "middle", "1" if kind == "attentions" else str(2 * int(index))], parts)
    if first == "down_blocks":
        return _residual([side, "downsamples", parts[0]], parts[1:])
    level, kind, index, *parts = parts
    place = int(level) * (_RESNETS + 1) + (int(index) if kind == "resnets" else _RESNETS)
    return _residual([side, "upsamples", str(place)], parts)


def _residual(before: list[str], parts: list[str]) -> str:
    return ".".join([*before, _RESIDUAL.get(parts[0], parts[0]), *parts[1:]])


def links(network: torch.nn.Module) -> tuple[Link, ...]:
    """How the official file names the weights of diffusers' network."""
    return tuple(Link(name, (official_name(name),), s, s) for name, s in shapes_of(network).items())


@register("codec", "wan_vae")
class WanVae:
    """Wan2.1's causal VAE: 16 channels, 8 x 8 pixels and 4 frames per latent, the first frame alone.

    Args:
        base_dim: width of its first layer (96 as released; tests use less).
        weights: folder with ``Wan2.1_VAE.pth`` or diffusers' ``vae/``, or a file; read on first use.
        device, dtype: where and in which type it computes.
    """

    scale = SCALE

    def __init__(
        self,
        base_dim: int = 96,
        weights: Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if base_dim < 1:
            raise ValueError(f"base_dim must be at least 1, got {base_dim}")
        self.base_dim, self.weights, self.device, self.dtype = base_dim, weights, device, dtype

    @cached_property
    def network(self) -> Any:
        """diffusers' network with the weights.

        Raises:
            UserError: diffusers or the weights are missing, or the weights do not fit.
        """
        files = self._files
        with torch.device("meta"):
            network = self.empty()
        original = "conv1.weight" in files.shapes
        found = links(network) if original else same(shapes_of(network))
        what = f"the VAE of Wan2.1 with base_dim {self.base_dim}"
        check(found, files, what)
        return fill(network, found, files, what, self.dtype, self.device).eval().requires_grad_(False)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files of its weights; none as long as nothing says where they are."""
        return () if self.weights is None else self._files.sources

    @property
    def _files(self) -> TensorFiles:
        if self.weights is None:
            raise UserError(
                "codec 'wan_vae' needs the weights of Wan2.1: say where with --weights, or by runtime.weights"
            )
        folder = self.weights / "vae" if (self.weights / "vae").is_dir() else self.weights
        return open_tensors(folder, "diffusion_pytorch_model" if folder != self.weights else STEM)

    @property
    def released_bytes(self) -> int | None:
        """Bytes of its weights in fp32, where it is the released one."""
        return 507_609_880 if self.base_dim == 96 else None

    def decoding(self, frames: int, height: int, width: int) -> Work:
        """What decoding ``frames`` latents of ``height x width`` takes; see docs/wan.md for the counts in it."""
        # In units of base_dim^2 and base_dim per pixel of a frame: the first latent's, and each later one's.
        flops = self._flops((1164, 216), (3658, 702), frames)
        return self._work(flops, 24.6, 26.0, height, width)

    def encoding(self, frames: int, height: int, width: int) -> Work:
        """What encoding a clip of ``frames`` latents of ``height x width`` takes."""
        return self._work(self._flops((719.5, 270), (2163.5, 756), frames), 14.6, 22.0, height, width)

    def _flops(self, first: tuple[float, float], later: tuple[float, float], frames: int) -> float:
        square, linear = (one + (frames - 1) * each for one, each in zip(first, later, strict=True))
        return (square * self.base_dim + linear) * self.base_dim

    def _work(self, flops: float, state: float, most: float, height: int, width: int) -> Work:
        pixels = height * width * SCALE**2
        frame = pixels * self.base_dim * self.dtype.itemsize  # the features of one frame at full size
        return Work(flops * pixels, state * frame, most * frame)

    def empty(self) -> Any:
        """diffusers' network with fresh weights."""
        try:
            with libraries.quiet():
                from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
        except ImportError as error:
            raise UserError("codec 'wan_vae' needs diffusers: pip install 'causvid[wan]'") from error
        return AutoencoderKLWan(base_dim=self.base_dim, z_dim=CHANNELS)

    def encode(self, pixels: Tensor) -> Tensor:
        """``b 1+4(n-1) 3 8h 8w`` in [-1, 1] -> normalised latents ``b n 16 h w``."""
        return self.encode_block(pixels, VaeState()).value

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents ``b n 16 h w`` -> ``b 1+4(n-1) 3 8h 8w`` in [-1, 1]."""
        return self.decode_block(latents, VaeState()).value

    @torch.no_grad()
    def encode_block(self, pixels: Tensor, state: VaeState) -> Streamed:
        """Encode the next frames of a stream: 1 + 4k at its start, 4k after it.

        Raises:
            ValueError: a number of frames or a size that does not fit.
        """
        count, height, width = pixels.shape[1], *pixels.shape[-2:]
        if height % SCALE or width % SCALE:
            raise ValueError(f"height and width must be multiples of {SCALE}, got {height}x{width}")
        first = 0 if state.features else 1
        if count < 1 or (count - first) % FRAMES:
            raise ValueError(
                f"{'a stream starts with 1 + ' if first else 'a stream goes on with '}4k frames, not {count}"
            )
        x = rearrange(pixels, "b f c h w -> b c f h w").to(self.device, self.dtype)
        starts = [*([0] if first else []), *range(first, count, FRAMES)]
        features = self._features(state, "encoder")
        parts = []
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            parts.append(self.network.encoder(x[:, :, start:stop], feat_cache=features, feat_idx=[0]))
        mean = self.network.quant_conv(torch.cat(parts, 2)).chunk(2, dim=1)[0]
        latents = rearrange(mean, "b c f h w -> b f c h w").float()
        return Streamed((latents - self._column(MEAN)) / self._column(STD), VaeState(tuple(features)))

    @torch.no_grad()
    def decode_block(self, latents: Tensor, state: VaeState) -> Streamed:
        """Decode the next latents of a stream; the first of all gives one frame, every other four."""
        x = latents.to(self.device).float() * self._column(STD) + self._column(MEAN)
        x = self.network.post_quant_conv(rearrange(x, "b f c h w -> b c f h w").to(self.dtype))
        features = self._features(state, "decoder")
        parts = []
        for index in range(x.shape[2]):
            start = index == 0 and not state.features
            part = self.network.decoder(
                x[:, :, index : index + 1], feat_cache=features, feat_idx=[0], first_chunk=start
            )
            parts.append(part.float().clamp(-1, 1))
        return Streamed(rearrange(torch.cat(parts, 2), "b c f h w -> b f c h w"), VaeState(tuple(features)))

    def _features(self, state: VaeState, side: str) -> list[Any]:
        """The features as the network wants them: a list that it writes into, one entry per convolution along time."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        if state.features:
            return list(state.features)
        return [None] * sum(isinstance(module, WanCausalConv3d) for module in getattr(self.network, side).modules())

    def _column(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=self.device)[:, None, None]

    def pixel_frames(self, latent_frames: int) -> int:
        return 1 + FRAMES * (latent_frames - 1)

    def latent_frames(self, pixel_frames: int) -> int:
        """Latents of a clip.

        Raises:
            ValueError: a number of frames that is not 1 + 4 (n - 1).
        """
        if pixel_frames < 1 or (pixel_frames - 1) % FRAMES:
            raise ValueError(f"clips need 1 + {FRAMES} n frames, got {pixel_frames}")
        return 1 + (pixel_frames - 1) // FRAMES

    def latent_channels(self, pixel_channels: int) -> int:
        return CHANNELS
