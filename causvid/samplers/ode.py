"""Deterministic sampling: the probability-flow ODE by Euler's method, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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


class OdeSampler:
    """What the many-step samplers share: a grid of times, guidance, and how they are called.

    Attributes:
        times: where the network is evaluated, from noise to data, and the end.
        guidance: weight of classifier-free guidance.
        guidance_interval: times at which it is guided, (lowest, highest) (Kynkaanniemi et al., arXiv 2404.07724).
    """

    times: Tensor
    guidance: float
    guidance_interval: tuple[float, float]

    def guided(self, time: float) -> bool:
        """Whether a step from this time is guided."""
        return self.guidance != 1.0 and self.guidance_interval[0] <= time <= self.guidance_interval[1]

    @property
    def evaluations(self) -> int:
        """Network evaluations per clip, a guided step counted twice."""
        return sum(2 if self.guided(time) else 1 for time in self.times[:-1].tolist())

    @torch.no_grad()
    def __call__(
        self, model: Denoiser, noise: Tensor, text: Text, unconditional: Text, keep: Sequence[int] | None = None
    ) -> Trajectory:
        """Integrate from noise (``b f c h w``) to data.

        Args:
            keep: indices into ``times`` of the states to return; default the last alone.
        """
        last = len(self.times) - 1
        wanted = set(keep if keep is not None else [last])
        guided = Guided(model, unconditional, self.guidance)

        def estimate(x: Tensor, time: float) -> DenoiserOutput:
            network = guided if self.guided(time) else model
            return network(x, torch.full(x.shape[:2], time, dtype=x.dtype, device=x.device), text)

        states = [x for i, x in enumerate(self.states(noise, estimate)) if i in wanted]
        return Trajectory(torch.stack(states), self.times[sorted(wanted)])

    def states(self, noise: Tensor, estimate: Callable[[Tensor, float], DenoiserOutput]) -> Iterator[Tensor]:
        """The state at each of ``times``, the noise first; ``estimate`` asks the network at a state and a time."""
        raise ValueError(f"{type(self).__name__} does not say how it integrates")


@register("sampler", "euler")
class Euler(OdeSampler):
    """Euler steps through all frames at once: the many-step teacher.

    Args:
        steps: number of steps, or explicit times.
        shift: shift of the time grid.
        guidance: weight of classifier-free guidance.
        guidance_interval: times at which it is guided, (lowest, highest).
    """

    def __init__(
        self,
        steps: int | Sequence[float] = 50,
        shift: float = 1.0,
        guidance: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
    ) -> None:
        self.times = schedule.grid(steps, shift)
        self.shift, self.guidance = shift, guidance
        self.guidance_interval = schedule.interval("guidance_interval", guidance_interval)

    def states(self, noise: Tensor, estimate: Callable[[Tensor, float], DenoiserOutput]) -> Iterator[Tensor]:
        x = noise
        for now, after in zip(self.times[:-1].tolist(), self.times[1:].tolist(), strict=True):
            yield x
            x = x + (after - now) * estimate(x, now).velocity
        yield x
