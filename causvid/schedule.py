"""Flow-matching time in closed form: no tables, no state.

``t`` is sigma, already shifted: ``shift`` is applied once, where a grid is built or a training time is drawn, and
nowhere else. t = 1 is pure noise, t = 0 is data; x_t = (1 - t) x0 + t noise; velocity = noise - x0 (Lipman et al.,
arXiv 2210.02747, with time reversed; the shift is eq. 23 of Esser et al., arXiv 2403.03206).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causvid.errors import UserError


def shift(u: Tensor, amount: float) -> Tensor:
    """Warp uniform time ``u`` in [0, 1] towards noise: s u / (1 + (s - 1) u). 1 leaves it as it is.

    Raises:
        ValueError: the amount is not positive.
    """
    if amount <= 0:
        raise ValueError(f"shift must be positive, got {amount}")
    return amount * u / (1 + (amount - 1) * u)


def unshift(t: Tensor, amount: float) -> Tensor:
    """The inverse of :func:`shift`."""
    return shift(t, 1 / amount)


def grid(steps: int | Sequence[float], amount: float) -> Tensor:
    """Times at which a sampler evaluates its network, ending with 0: ``steps + 1`` values in fp64, descending.

    An integer is a uniform grid in u, then shifted: 4 steps at shift 5 give 1, .9375, .8333, .625, 0. A sequence
    is taken as it is (already shifted), and 0 is appended when it is missing.

    Raises:
        ValueError: no step, or times that do not descend within (0, 1].
    """
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        shifted = shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), amount)
        shifted[0] = 1.0  # exactly, whatever the shift rounds to
        return shifted
    times = [float(t) for t in steps]
    if times and times[-1] != 0:
        times.append(0.0)
    if len(times) < 2 or times[0] > 1 or any(a <= b for a, b in zip(times, times[1:], strict=False)):
        raise ValueError(f"times must descend strictly within (0, 1], got {list(steps)}")
    return torch.tensor(times, dtype=torch.float64)


def interval(name: str, bounds: Sequence[float]) -> tuple[float, float]:
    """Times from ``bounds[0]`` to ``bounds[1]``, both included.

    Raises:
        ValueError: not two times in order within [0, 1]; ``name`` says of what.
    """
    if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
        raise ValueError(f"{name} needs 0 <= lowest <= highest <= 1, got {list(bounds)}")
    return bounds[0], bounds[1]


def state_indices(trajectory_times: Tensor, wanted: Sequence[float]) -> list[int]:
    """Where the wanted times stand in a trajectory.

    Raises:
        UserError: a time that was not stored; a neighbour is never taken for it.
    """
    indices = []
    for time in wanted:
        distance = (trajectory_times.double() - time).abs()
        if float(distance.min()) > 1e-4:
            held = ", ".join(f"{float(t):.4f}" for t in trajectory_times)
            raise UserError(
                f"the stored trajectory holds no state at t = {time:.4f} (it holds {held}); choose student.steps whose "
                "times are stored, or add them to ode_pairs.keep"
            )
        indices.append(int(distance.argmin()))
    return indices


def _like(t: Tensor, x: Tensor) -> Tensor:
    """``t`` (``b f``) with trailing axes, in the type of ``x`` (``b f ...``)."""
    return t.to(x.dtype).reshape(*t.shape, *([1] * (x.ndim - t.ndim)))


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t noise, for ``b f c h w`` and ``t`` of ``b f``."""
    t = _like(t, x0)
    return (1 - t) * x0 + t * noise


def to_x0(x_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """x0 = x_t - t v."""
    return x_t - _like(t, x_t) * velocity


def to_velocity(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - x0) / t; singular at t = 0, where E[noise - x0 | x_0 = x_t] = -x0 is returned."""
    t = _like(t, x_t)
    clean = t == 0
    return torch.where(clean, -x0, (x_t - x0) / torch.where(clean, torch.ones_like(t), t))
