"""The metrics, frozen before any model is judged: rendered data is perfect, and each corruption is seen by the metric
that should see it and held against no other."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from causvid import build, spec
from causvid.data import shapes
from causvid.eval.shapes_truth import ShapesTruth, fit
from causvid.stages.evaluate import judges_of
from causvid.validate import Bound

FRAMES = 12
STATE = shapes.sample_states(0, range(48), "metrics")
METRIC = ShapesTruth()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def paint(alpha, ground=None):
    """Shapes of a given coverage over the ground."""
    ground = shapes.ground_image(STATE.ground, STATE.texture)[:, None, None] if ground is None else ground
    colour = torch.tensor(list(shapes.COLOURS.values()))[STATE.colour][:, None, :, None, None]
    return alpha[:, :, None] * colour + (1 - alpha[:, :, None]) * ground


def cover(positions=None):
    return shapes.matte(STATE.shape, STATE.radius, STATE.positions(FRAMES) if positions is None else positions)


def until(frame):
    """Coverage that vanishes from a frame on."""
    return cover() * (torch.arange(FRAMES) < frame)[None, :, None, None]


def star():
    """Five-pointed blobs of about the right size, where the shapes should be."""
    axis, centres = torch.arange(shapes.SIZE) + 0.5, STATE.positions(FRAMES)
    x, y = ((axis - centres[..., i : i + 1] + 16) % 32 - 16 for i in (0, 1))
    x, y = x[..., None, :], y[..., :, None]
    edge = STATE.radius[:, None, None, None] * (1 + 0.55 * torch.cos(5 * torch.atan2(y, x)))
    return (edge - (x**2 + y**2).sqrt() + 0.5).clamp(0, 1)


def mottled():
    patches = torch.randn(len(STATE), 1, 4, 4, generator=generator())
    clouds = F.interpolate(patches, scale_factor=8, mode="bilinear", align_corners=False)
    return paint(cover(), (shapes.ground_image(STATE.ground, STATE.texture) + 0.1 * clouds[:, 0])[:, None, None])


def blurred():
    """Texture averaged over 9 pixels; shapes stay sharp."""
    cells = F.interpolate(STATE.texture[:, None], scale_factor=shapes.CELL)
    texture = F.avg_pool2d(F.pad(cells, (4, 4, 4, 4), mode="circular"), 9, 1)
    return paint(cover(), STATE.ground[:, None, None, None, None] + shapes.TEXTURE * texture[:, None])


def flickering():
    """A texture of the right contrast in each frame that is not the same in the next."""
    frames = [replace(STATE, texture=STATE.texture * (-1) ** frame) for frame in range(FRAMES)]
    return torch.cat([shapes.render(state, 1, frame) for frame, state in enumerate(frames)], 1)


def changed(**parts):
    return shapes.render(replace(STATE, **parts), FRAMES)


def rendered():
    return changed()


def there_and_back():
    time = torch.arange(FRAMES)
    time = torch.minimum(time, 14 - time)  # turns after frame 7
    positions = STATE.positions(FRAMES)
    velocity = positions[:, 1:2] - positions[:, :1]
    return paint(cover(positions[:, :1] + time[None, :, None] * velocity))


def second_object(colour):
    alpha = cover(STATE.positions(FRAMES) + 16)[:, :, None]
    other = torch.tensor(list(shapes.COLOURS.values()))[colour][:, None, :, None, None]
    return alpha * other + (1 - alpha) * rendered()


def judge(videos, prompts=None):
    """Which videos each metric finds as rendered data of the state is."""
    scores = METRIC(videos, STATE.captions if prompts is None else prompts)
    start = torch.stack([scores["start_x"], scores["start_y"]], 1)
    right = {name: scores[name] == 1 for name in ("colour", "shape", "direction", "ok")}
    return right | {
        "fidelity": scores["fidelity"] > 38,
        "contrast": (scores["contrast"] - 1).abs() < 0.05,
        "overlap": scores["overlap"] > 0.93,
        "trajectory": scores["trajectory"] < 0.15,
        "speed": (scores["speed"] - STATE.speed).abs() < 0.04,
        "size": (scores["size"] - STATE.radius).abs() < 0.12,
        "ground": (scores["ground"] - STATE.ground).abs() < 0.02,
        "start": ((start - STATE.start + 16) % 32 - 16).abs().amax(1) < 0.3,
    }


# corruption: (videos, metrics that must see it, metrics that may). Every other metric must not.
CORRUPTIONS = {
    "nothing": (rendered, "", ""),
    "8-bit files": (lambda: ((rendered() + 1) * 127.5).round() / 127.5 - 1, "", ""),
    "another colour": (lambda: changed(colour=(STATE.colour + 1) % 4), "colour ok", ""),
    "another shape": (lambda: changed(shape=(STATE.shape + 1) % 3), "shape ok", ""),
    "time reversed": (lambda: rendered().flip(1), "direction ok start", ""),
    "moves across": (lambda: changed(direction=(STATE.direction + 2) % 4), "direction ok", ""),
    # A shape that never moves hides cells for good: of some, only the mixed pixels at its rim are seen.
    "frozen": (lambda: rendered()[:, :1].expand(-1, FRAMES, -1, -1, -1), "direction ok speed", "contrast"),
    "crawls": (lambda: changed(speed=STATE.speed * 0.2), "direction ok speed", ""),
    "slower": (lambda: changed(speed=STATE.speed * 0.7), "speed", ""),
    "turns back": (there_and_back, "trajectory speed fidelity start", "direction ok shape overlap size"),
    "jitters": (
        lambda: paint(cover(STATE.positions(FRAMES) + 0.5 * torch.randn(48, FRAMES, 2, generator=generator()))),
        "trajectory fidelity", "overlap start speed size",
    ),
    "texture blurred": (blurred, "contrast fidelity", "ground"),
    "texture at half": (lambda: changed(texture=STATE.texture * 0.5), "contrast fidelity", ""),
    "texture half as strong again": (lambda: changed(texture=STATE.texture * 1.5), "contrast fidelity", ""),
    "texture gone": (lambda: changed(texture=STATE.texture * 0), "contrast fidelity", ""),
    "texture flickers": (flickering, "contrast fidelity", ""),
    "mottled ground": (mottled, "fidelity", "contrast ground"),
    "wrong ground": (lambda: changed(ground=STATE.ground + 0.4), "ground", ""),
    "tinted": (
        lambda: rendered() + torch.tensor([0.05, 0.0, -0.05]).reshape(3, 1, 1), "fidelity", "overlap ground size",
    ),
    "noise": (
        lambda: rendered() + 0.1 * torch.randn(48, FRAMES, 3, 32, 32, generator=generator()),
        "fidelity", "overlap trajectory size start",
    ),
    "star": (lambda: paint(star()), "shape ok overlap fidelity size", "start trajectory"),
    "faded": (lambda: paint(cover() * 0.5), "shape ok overlap fidelity size", "trajectory contrast ground start"),
    "larger": (lambda: changed(radius=STATE.radius * 1.2), "size", ""),
    "never there": (
        lambda: paint(until(0)), "colour shape direction ok overlap trajectory speed size start", "fidelity",
    ),
    "vanishes halfway": (
        lambda: paint(until(FRAMES // 2)), "shape ok overlap fidelity trajectory size", "direction speed start",
    ),
    "vanishes at the end": (
        lambda: paint(until(FRAMES - 1)), "overlap fidelity trajectory", "shape ok direction speed start size",
    ),
    "twice there": (
        lambda: second_object(STATE.colour), "shape ok overlap fidelity size", "direction speed trajectory start",
    ),
    "beside another": (
        lambda: second_object((STATE.colour + 1) % 4), "fidelity",
        "colour shape ok overlap start trajectory size ground contrast",
    ),
    "grey": (
        lambda: rendered().mean(2, keepdim=True).expand(-1, -1, 3, -1, -1),
        "colour shape direction ok overlap fidelity trajectory speed size start", "ground contrast",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_corruption_is_named_by_its_metrics_and_no_other(name):
    make, seen, may = CORRUPTIONS[name]
    for metric, fine in judge(make()).items():
        share = fine.float().mean().item()
        if metric in seen.split():
            assert share < 0.1, f"{metric} does not see '{name}'"
        elif metric not in may.split():
            assert share == 1, f"{metric} is wrongly moved by '{name}'"


@pytest.mark.parametrize("word", ["colour", "shape", "direction"])
def test_a_wrong_word_of_the_prompt_is_named(word):
    kinds = {"colour": 4, "shape": 3, "direction": 4}[word]
    wrong = replace(STATE, **{word: (getattr(STATE, word) + 1) % kinds}).captions
    for metric, fine in judge(rendered(), wrong).items():
        assert fine.all() if metric not in (word, "ok") else not fine.any()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), frames=st.sampled_from([3, 12, 40]), first=st.sampled_from([0, 108]))
def test_rendered_data_is_perfect(seed, frames, first):
    state = shapes.sample_states(seed, range(4))
    scores = METRIC(shapes.render(state, frames, first), state.captions)
    assert all(scores[name].min() == 1 for name in ("colour", "shape", "direction", "ok"))
    assert scores["fidelity"].min() > 44
    assert scores["overlap"].min() > 0.93
    assert scores["trajectory"].max() < 0.15
    if frames >= 12:  # fewer leave cells half hidden
        assert (scores["contrast"] - 1).abs().max() < 0.06


def test_the_fitted_texture_is_the_truth():
    assert torch.equal(fit(rendered()).state.texture, STATE.texture)


@pytest.mark.parametrize("amount", [0.02, 0.1, 0.2, 0.4, 0.8])
def test_contrast_is_the_amplitude_of_the_texture(amount):
    contrast = METRIC(changed(texture=STATE.texture * amount), STATE.captions)["contrast"]
    assert contrast.mean().item() == pytest.approx(amount, abs=0.03)


def test_fidelity_falls_with_noise_as_it_should():
    noise = torch.randn(48, FRAMES, 3, 32, 32, generator=generator())
    assert METRIC(rendered(), STATE.captions)["fidelity"].min() > 49  # so the fit's own error is small beside the noise
    for deviation in (0.02, 0.05):
        scores = METRIC(rendered() + deviation * noise, STATE.captions)
        expected = 10 * math.log10(4 / deviation**2)  # the range is 2
        assert scores["fidelity"].mean().item() == pytest.approx(expected, abs=0.1)


def hadamard(size):
    """Rows of -1 and 1, any two of which agree in half of the places."""
    rows = [[1.0]]
    while len(rows) < size:
        rows = [row + row for row in rows] + [row + [-x for x in row] for row in rows]
    return rows


LAWS = {
    "size_gap": "radius", "speed_gap": "speed", "ground_gap": "ground", "start_gap": "start", "texture_gap": "texture",
}  # fmt: skip
MANY = shapes.sample_states(0, range(192), "metrics")


def gaps(state):
    return METRIC.over_set(METRIC(shapes.render(state, FRAMES), state.captions))


def test_a_rendered_set_has_the_true_laws():
    assert gaps(MANY).keys() == {*LAWS, "caption_gap"}
    assert max(gaps(MANY).values()) < 0.06  # 2 standard errors of a sample of 192


@pytest.mark.parametrize("law", LAWS)
def test_a_collapsed_quantity_is_named(law):
    state = shapes.sample_states(0, range(96), "metrics")
    values = getattr(state, LAWS[law])
    before = gaps(state)
    for other, gap in gaps(replace(state, **{LAWS[law]: values[:1].expand_as(values)})).items():
        if other == "caption_gap":
            continue  # the mean over all quantities but the texture: see below
        if other == law:
            assert gap > 0.2  # a point mass is a quarter of the range away, or more
        else:
            assert gap == pytest.approx(before[other], abs=0.02)


def collapsed(state, rows, *parts):
    """The state with some quantities taken from other rows."""
    return replace(state, **{part: getattr(state, part)[rows] for part in parts})


FREE = ("radius", "speed", "start", "ground", "texture")


def test_one_texture_for_all_is_seen_by_the_texture_alone():
    before, after = gaps(MANY), gaps(collapsed(MANY, torch.zeros(192, dtype=torch.int64), "texture"))
    assert before["texture_gap"] < 0.01 and after["texture_gap"] > 0.9
    assert all(after[name] == pytest.approx(before[name], abs=0.02) for name in before if name != "texture_gap")


def test_one_clip_per_caption_is_seen_though_the_laws_over_the_set_hold():
    keys = [caption for caption in MANY.captions]
    rows = torch.tensor([keys.index(caption) for caption in keys])
    before, after = gaps(MANY), gaps(collapsed(MANY, rows, *FREE))
    assert before["caption_gap"] < 0.1 and after["caption_gap"] > 0.95
    assert after["texture_gap"] > before["texture_gap"] + 0.01
    assert all(after[law] < 0.12 for law in LAWS)


def test_without_a_caption_that_comes_twice_its_spread_is_not_asked():
    state = shapes.sample_states(0, range(3), "metrics")
    assert len(set(state.captions)) == 3 and "caption_gap" not in gaps(state)


def test_what_is_not_there_has_the_worst_trajectory_and_no_contrast():
    empty = torch.full((4, FRAMES, 3, shapes.SIZE, shapes.SIZE), -0.3)
    scores = METRIC(empty, STATE.captions[:4])
    assert (scores["trajectory"] == 16).all() and scores["contrast"].max() < 1e-4 and not scores["ok"].any()


def test_gap_is_the_wasserstein_distance_in_units_of_the_range():
    even = (torch.arange(100) + 0.5) / 100

    def spread(bounds, share):
        return bounds[0] + (bounds[1] - bounds[0]) * share

    perfect = {
        "size": spread(shapes.RADIUS, even), "speed": spread(shapes.SPEED, even.flip(0)),
        "ground": spread(shapes.GROUND, even), "start_x": spread(shapes.START, even),
        "start_y": spread(shapes.START, even.flip(0)),
        "textures": torch.tensor(hadamard(128)[:100]), "captions": torch.arange(100)[:, None],
    }  # fmt: skip
    assert "caption_gap" not in METRIC.over_set(perfect)
    assert max(METRIC.over_set(perfect).values()) < 1e-6
    halves = {**perfect, "textures": perfect["textures"][:50].repeat(2, 1)}  # 50 of 4950 pairs agree, the rest are even
    assert METRIC.over_set(halves)["texture_gap"] == pytest.approx((50 / 4950 - 1 / 128) / (1 - 1 / 128), abs=1e-6)
    shifted = {**perfect, "size": spread(shapes.RADIUS, even + 0.25)}
    assert METRIC.over_set(shifted)["size_gap"] == pytest.approx(0.25)
    halved = {**perfect, "speed": spread(shapes.SPEED, 0.25 + even / 2)}  # quantiles move by |q - .5| / 2
    assert METRIC.over_set(halved)["speed_gap"] == pytest.approx(0.125, abs=1e-3)


def test_a_world_is_judged_by_its_own_speeds_and_sizes():
    """Half of the slowest is still; laws of speed and size are the world's; the stage takes them from the dataset."""
    world = build.World(spec.load("tiny/causvid", ["world.dataset.speed=[3, 4]", "world.dataset.radius=[8.5, 9.5]"]))
    metric = Bound("metric", {"name": "shapes_truth", "speed": None, "radius": None})
    own, other = judges_of([metric], world, *world.pixels([0]))[0], METRIC
    state = shapes.sample_states(0, range(192), "metrics", (3.0, 4.0), (8.5, 9.5))
    crawling = replace(state, speed=torch.full((192,), 1.1))
    for metric, share in ((own, 0), (other, 1)):
        assert metric(shapes.render(crawling, 12), crawling.captions)["direction"].float().mean() == share
    scores = own(shapes.render(state, 12), state.captions)
    assert scores["ok"].all()
    for name, apart in {"speed_gap": 1.4, "size_gap": 0.95}.items():  # in units of the range
        assert own.over_set(scores)[name] < 0.05 and other.over_set(scores)[name] > apart


def test_the_interior_of_shapes_by_a_dark_middle():
    """``benchmarks/interior.py``: nothing on clean clips; .1 where .1 is taken from the middle of the shapes alone."""
    path = Path(__file__).parents[1] / "benchmarks" / "interior.py"
    loading = importlib.util.spec_from_file_location("interior", path)
    assert loading and loading.loader
    module = importlib.util.module_from_spec(loading)
    loading.loader.exec_module(module)
    middle = shapes.matte(STATE.shape, STATE.radius / 2, STATE.positions(FRAMES))[:, :, None] >= 0.5
    clean, dark = module.interior(paint(cover())), module.interior(paint(cover()) - 0.1 * middle)
    assert set(clean) == {"all", "squares"}  # there is no green square among these
    assert max(clean.values()) < 0.01
    assert dark["all"] == pytest.approx(0.1, rel=0.15)
