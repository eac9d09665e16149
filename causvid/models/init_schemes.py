"""Where a student's weights come from: the stage whose ``weights.safetensors`` it starts with, or none."""

from __future__ import annotations

from causvid.registry import register


@register("init", "ode")
class Ode:
    """Weights regressed onto the teacher's ODE trajectories (CausVid, sec. 4.3)."""

    source = "ode_init"


@register("init", "teacher")
class Teacher:
    """The teacher's weights, run causally."""

    source = "teacher"


@register("init", "random")
class Random:
    """Fresh random weights."""

    source = None
