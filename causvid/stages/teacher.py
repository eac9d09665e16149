"""The many-step teacher: the shipped weights of this world and kind, or a network trained on data.

Writes ``weights.safetensors``.
"""

from __future__ import annotations

from pathlib import Path

from causvid import build, training, weights
from causvid.errors import UserError
from causvid.randomness import Draw
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.types import Scene


@register("stage", "teacher")
class Teacher:
    """Takes or trains the teacher."""

    name = "teacher"

    def reads(self, spec: Spec) -> tuple[str, ...]:
        shipped = spec["teacher_training.weights"] == "shipped"
        training_reads = ("teacher_training.weights",) if shipped else ("teacher_training", "seed")
        return (*build.teacher_reads(spec), *training_reads)

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ()

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return build.teacher_files(spec)

    def run(self, context: Context) -> None:
        if context.spec["teacher_training.weights"] == "given":
            raise UserError(
                "teacher_training.weights: given weights can be sampled (causvid generate --spec), and not trained yet"
            )
        if context.spec["teacher_training.weights"] == "shipped":
            take(context)
        else:
            train(context)


def take(context: Context) -> None:
    """Check that the shipped weights fit the spec's network, and copy them in fp32."""
    spec = context.spec
    world = build.World(spec)
    model = build.load_network(spec, world, build.teacher_rule(spec), build.shipped_teacher(spec))
    weights.write_tensors(context.folder / "weights.safetensors", model.state_dict())


def train(context: Context) -> None:
    """Flow matching on data."""
    spec = context.spec
    options = spec["teacher_training"]
    training.seed_everything(spec, "teacher")
    world = build.World(spec)
    rule = build.teacher_rule(spec)
    model = build.network(spec, world, rule)
    if options["start"]:
        path = build.shipped_teacher(spec, options["start"])
        weights.load_into(model, weights.read_tensors(path)[0], str(path))
    model = training.prepare(model, options)
    loss = build.construct(options["loss"], times=build.construct(spec["teacher"]).times)
    player = training.Player(model, options["optimizer"], options, options["iterations"])
    total, batch = options["iterations"], options["batch"]
    with training.session(context, "teacher", {"student": player}, total) as session:
        for step in range(session.start, total):
            samples = range(step * batch, (step + 1) * batch)
            data, text, unconditional = world.batch(samples)
            blocks = tuple(rule.blocks(data.shape[1]))  # of the batch: pictures are one frame
            draw = Draw(spec["seed"], "teacher", step, samples)
            output = loss(
                "student",
                Scene(draw, text, unconditional, {"student": model}, blocks, data=data),
            )
            norm = player.step(output.value)
            session.after(step, output, gradient_norm=norm)
        session.finish(weights=player.final())
