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

from causvid import build, ranks, training
from causvid.attention.masks import Rule
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

    def shared(self, spec: Spec) -> bool:
        return True

    def reads(self, spec: Spec) -> tuple[str, ...]:
        paths = (
            "world",
            "model",
            "causal",
            "teacher",
            "init",
            "loss",
            "distill",
            "precision",
            "real_score",
            "fake_score",
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
        other = ["real_score"] if spec["real_score"] else []
        return tuple(dict.fromkeys(["teacher", *other, *([source] if source else [])]))

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return ()

    def run(self, context: Context) -> None:
        spec = context.spec
        options = spec["distill"]
        training.seed_everything(spec, "distill")
        world = build.World(spec)
        world.ready_text()
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
                    samples = ranks.rows(range(number * batch, (number + 1) * batch))
                    data, text, unconditional = world.batch(samples)
                    blocks = tuple(rule.blocks(data.shape[1]))
                    scene = Scene(
                        Draw(spec["seed"], f"distill/{name}", number, samples, world.device),
                        text,
                        unconditional,
                        nets,
                        blocks,
                        data=data,
                        edit=partial(world.edits, samples, blocks),
                    )
                    # Kept, so that several losses of one player judge the same samples.
                    generate = cache(partial(make_input, scene, times))
                    output = loss(name, replace(scene, generate=generate))
                    numbers[f"{name}_gradient_norm"] = players[name].step(output.value)
                    if name != "student":  # whose loss is the step's own
                        numbers[f"{name}_loss"] = float(output.value.detach())
                session.after(step, output, **numbers)
            session.finish(**{"weights" if name == "student" else name: p.final() for name, p in players.items()})


def networks(context: Context, world: build.World, players: tuple[str, ...]) -> dict[str, nn.Module]:
    """The networks by role: student, fake score, teacher (frozen, the real score), and a discriminator where needed."""
    spec = context.spec
    sees = build.teacher_rule(spec)
    ready = partial(training.prepare, options=spec["distill"], device=world.device)
    frozen = partial(training.shard, device=world.device)

    def load(source: str, rule: Rule, ready: build.Ready) -> nn.Module:
        model = spec["real_score"] if source == "real_score" else None
        return build.load_network(spec, world, rule, context.inputs[source] / "weights.safetensors", ready, model)

    source, rule = build.construct(spec["init"]).source, build.student_rule(spec)
    fresh = None if source else ready(build.network(spec, world, rule).to(world.device))
    nets: dict[str, nn.Module] = {
        "student": fresh or load(str(source), rule, ready),
        "teacher": load("real_score" if spec["real_score"] else "teacher", sees, frozen).requires_grad_(False),
        "fake_score": load(spec["fake_score"], sees, ready),
    }
    if "discriminator" in players:
        nets["discriminator"] = ready(build.discriminator(spec).to(world.device))
    return nets


def _players(nets: dict[str, nn.Module], names: tuple[str, ...], options: Any) -> dict[str, training.Player]:
    if "student" not in names:
        raise UserError(f"loss: distillation needs a loss for the student; this one trains {', '.join(names)}")
    players = {}
    for name in names:
        nets[name].train()
        optimizer = options["optimizer"] if name == "student" else options["critic_optimizer"]
        updates = options["iterations"] * (1 if name == "student" else options["critic_updates"])
        section = options if name == "student" else {**options, "ema": 0.0}
        players[name] = training.Player(nets[name], optimizer, section, updates)
    return players
