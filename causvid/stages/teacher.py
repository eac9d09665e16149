"""The many-step teacher: the shipped weights of this world and kind, given ones, or a network trained on data.

Writes ``weights.safetensors``, or shards of it and their index.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from causvid import build, ranks, tensor_files, training, weights
from causvid.errors import UserError
from causvid.models import wan_files
from causvid.randomness import Draw
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.types import Scene
from causvid.validate import Bound


@register("stage", "teacher")
class Teacher:
    """Takes or trains the teacher."""

    name = "teacher"

    def shared(self, spec: Spec) -> bool:
        return spec["teacher_training.weights"] == "train"

    def reads(self, spec: Spec) -> tuple[str, ...]:
        trained = ("teacher_training", "seed", "precision")
        training_reads = trained if self.shared(spec) else ("teacher_training.weights",)
        return (*build.teacher_reads(spec), *training_reads)

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ()

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return build.teacher_files(spec)

    def run(self, context: Context) -> None:
        kind = context.spec["teacher_training.weights"]
        if kind == "given":
            give(
                context,
                context.spec["model"],
                "runtime.teacher" if context.spec["runtime.teacher"] else "runtime.weights",
            )
        elif kind == "shipped":
            take(context)
        else:
            train(context)


@register("stage", "real_score")
class RealScore:
    """Takes the given weights of another network for the real score."""

    name = "real_score"

    def reads(self, spec: Spec) -> tuple[str, ...]:
        return ("world", "real_score")

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ()

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return build.real_score_files(spec)

    def run(self, context: Context) -> None:
        give(context, context.spec["real_score"], "runtime.real_score")


def give(context: Context, model: Bound, key: str) -> None:
    """Copy given weights of any layout, in their own type and tensor by tensor, after checking that they fit."""
    spec = context.spec
    if spec[key] is None:
        raise UserError(
            f"{context.folder.parent.name}: its weights are given from outside: say where with {key}=FOLDER"
        )
    found = wan_files.find(Path(spec[key]))
    size = build.size_of(build.World(spec), model)
    wan_files.agree(found, size)
    tensor_files.write_shards(context.folder, "weights", wan_files.converted(found, size, "ours"))


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
    world.ready_text()
    rule = build.teacher_rule(spec)
    ready = partial(training.prepare, options=options, device=world.device)
    if options["start"]:
        model = build.load_network(spec, world, rule, build.shipped_teacher(spec, options["start"]), ready)
    else:
        model = ready(build.network(spec, world, rule).to(world.device))
    model = model.train()
    loss = build.construct(options["loss"], times=build.construct(spec["teacher"]).times)
    player = training.Player(model, options["optimizer"], options, options["iterations"])
    total, batch = options["iterations"], options["batch"]
    with training.session(context, "teacher", {"student": player}, total) as session:
        for step in range(session.start, total):
            samples = ranks.rows(range(step * batch, (step + 1) * batch))
            data, text, unconditional = world.batch(samples)
            blocks = tuple(rule.blocks(data.shape[1]))  # of the batch: pictures are one frame
            draw = Draw(spec["seed"], "teacher", step, samples, world.device)
            output = loss(
                "student",
                Scene(draw, text, unconditional, {"student": model}, blocks, data=data),
            )
            norm = player.step(output.value)
            session.after(step, output, gradient_norm=norm)
        session.finish(weights=player.final())
