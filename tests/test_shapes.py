"""The tiny world: captions, geometry against polygons, wrap-around, and states that depend on their index alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causvid.data import shapes
from causvid.errors import UserError

CIRCLE, SQUARE, TRIANGLE = range(3)


def same(a, b):
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


def test_states_are_a_function_of_the_index_alone():
    several = shapes.sample_states(0, [7, 2, 11])
    assert same(several[1:2], shapes.sample_states(0, [2]))
    assert same(several, shapes.sample_states(0, [7, 2, 11]))


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "test"}, {"indices": range(50, 100)}])
def test_seeds_splits_and_indices_differ(other):
    start = shapes.sample_states(0, range(50)).start
    changed = shapes.sample_states(**{"seed": 0, "indices": range(50), **other}).start
    assert (start != changed).all()


def test_states_cover_their_ranges_evenly():
    state, count = shapes.sample_states(0, range(1200)), 1200
    for values, kinds in ((state.colour, 4), (state.shape, 3), (state.direction, 4)):
        assert values.bincount(minlength=kinds).tolist() == pytest.approx([count / kinds] * kinds, rel=0.2)
    for values, (low, high) in (
        (state.radius, shapes.RADIUS), (state.speed, shapes.SPEED), (state.ground, shapes.GROUND),
        (state.start[:, 0], shapes.START), (state.start[:, 1], shapes.START),
    ):  # fmt: skip
        share = (values - low) / (high - low)
        assert 0 <= share.min() < 0.01 and 0.99 < share.max() <= 1
        assert share.mean().item() == pytest.approx(0.5, abs=0.04)  # 4.8 standard errors
    assert set(state.texture.unique().tolist()) == {-1.0, 1.0}
    assert state.texture.mean().abs() < 0.02


@pytest.mark.parametrize("triple", list(itertools.product(range(4), range(3), range(4))))
def test_captions_parse_to_what_they_say(triple):
    assert shapes.parse(shapes.caption(*triple)) == triple
    assert shapes.parse(shapes.caption(*triple).upper()) == triple


def test_a_states_caption():
    state = replace(shapes.sample_states(0, [0]), **{k: torch.tensor([2]) for k in ("colour", "shape", "direction")})
    assert state.captions == ["a blue triangle moves up"]


@pytest.mark.parametrize(
    ("prompt", "hint"),
    [
        ("a red circel moves left", "did you mean 'circle'"),
        ("a rde circle moves left", "did you mean 'red'"),
        ("a red circle moves lefft", "did you mean 'left'"),
        ("a red circle", "write 'a red|green|blue|yellow circle|square|triangle moves left|right|up|down'"),
        ("a circle red moves left", "write 'a red"),
        ("", "write 'a red"),
    ],
)
def test_other_prompts_are_refused_with_a_hint(prompt, hint):
    with pytest.raises(UserError, match=f"prompt '{prompt}' is not of this world") as caught:
        shapes.parse(prompt)
    assert hint in str(caught.value)


def one(shape, radius, x, y):
    return shapes.matte(torch.tensor([shape]), torch.tensor([radius]), torch.tensor([[[x, y]]]))[0, 0]


@settings(deadline=None)
@given(
    shape=st.sampled_from([CIRCLE, SQUARE, TRIANGLE]),
    radius=st.floats(*shapes.RADIUS), x=st.floats(0, 32), y=st.floats(0, 32),
)  # fmt: skip
def test_all_shapes_have_the_area_of_the_circle(shape, radius, x, y):
    assert one(shape, radius, x, y).sum().item() == pytest.approx(math.pi * radius**2, rel=0.01)


def inside(shape, radius, dx, dy, level):
    """Whether a point is within the line of a coverage, from the shape's corners (y points down).

    That of ``level`` is EDGE (1/2 - level) further out than the half-covered line, whose inradius a has a^2 + EDGE^2/12
    as the shape of the full area has it.
    """
    area = math.pi * radius**2
    inradius = {CIRCLE: radius, SQUARE: math.sqrt(area) / 2, TRIANGLE: math.sqrt(area / (3 * math.sqrt(3)))}[shape]
    inradius = math.sqrt(inradius**2 - shapes.EDGE**2 / 12) + shapes.EDGE * (0.5 - level)
    if shape == CIRCLE:
        return math.hypot(dx, dy) <= inradius
    if shape == SQUARE:
        return max(abs(dx), abs(dy)) <= inradius
    height = 3 * inradius
    side = height * 2 / math.sqrt(3)
    corners = [(0, -2 * height / 3), (side / 2, height / 3), (-side / 2, height / 3)]  # one corner up
    edges = zip(corners, [*corners[1:], corners[0]], strict=True)
    return all((bx - ax) * (dy - ay) - (by - ay) * (dx - ax) >= 0 for (ax, ay), (bx, by) in edges)


@pytest.mark.parametrize("shape", [CIRCLE, SQUARE, TRIANGLE])
@pytest.mark.parametrize(("x", "y", "radius"), [(16.3, 15.2, 6.1), (1.7, 30.9, 5.0), (31.2, 3.4, 7.0)])
@pytest.mark.parametrize("level", [0.1, 0.5, 0.9])
def test_a_pixel_is_covered_as_far_as_its_centre_is_inside(shape, x, y, radius, level):
    alpha = one(shape, radius, x, y)
    for row, column in itertools.product(range(32), range(32)):
        dx, dy = ((place + 0.5 - centre + 16) % 32 - 16 for place, centre in ((column, x), (row, y)))
        assert (alpha[row, column] >= level) == inside(shape, radius, dx, dy, level)


@pytest.mark.parametrize("shape", [CIRCLE, SQUARE, TRIANGLE])
def test_the_world_is_a_torus(shape):
    alpha = one(shape, 6.0, 16.25, 15.5)
    assert torch.equal(one(shape, 6.0, 16.25 + 32, 15.5 - 64), alpha)
    torch.testing.assert_close(one(shape, 6.0, 16.25 + 13, 15.5 - 9), alpha.roll((-9, 13), (0, 1)), atol=1e-5, rtol=0)


def test_positions_move_as_the_caption_says():
    state = replace(shapes.sample_states(0, range(4)), direction=torch.arange(4))
    moved = state.positions(3, first=5)[:, 2] - state.start
    for row, (dx, dy) in enumerate(shapes.DIRECTIONS.values()):
        expected = torch.tensor([dx, dy]) * state.speed[row] * 7
        torch.testing.assert_close(moved[row], expected, atol=1e-4, rtol=0)
    assert list(shapes.DIRECTIONS) == ["left", "right", "up", "down"]
    assert shapes.DIRECTIONS["left"] == (-1, 0) and shapes.DIRECTIONS["up"] == (0, -1)  # pixel rows count downwards


@pytest.mark.parametrize(("speed", "period"), [(1.0, 32), (2.0, 16), (1.6, 20)])
def test_after_a_whole_turn_the_video_repeats(speed, period):
    state = shapes.sample_states(0, range(12))
    state = replace(state, speed=torch.full((12,), speed))
    again = shapes.render(state, 2, first=3 + period)
    torch.testing.assert_close(again, shapes.render(state, 2, first=3), atol=1e-4, rtol=0)


def test_later_frames_continue_the_video():
    state = shapes.sample_states(0, range(3))
    assert torch.equal(shapes.render(state, 8)[:, 5:], shapes.render(state, 3, first=5))


def test_rendering_is_shape_over_ground():
    state = shapes.sample_states(0, range(6))
    videos = shapes.render(state, 2)
    assert videos.shape == (6, 2, 3, 32, 32) and videos.abs().max() <= 1
    alpha = shapes.matte(state.shape, state.radius, state.positions(2))
    for row, frame in itertools.product(range(6), range(2)):
        pixels, cover = videos[row, frame], alpha[row, frame]
        colour = torch.tensor(list(shapes.COLOURS.values())[state.colour[row]])
        assert torch.allclose(pixels[:, cover == 1], colour[:, None])
        for y, x in ((cover == 0).nonzero()[::37]).tolist():
            level = state.ground[row] + 0.1 * state.texture[row, y // 4, x // 4]
            assert torch.allclose(pixels[:, y, x], level)


def test_speeds_and_sizes_of_a_dataset_are_its_own_and_change_nothing_else():
    own = shapes.Shapes(12, speed=[3, 5], radius=[7, 9])
    usual, other = shapes.Shapes(12).states(range(64)), own.states(range(64))
    assert torch.allclose(other.speed, 2 * usual.speed) and torch.allclose(other.radius, usual.radius + 1)
    assert same(replace(other, speed=usual.speed, radius=usual.radius), usual)
    edits = own.edits(range(8), [6], "test")
    state, after, _ = shapes.sample_edits(0, range(8), [6], "test", (3.0, 5.0), (7.0, 9.0))
    assert torch.equal(edits.target[:, -1], shapes.render(after, 12)[:, -1])
    assert state.speed.min() >= 3 and state.radius.min() >= 7


@pytest.mark.parametrize("name", ["speed", "radius"])
@pytest.mark.parametrize("bounds", [[], [1.0], [1.0, 1.0], [2.0, 1.0], [0.0, 1.0], [1.0, 16.0], [1.0, 2.0, 3.0]])
def test_speeds_and_sizes_that_are_no_range_are_refused(name, bounds):
    with pytest.raises(ValueError, match=rf"{name} is \(lowest, highest\)"):
        shapes.Shapes(**{name: bounds})


def test_dataset():
    dataset = shapes.Shapes(frames=3, seed=4)
    pixels, captions = dataset.batch([5, 9], "test")
    assert pixels.shape == (2, *dataset.pixel_shape) == (2, 3, 3, 32, 32)
    state = shapes.sample_states(4, [5, 9], "test")
    assert torch.equal(pixels, shapes.render(state, 3)) and captions == state.captions
    assert {word for caption in captions for word in caption.split()} <= set(dataset.vocabulary)
