"""What a student is trained on: noised data, its own few-step samples, or its own rollouts through the cache.

Each is a callable ``(scene, times, grad) -> StudentSample``; ``times`` are the student's steps, without the final 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from causvid import schedule
from causvid.models.wan_vae import VaeState
from causvid.registry import register
from causvid.samplers.few_step import renoise
from causvid.samplers.rollout import few_step_schedule, run_schedule
from causvid.types import Scene, StudentSample


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

    A clip's length does not show slow drift. With ``extra_blocks`` a rollout begins with a random number of further
    blocks, all steps of them and without gradient, and only the clip's length after them is judged (as LongLive does,
    arXiv 2509.22622). That clip begins in mid-stream: its first latent, which codecs make of one frame, is the last
    frame of that latent encoded anew, and does not count.

    Args:
        exit_step: after how many steps a block is done: ``random``, the same for all blocks, or always the ``last``.
        context_t: the sampler's.
        extra_blocks: most blocks before the judged ones.
    """

    streams = True

    def __init__(
        self, exit_step: Literal["random", "last"] = "random", context_t: float = 0.0, extra_blocks: int = 0
    ) -> None:
        if extra_blocks < 0:
            raise ValueError(f"extra_blocks must be at least 0, got {extra_blocks}")
        self.exit_step: Literal["random", "last"] = exit_step
        self.context_t, self.extra_blocks = context_t, extra_blocks

    def __call__(self, scene: Scene, times: Sequence[float], grad: bool) -> StudentSample:
        student = scene.nets["student"]
        last = _exit_step(scene, times, self.exit_step)
        extra = scene.draw.shared_integer("extra_blocks", self.extra_blocks + 1) if self.extra_blocks else 0
        count, cache = extra + len(scene.blocks), student.new_cache()
        ranges = [cache.rule.block_range(block) for block in range(count)] if extra else scene.blocks
        before = few_step_schedule(extra, times, self.context_t, commit_last=True)
        judged = few_step_schedule(len(scene.blocks), times[: last + 1], self.context_t)
        steps = chain(before, (replace(step, block=extra + step.block) for step in judged))
        blocks = run_schedule(
            student, steps, ranges, _frame_shape(scene), scene.text, scene.draw, cache,
            frozenset({last}) if grad else None, extra,
        )  # fmt: skip
        latents = torch.cat([block.latents for block in blocks], dim=1)
        return self._end(scene, latents, times[last]) if extra else _everywhere(latents, times[last])

    def _end(self, scene: Scene, latents: Tensor, time: float) -> StudentSample:
        """The last clip's length of a longer rollout."""
        start = latents.shape[1] - scene.blocks[-1][1]
        with torch.no_grad():
            seen = scene.codec.decode_block(latents[:, : start + 1], VaeState()).value
            first = scene.codec.encode(seen[:, -1:]).to(latents.dtype)
        sample = _everywhere(torch.cat([first, latents[:, start + 1 :]], dim=1), time)
        given = torch.arange(sample.t.shape[1], device=sample.t.device) == 0
        return StudentSample(sample.x0, sample.t.masked_fill(given, 0.0), sample.counts & ~given)
