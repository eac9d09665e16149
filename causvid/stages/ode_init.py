"""ODE initialisation: the causal student regresses the end of the teacher's trajectories (CausVid, sec. 4.3).

Those of the stage ``ode_pairs``, or of the store that ``ode_init.pairs`` names.

Writes ``weights.safetensors``.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import torch

from causvid import build, ranks, training
from causvid.data.latents import digest_file
from causvid.randomness import Draw, key
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.stages.ode_pairs import STORE
from causvid.types import Scene, Trajectory


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
        return ("teacher",) if spec["ode_init.pairs"] else ("teacher", "ode_pairs")

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return digest_file(spec["ode_init.pairs"]) if spec["ode_init.pairs"] else ()

    def run(self, context: Context) -> None:
        spec = context.spec
        options = spec["ode_init"]
        training.seed_everything(spec, "ode_init")
        world = build.World(spec)
        pairs = build.stored_pairs(spec, world, None if options["pairs"] else context.inputs["ode_pairs"] / STORE)
        if ranks.first():
            pairs.ready_text(world.text_encoder)
        world.ready_text()
        rule = build.student_rule(spec)
        ready = partial(training.prepare, options=options, device=world.device)
        student = build.load_network(spec, world, rule, context.inputs["teacher"] / "weights.safetensors", ready)
        student.train()
        loss = build.construct(options["loss"])
        player = training.Player(student, options["optimizer"], options, options["iterations"])
        blocks = tuple(rule.blocks(world.latent_shape[0]))
        total, batch = options["iterations"], options["batch"]
        with training.session(context, "ode init", {"student": player}, total) as session:
            for step in range(session.start, total):
                samples = ranks.rows(range(step * batch, (step + 1) * batch))
                rows = [_row(spec["seed"], sample, len(pairs)) for sample in samples]
                chosen, text = pairs.rows(rows, world.text_encoder)
                chosen = Trajectory(chosen.states.to(world.device), chosen.times)  # the loss reads the times here
                text, unconditional = text.to(world.device), world.unconditional(len(rows))
                draw = Draw(spec["seed"], "ode_init", step, samples, world.device)
                edit = partial(world.edits, samples, blocks)
                scene = Scene(draw, text, unconditional, {"student": student}, blocks, trajectory=chosen, edit=edit)
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
