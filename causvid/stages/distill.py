"""Distillation: the student against its critics, each player with its own loss.

One iteration is some updates of every other player, then one of the student. Writes ``weights.safetensors`` (the
student) and one file per other player that was trained.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from causvid import build, training
from causvid.errors import UserError
from causvid.randomness import Draw
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.types import LossOutput, Scene


@register("stage", "distill")
class Distill:
    """Trains the few-step student with the spec's loss and student input."""

    name = "distill"

    def reads(self, spec: Spec) -> tuple[str, ...]:
        paths = (
            "world",
            "model",
            "causal",
            "teacher",
            "init",
            "loss",
            "distill",
            "seed",
        )
        streams = getattr(build.student_input(spec), "streams", False)
        return (
            *paths,
            *(["student.sampler"] if streams else []),
            "student.steps",
            "student.shift",
            "student.causal",
            "student.input",
        )

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        source = build.construct(spec["init"]).source
        return tuple(dict.fromkeys(["teacher", *([source] if source else [])]))

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return ()

    def run(self, context: Context) -> None:
        spec = context.spec
        options = spec["distill"]
        training.seed_everything(spec, "distill")
        world = build.World(spec)
        loss = build.construct(spec["loss"])
        nets = networks(context, world, loss.players)
        iterations, batch, per_student = (
            options["iterations"],
            options["batch"],
            options["critic_updates"],
        )
        players = _players(nets, loss.players, options)
        rule = build.student_rule(spec)
        make_input, times = (
            build.student_input(spec),
            build.student_times(spec),
        )
        with training.session(context, "distill", players, iterations) as session:
            for step in range(session.start, iterations):
                numbers: dict[str, float] = {}
                output = LossOutput(torch.zeros(()))
                # Critics first: the student's gradient is only as good as the fake score is up to date.
                critics = [name for name in players if name != "student"]
                turns = [*critics * per_student, "student"]
                for turn, name in enumerate(turns):
                    # Numbered by the player's own updates: arms with other players or turns stay paired.
                    number = step if name == "student" else step * per_student + turn // len(critics)
                    samples = range(number * batch, (number + 1) * batch)
                    data, text, unconditional = world.batch(samples)
                    scene = Scene(
                        Draw(spec["seed"], f"distill/{name}", number, samples),
                        text,
                        unconditional,
                        nets,
                        tuple(rule.blocks(data.shape[1])),
                        data=data,
                    )
                    # Kept, so that several losses of one player judge the same samples.
                    generate = cache(partial(make_input, scene, times))
                    output = loss(name, replace(scene, generate=generate))
                    numbers[f"{name}_gradient_norm"] = players[name].step(output.value)
                    numbers[f"{name}_loss"] = float(output.value.detach())
                session.after(step, output, **numbers)
            session.finish(**{"weights" if name == "student" else name: p.final() for name, p in players.items()})


def networks(context: Context, world: build.World, players: tuple[str, ...]) -> dict[str, nn.Module]:
    """The networks by role: student, fake score, teacher (frozen), and a discriminator where the loss trains one."""
    spec = context.spec
    path = context.inputs["teacher"] / "weights.safetensors"
    source = build.construct(spec["init"]).source
    rule = build.student_rule(spec)
    if source is None:
        student = build.network(spec, world, rule)
    else:
        student = build.load_network(spec, world, rule, context.inputs[source] / "weights.safetensors")
    teacher = build.load_network(spec, world, build.teacher_rule(spec), path).requires_grad_(False)
    fake_score = build.load_network(spec, world, build.teacher_rule(spec), path)
    nets: dict[str, nn.Module] = {
        "student": student.train(),
        "teacher": teacher,
        "fake_score": fake_score.train(),
    }
    if "discriminator" in players:
        nets["discriminator"] = build.discriminator(spec).train()
    return nets


def _players(nets: dict[str, nn.Module], names: tuple[str, ...], options: Any) -> dict[str, training.Player]:
    if "student" not in names:
        raise UserError(f"loss: distillation needs a loss for the student; this one trains {', '.join(names)}")
    players = {}
    for name in names:
        training.prepare(nets[name], options)
        optimizer = options["optimizer"] if name == "student" else options["critic_optimizer"]
        updates = options["iterations"] * (1 if name == "student" else options["critic_updates"])
        section = options if name == "student" else {**options, "ema": 0.0}
        players[name] = training.Player(nets[name], optimizer, section, updates)
    return players
