"""Deterministic sampling: the probability-flow ODE by Euler's method, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causvid import schedule
from causvid.registry import register
from causvid.types import Denoiser, DenoiserOutput, Text, Trajectory


class Guided:
    """A denoiser under classifier-free guidance, uncond + w (cond - uncond), as one call on a doubled batch.

    A cache passed through it holds both halves. With w = 1 the unconditional half is not computed.

    Args:
        model: the denoiser.
        unconditional: the empty prompt, as often as there are rows.
        weight: w.
    """

    def __init__(self, model: Denoiser, unconditional: Text, weight: float) -> None:
        self.model, self.unconditional, self.weight = model, unconditional, weight
        self._both: tuple[Text, Text] | None = None

    def __call__(self, x: Tensor, t: Tensor, text: Text, **options: object) -> DenoiserOutput:
        if self.weight == 1.0:
            return self.model(x, t, text, **options)  # type: ignore[arg-type]
        if self._both is None or self._both[0] is not text:  # the same object again lets the cross memo be used
            self._both = (text, Text.cat([text, self.unconditional.spread(text)]))
        out = self.model(torch.cat([x, x]), torch.cat([t, t]), self._both[1], **options)  # type: ignore[arg-type]
        conditional, free = out.prediction.chunk(2)
        return DenoiserOutput(x, t, free + self.weight * (conditional - free), out.kind, out.cache)


@register("sampler", "euler")
class Euler:
    """Euler steps through all frames at once: the many-step teacher.

    Args:
        steps: number of steps, or explicit times.
        shift: shift of the time grid.
        guidance: weight of classifier-free guidance.
    """

    def __init__(self, steps: int | Sequence[float] = 50, shift: float = 1.0, guidance: float = 1.0) -> None:
        self.times = schedule.grid(steps, shift)
        self.shift, self.guidance = shift, guidance

    @property
    def evaluations(self) -> int:
        """Network evaluations per clip, guidance counted twice."""
        return (len(self.times) - 1) * (1 if self.guidance == 1.0 else 2)

    @torch.no_grad()
    def __call__(
        self, model: Denoiser, noise: Tensor, text: Text, unconditional: Text, keep: Sequence[int] | None = None
    ) -> Trajectory:
        """Integrate from noise (``b f c h w``) to data.

        Args:
            keep: indices into ``times`` of the states to return; default the last alone.
        """
        guided = Guided(model, unconditional, self.guidance)
        wanted = set(keep if keep is not None else [len(self.times) - 1])
        x, states = noise, []
        for i, (now, after) in enumerate(zip(self.times[:-1].tolist(), self.times[1:].tolist(), strict=True)):
            if i in wanted:
                states.append(x)
            t = torch.full(x.shape[:2], now, dtype=x.dtype, device=x.device)
            x = x + (after - now) * guided(x, t, text).velocity
        if len(self.times) - 1 in wanted:
            states.append(x)
        return Trajectory(torch.stack(states), self.times[sorted(wanted)])
