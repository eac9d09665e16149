"""Flow matching: train a denoiser on data (Lipman et al., arXiv 2210.02747)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from causvid import schedule
from causvid.randomness import Draw
from causvid.registry import register
from causvid.types import DenoiserOutput, LossOutput, Scene, Text


def draw_times(draw: Draw, purpose: str, scene: Scene, how: Literal["shared", "per_block"], shift: float) -> Tensor:
    """Training times ``b f``: uniform, then shifted; one for all frames, or one per block (diffusion forcing)."""
    if how == "shared":
        u = draw.uniform(purpose)[:, None].expand(-1, scene.blocks[-1][1])
    else:
        u = scene.per_block(draw.uniform(purpose, len(scene.blocks)))
    return schedule.shift(u, shift)


def denoising_error(output: DenoiserOutput, x0: Tensor, noise: Tensor, t_floor: float) -> Tensor:
    """Squared error per frame, ``b f``: that of velocity, with its weight 1/t^2 on x0 held at 1/t_floor^2 for small t.

    With ``t_floor`` = 0 this is plain flow matching. A network that predicts x0 needs a floor: below it, the error of
    a perfect velocity is the x0 error times a weight without bound.
    """
    t = output.t
    if output.kind == "velocity":
        error, weight = output.prediction - (noise - x0), (t / t.clamp(min=t_floor)).nan_to_num(1.0) ** 2
    else:
        error, weight = output.prediction - x0, t.clamp(min=max(t_floor, 1e-3)) ** -2
    return weight * error.pow(2).mean((2, 3, 4))


def drop_text(scene: Scene, probability: float) -> Text:
    """The batch's text, with the empty prompt in its place for a random part of the rows (for guidance)."""
    drop = scene.draw.uniform("drop_text") < probability
    shape = (-1, *([1] * (scene.text.embeddings.ndim - 1)))
    free = scene.unconditional.spread(scene.text)
    return Text(torch.where(drop.reshape(shape), free.embeddings, scene.text.embeddings))


@register("loss", "flow_matching")
class FlowMatching:
    """Velocity regression on noised data: how teachers are trained.

    Args:
        shift: shift of the training times.
        times: ``shared`` by all frames, or ``per_block`` (diffusion forcing, for causal networks); by default as the
            kind of teacher says.
        context: what a causal network sees of earlier blocks: ``noisy`` (as drawn) or ``clean`` (teacher forcing).
        anchor: probability that the first latent frame is cleaner than the rest, by a uniform factor on its time; 0 is
            image-to-video. What happens after a known frame is for the prompt to say, so motion is learned far
            sooner than from clips that are equally noisy all over.
        drop_text: probability of training without the prompt.
        t_floor: see :func:`denoising_error`.
    """

    players = ("student",)
    needs = ("data",)

    def __init__(
        self,
        shift: float = 1.0,
        times: Literal["shared", "per_block"] | None = None,
        context: Literal["noisy", "clean"] = "noisy",
        anchor: float = 0.0,
        drop_text: float = 0.1,
        t_floor: float = 0.0,
    ) -> None:
        self.shift, self.context, self.anchor = shift, context, anchor
        self.times: Literal["shared", "per_block"] = times or "shared"
        self.drop_text, self.t_floor = drop_text, t_floor

    def __call__(self, player: str, scene: Scene) -> LossOutput:
        """Mean over batch and frames; logs the unweighted x0 error in four bands of t."""
        if scene.data is None:
            raise ValueError("flow matching needs data")
        x0 = scene.data
        t = draw_times(scene.draw, "t", scene, self.times, self.shift)
        if self.anchor > 0:
            anchored = scene.draw.uniform("anchor") < self.anchor
            factor = torch.where(anchored, scene.draw.uniform("anchor_factor"), 1.0)
            t = torch.cat([t[:, :1] * factor[:, None], t[:, 1:]], dim=1)
        noise = scene.draw.normal("noise", *x0.shape[1:])
        context = x0 if self.context == "clean" else None
        x_t = schedule.add_noise(x0, noise, t)
        output = scene.nets["student"](x_t, t, drop_text(scene, self.drop_text), context=context)
        value = denoising_error(output, x0, noise, self.t_floor).mean()
        return LossOutput(value, _bands((output.x0 - x0).detach().pow(2).mean((2, 3, 4)), t))


def _bands(error: Tensor, t: Tensor) -> dict[str, float | Tensor]:
    edges = (0.0, 0.25, 0.5, 0.75, 1.01)
    logs: dict[str, float | Tensor] = {}
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (t >= low) & (t < high)
        logs[f"x0_error_t{low:.2f}"] = (error * inside).sum() / inside.sum() if inside.any() else float("nan")
    return logs
