"""What a student is trained on: noised data, its own few-step samples, or its own rollouts through the cache.

Each is a callable ``(scene, times, grad) -> StudentSample``; ``times`` are the student's steps, without the final 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from causvid import schedule
from causvid.registry import register
from causvid.samplers.few_step import renoise
from causvid.samplers.rollout import few_step_schedule, run_schedule
from causvid.types import Scene, StudentInput, StudentSample


@register("student_input", "data")
class Data:
    """Data corrupted to a time drawn per block from the student's steps: the paper's algorithm 1.

    A block drawn at t = 0 is passed through as data and does not count.

    Args:
        include_clean: whether t = 0 is among the drawn times, as in the release.
        context: ``noisy``: earlier blocks stand at their own drawn times; ``clean``: at t = 0 (teacher forcing).
    """

    def __init__(self, include_clean: bool = True, context: Literal["noisy", "clean"] = "noisy") -> None:
        self.include_clean, self.context = include_clean, context

    def __call__(self, scene: Scene, times: Sequence[float], grad: bool) -> StudentSample:
        if scene.data is None:
            raise ValueError("student input 'data' needs data")
        choices = torch.tensor([*times, 0.0] if self.include_clean else list(times), dtype=scene.data.dtype)
        drawn = scene.draw.integer("student_t", len(choices), len(scene.blocks))
        t = scene.per_block(choices.to(scene.data.device)[drawn])
        x_t = schedule.add_noise(scene.data, scene.draw.normal("student_noise", *scene.data.shape[1:]), t)
        context = scene.data if self.context == "clean" else None
        with torch.set_grad_enabled(grad):
            x0 = scene.nets["student"](x_t, t, scene.text, context=context).x0
        clean = t == 0
        x0 = torch.where(clean[:, :, None, None, None], scene.data, x0)
        return StudentSample(x0, t, ~clean)


def _exit_step(scene: Scene, times: Sequence[float], exit_step: Literal["random", "last"]) -> int:
    return len(times) - 1 if exit_step == "last" else scene.draw.shared_integer("exit", len(times))


def _frame_shape(scene: Scene) -> tuple[int, ...]:
    if scene.data is None:
        raise ValueError("student inputs take the shape of latents from data, and the stage has none")
    return tuple(scene.data.shape[2:])


def _everywhere(x0: Tensor, time: float) -> StudentSample:
    t = torch.full(x0.shape[:2], time, dtype=x0.dtype, device=x0.device)
    return StudentSample(x0, t, torch.ones_like(t, dtype=torch.bool))


@register("student_input", "backward_simulation")
class BackwardSimulation:
    """The student's own few-step samples, all frames in one masked pass; gradient through the last step (DMD2).

    Args:
        exit_step: after how many steps to stop: ``random``, so that every step is trained, or always the ``last``.
    """

    def __init__(self, exit_step: Literal["random", "last"] = "random") -> None:
        self.exit_step: Literal["random", "last"] = exit_step

    def __call__(self, scene: Scene, times: Sequence[float], grad: bool) -> StudentSample:
        last = _exit_step(scene, times, self.exit_step)
        x0 = torch.zeros(len(scene.text), scene.blocks[-1][1], *_frame_shape(scene)).to(scene.text.embeddings)
        for i, time in enumerate(times[: last + 1]):
            with torch.set_grad_enabled(grad and i == last):
                x_t, t = renoise(x0, scene.draw, f"student_step{i}", time)
                x0 = scene.nets["student"](x_t, t, scene.text).x0
        return _everywhere(x0, times[last])


@register("student_input", "self_rollout")
class SelfRollout:
    """The student's own rollout through the cache, as at inference; gradient through each block's last step.

    Context is committed without gradient (Self-Forcing, arXiv 2506.08009, algorithm 1), at the time at which the
    student's sampler commits it.

    A rollout of a clip's length does not show slow drift (decision 54). With ``given_blocks`` it begins with a random
    number of blocks of data, so that the student also learns to go on from what is right; they do not count.

    Args:
        exit_step: after how many steps a block is done: ``random``, the same for all blocks, or always the ``last``.
        context_t: the sampler's.
        given_blocks: most blocks of data that a rollout begins with; it must leave one to make.
    """

    streams = True

    def __init__(
        self, exit_step: Literal["random", "last"] = "random", context_t: float = 0.0, given_blocks: int = 0
    ) -> None:
        if given_blocks < 0:
            raise ValueError(f"given_blocks must be at least 0, got {given_blocks}")
        self.exit_step: Literal["random", "last"] = exit_step
        self.context_t, self.given_blocks = context_t, given_blocks

    def __call__(self, scene: Scene, times: Sequence[float], grad: bool) -> StudentSample:
        student, shape = scene.nets["student"], _frame_shape(scene)
        last = _exit_step(scene, times, self.exit_step)
        if self.given_blocks >= len(scene.blocks):
            raise ValueError(f"given_blocks must be below the {len(scene.blocks)} blocks of a clip")
        given = scene.draw.shared_integer("given_blocks", self.given_blocks + 1) if self.given_blocks else 0
        cache, data = student.new_cache(), cast(Tensor, scene.data)[:, : scene.blocks[given][0]]
        with torch.no_grad():
            for start, stop in scene.blocks[:given]:
                block = data[:, start:stop]
                x_t, t = renoise(block, scene.draw, f"given{start}", self.context_t)
                cache = student(x_t, t, scene.text.frames(start, stop), cache=cache, commit=True).cache
        steps = few_step_schedule(len(scene.blocks), times[: last + 1], self.context_t)
        steps = (step for step in steps if step.block >= given)
        blocks = run_schedule(
            student, steps, scene.blocks, shape, scene.text, scene.draw, cache, frozenset({last}) if grad else None
        )
        sample = _everywhere(torch.cat([data, *(block.latents for block in blocks)], dim=1), times[last])
        clean = torch.arange(sample.t.shape[1], device=sample.t.device) < data.shape[1]
        return StudentSample(sample.x0, sample.t.masked_fill(clean, 0.0), sample.counts & ~clean)


@register("student_input", "mixed")
class Mixed:
    """Several student inputs in turn, row by row: a row's sample number says which is its own, whoever has the row.

    A student that is trained on its own rollouts alone never sees again what it no longer makes. Rows of data hold it
    there, and rollouts show it its own errors (decision 38). Every process needs a row of each input.

    Args:
        of: the student inputs; one that stands twice has twice the rows.

    Raises:
        ValueError: none is given, or one is a mixture itself; when called, with fewer rows than inputs.
    """

    def __init__(self, of: Sequence[StudentInput]) -> None:
        if not of:
            raise ValueError("a mixture needs at least one student input")
        if any(isinstance(part, Mixed) for part in of):
            raise ValueError("a mixture can't hold a mixture; list all student inputs in one, some of them twice")
        self.of = list(of)
        self.streams = any(getattr(part, "streams", False) for part in of)

    def __call__(self, scene: Scene, times: Sequence[float], grad: bool) -> StudentSample:
        count, numbers = len(self.of), scene.draw.samples
        rows = [[row for row, number in enumerate(numbers) if number % count == turn] for turn in range(count)]
        if not all(rows):
            raise ValueError(f"{len(numbers)} rows can't be shared by {count} student inputs")
        samples = [part(scene.rows(own), times, grad) for part, own in zip(self.of, rows, strict=True)]
        back = torch.tensor([row for own in rows for row in own]).argsort()
        fields = zip(*((sample.x0, sample.t, sample.counts) for sample in samples), strict=True)
        return StudentSample(*(torch.cat(parts)[back] for parts in fields))
