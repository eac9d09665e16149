"""Samples of the spec's suites: the student's videos of their prompts, as files named as upstream VBench wants them.

Writes ``SUITE/PROMPT-INDEX.mp4`` for each suite that ``eval`` names, and ``SUITE/sampling.json``, which says how.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from causvid import build, progress
from causvid.errors import UserError
from causvid.eval import judges, sampling
from causvid.eval.benchmarks import CRF, LEAST_SIDE, Suite, named_once
from causvid.eval.suites import Prompt, generating
from causvid.randomness import Draw
from causvid.registry import register
from causvid.runs import Context
from causvid.spec import Spec
from causvid.stages.sample import SPLIT, STUDENT, Student, load_student

BATCH = 8  # videos that are sampled at once


def suites_of(spec: Spec) -> list[Suite]:
    """The suites that ``eval`` names, under different names."""
    return named_once([build.construct(each) for each in spec["eval"] if each.group == "suite"])


def metrics_of(spec: Spec) -> list[Any]:
    """The metrics of the held-out clips: those of ``evaluation.metrics``, and those that ``eval`` adds."""
    named = [*spec["evaluation.metrics"], *(each for each in spec["eval"] if each.group == "metric")]
    return [each for number, each in enumerate(named) if each not in named[:number]]


def closed(world: build.World) -> bool:
    """Whether a world's text encoder knows few words, so that prompts must be its own captions."""
    return bool(world.dataset.vocabulary)


def prompts_of(suite: Suite, world: build.World, samples: int) -> list[Prompt]:
    """A suite's prompts; those of a world of few words are its held-out captions.

    Raises:
        UserError: a prompt that the text encoder can't read, told for all of a list before anything is sampled.
    """
    captions = world.pixels(range(samples), SPLIT)[1] if closed(world) and suite.file is None else []
    prompts = suite.prompts(captions, closed(world))
    if closed(world):
        world.text_encoder.encode(list(generating(prompts).values()))
    return prompts


def latent_frames(suite: Suite, world: build.World, causal: bool) -> int:
    """Latent frames of a suite's videos.

    Raises:
        UserError: longer than a bidirectional student's clips.
    """
    trained = world.latent_shape[0]
    if suite.seconds is None:
        return trained
    wanted = math.ceil(suite.seconds * suite.fps)
    frames = next(n for n in range(1, wanted + 1) if world.codec.pixel_frames(n) >= wanted)
    if frames > trained and not causal:
        raise UserError(
            f"eval.{suite.name}: {suite.seconds:g} s at {suite.fps:g} fps are {frames} latent frames, and a "
            f"bidirectional student makes {trained}; lower seconds, or set student.causal"
        )
    return max(frames, trained) if not causal else frames


@register("stage", "sample_suites")
class SampleSuites:
    """Samples the student on the prompts of the spec's suites, into mp4 files."""

    name = "sample_suites"

    def facts(self, spec: Spec) -> list[Any]:
        """What is sampled of each suite, whoever judges it."""
        return [suite.sampling for suite in suites_of(spec)]

    def reads(self, spec: Spec) -> tuple[str, ...]:
        return (*STUDENT, "evaluation.samples")

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        return ("distill",)

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        return prompt_files(spec)

    def run(self, context: Context) -> None:
        spec = context.spec
        world = build.World(spec)
        student = load_student(spec, world, context.inputs["distill"])
        for suite in suites_of(spec):
            sample_suite(suite, context.folder / suite.name, spec, world, student, context.inputs["distill"].name)


def sample_suite(
    suite: Suite,
    folder: Path,
    spec: Spec,
    world: build.World,
    student: Student,
    name: str,
    shard: tuple[int, int] = (0, 1),
) -> int:
    """Sample a suite, or a shard of it, with a student; ``name`` tells it from others. Returns how many were made."""
    prompts = prompts_of(suite, world, spec["evaluation.samples"])
    frames = latent_frames(suite, world, spec["student.causal"])

    def make(jobs: Sequence[sampling.Job]) -> list[Tensor]:
        text = world.text_encoder.encode([job.text for job in jobs]).to(world.device)
        draw = Draw(0, "suite", 0, [job.seed for job in jobs], world.device)
        latents = student((frames, *world.latent_shape[1:]), text, draw)
        return list(world.codec.decode(latents))

    height, width = (side * world.codec.scale for side in world.latent_shape[2:])
    with progress.bar(suite.name, suite.videos(prompts)) as show:
        return sampling.sample(
            folder, prompts, suite.per_prompt, make,
            {"student": name, "frames": world.codec.pixel_frames(frames)},
            suite.fps, max(1, -(-LEAST_SIDE // min(height, width))), CRF, BATCH, shard,
            lambda done, total: show(done), suite.static_filter,
        )  # fmt: skip


def prompt_files(spec: Spec) -> tuple[Path, ...]:
    """Lists of prompts that the spec's suites read, checked: what can't be sampled is told before anything runs.

    Raises:
        UserError: a list that can't be read, or a suite that this student can't make.
    """
    suites = suites_of(spec)
    if not suites:
        return ()
    world, paths = build.World(spec), []
    for suite in suites:
        latent_frames(suite, world, spec["student.causal"])
        prompts_of(suite, world, spec["evaluation.samples"])
        if suite.dimensions:
            judges.require(suite.dimensions, suite.folder, suite.seconds is not None, suite.static_filter > 0)
        paths.append(suite.source(closed(world)))
    return tuple(dict.fromkeys(path for path in paths if path is not None))
