"""Samples to judge and look at: the teacher's at several step counts, the student's on the way and at the end.

Every arm gets the same held-out pairs. The teacher's step counts start from one noise; all students (untrained,
ODE-initialised, distilled, and those of other seeds) draw another, block by block and step by step. Writes
``NAME.safetensors`` per arm (``videos``, uint8 ``b f c h w``; ``first`` and ``last`` for long rollouts) and
``timings.json``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causvid import build, progress, weights
from causvid.attention.cache import KVCache
from causvid.data.video import to_bytes
from causvid.randomness import Draw
from causvid.registry import register
from causvid.runs import Context
from causvid.samplers.rollout import Block
from causvid.spec import Spec
from causvid.types import Text

SPLIT = "test"
# What a student's samples depend on beside its weights.
STUDENT = (
    "world", "model", "causal", "precision", "student.steps", "student.shift", "student.causal", "student.sampler",
    "student.cache",
)  # fmt: skip


@register("stage", "sample_teacher")
class SampleTeacher:
    """Samples the many-step teacher, and the same teacher cut to fewer steps."""

    name = "sample_teacher"

    def reads(self, spec: Spec) -> tuple[str, ...]:
        judged = ("evaluation.samples", "evaluation.teacher_steps", "evaluation.batch")
        return (*build.teacher_reads(spec), "teacher_sampling", "precision", *judged)

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ("teacher",)

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return ()

    def run(self, context: Context) -> None:
        spec = context.spec
        world = build.World(spec)
        rule, path = (
            build.teacher_rule(spec),
            context.inputs["teacher"] / "weights.safetensors",
        )
        teacher = build.load_network(spec, world, rule, path)
        steps = [spec["teacher_sampling.steps"], *spec["evaluation.teacher_steps"]]
        samplers = {f"teacher_{n}": build.teacher_sampler(spec, n) for n in dict.fromkeys(steps)}
        with progress.bar("teacher clips", len(samplers) * spec["evaluation.samples"]) as show:
            for number, (name, sampler) in enumerate(samplers.items()):

                def clips(text: Text, free: Text, draw: Draw, sampler: Any = sampler) -> Tensor:
                    return sampler(teacher, draw.normal("noise", *world.latent_shape), text, free).last

                collect(
                    context,
                    world,
                    name,
                    clips,
                    lambda n, base=number: show(base * spec["evaluation.samples"] + n),
                )


class _StudentStage:
    """What both stages that sample a student share."""

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return ()

    def reads(self, spec: Spec) -> tuple[str, ...]:
        return (*STUDENT, "teacher", "evaluation.samples", "evaluation.batch")


@register("stage", "sample_start")
class SampleStart(_StudentStage):
    """Samples what the student was before distillation: the teacher's weights run causally, and after ODE init.

    A stage of its own, so that the arms of a sweep over distillation share it.
    """

    name = "sample_start"

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ("teacher", *(["ode_init"] if spec["init"]["name"] == "ode" else []))

    def run(self, context: Context) -> None:
        sources = {"untrained": "teacher", "ode_init": "ode_init"}
        arms = {name: source for name, source in sources.items() if source in context.inputs}
        world, count = build.World(context.spec), context.spec["evaluation.samples"]
        with progress.bar("clips before distillation", len(arms) * count) as show:
            for number, (name, source) in enumerate(arms.items()):
                student_clips(context, world, name, source, lambda n, base=number: show(base * count + n))


@register("stage", "sample")
class Sample(_StudentStage):
    """Samples the distilled student: clips, long rollouts, and its speed beside the teacher's."""

    name = "sample"

    def reads(self, spec: Spec) -> tuple[str, ...]:
        rollout = ("evaluation.rollout_factor", "evaluation.rollout_samples")
        return (*super().reads(spec), "teacher_sampling", "evaluation.teacher_steps", *rollout)

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ("teacher", "distill")

    def run(self, context: Context) -> None:
        spec = context.spec
        world = build.World(spec)
        count = spec["evaluation.samples"]
        with progress.bar("student clips", count + spec["evaluation.rollout_samples"]) as show:
            student_clips(context, world, "student", "distill", show)
            student = load_student(spec, world, context.inputs["distill"])
            if spec["student.causal"]:
                long_rollouts(context, world, student)
            timings = measure(context, world, student)
        weights.write_json(context.folder / "timings.json", timings)


@dataclass(frozen=True)
class Student:
    """A student, as its spec samples it: ``network`` with a sampler and, where it streams, a cache policy."""

    network: Any
    sampler: Any
    causal: bool
    new_cache: Callable[[], KVCache]

    def stream(self, shape: Sequence[int], text: Text, draw: Draw) -> Iterator[Block]:
        """Blocks of latents of shape ``(f, c, h, w)``, each as soon as it is done."""
        return self.sampler.stream(self.network, shape, text, draw, self.new_cache())

    def __call__(self, shape: Sequence[int], text: Text, draw: Draw) -> Tensor:
        """Latents ``b f c h w`` of the whole clip."""
        if not self.causal:
            return self.sampler(self.network, shape, text, draw)
        return torch.cat([block.latents for block in self.stream(shape, text, draw)], dim=1)


def student_clips(context: Context, world: build.World, name: str, source: str, show: Callable[[int], None]) -> None:
    """Sample all held-out pairs with the student's architecture and a stage's weights."""
    student = load_student(context.spec, world, context.inputs[source])

    def clips(text: Text, free: Text, draw: Draw) -> Tensor:
        return student(world.latent_shape, text, draw)

    collect(context, world, name, clips, show)


def load_student(spec: Spec, world: build.World, folder: Path) -> Student:
    """The student with the weights in a stage's folder."""
    network = build.load_network(spec, world, build.student_rule(spec), folder / "weights.safetensors")
    return student_with(spec, world, network)


def student_with(spec: Spec, world: build.World, network: Any) -> Student:
    """A network, sampled as the spec samples its student."""
    mask = build.student_rule(spec)
    sampler = build.construct(spec["student.sampler"], times=build.student_times(spec))
    cache = partial(build.stream_cache, spec["student.cache"], mask, world.latent_shape[0])
    return Student(network, sampler, spec["student.causal"], cache)


def from_bytes(videos: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return videos.float() / 127.5 - 1


def collect(
    context: Context,
    world: build.World,
    name: str,
    clips: Callable[[Text, Text, Draw], Tensor],
    show: Callable[[int], None],
) -> None:
    """Sample all held-out pairs in batches, and write them; a finished arm is not sampled again."""
    path = context.folder / f"{name}.safetensors"
    spec = context.spec
    count, batch = spec["evaluation.samples"], spec["evaluation.batch"]
    if not path.is_file():
        parts = []
        for start in range(0, count, batch):
            samples = range(start, min(start + batch, count))
            parts.append(held_out(world, samples, clips))
            show(start + len(samples))
        weights.write_tensors(path, {"videos": torch.cat(parts)})
    show(count)


def held_out(world: build.World, samples: Sequence[int], clips: Callable[[Text, Text, Draw], Tensor]) -> Tensor:
    """Videos of held-out captions, uint8 ``b f c h w``."""
    _, text, free = world.batch(samples, SPLIT)
    # Evaluation noise does not depend on the training seed: arms of an ablation are paired.
    latents = clips(text, free, Draw(0, "evaluation", 0, samples, world.device))
    return to_bytes(world.codec.decode(latents)).cpu()


def long_rollouts(context: Context, world: build.World, student: Student) -> None:
    """Stream rollouts of many times the training length; keep the first and the last training length of each."""
    path = context.folder / "rollout.safetensors"
    spec = context.spec
    if path.is_file():
        return
    samples = range(spec["evaluation.rollout_samples"])
    _, text, _ = world.batch(samples, SPLIT)
    frames, *frame = world.latent_shape
    total = frames * spec["evaluation.rollout_factor"]
    blocks = [
        block.latents for block in student.stream((total, *frame), text, Draw(0, "rollout", 0, samples, world.device))
    ]
    videos = to_bytes(world.codec.decode(torch.cat(blocks, dim=1))).cpu()
    length = world.codec.pixel_frames(frames)
    weights.write_tensors(
        path,
        # Copies: parts of a single rollout share memory, which a tensor file can't.
        {"first": videos[:, :length].clone(), "last": videos[:, -length:].clone(), "whole": videos[:4]},
    )


def measure(context: Context, world: build.World, student: Student, repeats: int = 5) -> dict[str, float]:
    """Seconds to the first block and to a whole clip, student and teacher in turns in one process, one clip each."""
    spec = context.spec
    path = context.inputs["teacher"] / "weights.safetensors"
    teacher = build.load_network(spec, world, build.teacher_rule(spec), path)
    full = build.teacher_sampler(spec)
    few = {n: build.teacher_sampler(spec, n) for n in spec["evaluation.teacher_steps"]}
    _, text, free = world.batch([0], SPLIT)
    draw = Draw(0, "timing", 0, [0], world.device)
    noise = draw.normal("noise", *world.latent_shape)

    def stream() -> tuple[float, float]:
        begin = time.perf_counter()
        if spec["student.causal"]:
            blocks = student.stream(world.latent_shape, text, draw)
            first = list(islice(blocks, 1))
            latency = time.perf_counter() - begin
            for _ in chain(first, blocks):
                pass
            return latency, time.perf_counter() - begin
        student(world.latent_shape, text, draw)
        whole = time.perf_counter() - begin
        return whole, whole

    def seconds(solver: Any) -> float:
        begin = time.perf_counter()
        solver(teacher, noise, text, free)
        return time.perf_counter() - begin

    stream()
    rows = [(*stream(), seconds(full), *(seconds(solver) for solver in few.values())) for _ in range(repeats)]
    latency, whole, teacher_s, *others = (statistics.median(column) for column in zip(*rows, strict=True))
    out = {"latency_s": latency, "clip_s": whole, "teacher_s": teacher_s}
    out |= {"latency_ratio": teacher_s / latency, "throughput_ratio": teacher_s / whole}
    for n, other in zip(few, others, strict=True):
        out |= {
            f"latency_ratio_vs_{n}": other / latency,
            f"throughput_ratio_vs_{n}": other / whole,
        }
    return out


def read_timings(folder: Path) -> dict[str, float]:
    return json.loads((folder / "timings.json").read_text())
