"""ODE initialisation: the causal student regresses the end of the teacher's trajectories (CausVid, sec. 4.3).

Writes ``weights.safetensors``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from causvid import build, training
from causvid.losses.ode import select_states
from causvid.randomness import Draw, key
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.stages.ode_pairs import read_pairs
from causvid.types import Scene, Trajectory


@register("stage", "ode_init")
class OdeInit:
    """Regresses the student onto stored trajectories, from the teacher's weights."""

    name = "ode_init"

    def reads(self, spec: Spec) -> tuple[str, ...]:
        return (
            "world",
            "model",
            "causal",
            "student.steps",
            "student.shift",
            "student.causal",
            "ode_init",
            "seed",
        )

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ("teacher", "ode_pairs")

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return ()

    def run(self, context: Context) -> None:
        spec = context.spec
        options = spec["ode_init"]
        training.seed_everything(spec, "ode_init")
        world = build.World(spec)
        rule = build.student_rule(spec)
        student = build.load_network(spec, world, rule, context.inputs["teacher"] / "weights.safetensors")
        student = training.prepare(student, options)
        pairs = select_states(read_pairs(context.inputs["ode_pairs"]), [*build.student_times(spec), 0.0])
        loss = build.construct(options["loss"])
        player = training.Player(student, options["optimizer"], options, options["iterations"])
        blocks = tuple(rule.blocks(world.latent_shape[0]))
        total, batch = options["iterations"], options["batch"]
        _, text, unconditional = world.batch(range(pairs.states.shape[1]))
        with training.session(context, "ode init", {"student": player}, total) as session:
            for step in range(session.start, total):
                samples = range(step * batch, (step + 1) * batch)
                rows = torch.tensor([_row(spec["seed"], sample, pairs.states.shape[1]) for sample in samples])
                scene = Scene(
                    Draw(spec["seed"], "ode_init", step, samples), text[rows], unconditional[rows],
                    {"student": student}, blocks, trajectory=Trajectory(pairs.states[:, rows].float(), pairs.times),
                )  # fmt: skip
                output = loss("student", scene)
                norm = player.step(output.value)
                session.after(step, output, gradient_norm=norm)
            session.finish(weights=player.final())


def _row(seed: int, sample: int, count: int) -> int:
    """Which stored pair a sample of the training order reads: a permutation of all pairs per epoch."""
    epoch, place = divmod(sample, count)
    return int(_permutation(seed, epoch, count)[place])


@cache
def _permutation(seed: int, epoch: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(key(seed, "ode_init", "epoch", epoch))
    return torch.randperm(count, generator=generator)
