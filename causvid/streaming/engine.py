"""What sessions share: a causal few-step network with its codec and its text encoder, and how it is sampled."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from causvid import build, schedule
from causvid.attention.cache import KVCache
from causvid.attention.masks import Rule
from causvid.attention.policies import Footprint
from causvid.errors import UserError
from causvid.models.dit import VideoDiT
from causvid.types import Text
from causvid.validate import Bound, component


@dataclass(frozen=True)
class Engine:
    """A network that streams, ready to be sampled.

    Attributes:
        model: the denoiser; ``network`` is the transformer in it, whose geometry counts.
        codec: pixels to latents and back, in blocks.
        frame_shape: (c, h, w) of a latent frame.
        frames: latents of a training clip.
        times: times of a block's steps, descending from 1.
        shift: of the times, where a session asks for another number of steps.
        context_t: time at which a finished block is committed.
        cache: cache policy of sessions that ask for none.
    """

    model: Any
    network: VideoDiT
    codec: Any
    text_encoder: Any
    frame_shape: tuple[int, int, int]
    frames: int
    times: tuple[float, ...]
    shift: float = 1.0
    context_t: float = 0.0
    device: str = "cpu"
    cache: Any = "trained"

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a replay must find again to give the same bytes: digests of the weights, and of what else is set."""
        settings = [self.frame_shape, self.frames, self.context_t, repr(self.mask), repr(self.network.position)]
        out = {"network": digest_of(self.network.state_dict())}
        if isinstance(inner := getattr(self.codec, "network", None), torch.nn.Module):
            out["codec"] = digest_of(inner.state_dict())
        return out | {"settings": hashlib.sha256(repr(settings).encode()).hexdigest()}

    @property
    def mask(self) -> Rule:
        """The mask that the network was trained with."""
        return self.network.mask

    @property
    def pixel_size(self) -> tuple[int, int]:
        """(height, width) of a frame in pixels."""
        return self.frame_shape[1] * self.codec.scale, self.frame_shape[2] * self.codec.scale

    def with_steps(self, steps: int | Sequence[float] | None) -> Engine:
        """The same engine with another number of steps, or with given times.

        Raises:
            UserError: no descending times from 1.
        """
        if steps is None:
            return self
        try:
            times = schedule.grid(steps, self.shift)[:-1].tolist()
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"steps: {error}") from error
        if not all(map(math.isfinite, times)):
            raise UserError(f"steps: times must be numbers in (0, 1], got {steps}")
        if times[0] != 1.0 or len(times) > 1000:
            raise UserError(f"steps: a stream starts from noise, t = 1, and takes at most 1000 steps; got {steps}")
        return replace(self, times=tuple(times))

    def encode_text(self, prompts: Sequence[str]) -> Text:
        """Prompts as the network takes them: in its type, on its device.

        Raises:
            UserError: no text, or text that the encoder refuses.
        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UserError(f"a prompt must be text, got {type(prompt).__name__} {prompt!r:.80}")
        dtype = next(self.network.parameters()).dtype
        return self.text_encoder.encode(list(prompts)).to(self.device, dtype)

    def policy(self, value: Any) -> Bound:
        """A cache policy by name or mapping, with its defaults written out; None is the engine's own.

        Raises:
            UserError: no such policy, or wrong options.
        """
        return component("cache_policy", self.cache if value is None else value, "cache")

    def new_cache(self, policy: Bound, first_block_frames: int | None = None) -> KVCache:
        """An empty cache under a policy.

        Args:
            first_block_frames: frames of the first block, where it is not that of training.

        Raises:
            UserError: the policy does not fit the mask.
        """
        return build.stream_cache(policy, self.mask, self.frames, first_block_frames)

    def footprint(self, batch: int = 1) -> Footprint:
        """What the keys and values of a stream are made of."""
        network = self.network
        width = network.patch_embed.out_features
        tokens = (self.frame_shape[1] // network.patch[0]) * (self.frame_shape[2] // network.patch[1])
        item = next(network.parameters()).element_size()
        return Footprint(network.layers, width, tokens, item, batch)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors, whatever file they came from."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
