"""Block rollouts through a cache: a schedule of (block, t, commit) is data, and one loop runs any of them.

Each block holds an estimate of its clean latents. A step noises the estimate to the step's time, with fresh noise, and
lets the network estimate again; a committing step writes the block's keys and values into the cache and is the last
one of its block. A block without an estimate starts at t = 1, from pure noise. Few-step generation, the paper's clean
context pass, noisy context and video-to-video (an estimate that is given) are schedules and starting points, not code.

Steps of several consecutive blocks may share one evaluation, a *pass*: rolling denoising. Each block of a pass sees,
by the rule of the stream, what is committed and the earlier blocks of the pass, as noisy as they stand there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causvid.randomness import Draw
from causvid.registry import register
from causvid.samplers.few_step import descending, renoise
from causvid.types import Denoiser, DenoiserOutput, Text


@dataclass(frozen=True)
class Step:
    """One evaluation of one block."""

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


def rolling_schedule(
    blocks: int, times: Sequence[float], window: int, context_t: float = 0.0, first: int = 0
) -> Iterator[tuple[Step, ...]]:
    """Passes over up to ``window`` blocks at once, the earlier ones less noisy: the next block begins before the last
    one is done (rolling diffusion, arXiv 2402.09470; Rolling Forcing, arXiv 2509.25161).

    Every block has all the ``times``, and is committed alone when it has had them. With a window of 1 this is
    :func:`few_step_schedule`.

    Args:
        first: the block that it begins with.

    Raises:
        ValueError: the window does not divide the number of steps, so blocks could not begin evenly.
    """
    if window < 1 or len(times) % window:
        raise ValueError(f"window_blocks must divide the number of steps, {len(times)}; got {window}")
    count, apart = len(times), len(times) // window  # passes of a block; from its beginning to that of the next
    for number in range((blocks - 1 - first) * apart + count if blocks > first else 0):
        oldest, newest = first + max(0, number - count + apart) // apart, min(blocks - 1, first + number // apart)
        taken = {block: number - (block - first) * apart for block in range(oldest, newest + 1)}
        yield tuple(Step(block, times[step], False) for block, step in taken.items())
        if taken[oldest] == count - 1 and oldest < blocks - 1:
            yield (Step(oldest, context_t, True),)


@dataclass(frozen=True)
class Block:
    """A finished block: its frames [start, stop) and clean latents ``b f c h w``."""

    start: int
    stop: int
    latents: Tensor


def noised(step: Step, index: int, estimate: Tensor, draw: Draw, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x_t ``b f c h w``, t ``b f``): an estimate of a block, noised to the step's time with the step's own noise.

    Args:
        index: number of the step within its block; with the block it is the key of the noise.
        estimate: clean latents as far as they are known, ``b f c h w``.
        given: clean latents of the block's first frames, which stand at t = 0 whatever the step's time is.
    """
    x_t, t = renoise(estimate, draw, f"block{step.block}/step{index}", step.t)
    if given is not None:
        count = given.shape[1]
        x_t, t = torch.cat([given, x_t[:, count:]], 1), torch.cat([torch.zeros_like(t[:, :count]), t[:, count:]], 1)
    return x_t, t


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
    """One step of one block through the network; for the arguments see :func:`noised`."""
    return model(*noised(step, index, estimate, draw, given), text, cache=cache, commit=step.commit)


def run_schedule(
    model: Denoiser,
    schedule_steps: Iterable[Step | tuple[Step, ...]],
    blocks: Sequence[tuple[int, int]],
    frame_shape: Sequence[int],
    text: Text,
    draw: Draw,
    cache: object,
    grad_steps: frozenset[int] | None = None,
) -> Iterator[Block]:
    """Run a schedule and yield each block when it is committed, those that never are at the end.

    Args:
        model: a causal denoiser.
        schedule_steps: the evaluations: a step, or a pass of steps of consecutive blocks.
        blocks: frames [start, stop) of each block.
        frame_shape: (c, h, w) of a latent frame.
        text: prompts, one for the clip (``b l d``) or per frame.
        draw: noise; a function of block and step, so a prefix of a longer rollout has the same noise.
        cache: an empty cache of the model.
        grad_steps: for each block, which of its denoising steps (0-based) keep gradient; default none. The estimate
            is detached between steps.

    Raises:
        ValueError: a block that does not start at t = 1.
    """
    estimates: dict[int, Tensor] = {}
    taken: dict[int, int] = {}
    for item in schedule_steps:
        steps: tuple[Step, ...] = item if isinstance(item, tuple) else (item,)
        made, grad, commit = [], False, steps[0].commit
        for step in steps:
            start, stop = blocks[step.block]
            index = taken.get(step.block, 0)
            if index == 0:
                if step.t != 1.0:
                    raise ValueError(
                        f"block {step.block} starts at t = {step.t} without an estimate: it must start at 1"
                    )
                estimates[step.block] = torch.zeros(len(text), stop - start, *frame_shape).to(text.embeddings)
            made.append(noised(step, index, estimates[step.block].detach(), draw))
            grad = grad or (grad_steps is not None and not commit and index in grad_steps)
            taken[step.block] = index + 1
        first, last = blocks[steps[0].block][0], blocks[steps[-1].block][1]
        x_t, t = torch.cat([part for part, _ in made], 1), torch.cat([part for _, part in made], 1)
        with torch.set_grad_enabled(grad):
            output = model(x_t, t, text.frames(first, last), cache=cache, commit=commit)
        if commit:
            cache = output.cache
            yield Block(first, last, estimates.pop(steps[0].block))
            continue
        for step in steps:
            start, stop = blocks[step.block]
            estimates[step.block] = output.x0[:, start - first : stop - first]
    for number, estimate in estimates.items():
        yield Block(*blocks[number], estimate)


@register("sampler", "rollout")
class Rollout:
    """Few-step block rollout with a cache: how causal students stream (CausVid, algorithm 2).

    Args:
        times: times of a block's steps, descending from 1; the final 0 is implied.
        context_t: time at which a finished block is committed; 0 is the paper's extra clean pass.
        window_blocks: blocks that are denoised together, each at a time of its own (:func:`rolling_schedule`).

    Raises:
        ValueError: times that do not start at 1, or a window that does not divide their number.
    """

    def __init__(self, times: Sequence[float], context_t: float = 0.0, window_blocks: int = 1) -> None:
        self.times, self.context_t, self.window_blocks = descending(times), context_t, window_blocks
        next(rolling_schedule(1, self.times, window_blocks))  # refuses a window that does not fit

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
        first = 0 if start is None else 1
        steps = rolling_schedule(len(blocks), self.times, self.window_blocks, self.context_t, first)
        cache = model.new_cache() if cache is None else cache  # type: ignore[attr-defined]
        if start is not None:
            clean = torch.zeros(start.shape[:2], dtype=start.dtype, device=start.device)
            with torch.no_grad():
                cache = model(start, clean, text.frames(*blocks[0]), cache=cache, commit=True).cache
        return run_schedule(model, steps, blocks, shape[1:], text, draw, cache)

    def __call__(self, model: Denoiser, shape: Sequence[int], text: Text, draw: Draw) -> Tensor:
        """Latents ``b f c h w`` of the whole clip."""
        return torch.cat([block.latents for block in self.stream(model, shape, text, draw)], dim=1)
