"""Few-step stochastic sampling of all frames at once: estimate x0, noise it again to the next time, repeat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causvid import schedule
from causvid.randomness import Draw
from causvid.registry import register
from causvid.types import Denoiser, Text


def descending(times: Sequence[float]) -> list[float]:
    """The times of a sampler's steps, without a final 0.

    Raises:
        ValueError: the first is not 1, where pure noise stands.
    """
    steps = [t for t in times if t > 0]
    if not steps or steps[0] != 1:
        raise ValueError(f"few-step sampling starts from pure noise, so its first time must be 1, got {list(times)}")
    return steps


def renoise(x0: Tensor, draw: Draw, purpose: str, time: float) -> tuple[Tensor, Tensor]:
    """(x_t, t) from an estimate of x0 and fresh noise; ``t`` is ``b f``."""
    t = torch.full(x0.shape[:2], time, dtype=x0.dtype, device=x0.device)
    return schedule.add_noise(x0, draw.normal(purpose, *x0.shape[1:]).to(x0.dtype), t), t


@register("sampler", "few_step")
class FewStep:
    """Re-noising steps through all frames at once, for few-step bidirectional students (DMD2, sec. 4.5).

    Args:
        times: times of the steps, descending from 1; the final 0 is implied.

    Raises:
        ValueError: times that do not start at 1.
    """

    def __init__(self, times: Sequence[float]) -> None:
        self.times = descending(times)

    @torch.no_grad()
    def __call__(self, model: Denoiser, shape: Sequence[int], text: Text, draw: Draw) -> Tensor:
        """Latents ``b f c h w`` of the given shape ``(f, c, h, w)``."""
        x0 = torch.zeros(len(text), *shape)
        x0 = x0.to(text.embeddings)
        for i, time in enumerate(self.times):
            x_t, t = renoise(x0, draw, f"step{i}", time)
            x0 = model(x_t, t, text).x0
        return x0
