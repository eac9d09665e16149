"""Block rollouts through a cache: a schedule of (block, t, commit) is data, and one loop runs any of them.

Each block holds an estimate of its clean latents. A step noises the estimate to the step's time, with fresh noise, and
lets the network estimate again; a committing step writes the block's keys and values into the cache and is the last
one of its block. A block without an estimate starts at t = 1, from pure noise. Few-step generation, the paper's clean
context pass, noisy context and video-to-video (an estimate that is given) are schedules and starting points, not code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from causvid.randomness import Draw
from causvid.registry import register
from causvid.samplers.few_step import descending, renoise
from causvid.types import Denoiser, DenoiserOutput, Text


@dataclass(frozen=True)
class Step:
    """One network evaluation of a rollout."""

    block: int
    t: float
    commit: bool


def few_step_schedule(
    blocks: int, times: Sequence[float], context_t: float = 0.0, commit_last: bool = False
) -> Iterator[Step]:
    """Denoise each block at ``times``, then commit it at ``context_t`` (0: the paper's clean context).

    Nobody reads the last block's context, so by default it is not computed.
    """
    for block in range(blocks):
        for t in times:
            yield Step(block, t, False)
        if block < blocks - 1 or commit_last:
            yield Step(block, context_t, True)


@dataclass(frozen=True)
class Block:
    """A finished block: its frames [start, stop) and clean latents ``b f c h w``."""

    start: int
    stop: int
    latents: Tensor


def evaluate(
    model: Denoiser,
    step: Step,
    index: int,
    estimate: Tensor,
    text: Text,
    draw: Draw,
    cache: object,
    given: Tensor | None = None,
) -> DenoiserOutput:
    """One step of a block: its estimate, noised to the step's time with the step's own noise, through the network.

    Args:
        index: number of the step within its block; with the block it is the key of the noise.
        estimate: clean latents as far as they are known, ``b f c h w``.
        given: clean latents of the block's first frames, which stand at t = 0 whatever the step's time is.
    """
    x_t, t = renoise(estimate, draw, f"block{step.block}/step{index}", step.t)
    if given is not None:
        count = given.shape[1]
        x_t, t = torch.cat([given, x_t[:, count:]], 1), torch.cat([torch.zeros_like(t[:, :count]), t[:, count:]], 1)
    return model(x_t, t, text, cache=cache, commit=step.commit)


def run_schedule(
    model: Denoiser,
    schedule_steps: Iterator[Step] | Sequence[Step],
    blocks: Sequence[tuple[int, int]],
    frame_shape: Sequence[int],
    text: Text,
    draw: Draw,
    cache: object,
    grad_steps: frozenset[int] | None = None,
    grad_from: int = 0,
) -> Iterator[Block]:
    """Run a schedule and yield each block when its last step is done.

    Args:
        model: a causal denoiser.
        schedule_steps: the evaluations, blocks in ascending order.
        blocks: frames [start, stop) of each block.
        frame_shape: (c, h, w) of a latent frame.
        text: prompts, one for the clip (``b l d``) or per frame.
        draw: noise; a function of block and step, so a prefix of a longer rollout has the same noise.
        cache: an empty cache of the model.
        grad_steps: for each block, which of its denoising steps (0-based) keep gradient; default none. The estimate
            is detached between steps.
        grad_from: first block that keeps any.
    """
    for number, steps in groupby(schedule_steps, key=lambda step: step.block):
        start, stop = blocks[number]
        part = text.frames(start, stop)
        estimate = torch.zeros(len(text), stop - start, *frame_shape).to(text.embeddings)
        for index, step in enumerate(steps):
            if index == 0 and step.t != 1.0:
                raise ValueError(f"block {number} starts at t = {step.t} without an estimate: it must start at 1")
            kept = grad_steps is not None and number >= grad_from and not step.commit and index in grad_steps
            with torch.set_grad_enabled(kept):
                output = evaluate(model, step, index, estimate.detach(), part, draw, cache)
            if step.commit:
                cache = output.cache
            else:
                estimate = output.x0
        yield Block(start, stop, estimate)


@register("sampler", "rollout")
class Rollout:
    """Few-step block rollout with a cache: how causal students stream (CausVid, algorithm 2).

    Args:
        times: times of a block's steps, descending from 1; the final 0 is implied.
        context_t: time at which a finished block is committed; 0 is the paper's extra clean pass.

    Raises:
        ValueError: times that do not start at 1.
    """

    def __init__(self, times: Sequence[float], context_t: float = 0.0) -> None:
        self.times, self.context_t = descending(times), context_t

    def stream(
        self,
        model: Denoiser,
        shape: Sequence[int],
        text: Text,
        draw: Draw,
        cache: object = None,
        start: Tensor | None = None,
    ) -> Iterator[Block]:
        """Blocks of a clip of latent shape ``(f, c, h, w)``, each as soon as it is done.

        Args:
            cache: an empty cache, for a stream under another rule than the model's mask.
            start: clean latents of the first block, ``b f c h w``; they are its context and are not yielded.
        """
        blocks = model.mask.blocks(shape[0])  # type: ignore[attr-defined]
        steps = few_step_schedule(len(blocks), self.times, self.context_t)
        cache = model.new_cache() if cache is None else cache  # type: ignore[attr-defined]
        if start is not None:
            clean = torch.zeros(start.shape[:2], dtype=start.dtype, device=start.device)
            with torch.no_grad():
                cache = model(start, clean, text.frames(*blocks[0]), cache=cache, commit=True).cache
            steps = (step for step in steps if step.block > 0)
        return run_schedule(model, steps, blocks, shape[1:], text, draw, cache)

    def __call__(self, model: Denoiser, shape: Sequence[int], text: Text, draw: Draw) -> Tensor:
        """Latents ``b f c h w`` of the whole clip."""
        return torch.cat([block.latents for block in self.stream(model, shape, text, draw)], dim=1)
