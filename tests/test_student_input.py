"""Student inputs: which times, which frames count, and where gradient flows; rollouts in training are inference's."""

from __future__ import annotations

import pytest
import torch
from closed_form import F64, LATENT, FixedDraw, GaussianDenoiser, normal, numbers, scene, tiny_dit, tiny_text

from causvid import schedule
from causvid.attention.masks import BlockCausal, SlidingWindow
from causvid.randomness import Draw
from causvid.samplers.few_step import renoise
from causvid.samplers.rollout import Rollout, few_step_schedule, run_schedule
from causvid.samplers.student_input import BackwardSimulation, Data, Mixed, SelfRollout

TIMES = (1.0, 0.8, 0.4)
BLOCKS = ((0, 2), (2, 4), (4, 5))
SHAPE = (2, 5, *LATENT)


def data_scene(student, drawn=((0, 2, 3), (3, 1, 0)), **draws):
    draw = FixedDraw(student_t=torch.tensor(drawn), student_noise=normal(*SHAPE, seed=1), **draws)
    return scene(draw, {"student": student}, BLOCKS, 2, text=numbers(0.3, -0.5), data=normal(*SHAPE))


def test_data_is_noised_to_times_of_the_students_steps():
    student = GaussianDenoiser(0.7)
    given_scene = data_scene(student)
    sample = Data()(given_scene, TIMES, False)
    t = torch.tensor([[1.0, 1.0, 0.4, 0.4, 0.0], [0.0, 0.0, 0.8, 0.8, 1.0]], dtype=F64)
    assert torch.equal(sample.t, t)
    assert torch.equal(sample.counts, t > 0)
    (call,) = student.calls
    assert torch.equal(call.t, t)
    torch.testing.assert_close(call.x, schedule.add_noise(given_scene.data, normal(*SHAPE, seed=1), t))
    clean = (t == 0)[:, :, None, None, None]
    with torch.no_grad():
        expected = student(call.x, t, given_scene.text).x0
    torch.testing.assert_close(sample.x0, torch.where(clean, given_scene.data, expected))


def test_passed_through_data_is_exact_and_without_gradient():
    bias = torch.zeros(SHAPE, dtype=F64, requires_grad=True)

    class Shifted(GaussianDenoiser):
        def forward(self, x, *args, **options):
            return super().forward(x + 1 + bias, *args, **options)

    given_scene = data_scene(Shifted())
    sample = Data()(given_scene, TIMES, True)
    assert torch.equal(sample.x0[~sample.counts], given_scene.data[~sample.counts])
    (gradient,) = torch.autograd.grad(sample.x0.sum(), bias)
    assert gradient[~sample.counts].abs().max() == 0


@pytest.mark.parametrize(("include_clean", "choices"), [(True, 4), (False, 3)])
def test_clean_is_among_the_drawn_times_or_not(include_clean, choices):
    given_scene = data_scene(GaussianDenoiser(), ((0, 2, 1), (1, 1, 0)))
    sample = Data(include_clean)(given_scene, TIMES, False)
    assert given_scene.draw.highs == {"student_t": choices}
    assert sample.counts.all()


def test_clean_context_is_the_data():
    student = GaussianDenoiser()
    given_scene = data_scene(student)
    for context in ("noisy", "clean"):
        Data(context=context)(given_scene, TIMES, False)
    assert student.calls[0].context is None
    assert student.calls[1].context is given_scene.data


MIXED = Mixed([SelfRollout("last"), Data()])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("student_input", [Data(), BackwardSimulation("last"), SelfRollout("last"), MIXED])
def test_gradient_is_kept_only_where_it_is_asked_for(student_input, grad):
    with torch.no_grad() if not grad else torch.enable_grad():
        sample = student_input(tiny_scene(tiny_dit()), TIMES, grad)
    assert sample.x0.requires_grad == grad


@pytest.mark.parametrize("student_input", [Data(), BackwardSimulation(), SelfRollout(), Mixed([SelfRollout()])])
def test_needs_data(student_input):
    with pytest.raises(ValueError, match="data"):
        student_input(scene(Draw(0, "s", 0, [0]), {"student": tiny_dit()}, BLOCKS), TIMES, False)


def tiny_scene(model, step=0, text=None):
    return scene(
        Draw(0, "train", step, [4, 5]), {"student": model}, model.mask.blocks(5), 2, text=text or tiny_text(),
        data=torch.zeros(SHAPE, dtype=F64),
    )  # fmt: skip


def gradients(model, x0):
    """Of a loss that weights every value differently."""
    model.zero_grad()
    (x0 * normal(*SHAPE, seed=8)).sum().backward()
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])


@pytest.mark.parametrize("last", [0, 1, 2])
def test_backward_simulation_keeps_gradient_of_its_last_step(last):
    student, draw = GaussianDenoiser(0.7, 0.2), Draw(0, "s", 0, [4, 5])
    given_scene = scene(FixedExit(draw, last), {"student": student}, BLOCKS, text=numbers(0.3, -0.5),
                        data=normal(*SHAPE))  # fmt: skip
    sample = BackwardSimulation()(given_scene, TIMES, True)
    x0 = torch.zeros(SHAPE, dtype=F64)
    for step in range(last + 1):
        x_t, t = renoise(x0.detach(), draw, f"student_step{step}", TIMES[step])
        x0 = student(x_t, t, given_scene.text).x0
    torch.testing.assert_close(sample.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(student, sample.x0), gradients(student, x0), rtol=1e-10, atol=0)
    assert sample.t.unique().tolist() == [TIMES[last]]
    assert sample.counts.all()


class FixedExit:
    """A draw whose exit step is given."""

    def __init__(self, draw, last):
        self.draw, self.last, self.normal = draw, last, draw.normal

    def shared_integer(self, purpose, high):
        assert (purpose, high) == ("exit", len(TIMES))
        return self.last


class FixedGiven:
    """A draw whose number of given blocks is given."""

    def __init__(self, draw, given):
        self.draw, self.given, self.normal = draw, given, draw.normal

    def shared_integer(self, purpose, high):
        assert purpose == "given_blocks" and self.given < high
        return self.given


RULES = {"blocks": BlockCausal(2), "window": SlidingWindow(2, window_frames=3), "first_frame_alone": BlockCausal(2, 1)}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["velocity", "x0"])
@pytest.mark.parametrize("rule", RULES)
def test_self_rollout_is_the_rollout_of_inference(rule, kind, grad):
    model = tiny_dit(RULES[rule], kind=kind)
    given_scene = tiny_scene(model)
    sample = SelfRollout("last")(given_scene, TIMES, grad)
    inference = Rollout(TIMES)(model, SHAPE[1:], given_scene.text, Draw(0, "train", 0, [4, 5]))
    torch.testing.assert_close(sample.x0, inference, rtol=0, atol=1e-12)
    assert sample.t.unique().tolist() == [TIMES[-1]]
    assert sample.counts.all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("last", [0, 2])
def test_self_rollout_keeps_gradient_of_each_blocks_last_step_alone(rule, last):
    model = tiny_dit(RULES[rule])
    text, draw, cache, blocks = tiny_text(), Draw(0, "train", 0, [4, 5]), model.new_cache(), []
    for block, (start, stop) in enumerate(model.mask.blocks(5)):
        x0 = torch.zeros(2, stop - start, *LATENT, dtype=F64)
        for step, time in enumerate(TIMES[: last + 1]):
            x_t, t = renoise(x0.detach(), draw, f"block{block}/step{step}", time)
            x0 = model(x_t, t, text, cache=cache).x0
        with torch.no_grad():
            cache = model(x0.detach(), torch.zeros_like(t), text, cache=cache, commit=True).cache
        blocks.append(x0)
    expected = gradients(model, torch.cat(blocks, 1))
    given_scene = scene(FixedExit(draw, last), {"student": model}, model.mask.blocks(5), text=text,
                        data=torch.zeros(SHAPE, dtype=F64))  # fmt: skip
    found = gradients(model, SelfRollout()(given_scene, TIMES, True).x0)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("grad", [False, True])
def test_self_rollout_records_one_evaluation_per_block(grad):
    modes = []

    class Watched:
        mask, new_cache = tiny_dit().mask, tiny_dit().new_cache

        def __call__(self, *args, commit, **options):
            modes.append((torch.is_grad_enabled(), commit))
            return tiny_dit()(*args, commit=commit, **options)

    SelfRollout("last")(tiny_scene(Watched()), TIMES, grad)
    block = [(False, False), (False, False), (grad, False), (False, True)]
    assert modes == (block * 3)[:-1]


def begun(model, given, grad=False, context_t=0.0):
    draw = FixedGiven(Draw(0, "train", 0, [4, 5]), given)
    given_scene = scene(draw, {"student": model}, model.mask.blocks(5), text=tiny_text(), data=normal(*SHAPE, seed=3))
    return SelfRollout("last", context_t, given_blocks=2)(given_scene, TIMES, grad)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_rollout_goes_on_from_blocks_of_data(rule, given):
    """What follows sees the data as a stream sees its own past: denoised by hand in one masked pass per step."""
    model, data = tiny_dit(RULES[rule]), normal(*SHAPE, seed=3)
    blocks, draw = model.mask.blocks(5), Draw(0, "train", 0, [4, 5])
    sample = begun(model, given)
    first = blocks[given][0]
    whole = data.clone()
    for block, (start, stop) in enumerate(blocks[given:], given):
        x0 = torch.zeros(2, stop - start, *LATENT, dtype=F64)
        for step, time in enumerate(TIMES):
            x_t, t = renoise(x0, draw, f"block{block}/step{step}", time)
            frames = torch.cat([whole[:, :start], x_t], 1)
            times = torch.cat([torch.zeros(2, start, dtype=F64), t], 1)
            with torch.no_grad():
                x0 = model(frames, times, tiny_text()).x0[:, start:]
        whole = torch.cat([whole[:, :start], x0, whole[:, stop:]], 1)
    torch.testing.assert_close(sample.x0, whole, rtol=0, atol=1e-9)
    assert sample.counts.tolist() == [[frame >= first for frame in range(5)]] * 2
    assert sample.t.tolist() == [[TIMES[-1] if frame >= first else 0.0 for frame in range(5)]] * 2


def test_given_blocks_get_no_gradient_and_noisy_context_is_that_of_the_sampler():
    model, seen = tiny_dit(), []

    class Watched:
        mask, new_cache = model.mask, model.new_cache

        def __call__(self, x, t, *args, commit, **options):
            seen.append((torch.is_grad_enabled(), commit, float(t[0, 0])))
            return model(x, t, *args, commit=commit, **options)

    begun(Watched(), 2, grad=True, context_t=0.25)
    assert seen[:2] == [(False, True, 0.25)] * 2
    assert seen[2:] == [(False, False, 1.0), (False, False, 0.8), (True, False, 0.4)]


@pytest.mark.parametrize(("given", "words"), [(-1, "at least 0, got -1"), (3, "below the 3 blocks")])
def test_a_number_of_given_blocks_that_leaves_nothing_to_make_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        SelfRollout(given_blocks=given)(tiny_scene(tiny_dit()), TIMES, False)


def test_gradient_never_crosses_steps():
    model, text = tiny_dit(), tiny_text()
    blocks = model.mask.blocks(5)

    def found(grad_steps):
        steps = few_step_schedule(len(blocks), TIMES)
        draw = Draw(0, "train", 0, [4, 5])
        out = run_schedule(model, steps, blocks, LATENT, text, draw, model.new_cache(), grad_steps)
        return gradients(model, torch.cat([block.latents for block in out], 1))

    assert torch.equal(found(frozenset({0, 1, 2})), found(frozenset({2})))


def test_self_rollout_with_a_prompt_per_frame():
    model, text = tiny_dit(), tiny_text(frames=5)
    sample = SelfRollout("last")(tiny_scene(model, text=text), TIMES, False)
    inference = Rollout(TIMES)(model, SHAPE[1:], text, Draw(0, "train", 0, [4, 5]))
    assert torch.equal(sample.x0, inference)


def test_exit_steps_cover_all_steps_and_do_not_depend_on_the_micro_batch():
    def exits(samples):
        return [Draw(0, "train", step, samples).shared_integer("exit", 3) for step in range(40)]

    assert exits([0]) == exits([7, 8])
    assert set(exits([0])) == {0, 1, 2}


@pytest.mark.parametrize("student_input", [BackwardSimulation(), SelfRollout()])
def test_time_of_a_random_exit_is_a_step_of_the_student(student_input):
    model = tiny_dit()
    times = {student_input(tiny_scene(model, step), TIMES, False).t.unique().item() for step in range(12)}
    assert times == set(TIMES)


@pytest.mark.parametrize("context_t", [0.0, 0.3])
def test_a_self_rollout_commits_where_the_sampler_commits(context_t):
    student = tiny_dit()
    draw = Draw(0, "s", 0, range(2))
    given_scene = scene(draw, {"student": student}, BLOCKS, text=tiny_text(2), data=normal(*SHAPE))
    trained = SelfRollout("last", context_t)(given_scene, TIMES, False).x0
    sampled = Rollout(TIMES, context_t)(student, SHAPE[1:], given_scene.text, draw)
    torch.testing.assert_close(trained, sampled)


MIXTURES = {
    "data and rollout": ([Data(context="clean"), SelfRollout("last")], [0, 1, 0, 1, 0]),
    "rollout and data": ([SelfRollout(), Data()], [0, 1, 0, 1, 0]),
    "three": ([Data(), BackwardSimulation(), SelfRollout(given_blocks=1)], [0, 1, 2, 0, 1]),
    "one": ([SelfRollout()], [0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_row_of_a_mixture_is_that_of_its_input_alone(mixture):
    """Every input makes the whole batch, of which the mixture has the rows whose turn it is; first is sample 6."""
    inputs, turns = MIXTURES[mixture]
    model = tiny_dit()

    def batch(numbers):
        data = normal(20, *SHAPE[1:], seed=3)[list(numbers)]
        return scene(
            Draw(0, "train", 0, numbers), {"student": model}, model.mask.blocks(5), text=tiny_text(20)[list(numbers)],
            unconditional=tiny_text(20)[list(numbers)], data=data,
        )  # fmt: skip

    found = Mixed(inputs)(batch(range(6, 11)), TIMES, True)
    alone = [student_input(batch(range(6, 11)), TIMES, True) for student_input in inputs]
    for row, turn in enumerate(turns):
        torch.testing.assert_close(found.x0[row], alone[turn].x0[row], rtol=0, atol=1e-12)
        assert torch.equal(found.t[row], alone[turn].t[row]) and torch.equal(found.counts[row], alone[turn].counts[row])
    halves = [Mixed(inputs)(batch(part), TIMES, False).x0 for part in (range(6, 9), range(9, 12))]
    torch.testing.assert_close(torch.cat(halves)[:5], found.x0, rtol=0, atol=1e-12)  # however it is shared out
    weights = normal(5, *SHAPE[1:], seed=8)

    def gradient(x0):
        model.zero_grad()
        (x0 * weights).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = gradient(torch.stack([alone[turn].x0[row] for row, turn in enumerate(turns)]))
    torch.testing.assert_close(gradient(found.x0), expected, rtol=1e-9, atol=1e-10)


def test_a_mixture_of_nothing_or_of_more_than_there_are_rows_is_refused():
    with pytest.raises(ValueError, match="at least one student input"):
        Mixed([])
    with pytest.raises(ValueError, match="can't hold a mixture"):
        Mixed([Data(), Mixed([Data()])])
    with pytest.raises(ValueError, match="2 rows can't be shared by 3 student inputs"):
        Mixed([Data(), Data(), Data()])(tiny_scene(tiny_dit()), TIMES, False)


def test_a_mixture_streams_if_one_of_its_inputs_does():
    assert Mixed([Data(), SelfRollout()]).streams and not Mixed([Data(), BackwardSimulation()]).streams
