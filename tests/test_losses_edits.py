"""Training on clips that a prompt changes: what is seen, what counts, and that a session sees the same."""

from __future__ import annotations

import json

import pytest
import torch
from closed_form import F64, FixedDraw, GaussianDenoiser, normal, numbers, scene
from stream_toys import BLUE, RED, toy_engine
from toy import toy_spec

from causvid import build, checks, experiment, spec
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


def clips():
    """One that changes at its second block, one that is restyled."""
    source, target = (normal(2, 6, 1, 2, 2, seed=seed) for seed in (1, 2))
    source[0] = target[0]
    return Clips(source, target, numbers(1, 2), numbers(3, 4), torch.tensor([2, 0]))


def loss(made, student, t, drawn, blocks=BLOCKS, **options):
    draw = FixedDraw(
        edit_t=torch.tensor(t, dtype=F64), edit_from_noise=torch.tensor(drawn, dtype=F64),
        edit_noise=normal(2, 6, 1, 2, 2, seed=3),
    )  # fmt: skip
    return Edits(**options)("student", scene(draw, {"student": student}, blocks, edit=lambda: made)).value


def test_noise_lies_over_the_source_and_text_changes_where_the_clip_does():
    made, student = clips(), GaussianDenoiser()
    loss(made, student, [[0.5, 0.6, 0.7], [0.8, 0.2, 0.3]], [[0.9, 0.9, 0.1], [0.9, 0.1, 0.9]], from_noise=0.4)
    call = student.calls[0]
    wanted = torch.tensor([[0.5, 0.6, 1.0], [0.8, 0.2, 0.3]], dtype=F64).repeat_interleave(2, 1)
    assert torch.equal(call.t, wanted)  # what is restyled never begins from noise alone
    time = wanted[:, :, None, None, None]
    torch.testing.assert_close(call.x, (1 - time) * made.source + time * normal(2, 6, 1, 2, 2, seed=3))
    assert torch.equal(call.context, made.target)
    assert call.text.embeddings[..., 0, 0].tolist() == [[1, 1, 3, 3, 3, 3], [4] * 6]


def test_times_are_shifted_once():
    student = GaussianDenoiser()
    loss(clips(), student, [[0.5, 0.5, 0.5]] * 2, [[0.9] * 3] * 2, shift=5.0)
    assert student.calls[0].t.unique().tolist() == [pytest.approx(5 * 0.5 / (1 + 4 * 0.5))]


def test_the_value_is_the_mean_square_over_frames_from_the_change_on():
    made, output = clips(), normal(2, 6, 1, 2, 2, seed=5)
    student = lambda x, t, text, context: DenoiserOutput(x, t, output, "x0")  # noqa: E731
    error = (output - made.target).pow(2).mean((2, 3, 4))
    wanted = (error[0, 2:].sum() + error[1].sum()) / 10
    assert loss(made, student, [[0.5] * 3] * 2, [[0.9] * 3] * 2).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_what_is_trained_is_what_a_session_does():
    """The masked pass with a text per frame is a stream whose prompt changes under ``keep``."""
    engine = toy_engine(BlockCausal(3))
    session, draw = Session(engine, RED, steps=[1.0]), Draw(0, "generate", 0, [0])
    made = [session.step().latents for _ in range(2)]
    session.prompt(BLUE, "keep")
    made = torch.cat([*made, *(session.step().latents for _ in range(2))], 1)
    noise = [draw.normal(f"block{block}/step0", 3, *engine.frame_shape) for block in range(4)]
    given = FixedDraw(edit_t=torch.ones(1, 4), edit_from_noise=torch.zeros(1, 4), edit_noise=torch.cat(noise, 1))
    edits = Clips(made, made, engine.encode_text([RED]), engine.encode_text([BLUE]), torch.tensor([6]))
    seen = []

    def student(*args, **options):
        seen.append(engine.model(*args, **options))
        return seen[-1]

    with torch.no_grad():
        blocks = engine.mask.blocks(12)
        value = Edits()("student", scene(given, {"student": student}, blocks, edit=lambda: edits)).value
    torch.testing.assert_close(seen[0].x0, made, rtol=1e-5, atol=1e-5)
    assert value.item() < 1e-9


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"from_noise must be in \[0, 1\]"):
        Edits(from_noise=1.5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tiny/clips", "loss={name: sum, of: [dmd, edits]}", "'sum' needs edits, and this stage has data and samples"),
        ("tiny/interactive", "causal.mask={name: block_causal, block_frames: 12}", "clips of two blocks or more"),
    ],
)
def test_a_world_without_changes_is_refused_before_anything_runs(name, change, message):
    with pytest.raises(UserError, match=message):
        checks.check(spec.load(name, [change]))


def test_the_world_gives_latents_of_the_clips():
    """Row by row; a source is the target, or differs from its first frame on."""
    arm = spec.load("tiny/interactive")
    world, blocks = build.World(arm), tuple(build.student_rule(arm).blocks(12))
    made = world.edits(range(40), blocks)
    assert set(made.start.tolist()) == {0, 3, 6, 9}
    differ = (made.source - made.target).abs().amax((2, 3, 4)) > 0
    assert (differ == (made.start == 0)[:, None]).all()
    alone = world.edits([7], blocks)
    for name in ("source", "target", "start"):
        assert torch.equal(getattr(alone, name)[0], getattr(made, name)[7])
    assert torch.equal(alone.after.embeddings[0], made.after.embeddings[7])


def test_a_scene_goes_on_from_where_it_was():
    """Nothing jumps, the rest of the scene stays, and every set of attributes changes as often as any other."""
    before, after, start = shapes.sample_edits(0, range(240), [47, 101], "test")
    assert set(start.tolist()) == {0, 47, 101}
    axes, rows = torch.tensor(list(shapes.DIRECTIONS.values()), dtype=torch.float32), torch.arange(240)
    walk = before.positions(200)
    reached = torch.where(start[:, None] > 0, walk[rows, (start - 1).clamp(min=0)], 2 * walk[:, 0] - walk[:, 1])
    goes_on = after.positions(200)[rows, start]
    torch.testing.assert_close(goes_on, reached + axes[after.direction] * before.speed[:, None], atol=1e-3, rtol=0)
    for name in ("radius", "speed", "ground", "texture"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    changes = torch.stack([getattr(before, n) != getattr(after, n) for n in ("colour", "shape", "direction")], 1)
    restyled = start == 0
    assert changes.any(1).all() and not changes[restyled, 2].any()
    assert restyled.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert (changes[~restyled].float().mean(0) - 4 / 7).abs().max() < 0.15
    assert (changes[restyled, :2].float().mean(0) - 2 / 3).abs().max() < 0.15


def test_changed_clips_are_judged_as_their_captions():
    clips = shapes.Shapes(95).edits(range(16), [47], "test")
    judge, turn = shapes_truth.ShapesTruth(), (clips.start > 0)[:, None, None, None, None]
    assert judge(clips.target[:, 47:], clips.after)["ok"].all()
    earlier = [old if start else new for old, new, start in zip(clips.before, clips.after, clips.start, strict=True)]
    assert judge(clips.target[:, :47], earlier)["ok"].all()
    restyled = ~turn.flatten()
    assert judge(clips.source, clips.before)["ok"][restyled].all() and restyled.any() and turn.any()


def test_both_stages_train_by_it(tmp_path):
    name = toy_spec(
        tmp_path,
        "ode_init: {loss: {name: sum, of: [{name: ode_regression}, {name: edits}]}}\n"
        "loss: {name: sum, of: [{name: dmd}, {name: edits}]}\nuntil: distill\n",
    )
    folders = experiment.run(name, [], tmp_path / "runs").folders
    for stage, updates in (("ode_init", 4), ("distill", 3)):
        lines = [json.loads(line) for line in (folders[stage] / "curves.jsonl").read_text().splitlines()]
        assert len(lines) == updates and all(0 < line["edits"] < 10 for line in lines)
