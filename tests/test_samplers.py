"""Few-step sampling and block rollouts against loops written out by hand, without a cache wherever that can be."""

from __future__ import annotations

import itertools

import pytest
import torch
from closed_form import F64, LATENT, GaussianDenoiser, normal, numbers, tiny_dit, tiny_text

from causvid import build, schedule, spec
from causvid.attention.masks import BlockCausal, SinkWindow, SlidingWindow
from causvid.errors import UserError
from causvid.randomness import Draw
from causvid.samplers.few_step import FewStep, descending
from causvid.samplers.ode import Guided
from causvid.samplers.rollout import Rollout, Step, few_step_schedule, rolling_schedule, run_schedule
from causvid.types import Text

TIMES = (1.0, 0.8, 0.4)
FRAMES = 5
RULES = {
    "blocks": BlockCausal(2),
    "first_frame_alone": BlockCausal(2, 1),
    "frame_wise": BlockCausal(1),
    "window": SlidingWindow(2, window_frames=3),
    "sink": SinkWindow(1, window_frames=2, sink_frames=1),
}


def draw(samples=(0, 1)):
    return Draw(0, "test", 0, samples)


def rollout(model, text, frames=FRAMES, context_t=0.0, samples=(0, 1)):
    return Rollout(TIMES, context_t)(model, (frames, *LATENT), text, draw(samples))


def noise_of(block, step, frames, rows=2):
    return draw(range(rows)).normal(f"block{block}/step{step}", frames, *LATENT).to(F64)


def test_schedule_of_blocks_times_and_commits():
    assert list(few_step_schedule(2, [1.0, 0.5])) == [
        Step(0, 1.0, False), Step(0, 0.5, False), Step(0, 0.0, True),
        Step(1, 1.0, False), Step(1, 0.5, False),
    ]  # fmt: skip
    noisy = few_step_schedule(1, [1.0], context_t=0.3, commit_last=True)
    assert list(noisy) == [Step(0, 1.0, False), Step(0, 0.3, True)]


def by_hand(model, text, frames=FRAMES):
    """Each step is one masked pass over everything so far, teacher-forced with the finished blocks: no cache."""
    done = torch.zeros(2, 0, *LATENT, dtype=F64)
    for block, (start, stop) in enumerate(model.mask.blocks(frames)):
        estimate = torch.zeros(2, stop - start, *LATENT, dtype=F64)
        for step, time in enumerate(TIMES):
            x_t = (1 - time) * estimate + time * noise_of(block, step, stop - start)
            x = torch.cat([torch.zeros_like(done), x_t], 1)  # a noisy block sees clean earlier ones alone
            t = torch.full((2, stop), time, dtype=F64)
            clean = torch.cat([done, torch.zeros_like(x_t)], 1)
            with torch.no_grad():
                estimate = model(x, t, text.frames(0, stop), context=clean).x0[:, start:]
        done = torch.cat([done, estimate], 1)
    return done


@pytest.mark.parametrize("kind", ["velocity", "x0"])
@pytest.mark.parametrize("rule", RULES)
def test_rollout_is_the_loop_without_a_cache(rule, kind):
    model, text = tiny_dit(RULES[rule], kind=kind), tiny_text()
    torch.testing.assert_close(rollout(model, text), by_hand(model, text), rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", ["blocks", "window"])
def test_rollout_with_a_prompt_per_frame(rule):
    model, text = tiny_dit(RULES[rule]), tiny_text(frames=FRAMES)
    torch.testing.assert_close(rollout(model, text), by_hand(model, text), rtol=0, atol=1e-10)


def test_a_new_prompt_acts_from_its_frame_on():
    model, first, second = tiny_dit(), tiny_text(seed=1), tiny_text(seed=2)
    constant = Text(first.embeddings[:, None].expand(-1, FRAMES, -1, -1))
    switched = Text(torch.cat([constant.embeddings[:, :2], second.embeddings[:, None].expand(-1, 3, -1, -1)], 1))
    plain, same, changed = (rollout(model, text) for text in (first, constant, switched))
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-10)
    assert torch.equal(changed[:, :2], same[:, :2])
    assert (changed[:, 2:] - same[:, 2:]).abs().max() > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_a_shorter_rollout_is_the_beginning_of_a_longer_one(rule):
    model, text = tiny_dit(RULES[rule], torch.float32), tiny_text(dtype=torch.float32)
    stops = [stop for _, stop in model.mask.blocks(7)][:-1]
    longer = rollout(model, text, 7)
    for frames in stops:
        assert torch.equal(rollout(model, text, frames), longer[:, :frames])


def test_blocks_are_yielded_as_they_are_done():
    model, text = tiny_dit(), tiny_text()
    stream = Rollout(TIMES).stream(model, (FRAMES, *LATENT), text, draw())
    first = next(stream)
    assert (first.start, first.stop) == (0, 2)
    whole = rollout(model, text)
    assert torch.equal(first.latents, whole[:, :2])
    assert [(block.start, block.stop) for block in stream] == [(2, 4), (4, 5)]


def test_rows_do_not_mix():
    model, text = tiny_dit(), tiny_text()
    together = rollout(model, text)
    for row in range(2):
        alone = rollout(model, text[row : row + 1], samples=[row])
        torch.testing.assert_close(alone, together[row : row + 1], rtol=0, atol=1e-10)


def test_a_window_of_one_block_is_the_schedule_block_by_block():
    for blocks, level in itertools.product((1, 2, 5), (0.0, 0.3)):
        rolled = list(rolling_schedule(blocks, TIMES, 1, level))
        assert rolled == [(step,) for step in few_step_schedule(blocks, TIMES, level)]


def test_a_rolling_window_of_two_blocks():
    a, b, c, d = 1.0, 0.9, 0.7, 0.4
    steps = [[(step.block, step.t) for step in each] for each in rolling_schedule(3, [a, b, c, d], 2)]
    assert steps == [
        [(0, a)], [(0, b)], [(0, c), (1, a)], [(0, d), (1, b)], [(0, 0)],
        [(1, c), (2, a)], [(1, d), (2, b)], [(1, 0)], [(2, c)], [(2, d)],
    ]  # fmt: skip


@pytest.mark.parametrize("window", [1, 2, 3, 6])
@pytest.mark.parametrize("first", [0, 2])
def test_every_block_has_all_times_and_is_committed_before_it_leaves_the_window(window, first):
    times, seen, committed = [1.0, 0.9, 0.8, 0.6, 0.4, 0.2], {}, []
    for each in rolling_schedule(9, times, window, 0.1, first):
        assert [step.block for step in each] == list(range(each[0].block, each[0].block + len(each)))
        assert each[0].block == first + len(committed) and len(each) <= window
        assert all(left.t < right.t for left, right in itertools.pairwise(each))
        for step in each:
            if step.commit:
                assert (step.t, seen[step.block], len(each)) == (0.1, times, 1)
                committed.append(step.block)
            else:
                seen.setdefault(step.block, []).append(step.t)
    assert seen == {block: times for block in range(first, 9)} and committed == list(range(first, 8))


def rolled_by_hand(model, text, window, frames):
    """Every pass is one masked pass over all that is done, at t = 0, and all that has begun: no cache, no schedule."""
    blocks, apart = model.mask.blocks(frames), len(TIMES) // window
    estimates = [torch.zeros(2, stop - start, *LATENT, dtype=F64) for start, stop in blocks]
    taken, tick = [0] * len(blocks), 0
    while min(taken) < len(TIMES):
        begun = [b for b in range(len(blocks)) if b * apart <= tick]
        parts, levels = [], []
        for b in begun:
            time = TIMES[taken[b]] if taken[b] < len(TIMES) else 0.0
            noise = noise_of(b, taken[b], estimates[b].shape[1])
            parts.append((1 - time) * estimates[b] + time * noise)
            levels += [time] * estimates[b].shape[1]
        x = torch.cat(parts, 1)
        t = torch.tensor(levels, dtype=F64).expand(2, -1)
        with torch.no_grad():
            x0 = model(x, t, text.frames(0, x.shape[1])).x0
        for b in begun:
            if taken[b] < len(TIMES):
                estimates[b], taken[b] = x0[:, slice(*blocks[b])], taken[b] + 1
        tick += 1
    return torch.cat(estimates, 1)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("per_frame", [False, True])
def test_rolling_denoising_is_the_loop_without_a_cache(rule, window, per_frame):
    model, text = tiny_dit(RULES[rule]), tiny_text(frames=FRAMES if per_frame else None)
    sampler = Rollout(TIMES, window_blocks=window)
    made = sampler(model, (FRAMES, *LATENT), text, draw())
    torch.testing.assert_close(made, rolled_by_hand(model, text, window, FRAMES), rtol=0, atol=1e-10)


def test_a_window_of_one_changes_no_bit_and_a_wider_one_does():
    model, text = tiny_dit(), tiny_text()
    plain, one, three = (Rollout(TIMES, window_blocks=n)(model, (7, *LATENT), text, draw()) for n in (1, 1, 3))
    assert torch.equal(plain, one) and (three - plain).abs().max() > 1e-3
    blocks = list(Rollout(TIMES, window_blocks=3).stream(model, (7, *LATENT), text, draw()))
    assert [(block.start, block.stop) for block in blocks] == [(0, 2), (2, 4), (4, 6), (6, 7)]


def test_a_rolling_stream_goes_on_from_a_given_block():
    model, text = tiny_dit(), tiny_text()
    start = normal(2, 2, *LATENT)
    made = list(Rollout(TIMES, window_blocks=3).stream(model, (7, *LATENT), text, draw(), start=start))
    assert [block.start for block in made] == [2, 4, 6]
    assert (made[0].latents - Rollout(TIMES)(model, (7, *LATENT), text, draw())[:, 2:4]).abs().max() > 1e-3


@pytest.mark.parametrize("window", [0, 2, 4])
def test_a_window_that_does_not_divide_the_steps_is_refused(window):
    with pytest.raises(ValueError, match=f"must divide the number of steps, 3; got {window}"):
        Rollout(TIMES, window_blocks=window)


class Counted:
    """A model that counts its calls, and whether they committed."""

    def __init__(self, model):
        self.model, self.mask, self.commits = model, model.mask, []

    def new_cache(self):
        return self.model.new_cache()

    def __call__(self, x, t, text, *, commit, **options):
        self.commits.append(commit)
        return self.model(x, t, text, commit=commit, **options)


def test_the_last_blocks_context_is_not_computed_and_does_not_matter():
    text, model = tiny_text(), Counted(tiny_dit())
    short = rollout(model, text)
    assert model.commits == [False] * 3 + [True] + [False] * 3 + [True] + [False] * 3
    steps = few_step_schedule(3, TIMES, commit_last=True)
    blocks = model.mask.blocks(FRAMES)
    with_last = run_schedule(model, steps, blocks, LATENT, text, draw(), model.new_cache())
    assert torch.equal(torch.cat([block.latents for block in with_last], 1), short)
    assert model.commits[-1]


@torch.no_grad()
def test_noisy_context_commits_the_noised_block():
    model, text, level = tiny_dit(), tiny_text(), 0.3
    cache, blocks = model.new_cache(), []
    for block, (start, stop) in enumerate(model.mask.blocks(FRAMES)):
        estimate = torch.zeros(2, stop - start, *LATENT, dtype=F64)
        for step, time in enumerate((*TIMES, level)):
            t = torch.full((2, stop - start), time, dtype=F64)
            x_t = schedule.add_noise(estimate, noise_of(block, step, stop - start), t)
            if step == len(TIMES):
                cache = model(x_t, t, text, cache=cache, commit=True).cache
            else:
                estimate = model(x_t, t, text, cache=cache).x0
        blocks.append(estimate)
    noisy = rollout(model, text, context_t=level)
    torch.testing.assert_close(noisy, torch.cat(blocks, 1), rtol=0, atol=1e-10)
    clean = rollout(model, text)
    assert torch.equal(noisy[:, :2], clean[:, :2])
    assert (noisy[:, 2:] - clean[:, 2:]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [False, True])
def test_guidance_through_a_cache_is_two_streams(per_frame):
    model, weight = tiny_dit(), 3.0
    text, free = tiny_text(frames=FRAMES if per_frame else None), tiny_text(seed=9)
    blocks = model.mask.blocks(FRAMES)
    guided = Guided(model, free, weight)
    out = run_schedule(guided, few_step_schedule(3, TIMES), blocks, LATENT, text, draw(), model.new_cache())
    caches, expected = [model.new_cache(), model.new_cache()], []
    for block, (start, stop) in enumerate(blocks):
        estimate = torch.zeros(2, stop - start, *LATENT, dtype=F64)
        texts = (text.frames(start, stop), free)
        for step, time in enumerate(TIMES):
            t = torch.full((2, stop - start), time, dtype=F64)
            x_t = schedule.add_noise(estimate, noise_of(block, step, stop - start), t)
            with_prompt, without = (model(x_t, t, p, cache=c).x0 for p, c in zip(texts, caches, strict=True))
            estimate = without + weight * (with_prompt - without)
        t = torch.zeros(2, stop - start, dtype=F64)
        caches = [model(estimate, t, p, cache=c, commit=True).cache for p, c in zip(texts, caches, strict=True)]
        expected.append(estimate)
    torch.testing.assert_close(torch.cat([b.latents for b in out], 1), torch.cat(expected, 1), rtol=0, atol=1e-10)


def test_guidance_of_weight_one_is_the_model_itself():
    model, text = tiny_dit(), tiny_text()
    x, t = torch.ones(2, 2, *LATENT, dtype=F64), torch.full((2, 2), 0.5, dtype=F64)
    with torch.no_grad():
        assert torch.equal(Guided(model, tiny_text(seed=9), 1.0)(x, t, text).x0, model(x, t, text).x0)


def test_few_steps_of_all_frames_at_once():
    model, text = GaussianDenoiser(0.6, kind="velocity"), numbers(0.3, -0.2)
    out = FewStep([*TIMES, 0.0])(model, (3, *LATENT), text, draw())
    x0 = torch.tensor([0.3, -0.2], dtype=F64).reshape(2, 1, 1, 1, 1).expand(2, 3, *LATENT)  # pure noise says nothing
    for step, time in list(enumerate(TIMES))[1:]:
        x_t = (1 - time) * x0 + time * draw().normal(f"step{step}", 3, *LATENT).to(F64)
        gain = (1 - time) * 0.36 / ((1 - time) ** 2 * 0.36 + time**2)
        mean = torch.tensor([0.3, -0.2], dtype=F64).reshape(2, 1, 1, 1, 1)
        x0 = mean + gain * (x_t - (1 - time) * mean)
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-12)
    assert [call.t[0, 0].item() for call in model.calls] == list(TIMES)
    assert not out.requires_grad


@pytest.mark.parametrize("sampler", [Rollout, FewStep, descending])
@pytest.mark.parametrize("times", [[0.9, 0.5], [], [0.0]])
def test_times_that_do_not_start_from_noise_are_refused(sampler, times):
    with pytest.raises(ValueError, match="first time must be 1"):
        sampler(times)


def test_a_schedule_that_starts_without_an_estimate_is_refused():
    model = tiny_dit()
    with pytest.raises(ValueError, match="block 0 starts at t = 0.5"):
        next(run_schedule(model, [Step(0, 0.5, False)], [(0, 2)], LATENT, tiny_text(), draw(), model.new_cache()))


def test_a_session_makes_one_block_at_a_time_and_says_so():
    arm = spec.load("tiny/causal_teacher", ["student.sampler.window_blocks=2"])
    with pytest.raises(UserError, match="window_blocks: a session may be steered at every block"):
        build.session_sampler(arm)
