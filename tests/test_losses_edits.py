"""Training on changes of the prompt: what is seen, what counts, and that a session sees the same."""

from __future__ import annotations

import pytest
import torch
from closed_form import F64, FixedDraw, GaussianDenoiser, normal, numbers, scene
from stream_toys import BLUE, RED, toy_engine

from causvid import build, checks, spec
from causvid.attention.masks import BlockCausal
from causvid.data import shapes
from causvid.errors import UserError
from causvid.eval import shapes_truth
from causvid.losses.edits import Edits
from causvid.randomness import Draw
from causvid.streaming.session import Session
from causvid.types import DenoiserOutput
from causvid.types import Edits as Clips

BLOCKS = ((0, 2), (2, 4), (4, 6))


def clips(start=(2, 4), restyled=(True, True), frames=6):
    rows = len(start)
    edited, unedited = normal(rows, frames, 1, 2, 2, seed=1), normal(rows, frames, 1, 2, 2, seed=2)
    before = torch.arange(frames)[None] < torch.tensor(start)[:, None]
    unedited = torch.where(before[:, :, None, None, None], edited, unedited)
    old, new = numbers(*[1.0] * rows), numbers(*[3.0] * rows)
    return Clips(unedited, edited, old, new, torch.tensor(start), torch.tensor(restyled))


def drawn(t, from_noise, restyle, rows=2, frames=6):
    return FixedDraw(
        edit_t=torch.tensor(t, dtype=F64), edit_from_noise=torch.tensor(from_noise, dtype=F64),
        edit_restyle=torch.tensor(restyle, dtype=F64), edit_noise=normal(rows, frames, 1, 2, 2, seed=3),
    )  # fmt: skip


def loss(made, draw, student, blocks=BLOCKS, **options):
    return Edits(**options)("student", scene(draw, {"student": student}, blocks, edit=lambda: made))


def test_a_block_begins_as_one_of_the_two_clips_at_its_own_time():
    made, student = clips(restyled=(True, False)), GaussianDenoiser()
    t = [[0.5, 0.6, 0.7], [0.8, 0.2, 0.3]]
    draw = drawn(t, [[0.9, 0.9, 0.1], [0.9, 0.1, 0.9]], [[0.1, 0.1, 0.1], [0.9, 0.1, 0.1]])
    loss(made, draw, student, from_noise=0.4, restyle=0.5)
    call = student.calls[0]
    wanted = torch.tensor([[0.5, 0.6, 1.0], [0.8, 1.0, 0.3]], dtype=F64).repeat_interleave(2, 1)
    assert torch.equal(call.t, wanted)
    clean = made.edited.clone()
    clean[0, 2:4] = made.unedited[0, 2:4]  # the second row does not move alike
    time = wanted[:, :, None, None, None]
    torch.testing.assert_close(call.x, (1 - time) * clean + time * draw.numbers["edit_noise"])
    assert torch.equal(call.context, made.edited)
    assert call.text.embeddings[..., 0, 0].tolist() == [[1, 1, 3, 3, 3, 3], [1, 1, 1, 1, 3, 3]]


def test_the_value_is_the_mean_square_over_frames_after_the_change():
    made, output = clips(), normal(2, 6, 1, 2, 2, seed=5)
    student = lambda x, t, text, context: DenoiserOutput(x, t, output, "x0")  # noqa: E731
    value = loss(made, drawn([[0.5] * 3] * 2, [[0.9] * 3] * 2, [[0.9] * 3] * 2), student).value
    error = (output - made.edited).pow(2).mean((2, 3, 4))
    assert value.item() == pytest.approx((error[0, 2:].sum() + error[1, 4:].sum()).item() / 6, rel=1e-12)


@pytest.mark.parametrize(("restyle", "from_noise", "counted"), [(0.1, 0.9, 6), (0.9, 0.9, 4), (0.1, 0.1, 4)])
def test_the_first_block_counts_where_something_says_what_is_in_it(restyle, from_noise, counted):
    """Not from noise alone, nor where its noise lies over the answer itself."""
    made = clips(start=(0,), restyled=(True,))
    output = normal(1, 6, 1, 2, 2, seed=5).requires_grad_()
    student = lambda x, t, text, context: DenoiserOutput(x, t, output, "x0")  # noqa: E731
    draw = drawn([[0.5] * 3], [[from_noise] * 3], [[restyle] * 3], rows=1)
    loss(made, draw, student).value.backward()
    assert (output.grad.abs().sum((0, 2, 3, 4)) > 0).sum() == counted


def test_nothing_counts_in_the_first_block_of_plain_clips():
    made = clips(start=(0,), restyled=(False,), frames=2)
    draw = drawn([[0.5]], [[0.9]], [[0.1]], rows=1, frames=2)
    assert loss(made, draw, GaussianDenoiser(), ((0, 2),)).value.item() == 0


def test_what_is_trained_is_what_a_session_does():
    """The masked pass with a text per frame is a stream whose prompt changes under ``keep``."""
    engine = toy_engine(BlockCausal(3))
    session, draw = Session(engine, RED, steps=[1.0]), Draw(0, "generate", 0, [0])
    made = [session.step().latents for _ in range(2)]
    session.prompt(BLUE, "keep")
    made = torch.cat([*made, *(session.step().latents for _ in range(2))], 1)
    noise = [draw.normal(f"block{block}/step0", 3, *engine.frame_shape) for block in range(4)]
    numbers = {"edit_t": torch.zeros(1, 4), "edit_from_noise": torch.zeros(1, 4), "edit_restyle": torch.ones(1, 4)}
    edits = Clips(
        made, made, engine.encode_text([RED]), engine.encode_text([BLUE]), torch.tensor([6]), torch.tensor([False])
    )
    seen = []

    def student(*args, **options):
        seen.append(engine.model(*args, **options))
        return seen[-1]

    with torch.no_grad():
        value = loss(edits, FixedDraw(**numbers, edit_noise=torch.cat(noise, 1)), student, engine.mask.blocks(12)).value
    torch.testing.assert_close(seen[0].x0, made, rtol=1e-5, atol=1e-5)
    assert value.item() < 1e-9


@pytest.mark.parametrize("option", [{"from_noise": -0.1}, {"restyle": 1.5}])
def test_shares_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        Edits(**option)


def test_a_world_without_changes_is_refused_before_anything_runs():
    arm = spec.load("tiny/clips", ["loss={name: sum, of: [dmd, edits]}"])
    with pytest.raises(UserError, match="'sum' needs edits, and this stage has data and samples"):
        checks.check(arm)


def test_the_world_gives_latents_of_the_clips():
    """Row by row: alike before the change, the edited one as the later caption tells it from there on."""
    arm = spec.load("tiny/interactive")
    world, blocks = build.World(arm), tuple(build.student_rule(arm).blocks(12))
    made = world.edits(range(40), blocks)
    assert set(made.start.tolist()) == {0, 3, 6, 9}
    frame = torch.arange(12)
    differ = (made.edited - made.unedited).abs().amax((2, 3, 4)) > 0
    assert not differ[frame < made.start[:, None]].any() and differ[frame > made.start[:, None]].all()
    alone = world.edits([7], blocks)
    for name in ("unedited", "edited", "start", "restyled"):
        assert torch.equal(getattr(alone, name)[0], getattr(made, name)[7])
    assert torch.equal(alone.after.embeddings[0], made.after.embeddings[7])


def test_a_scene_goes_on_from_where_it_was():
    """Nothing jumps, the rest of the scene stays, and every set of attributes changes as often as any other."""
    before, after, start = shapes.sample_edits(0, range(96), [0, 47, 101], "test")
    axes = torch.tensor(list(shapes.DIRECTIONS.values()), dtype=torch.float32)
    pace = axes[after.direction] * before.speed[:, None]
    reached = before.start - pace  # where a clip with nothing before the change would have been
    for begin in (47, 101):
        reached[start == begin] = before.positions(begin)[start == begin, -1]
    goes_on = after.positions(200)[torch.arange(96), start]
    torch.testing.assert_close(goes_on, reached + pace, atol=1e-3, rtol=0)
    for name in ("radius", "speed", "ground", "texture"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    changes = torch.stack([getattr(before, n) != getattr(after, n) for n in ("colour", "shape", "direction")], 1)
    assert changes.any(1).all() and (changes.float().mean(0) - 4 / 7).abs().max() < 0.16
    assert changes.unique(dim=0).shape[0] == 7


def test_edited_clips_are_judged_as_their_captions():
    clips = shapes.Shapes(95).edits(range(8), [47], "test")
    judge = shapes_truth.ShapesTruth()
    assert judge(clips.edited[:, :47], clips.before)["ok"].all()
    assert judge(clips.edited[:, 47:], clips.after)["ok"].all()
    assert judge(clips.unedited, clips.before)["ok"].all()
    assert torch.equal(clips.edited[:, :47], clips.unedited[:, :47])
