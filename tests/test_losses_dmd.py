"""Distribution matching against closed forms: linear denoisers of Gaussian data, fp64, no Monte Carlo."""

from __future__ import annotations

import pytest
import torch
from closed_form import F64, FixedDraw, GaussianDenoiser, normal, numbers, scene, score

from causvid import schedule
from causvid.losses.dmd import DMD, dmd_gradient, guided_x0
from causvid.losses.flow import FlowMatching
from causvid.types import StudentSample

SHAPE = (3, 4, 2, 1, 2)  # b f c h w
BLOCKS = ((0, 1), (1, 3), (3, 4))
WANTED, FREE = (0.5, -1.0, 0.2), (0.0, 0.3, 0.1)  # means of the real data with and without prompt, per row
REAL_STD, FAKE_STD, FAKE_OFFSET, EPS = 0.8, 1.3, 0.4, 1e-3
U = torch.tensor([[0.2, 0.9, 0.5], [0.6, 0.1, 0.7], [0.8, 0.3, 0.4]], dtype=F64)


def column(values):
    return torch.tensor(values, dtype=F64).reshape(-1, 1, 1, 1, 1)


class World:
    """A student whose samples are ``theta * z``, and the scores of two Gaussians."""

    def __init__(self, kind="x0", score_times="shared", counts=None, fake=(FAKE_STD, FAKE_OFFSET)):
        self.theta = torch.tensor(0.7, dtype=F64, requires_grad=True)
        self.z, self.noise = normal(*SHAPE), normal(*SHAPE, seed=1)
        self.counts = torch.ones(SHAPE[:2], dtype=torch.bool) if counts is None else counts
        self.teacher, self.fake = GaussianDenoiser(REAL_STD, 0.0, kind), GaussianDenoiser(*fake, kind)
        self.draw = FixedDraw(score_t=U if score_times == "per_block" else U[:, 0], score_noise=self.noise)
        self.asked = []
        self.scene = scene(
            self.draw, {"teacher": self.teacher, "fake_score": self.fake}, BLOCKS, text=numbers(*WANTED),
            unconditional=numbers(*FREE), generate=self.generate,
        )  # fmt: skip

    def generate(self, grad):
        self.asked.append(grad)
        self.sample = self.theta * self.z
        if self.sample.requires_grad:
            self.sample.retain_grad()
        return StudentSample(self.sample, torch.ones(SHAPE[:2]), self.counts)


def by_scores(x, t, noise, guidance, counts):
    """DMD's gradient and normalisers from the scores themselves: x0 = (x_t + t^2 score) / (1 - t)."""
    s = t[..., None, None, None]
    x_t = (1 - s) * x + s * noise
    wanted, free = (score(x_t, t, column(means), REAL_STD) for means in (WANTED, FREE))
    real = free + guidance * (wanted - free)
    fake = score(x_t, t, column(WANTED) + FAKE_OFFSET, FAKE_STD)
    distance = (x - (x_t + s**2 * real) / (1 - s)).abs()
    normalisers = torch.stack([distance[row][counts[row]].mean() + EPS for row in range(len(x))])
    gradient = s**2 / (1 - s) * (fake - real) / normalisers[:, None, None, None, None]
    return torch.where(counts[..., None, None, None], gradient, 0.0), normalisers


@pytest.mark.parametrize("kind", ["velocity", "x0"])
@pytest.mark.parametrize("score_times", ["shared", "per_block"])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_gradient_is_the_difference_of_scores(kind, score_times, guidance):
    world = World(kind, score_times)
    value = DMD(guidance, 2.0, score_times=score_times, eps=EPS)("student", world.scene).value
    value.backward()
    u = U[:, [0, 1, 1, 2]] if score_times == "per_block" else U[:, :1].expand(-1, 4)
    x = world.sample.detach()
    expected, _ = by_scores(x, schedule.shift(u, 2.0), world.noise, guidance, world.counts)
    torch.testing.assert_close(world.sample.grad, expected / x.numel(), rtol=1e-9, atol=1e-12)
    assert value.item() == pytest.approx(0.5 * expected.pow(2).mean().item(), rel=1e-9)
    torch.testing.assert_close(world.theta.grad, (expected * world.z).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("count_clean", [False, True])
def test_passed_through_frames(count_clean):
    counts = torch.tensor([[True, True, True, False], [False, True, True, True], [False, False, False, True]])
    world = World(counts=counts)
    output = DMD(3.0, eps=EPS, count_clean=count_clean)("student", world.scene)
    output.value.backward()
    counted = torch.ones_like(counts) if count_clean else counts
    expected, _ = by_scores(world.sample.detach(), U[:, :1].expand(-1, 4), world.noise, 3.0, counted)
    torch.testing.assert_close(world.sample.grad * world.z.numel(), expected, rtol=1e-9, atol=1e-12)
    if not count_clean:
        assert world.sample.grad[~counts].abs().max() == 0


def test_a_sample_without_any_counted_frame_is_harmless():
    counts = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    world = World(counts=counts)
    DMD(3.0)("student", world.scene).value.backward()
    assert torch.isfinite(world.sample.grad).all()
    assert world.sample.grad[1].abs().max() == 0


def test_no_gradient_where_both_scores_agree():
    world = World(fake=(REAL_STD, 0.0))
    value = DMD()("student", world.scene).value
    value.backward()
    assert value.item() == 0
    assert world.theta.grad == 0


def test_epsilon_keeps_the_normaliser_finite_where_the_teacher_agrees_with_the_sample():
    x, fake = normal(*SHAPE), normal(*SHAPE, seed=1)
    counts = torch.ones(SHAPE[:2], dtype=torch.bool)
    gradient, normaliser = dmd_gradient(fake, x, x, counts, EPS)
    assert normaliser.tolist() == [EPS] * 3
    torch.testing.assert_close(gradient, (fake - x) / EPS)


def test_guidance_is_unconditional_plus_weighted_difference():
    model, x, t = GaussianDenoiser(), normal(*SHAPE), torch.full(SHAPE[:2], 0.5, dtype=F64)
    text, free = numbers(*WANTED), numbers(*FREE)
    wanted, plain = (model(x, t, each).x0 for each in (text, free))
    torch.testing.assert_close(guided_x0(model, x, t, text, free, 4.5), plain + 4.5 * (wanted - plain))
    released = wanted + 3.5 * (wanted - plain)  # CausVid's form, s = 3.5: w = s + 1
    torch.testing.assert_close(guided_x0(model, x, t, text, free, 4.5), released)
    torch.testing.assert_close(guided_x0(model, x, t, text, free, 0.0), plain)
    model.calls.clear()
    assert torch.equal(guided_x0(model, x, t, text, free, 1.0), wanted)
    assert len(model.calls) == 1


def test_guidance_within_an_interval_of_times_leaves_the_other_frames_as_they_are():
    model, x, t = GaussianDenoiser(), normal(*SHAPE), torch.tensor([[0.2, 0.5, 0.7, 0.9]], dtype=F64).expand(3, 4)
    text, free = numbers(*WANTED), numbers(*FREE)
    wanted, plain = (model(x, t, each).x0 for each in (text, free))
    guided = guided_x0(model, x, t, text, free, 4.5, (0.5, 0.8))
    torch.testing.assert_close(guided[:, [0, 3]], wanted[:, [0, 3]])
    torch.testing.assert_close(guided[:, [1, 2]], (plain + 4.5 * (wanted - plain))[:, [1, 2]])


def test_the_gradient_is_guided_within_the_interval_alone():
    t = U[:, [0, 1, 1, 2]]
    edge = float(t.median())
    world = World("x0", "per_block")
    loss = DMD(3.0, score_times="per_block", eps=EPS, guidance_interval=(edge, 1.0))
    loss("student", world.scene).value.backward()
    weight = torch.where(t >= edge, 3.0, 1.0).double()[..., None, None, None]
    assert 0 < (weight > 1).sum() < weight.numel()
    expected, _ = by_scores(world.sample.detach(), t, world.noise, weight, world.counts)
    torch.testing.assert_close(world.sample.grad * world.z.numel(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("interval", [(0.5,), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.5)])
def test_an_interval_that_is_none_is_refused(interval):
    with pytest.raises(ValueError, match="guidance_interval needs 0 <= lowest <= highest <= 1"):
        DMD(2.0, guidance_interval=interval)


@pytest.mark.parametrize("player", ["student", "fake_score"])
def test_score_times_are_clamped(player):
    world = World()
    world.draw.numbers["score_t"] = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    DMD(shift=4.0, t_min=0.1, t_max=0.9)(player, world.scene)
    assert world.fake.calls[0].t[:, 0].tolist() == [0.1, 0.8, 0.9]


def test_student_learns_and_nobody_else():
    world = World()
    DMD(2.0)("student", world.scene).value.backward()
    assert world.asked == [True]
    assert world.theta.grad.abs() > 0
    assert all(p.grad is None for net in (world.teacher, world.fake) for p in net.parameters())


@pytest.mark.parametrize("count_clean", [False, True])
def test_critic_learns_by_flow_matching_on_the_students_samples(count_clean):
    counts = torch.tensor([[True, True, False, False]] * 3)
    world = World("velocity", "per_block", counts)
    value = DMD(2.0, 3.0, score_times="per_block", count_clean=count_clean)("fake_score", world.scene).value
    value.backward()
    assert world.asked == [False]
    assert world.theta.grad is None and all(p.grad is None for p in world.teacher.parameters())
    critic_gradient = world.fake.std.grad.clone()
    world.fake.zero_grad()

    kept = 4 if count_clean else 2
    blocks = BLOCKS if count_clean else ((0, 1), (1, 2))  # elementwise networks: frames can be left out
    draw = FixedDraw(t=U[:, : len(blocks)], noise=world.noise[:, :kept], drop_text=torch.ones(3))
    plain = scene(draw, {"student": world.fake}, blocks, text=numbers(*WANTED), unconditional=numbers(*FREE),
                  data=world.sample.detach()[:, :kept])  # fmt: skip
    expected = FlowMatching(3.0, times="per_block")("student", plain).value
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(critic_gradient, world.fake.std.grad)


def test_logs_are_the_gradient_and_the_normaliser():
    world = World()
    logs = DMD(2.0, eps=EPS)("student", world.scene).logs
    t = U[:, :1].expand(-1, 4)
    gradient, normalisers = by_scores(world.sample.detach(), t, world.noise, 2.0, world.counts)
    assert float(logs["gradient"]) == pytest.approx(gradient.pow(2).mean().sqrt().item(), rel=1e-9)
    assert float(logs["normaliser"]) == pytest.approx(normalisers.mean().item(), rel=1e-9)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (-0.1, 0.9), (0.1, 1.1)])
def test_refuses_an_empty_range_of_times(low, high):
    with pytest.raises(ValueError, match="score times"):
        DMD(t_min=low, t_max=high)


def test_needs_a_student_input():
    world = World()
    with pytest.raises(ValueError, match="student input"):
        DMD()("student", scene(world.draw, world.scene.nets, BLOCKS))
