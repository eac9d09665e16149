"""Sampling a suite outside a run: from a finished run's student, or from given weights; shared among processes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from causvid import build, experiment, generation, progress, runs, weights
from causvid.errors import UserError
from causvid.eval import sampling
from causvid.eval.benchmarks import CRF, Suite
from causvid.spec import Spec
from causvid.stages import suites
from causvid.stages.sample import load_student
from causvid.wan_generation import Request, Studio


@dataclass(frozen=True)
class Order:
    """What to sample into ``out``, and which part of it."""

    suite: Suite
    out: Path
    shard: tuple[int, int] = (0, 1)


def from_run(order: Order, name: str, root: Path, overrides: Sequence[str] = ()) -> int:
    """Sample a suite with the student of a finished run, as ``causvid run`` names it; returns how many were made.

    Raises:
        UserError: no such run, a prompt that it can't read, or a folder of another model's videos.
    """
    spec, path = generation.student_of(name, root, overrides)
    experiment.set_threads(spec)
    world = build.World(spec)
    student = load_student(spec, world, path.parent)
    return suites.sample_suite(order.suite, order.out, spec, world, student, path.parent.name, order.shard)


def from_weights(order: Order, request: Request) -> int:
    """Sample a suite with any spec from given weights; returns how many videos were made.

    Raises:
        UserError: spec, weights, prompts or the folder are wrong.
    """
    suite = order.suite
    prompts = suite.prompts([], closed=False)
    frames = None if suite.seconds is None else math.ceil(suite.seconds * suite.fps)
    studio = Studio(replace(request, frames=frames))
    experiment.set_threads(studio.spec)
    count = studio.world.codec.pixel_frames(studio.latent_frames())
    if not studio.causal and studio.latent_frames() > studio.world.latent_shape[0]:
        raise UserError(f"{count} frames are more than '{request.spec}' samples at once; lower --seconds")
    studio = Studio(replace(request, frames=count))  # whole latents: nothing that was made is cut away
    every = sampling.jobs(prompts, suite.per_prompt, suite.static_filter)
    texts = list(dict.fromkeys(job.text for job in every))
    encoder = studio.world.text_encoder
    negative = studio.world.negative_prompt if request.negative is None else request.negative
    encoded = encoder.encode([*texts, negative]).to(studio.request.device)
    encoder.release()
    rows = {text: row for row, text in enumerate(texts)}

    def make(jobs: Sequence[sampling.Job]) -> list[Tensor]:
        out = []
        for job in jobs:
            row = rows[job.text]
            out.append(studio.video(encoded[row : row + 1], encoded[-1:], job.seed, lambda done, note="": None))
        return out

    record = {"student": identity(studio.spec, request), "frames": count}
    with progress.bar(suite.name, len(every)) as show:
        return sampling.sample(
            order.out, prompts, suite.per_prompt, make, record, suite.fps, 1, CRF, shard=order.shard,
            show=lambda done, total: show(done), static_filter=suite.static_filter,
        )  # fmt: skip


def identity(spec: Spec, request: Request) -> str:
    """What the videos depend on: the spec's values, and the weights' files by content.

    Two checkpoints of one training have the same name and size, and would share a folder of videos.
    """
    values = {key: value for key, value in spec.data.items() if key not in ("runtime", "about", "sweep", "eval")}
    sources = [path for path in (request.weights, request.model) if path is not None]
    files: list[Any] = []
    for source in sources:
        found = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
        files += [[path.name, weights.digest(path)] for path in found]
    text = runs.canonical([values, files, request.part, request.dtype, request.negative])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
