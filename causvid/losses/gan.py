"""Adversarial losses on noised latents, a discriminator head reads the fake score's features (2405.14867, 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from causvid import schedule
from causvid.losses.flow import draw_times
from causvid.registry import register
from causvid.types import Loss, LossOutput, Scene

Kind = Literal["logistic", "hinge"]


def discriminator_loss(real: Tensor, fake: Tensor, kind: Kind) -> Tensor:
    """Loss of the discriminator from its logits (any shape) on real and fake samples."""
    if kind == "logistic":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(fake: Tensor, kind: Kind) -> Tensor:
    """Loss of the generator from the discriminator's logits on its samples (non-saturating for ``logistic``)."""
    return F.softplus(-fake).mean() if kind == "logistic" else -fake.mean()


def r1_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """Mean squared norm of the gradient of the logits (``b``) at the real inputs (``b ...``); 1801.04406, eq. 9."""
    (gradient,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return gradient.pow(2).flatten(1).sum(1).mean()


@register("loss", "gan")
class GAN:
    """A discriminator tells noised data from the student's noised samples; the student makes that hard.

    Args:
        kind: ``logistic`` or ``hinge``.
        r1: weight of the R1 penalty, per value of a sample; 0 leaves it out.
        shift, t_min, t_max: law of the noise level at which samples are compared.
    """

    players = ("student", "discriminator")
    needs = ("data", "samples")

    def __init__(
        self, kind: Kind = "logistic", r1: float = 0.0, shift: float = 1.0, t_min: float = 0.02, t_max: float = 0.98
    ) -> None:
        if kind not in ("logistic", "hinge"):
            raise ValueError(f"kind must be 'logistic' or 'hinge', got '{kind}'")
        self.kind: Kind = kind
        self.r1, self.shift, self.t_min, self.t_max = r1, shift, t_min, t_max

    def __call__(self, player: str, scene: Scene) -> LossOutput:
        """The generator's loss for ``student``, the discriminator's for ``discriminator``."""
        discriminator, backbone = scene.nets["discriminator"], scene.nets["fake_score"]
        t = draw_times(scene.draw, "gan_t", scene, "shared", self.shift).clamp(self.t_min, self.t_max)

        def noised(x0: Tensor, purpose: str) -> Tensor:
            return schedule.add_noise(x0, scene.draw.normal(purpose, *x0.shape[1:]).to(x0.dtype), t)

        if player == "student":
            sample = scene.samples(True)
            x_t = noised(sample.x0, "gan_noise_fake")
            logits = discriminator(x_t, t, scene.text, backbone, counts=sample.counts)
            return LossOutput(generator_loss(logits, self.kind))
        if scene.data is None:
            raise ValueError("the discriminator needs data")
        with torch.no_grad():
            sample = scene.samples(False)
            fake_t = noised(sample.x0, "gan_noise_fake")
        real_t = noised(scene.data, "gan_noise_real").requires_grad_(self.r1 > 0)
        # The penalty differentiates twice, which of the attention kernels only the plain one can.
        with sdpa_kernel(SDPBackend.MATH) if self.r1 > 0 else nullcontext():
            # The same frames of both: else the discriminator could tell them by how many were averaged.
            real = discriminator(real_t, t, scene.text, backbone, counts=sample.counts)
        fake = discriminator(fake_t, t, scene.text, backbone, counts=sample.counts)
        value = discriminator_loss(real, fake, self.kind)
        logs: dict[str, float | Tensor] = {"real": real.detach().mean(), "fake": fake.detach().mean()}
        if self.r1 > 0:
            penalty = r1_penalty(real, real_t) / real_t[0].numel()
            value, logs["r1"] = value + self.r1 * penalty, penalty.detach()
        return LossOutput(value, logs)


@register("loss", "sum")
class Sum:
    """A weighted sum of losses, player by player; a player that only some of them have gets only theirs.

    Each term is logged under its loss's name; the second of a kind as ``NAME_2``.

    Args:
        of: the losses.
        weights: one per loss; default all 1.
    """

    def __init__(self, of: Sequence[Loss], weights: Sequence[float] | None = None) -> None:
        self.of, self.weights = list(of), list(weights) if weights is not None else [1.0] * len(of)
        if not self.of or len(self.of) != len(self.weights):
            raise ValueError(f"a sum needs one weight per loss, got {len(self.of)} losses, {len(self.weights)} weights")
        self.players = tuple(dict.fromkeys(player for loss in self.of for player in loss.players))
        self.needs = tuple(dict.fromkeys(need for loss in self.of for need in getattr(loss, "needs", ())))
        kinds = [type(loss).__name__.lower() for loss in self.of]
        again = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
        self.names = [f"{kind}_{n + 1}" if n else kind for kind, n in zip(kinds, again, strict=True)]

    def __call__(self, player: str, scene: Scene) -> LossOutput:
        terms = [
            (weight, name, loss(player, scene))
            for weight, name, loss in zip(self.weights, self.names, self.of, strict=True)
            if player in loss.players
        ]
        logs: dict[str, float | Tensor] = {}
        for _, name, term in terms:
            logs[name] = term.value.detach()
            logs.update({f"{name}_{key}": value for key, value in term.logs.items()})
        return LossOutput(torch.stack([weight * term.value for weight, _, term in terms]).sum(), logs)
