"""Whether samples are the clips that were trained on: the measure of a model that is meant to memorise a few."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causvid.registry import register

MAX_FIDELITY = 60.0  # dB


@register("metric", "memory")
class Memory:
    """How near videos come to the real clip of their caption: for models that memorise a few clips.

    Per video: ``ok`` (whether the nearest real clip is the caption's own), ``fidelity`` (PSNR in dB against it).
    """

    def __init__(self) -> None:
        self._clips = torch.zeros(0)
        self._captions: list[str] = []

    def knowing(self, videos: Tensor, captions: Sequence[str]) -> Memory:
        """The metric with real clips, ``b f 3 h w`` in [-1, 1], to compare with."""
        other = Memory()
        other._clips, other._captions = videos.float(), list(captions)
        return other

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Per-video scores, each ``b``."""
        ok, fidelity = [], []
        for video, prompt in zip(videos.float(), prompts, strict=True):
            error = (self._clips[:, : len(video)] - video[: self._clips.shape[1]]).pow(2).mean((1, 2, 3, 4))
            own = torch.tensor([caption == prompt for caption in self._captions])
            ok.append(bool(own[error.argmin()]))
            fidelity.append((10 * torch.log10(4 / error[own].min().clamp(min=1e-12))).clamp(max=MAX_FIDELITY))
        return {"ok": torch.tensor(ok), "fidelity": torch.stack(fidelity)}

    def over_set(self, scores: dict[str, Tensor]) -> dict[str, float]:
        """Nothing of the set as a whole."""
        return {}
