"""UniPC of second order for flow matching (arXiv 2302.04867, algorithms 5 and 6, with B(h) = e^h - 1), many-step.

It predicts x0, and works in half the log signal-to-noise ratio l = log((1 - t) / t). That is infinite at pure noise,
so the grid starts a thousandth below it, as the released samplers of Wan2.1 do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from causvid import schedule
from causvid.registry import register
from causvid.samplers.ode import OdeSampler
from causvid.types import DenoiserOutput

START = 0.999


def _log_ratio(t: float) -> float:
    return math.log((1 - t) / t)


def _phi(h: float) -> tuple[float, float, float]:
    """e^-h - 1, and the two moments of the exponential integrator that second order needs."""
    one = math.expm1(-h)
    two = one / -h - 1
    return one, two, two / -h - 0.5


@register("sampler", "unipc")
class UniPC(OdeSampler):
    """Second-order predictor and corrector through all frames at once: the many-step teacher in fewer steps.

    Args:
        steps: number of steps.
        shift: shift of the time grid.
        guidance: weight of classifier-free guidance.
        guidance_interval: times at which it is guided, (lowest, highest).
    """

    def __init__(
        self,
        steps: int = 50,
        shift: float = 1.0,
        guidance: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.times = schedule.shift(torch.linspace(START, 0, steps + 1, dtype=torch.float64), shift)
        self.shift, self.guidance = shift, guidance
        self.guidance_interval = schedule.interval("guidance_interval", guidance_interval)

    def states(self, noise: Tensor, estimate: Callable[[Tensor, float], DenoiserOutput]) -> Iterator[Tensor]:
        times = self.times.tolist()
        x = noise
        before = noise  # the state from which the last step started
        estimates: list[Tensor] = []  # of x0, at the last two times
        order = 1
        for i, now in enumerate(times[:-1]):
            x0 = estimate(x, now).x0
            if i > 0:
                x = _correct(before, estimates, x0, times[max(0, i - 2) : i + 1], order)
            yield x
            estimates = [*estimates[-1:], x0]
            before = x
            order = min(2, i + 1, len(times) - 1 - i)  # the last step is of first order
            x = _predict(x, estimates, times[max(0, i - 1) : i + 2], order)
        yield x


def _first(x: Tensor, estimate: Tensor, start: float, stop: float) -> Tensor:
    """The exact step for a constant x0."""
    return x * (stop / start) + (1 - stop / start) * estimate if stop > 0 else estimate


def _predict(x: Tensor, estimates: Sequence[Tensor], times: Sequence[float], order: int) -> Tensor:
    """From time ``times[-2]`` to ``times[-1]``."""
    start, stop = times[-2:]
    out = _first(x, estimates[-1], start, stop)
    if order < 2:
        return out
    here = _log_ratio(start)
    h = _log_ratio(stop) - here
    r = (_log_ratio(times[-3]) - here) / h
    return out - (1 - stop) * math.expm1(-h) * 0.5 * (estimates[-2] - estimates[-1]) / r


def _correct(x: Tensor, estimates: Sequence[Tensor], arrived: Tensor, times: Sequence[float], order: int) -> Tensor:
    """The step that led to ``times[-1]`` again, now that x0 was estimated there."""
    start, stop = times[-2:]
    out = _first(x, estimates[-1], start, stop)
    here = _log_ratio(start)
    h = _log_ratio(stop) - here
    one, two, three = _phi(h)
    change = arrived - estimates[-1]
    if order < 2:
        return out - (1 - stop) * one * 0.5 * change
    r = (_log_ratio(times[-3]) - here) / h
    # Weights of the two differences: they solve a + b = two / one and r a + b = 2 three / one.
    a = (two - 2 * three) / (one * (1 - r))
    b = two / one - a
    return out - (1 - stop) * one * (a * (estimates[-2] - estimates[-1]) / r + b * change)
