"""Discriminators: noised latents to one logit per clip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from causvid.registry import register
from causvid.types import Denoiser, Text


@register("discriminator", "feature_head")
class FeatureHead(nn.Module):
    """A small head on hidden states of a denoiser, which itself is not trained by it (DMD2, sec. 4.3).

    Args:
        dim: width of the denoiser.
        layers: number of its layers.
        taps: how many layers to read, evenly spaced, the last included.
        hidden: width of the head.

    Raises:
        ValueError: more taps than layers, or none.
    """

    def __init__(self, dim: int, layers: int, taps: int = 2, hidden: int = 64) -> None:
        super().__init__()
        if not 1 <= taps <= layers:
            raise ValueError(f"taps must be 1 to the network's layers ({layers}), got {taps}")
        self.taps: Sequence[int] = sorted({round((i + 1) * layers / taps) - 1 for i in range(taps)})
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self.taps)
        self.mix = nn.Linear(dim * len(self.taps), hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, x_t: Tensor, t: Tensor, text: Text, backbone: Denoiser, counts: Tensor | None = None) -> Tensor:
        """Logits ``b`` for noised latents ``b f c h w``; gradient reaches ``x_t`` through the backbone.

        Args:
            counts: frames whose logits are averaged (``b f``, bool), default all; 0 of a clip in which none counts.
        """
        features = backbone(x_t, t, text, return_features=self.taps).features
        hidden = torch.cat([norm(tokens) for norm, tokens in zip(self.norms, features, strict=True)], dim=-1)
        logits = self.out(nn.functional.silu(self.mix(hidden))).mean((2, 3))
        weight = torch.ones_like(logits) if counts is None else counts.to(logits.dtype)
        return (logits * weight).sum(1) / weight.sum(1).clamp(min=1)
