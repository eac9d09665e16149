"""Videos from finished runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from causvid import build, experiment, progress, runs
from causvid import spec as specs
from causvid.data.video import to_rgb, write_mp4
from causvid.errors import UserError
from causvid.randomness import Draw
from causvid.spec import Spec
from causvid.streaming.engine import Engine
from causvid.streaming.ledger import PARTS
from causvid.streaming.record import writable
from causvid.streaming.script import Play, Script
from causvid.streaming.sinks import GrowingMp4, RawPipe


def student_of(name: str, root: Path, overrides: Sequence[str] = ()) -> tuple[Spec, Path]:
    """The spec and the student's weights of a finished run, by spec with its overrides, or by the folder of the run.

    Raises:
        UserError: no such run, one that has not finished distillation, no arm of a sweep, or overrides of a folder.
    """
    if (Path(name) / "record.json").is_file():
        if overrides:
            raise UserError(
                f"{name} is the folder of a run, which is as it is; {', '.join(overrides)} goes with a spec"
            )
        return _recorded(Path(name).resolve())
    spec, store = experiment.single(name, overrides), runs.Store(root.resolve())
    node = next(node for node in experiment.plan(spec, "distill") if node.name == "distill")
    if not store.done(node):
        raise UserError(
            f"'{name}' has no finished student ({store.folder(node)}: {store.explain(node)}); "
            f"run it first: causvid run {' '.join([name, *overrides])}"
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
    if not runs.finished(student):
        raise UserError(f"{folder} has no finished student ({student}); run its spec again")
    return spec, student / "weights.safetensors"


def run_folder(name: str, root: Path) -> Path:
    """The folder of a finished run, by spec or as it is.

    Raises:
        UserError: as for :func:`student_of`.
    """
    if (Path(name) / "record.json").is_file():
        return Path(name).resolve()
    spec, store = experiment.single(name, []), runs.Store(root.resolve())
    node = experiment.plan(spec)[-1]
    if not store.done(node):
        raise UserError(f"'{name}' is not finished ({store.explain(node)}); run it first: causvid run {name}")
    return store.folder(node)


def engine_of(name: str, root: Path) -> Engine:
    """The student of a finished run, ready to stream.

    Raises:
        UserError: as for :func:`student_of`, or a student that is not causal.
    """
    spec, weights_path = student_of(name, root)
    if not spec["student.causal"]:
        raise UserError(f"the student of '{name}' is bidirectional: it makes whole clips and does not stream")
    return engine_with(spec, weights_path)


def shipped_engine(name: str = "tiny/causal_teacher", steps: int = 16) -> Engine:
    """The causal teacher that ships, sampled as a student in more steps: a stream without any training.

    Raises:
        UserError: no causal teacher ships for this spec.
    """
    spec = experiment.single(name, [f"student.steps={steps}"])
    return engine_with(spec, build.shipped_teacher(spec, "causal"))


def engine_with(spec: Spec, weights_path: Path) -> Engine:
    """A causal student of a spec with the weights of a file."""
    world = build.World(spec)
    network = build.load_network(spec, world, build.causal_rule(spec), weights_path)
    sampler = build.session_sampler(spec)
    frames, *frame = world.latent_shape
    return Engine(
        network, network, world.codec, world.text_encoder, (frame[0], frame[1], frame[2]), frames,
        tuple(sampler.times), spec["student.shift"], getattr(sampler, "context_t", 0.0), cache=spec["student.cache"],
    )  # fmt: skip


def refuse_out(out: Path, videos: int = 1) -> None:
    """Refuse a place where these videos can't be put, before anything is computed.

    Args:
        out: an mp4 file, or the folder of several; ``-`` is stdout.

    Raises:
        UserError: a file for several, a folder or another kind of file for one, or nothing can be written there.
    """
    if str(out) == "-":
        return
    alone = videos == 1
    if (out.suffix.lower() != ".mp4" or out.is_dir()) if alone else (out.suffix.lower() == ".mp4" or out.is_file()):
        kind = "one video: --out must be an mp4 file" if alone else f"{videos} videos: --out must be a folder"
        raise UserError(f"this makes {kind}, and not {out}")
    writable(out if alone else out / "videos.json", "--out")


def generate(
    prompt: str,
    run: str,
    out: Path,
    frames: int | None,
    seed: int,
    fps: int,
    scale: int,
    root: Path,
    script: Script | None = None,
    stream: bool = False,
) -> Path:
    """Make a video from a run's student; see the command line for the arguments.

    Args:
        script: what happens in the stream; default the prompt alone.
        stream: write while it is made: raw frames to stdout where ``out`` is ``-``, else into an mp4 that grows.

    Raises:
        UserError: the run, the prompt or the output path is wrong.
    """
    refuse_out(out)
    spec, weights_path = student_of(run, root)
    experiment.set_threads(spec)
    if not spec["student.causal"]:
        if script is not None or stream:
            raise UserError(f"the student of '{run}' is bidirectional: it makes whole clips and does not stream")
        return _whole_clip(spec, weights_path, prompt, run, out, frames, seed, fps, scale)
    script = script or Script(((0, prompt),), frames, seed)
    return play(engine_with(spec, weights_path), replace(script, fps=fps), out, fps, scale, stream)


def play(engine: Engine, script: Script, out: Path, fps: float, scale: int, stream: bool) -> Path:
    """Make a script's video; for the arguments see :func:`generate`.

    Raises:
        UserError: the script does not fit the engine, or the path can't be written.
    """
    height, width = engine.pixel_size
    to_rgb(torch.zeros(1, 3, height, width), scale)  # a picture too large is refused before it is made
    made = Play(engine, script)
    sink = None if not stream else RawPipe(scale) if str(out) == "-" else GrowingMp4(out, fps, scale)
    parts = []
    with progress.bar("blocks", made.blocks) as show:
        for number, frames in enumerate(made):
            show(number + 1)
            if sink is None:
                parts.append(frames)
            elif not sink.write(frames):
                progress.say(f"the reader has gone; {number + 1} of {made.blocks} blocks were made")
                break
    if sink is None:
        write_mp4(out, torch.cat(parts), fps=fps, scale=scale)
    else:
        sink.close()
    made.write_record()
    summary = made.session.ledger.summary()
    if summary:
        shares = ", ".join(f"{part} {summary[f'{part}_share']:.0%}" for part in PARTS)
        progress.say(f"first frame after {summary['first_frame_s']:.2f} s, then {summary['fps']:.1f} fps ({shares})")
    return out.resolve()


def _whole_clip(
    spec: Spec, path: Path, prompt: str, run: str, out: Path, frames: int | None, seed: int, fps: int, scale: int
) -> Path:
    """A clip of a bidirectional student, which has the training length."""
    world = build.World(spec)
    text, length = world.text_encoder.encode([prompt]), world.latent_shape[0]
    student = build.load_network(spec, world, build.student_rule(spec), path)
    sampler = build.construct(spec["student.sampler"], times=build.student_times(spec))
    most = world.codec.pixel_frames(length)
    wanted = frames or most
    if not world.codec.pixel_frames(length - 1) < wanted <= most:
        raise UserError(f"the student of '{run}' is bidirectional: it makes {most} frames")
    video = sampler(student, world.latent_shape, text, Draw(seed, "generate", 0, [0]))
    write_mp4(out, world.codec.decode(video)[0, :wanted], fps=fps, scale=scale)
    return out.resolve()
