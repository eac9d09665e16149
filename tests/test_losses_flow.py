"""Flow matching: the error's formula, and the closed-form optimum for Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch
from closed_form import F64, FixedDraw, GaussianDenoiser, normal, numbers, scene
from hypothesis import given, settings
from hypothesis import strategies as st

from causvid import schedule
from causvid.losses.flow import FlowMatching, denoising_error, draw_times, drop_text
from causvid.randomness import Draw
from causvid.types import DenoiserOutput, Scene, Text

SHAPE = (2, 3, 1, 2, 2)  # b f c h w
TIMES = torch.tensor([[0.0, 0.01, 0.3], [0.5, 0.9, 1.0]], dtype=F64)


@pytest.mark.parametrize("floor", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("kind", ["velocity", "x0"])
def test_error_is_the_weighted_square(kind, floor):
    prediction, x0, noise = (normal(*SHAPE, seed=i) for i in range(3))
    error = denoising_error(DenoiserOutput(x0, TIMES, prediction, kind), x0, noise, floor)
    for row in range(2):
        for frame in range(3):
            t = float(TIMES[row, frame])
            guess, data, noised = (x[row, frame] for x in (prediction, x0, noise))
            if kind == "velocity":
                weight = 1.0 if t >= floor else (t / floor) ** 2
                expected = weight * float((guess - (noised - data)).pow(2).mean())
            else:  # velocity's error is that of x0 over t; at t = 0 a floor of .001 holds
                expected = float((guess - data).pow(2).mean()) / max(t, floor, 1e-3) ** 2
            assert float(error[row, frame]) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(t=st.floats(0.01, 1.0), floor=st.floats(0.0, 1.0))
def test_networks_of_both_kinds_are_judged_alike(t, floor):
    x0, noise, guess = (normal(*SHAPE, seed=i) for i in range(3))
    times = torch.full(SHAPE[:2], t, dtype=F64)
    x_t = schedule.add_noise(x0, noise, times)
    velocity = (x_t - guess) / t
    of_x0 = denoising_error(DenoiserOutput(x_t, times, guess, "x0"), x0, noise, floor)
    of_velocity = denoising_error(DenoiserOutput(x_t, times, velocity, "velocity"), x0, noise, floor)
    torch.testing.assert_close(of_x0, of_velocity, rtol=1e-9, atol=0)


def gaussian_scene(student, mean, std, u, blocks, times):
    """The four sigma points of (data, noise): averages over them are exact for everything quadratic."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=F64)
    frames = blocks[-1][1]
    data, noise = (signs[:, i].reshape(4, 1, 1, 1, 1).expand(4, frames, 1, 1, 1) for i in (0, 1))
    u = torch.tensor(u, dtype=F64)
    draw = FixedDraw(
        t=u.expand(4, -1) if times == "per_block" else u[0].expand(4),
        noise=noise, drop_text=torch.ones(4),
    )  # fmt: skip
    return scene(draw, {"student": student}, blocks, text=numbers(*[mean] * 4), data=mean + std * data,
                 unconditional=numbers(*[0.0] * 4))  # fmt: skip


def gradient(student, given_scene, **options):
    student.zero_grad()
    FlowMatching(**options)("student", given_scene).value.backward()
    return torch.stack([student.std.grad, student.offset.grad])


@pytest.mark.parametrize("kind", ["velocity", "x0"])
@pytest.mark.parametrize("times", ["shared", "per_block"])
@pytest.mark.parametrize("t_floor", [0.0, 0.5])
def test_optimum_for_gaussian_data_is_the_posterior_mean(kind, times, t_floor):
    mean, std, blocks, u = 0.7, 0.6, ((0, 2), (2, 3)), (0.3, 0.8)
    options = {"times": times, "t_floor": t_floor, "shift": 2.0}
    best, off = GaussianDenoiser(std, 0.0, kind), GaussianDenoiser(std + 0.1, 0.1, kind)
    at_best, at_off = (
        gradient(student, gaussian_scene(student, mean, std, u, blocks, times), **options) for student in (best, off)
    )
    assert at_best.abs().max() < 1e-12
    assert (at_off > 1e-3).all()  # away from the optimum it pulls back


@settings(deadline=None)
@given(t=st.floats(0.02, 1.0), mean=st.floats(-2, 2), std=st.floats(0.1, 3.0))
def test_expected_loss_at_the_optimum_is_the_posterior_variance(t, mean, std):
    student = GaussianDenoiser(std, 0.0, "velocity")
    given_scene = gaussian_scene(student, mean, std, (t,), ((0, 1),), "shared")
    variance = std**2 * t**2 / ((1 - t) ** 2 * std**2 + t**2)  # Var[x0 | x_t]; velocity's is that over t^2
    assert FlowMatching()("student", given_scene).value.item() == pytest.approx(variance / t**2, rel=1e-8)


def test_clean_context_is_the_data():
    student = GaussianDenoiser()
    given_scene = gaussian_scene(student, 0.0, 1.0, (0.5,), ((0, 2),), "shared")
    for context in ("noisy", "clean"):
        FlowMatching(context=context)("student", given_scene)
    noisy, clean = student.calls
    assert noisy.context is None
    assert clean.context is given_scene.data
    assert torch.equal(noisy.x, clean.x)


def test_times_are_shared_or_per_block_and_shifted_once():
    given_scene = scene(None, {}, ((0, 1), (1, 4), (4, 6)), 2)
    u = torch.tensor([[0.1, 0.5, 0.9], [0.2, 0.4, 1.0]], dtype=F64)
    per_block = draw_times(FixedDraw(t=u), "t", given_scene, "per_block", 3.0)
    shared = draw_times(FixedDraw(t=u[:, 0]), "t", given_scene, "shared", 3.0)
    warped = 3 * u / (1 + 2 * u)
    assert torch.equal(per_block, warped[:, [0, 1, 1, 1, 2, 2]])
    assert torch.equal(shared, warped[:, :1].expand(2, 6))


@pytest.mark.parametrize("frames", [None, 3])
def test_dropped_rows_have_the_empty_prompt(frames):
    shape = (4, 2, 3) if frames is None else (4, frames, 2, 3)
    text, empty = Text(torch.ones(shape)), Text(torch.zeros(shape))
    draw = FixedDraw(drop_text=torch.tensor([0.05, 0.1, 0.0999, 0.9]))
    dropped = drop_text(scene(draw, {}, ((0, 3),), text=text, unconditional=empty), 0.1)
    assert dropped.embeddings.flatten(1).mean(1).tolist() == [0, 1, 0, 1]


def test_share_of_dropped_rows():
    rows = range(2000)
    text, empty = Text(torch.ones(2000, 1, 1)), Text(torch.zeros(2000, 1, 1))
    dropped = drop_text(scene(Draw(0, "s", 0, rows), {}, ((0, 1),), text=text, unconditional=empty), 0.1)
    assert 1 - float(dropped.embeddings.mean()) == pytest.approx(0.1, abs=0.03)  # 4.5 standard errors


def test_logs_hold_the_x0_error_of_each_band_of_t():
    student = GaussianDenoiser(1.0, kind="x0")
    given_scene = gaussian_scene(student, 0.0, 1.0, (0.1, 0.6), ((0, 1), (1, 2)), "per_block")
    logs = FlowMatching(times="per_block")("student", given_scene).logs
    for band, t in (("0.00", 0.1), ("0.50", 0.6)):
        expected = t**2 / ((1 - t) ** 2 + t**2)
        assert float(logs[f"x0_error_t{band}"]) == pytest.approx(expected, rel=1e-6)
    assert math.isnan(logs["x0_error_t0.25"]) and math.isnan(logs["x0_error_t0.75"])


def test_needs_data():
    with pytest.raises(ValueError, match="needs data"):
        FlowMatching()("student", scene(None, {}, ((0, 1),)))


def test_an_anchored_clip_has_a_cleaner_first_frame_and_the_rest_as_drawn():
    seen = {}

    class Recorder:
        def __call__(self, x, t, text, *, context=None):
            seen["x"], seen["t"] = x, t
            return DenoiserOutput(x, t, torch.zeros_like(x), "x0")

    data = torch.randn(64, 4, 1, 2, 2)
    text = Text(torch.zeros(64, 1, 1))
    scene = Scene(Draw(0, "s", 0, range(64)), text, text, {"student": Recorder()}, ((0, 4),), data=data)
    FlowMatching(anchor=0.5)("student", scene)
    factor = seen["t"][:, 0] / seen["t"][:, 1]
    assert 15 < (factor < 1).sum() < 49 and factor.max() == 1 and factor.min() >= 0
    assert (seen["t"][:, 1:] == seen["t"][:, 1:2]).all()


def test_the_empty_prompt_takes_the_place_of_every_frames_text():
    """With as many rows as frames, broadcasting would have mixed the two up."""
    text, empty = Text(normal(2, 2, 3, 4)), Text(normal(2, 3, 4, seed=1))
    draw = FixedDraw(drop_text=torch.tensor([0.05, 0.9]))
    dropped = drop_text(scene(draw, {}, ((0, 2),), text=text, unconditional=empty), 0.1).embeddings
    assert torch.equal(dropped[1], text.embeddings[1])
    assert all(torch.equal(dropped[0, frame], empty.embeddings[0]) for frame in range(2))
