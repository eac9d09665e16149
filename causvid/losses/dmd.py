"""Distribution matching distillation (Yin et al., arXiv 2311.18828, 2405.14867; for video, CausVid, sec. 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from causvid import ranks, schedule
from causvid.losses.flow import denoising_error, draw_times
from causvid.registry import register
from causvid.types import LossOutput, Scene, Text


def guided_x0(
    model: object,
    x_t: Tensor,
    t: Tensor,
    text: Text,
    unconditional: Text,
    guidance: float,
    interval: Sequence[float] = (0.0, 1.0),
) -> Tensor:
    """Estimate of x0 with classifier-free guidance: uncond + w (cond - uncond); w = 1 costs one evaluation.

    Frames whose time ``t`` (``b f``) lies outside the interval are not guided (Kynkaanniemi et al., arXiv 2404.07724).
    """
    conditional = model(x_t, t, text).x0  # type: ignore[operator]
    if guidance == 1.0:
        return conditional
    free = model(x_t, t, unconditional).x0  # type: ignore[operator]
    weight = torch.where((t >= interval[0]) & (t <= interval[1]), guidance, 1.0).to(conditional.dtype)
    return free + weight[:, :, None, None, None] * (conditional - free)


def dmd_gradient(fake_x0: Tensor, real_x0: Tensor, x0: Tensor, counts: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(gradient ``b f c h w``, normaliser ``b``): (fake - real) / (mean |x0 - real| + eps), eq. 7-8 of 2311.18828.

    The mean is per sample, over the frames that count (``b f``).
    """
    weight = counts.to(x0.dtype)
    distance = ((x0 - real_x0).abs().mean((2, 3, 4)) * weight).sum(1) / weight.sum(1).clamp(min=1)
    normaliser = distance + eps
    return (fake_x0 - real_x0) / normaliser[:, None, None, None, None] * weight[:, :, None, None, None], normaliser


@register("loss", "dmd")
class DMD:
    """Move the student's samples along real score minus fake score; the fake score follows the student.

    Args:
        guidance: classifier-free guidance of the real score, in the form uncond + w (cond - uncond).
        guidance_interval: score times at which it is guided, (lowest, highest). Guidance at the high ones decides what
            is seen, at the low ones it only hardens how it looks.
        shift: shift of the score times.
        t_min, t_max: score times are clamped to this range.
        score_times: ``shared`` by all frames, whatever the teacher (as in the release), or drawn ``per_block``, as a
            causal, diffusion-forced teacher was trained.
        count_clean: count frames that were passed through as data (the release does).
        eps: added to the normaliser.
        t_floor: for the fake score; see :func:`causvid.losses.flow.denoising_error`.
    """

    players = ("student", "fake_score")
    needs = ("samples",)

    def __init__(
        self,
        guidance: float = 1.0,
        shift: float = 1.0,
        t_min: float = 0.02,
        t_max: float = 0.98,
        score_times: Literal["shared", "per_block"] = "shared",
        count_clean: bool = False,
        eps: float = 1e-4,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        t_floor: float = 0.0,
    ) -> None:
        if not 0 <= t_min < t_max <= 1:
            raise ValueError(f"score times need 0 <= t_min < t_max <= 1, got {t_min} and {t_max}")
        self.guidance, self.guidance_interval = guidance, schedule.interval("guidance_interval", guidance_interval)
        self.shift, self.t_min, self.t_max = shift, t_min, t_max
        self.score_times: Literal["shared", "per_block"] = score_times
        self.count_clean, self.eps, self.t_floor = count_clean, eps, t_floor

    def __call__(self, player: str, scene: Scene) -> LossOutput:
        """The generator's loss for ``student``, the denoising loss on the student's samples for ``fake_score``."""
        return self._generator(scene) if player == "student" else self._critic(scene)

    def _noised(self, scene: Scene, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = draw_times(scene.draw, "score_t", scene, self.score_times, self.shift).clamp(self.t_min, self.t_max)
        noise = scene.draw.normal("score_noise", *x0.shape[1:]).to(x0.dtype)
        return schedule.add_noise(x0, noise, t), t, noise

    def _generator(self, scene: Scene) -> LossOutput:
        sample = scene.samples(True)
        x0 = sample.x0.detach()
        counts = torch.ones_like(sample.counts) if self.count_clean else sample.counts
        with torch.no_grad():
            x_t, t, _ = self._noised(scene, x0)
            fake = scene.nets["fake_score"](x_t, t, scene.text).x0
            real = guided_x0(
                scene.nets["teacher"], x_t, t, scene.text, scene.unconditional, self.guidance, self.guidance_interval
            )
            gradient, normaliser = dmd_gradient(fake, real, x0, counts, self.eps)
        # The mean over elements of 0.5 (x - stopgrad(x - g))^2 has the gradient g / elements.
        value = 0.5 * (sample.x0 - (x0 - gradient)).pow(2).mean()
        return LossOutput(value, {"gradient": gradient.pow(2).mean().sqrt(), "normaliser": normaliser.mean()})

    def _critic(self, scene: Scene) -> LossOutput:
        with torch.no_grad():
            sample = scene.samples(False)
        counts = torch.ones_like(sample.counts) if self.count_clean else sample.counts
        x_t, t, noise = self._noised(scene, sample.x0)
        output = scene.nets["fake_score"](x_t, t, scene.text)
        error = denoising_error(output, sample.x0, noise, self.t_floor)
        return LossOutput(ranks.weighted_mean(error, counts.to(error.dtype)))
