"""ODE regression: a causal student learns to jump from states of the teacher's trajectory to its end (CausVid, 4.3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from causvid import ranks
from causvid.errors import UserError
from causvid.registry import register
from causvid.types import LossOutput, Scene, Trajectory


@register("loss", "ode_regression")
class OdeRegression:
    """Regress the end of the teacher's trajectory from its states, with one time drawn per block.

    Blocks at t = 0 are context passed through; they are left out of the loss.

    Args:
        include_clean: whether t = 0 is among the drawn times, as in the release.
        context: ``noisy``: earlier blocks stand at their own drawn times, as in the release; ``clean``: at the
            trajectory's end (Causal-Forcing), so that training sees what inference sees.
        huber: c of the pseudo-Huber distance sqrt(d^2 + c^2) - c of a frame, where d^2 is its mean squared error (Song
            and Dhariwal, arXiv 2310.14189); 0 is d^2 itself, as in the paper. A first block at t = 1 can't know its
            target: squared, its error drowns those of blocks whose context tells them theirs.
    """

    players = ("student",)
    needs = ("trajectory",)

    def __init__(
        self, include_clean: bool = True, context: Literal["noisy", "clean"] = "noisy", huber: float = 0.0
    ) -> None:
        self.include_clean, self.context, self.huber = include_clean, context, huber

    def __call__(self, player: str, scene: Scene) -> LossOutput:
        """Mean distance over the frames that count."""
        if scene.trajectory is None:
            raise UserError("ODE regression needs trajectories: it is a loss for ode_init, not for distillation")
        times, states = scene.trajectory.times, scene.trajectory.states
        if len(times) != len(states) or times[-1] != 0 or not (times.diff() < 0).all():
            raise UserError(
                f"a trajectory's {len(states)} states need a time each, descending to 0; they have {times.tolist()}"
            )
        choices = len(times) if self.include_clean else len(times) - 1
        chosen = scene.per_block(scene.draw.integer("state", choices, len(scene.blocks)))
        x_t, t = gather_states(scene.trajectory, chosen)
        target = states[-1]
        context = target if self.context == "clean" else None
        output = scene.nets["student"](x_t, t, scene.text, context=context)
        error = (output.x0 - target).pow(2).mean((2, 3, 4))
        if self.huber:
            error = (error + self.huber**2).sqrt() - self.huber
        return LossOutput(ranks.weighted_mean(error, (t > 0).to(error.dtype)))


def gather_states(trajectory: Trajectory, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """States ``b f c h w`` and times ``b f`` of the chosen trajectory indices, ``b f``."""
    states = trajectory.states  # k b f c h w
    index = chosen[None, :, :, None, None, None].expand(1, *states.shape[1:])
    return states.gather(0, index)[0], trajectory.times.to(states)[chosen]
