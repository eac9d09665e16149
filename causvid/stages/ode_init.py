"""ODE initialisation: the causal student regresses the end of the teacher's trajectories (CausVid, sec. 4.3).

Writes ``weights.safetensors``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch

from causvid import build, ranks, training
from causvid.losses.ode import select_states
from causvid.randomness import Draw, key
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.stages.ode_pairs import Pairs
from causvid.types import Scene, Text, Trajectory


@register("stage", "ode_init")
class OdeInit:
    """Regresses the student onto stored trajectories, from the teacher's weights."""

    name = "ode_init"

    def shared(self, spec: Spec) -> bool:
        return True

    def reads(self, spec: Spec) -> tuple[str, ...]:
        return (
            "world",
            "model",
            "causal",
            "student.steps",
            "student.shift",
            "student.causal",
            "ode_init",
            "precision",
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
        world.ready_text()
        rule = build.student_rule(spec)
        ready = partial(training.prepare, options=options, device=world.device)
        student = build.load_network(spec, world, rule, context.inputs["teacher"] / "weights.safetensors", ready)
        student.train()
        pairs, wanted = Pairs(context.inputs["ode_pairs"]), [*build.student_times(spec), 0.0]
        loss = build.construct(options["loss"])
        player = training.Player(student, options["optimizer"], options, options["iterations"])
        blocks = tuple(rule.blocks(world.latent_shape[0]))
        total, batch = options["iterations"], options["batch"]
        texts = _texts(world, len(pairs))
        with training.session(context, "ode init", {"student": player}, total) as session:
            for step in range(session.start, total):
                samples = ranks.rows(range(step * batch, (step + 1) * batch))
                rows = [_row(spec["seed"], sample, len(pairs)) for sample in samples]
                chosen = select_states(pairs.rows(rows), wanted)
                chosen = Trajectory(chosen.states.to(world.device), chosen.times.to(world.device))
                text, unconditional = texts(rows)
                draw = Draw(spec["seed"], "ode_init", step, samples, world.device)
                scene = Scene(draw, text, unconditional, {"student": student}, blocks, trajectory=chosen)
                output = loss("student", scene)
                norm = player.step(output.value)
                session.after(step, output, gradient_norm=norm)
            session.finish(weights=player.final())


def _texts(world: build.World, count: int) -> Callable[[Sequence[int]], tuple[Text, Text]]:
    """The text of pairs by row, and the empty prompt as often: held where it is small, read again from a store."""
    if world.holds_latents:
        return lambda rows: world.batch(rows)[1:]
    _, text, unconditional = world.batch(range(count))
    return lambda rows: (text[list(rows)], unconditional[list(rows)])


def _row(seed: int, sample: int, count: int) -> int:
    """Which stored pair a sample of the training order reads: a permutation of all pairs per epoch."""
    epoch, place = divmod(sample, count)
    return int(_permutation(seed, epoch, count)[place])


@cache
def _permutation(seed: int, epoch: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(key(seed, "ode_init", "epoch", epoch))
    return torch.randperm(count, generator=generator)
