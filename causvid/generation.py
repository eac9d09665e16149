"""Videos from finished runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from causvid import build, experiment, progress, runs
from causvid import spec as specs
from causvid.data.video import write_mp4
from causvid.errors import UserError
from causvid.randomness import Draw
from causvid.spec import Spec
from causvid.streaming.engine import Engine


def student_of(name: str, root: Path) -> tuple[Spec, Path]:
    """The spec and the student's weights of a finished run, by spec or by the folder of the run.

    Raises:
        UserError: no such run, one that has not finished distillation, or a sweep.
    """
    if (Path(name) / "record.json").is_file():
        return _recorded(Path(name).resolve())
    spec, store = experiment.single(name, []), runs.Store(root.resolve())
    node = next(node for node in experiment.plan(spec, "distill") if node.name == "distill")
    if not store.done(node):
        raise UserError(
            f"'{name}' has no finished student ({store.folder(node)}: {store.explain(node)}); "
            f"run it first: causvid run {name}"
        )
    return spec, store.folder(node) / "weights.safetensors"


def _recorded(folder: Path) -> tuple[Spec, Path]:
    """The spec and the student of a run's folder, as its record names them, whatever the source says today."""
    try:
        record = json.loads((folder / "record.json").read_text())
        values, student = record["values"], folder.parent.parent / "distill" / record["inputs"]["distill"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/record.json is damaged or not that of a whole run: {error!r}") from error
    spec = specs.complete(values, str(folder))
    if not (student / "DONE").is_file():
        raise UserError(f"{folder} has no finished student ({student}); run its spec again")
    return spec, student / "weights.safetensors"


def engine_of(name: str, root: Path) -> Engine:
    """The student of a finished run, ready to stream.

    Raises:
        UserError: as for :func:`student_of`, or a student that is not causal.
    """
    spec, weights_path = student_of(name, root)
    if not spec["student.causal"]:
        raise UserError(f"the student of '{name}' is bidirectional: it makes whole clips and does not stream")
    return _engine(spec, weights_path)


def shipped_engine(name: str = "tiny/causal_teacher", steps: int = 16) -> Engine:
    """The causal teacher that ships, sampled as a student in more steps: a stream without any training.

    Raises:
        UserError: no causal teacher ships for this spec.
    """
    spec = experiment.single(name, [f"student.steps={steps}"])
    return _engine(spec, build.shipped_teacher(spec, "causal"))


def _engine(spec: Spec, weights_path: Path) -> Engine:
    world = build.World(spec)
    network = build.load_network(spec, world, build.causal_rule(spec), weights_path)
    sampler = build.construct(spec["student.sampler"], times=build.student_times(spec))
    frames, *frame = world.latent_shape
    return Engine(
        network, network, world.codec, world.text_encoder, (frame[0], frame[1], frame[2]), frames,
        tuple(sampler.times), spec["student.shift"], getattr(sampler, "context_t", 0.0),
    )  # fmt: skip


def generate(prompt: str, run: str, out: Path, frames: int | None, seed: int, fps: int, scale: int, root: Path) -> Path:
    """Stream a video from a run's student into an mp4; see the command line for the arguments.

    Raises:
        UserError: the run, the prompt or the output path is wrong.
    """
    spec, weights_path = student_of(run, root)
    experiment.set_threads(spec)
    world = build.World(spec)
    text = world.text_encoder.encode([prompt])
    student = build.load_network(spec, world, build.student_rule(spec), weights_path)
    sampler = build.construct(spec["student.sampler"], times=build.student_times(spec))
    length, *frame = world.latent_shape
    wanted = frames or world.codec.pixel_frames(length)
    latents = (
        length if frames is None else next(n for n in range(1, wanted + 1) if world.codec.pixel_frames(n) >= wanted)
    )
    draw = Draw(seed, "generate", 0, [0])
    with progress.bar("frames", latents) as show:
        if spec["student.causal"]:
            blocks = []
            for block in sampler.stream(student, (latents, *frame), text, draw):
                blocks.append(block.latents)
                show(block.stop)
            video = torch.cat(blocks, dim=1)
        elif latents != length:
            raise UserError(
                f"the student of '{run}' is bidirectional: it makes {world.codec.pixel_frames(length)} frames"
            )
        else:
            video = sampler(student, (latents, *frame), text, draw)
    write_mp4(out, world.codec.decode(video)[0, :wanted], fps=fps, scale=scale)
    return out.resolve()
