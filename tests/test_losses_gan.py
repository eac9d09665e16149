"""Adversarial losses against closed forms: optimal discriminators, R1 of a linear one, and who learns from what."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from closed_form import F64, FixedDraw, GaussianDenoiser, normal, scene, tiny_dit, tiny_text
from torch import nn

from causvid import schedule
from causvid.losses.dmd import DMD
from causvid.losses.gan import GAN, Sum, discriminator_loss, generator_loss, r1_penalty
from causvid.models.discriminator import FeatureHead
from causvid.training import Player
from causvid.types import LossOutput, StudentSample
from causvid.validate import Bound

SHAPE = (2, 4, 2, 2, 2)  # b f c h w


@pytest.mark.parametrize(("real_mean", "fake_mean", "std"), [(1.0, -0.5, 1.0), (0.3, 0.8, 0.7), (0.0, 0.0, 1.0)])
def test_logistic_optimum_between_gaussians_is_log_p_over_q(real_mean, fake_mean, std):
    """log p/q = (m1 - m0) / s^2 x - (m1^2 - m0^2) / (2 s^2); the expected loss is stationary there, by quadrature."""
    nodes, weights = (torch.from_numpy(each) for each in numpy.polynomial.hermite_e.hermegauss(120))
    weights = weights / weights.sum()

    def gradient(slope, intercept):
        line = torch.tensor([slope, intercept], dtype=F64, requires_grad=True)
        real, fake = (line[0] * (mean + std * nodes) + line[1] for mean in (real_mean, fake_mean))
        expected = sum(w * discriminator_loss(a, b, "logistic") for w, a, b in zip(weights, real, fake, strict=True))
        return torch.autograd.grad(expected, line)[0]

    slope, intercept = (real_mean - fake_mean) / std**2, -(real_mean**2 - fake_mean**2) / (2 * std**2)
    assert gradient(slope, intercept).abs().max() < 1e-9
    assert gradient(slope + 0.2, intercept + 0.2).min() > 1e-3  # convex: it pulls back


def atoms(d, counts):
    """Logits of a sample from a discrete law: the logit of each atom as often as it occurs."""
    return d.repeat_interleave(torch.tensor(counts))


@pytest.mark.parametrize(
    ("kind", "optimum", "value"),
    [
        ("hinge", (1.0, -1.0, 1.0), 2 * (0.2 + 0.1 + 0.2)),  # sign(p - q); twice the common mass
        ("logistic", (math.log(2.5), -math.log(4), math.log(1.5)),  # log p/q; 2 log 2 - 2 JSD
         -sum(p * math.log(p / (p + q)) + q * math.log(q / (p + q)) for p, q in ((0.5, 0.2), (0.1, 0.4), (0.3, 0.2)))),
    ],
)  # fmt: skip
def test_optimum_on_a_discrete_pair(kind, optimum, value):
    """Data has masses .5 .1 .3 and the student .2 .4 .2 on three atoms; the rest, .1 and .2, on atoms of their own."""
    real, fake = (5, 1, 3, 1, 0), (2, 4, 2, 0, 2)
    apart = (1.0, -1.0) if kind == "hinge" else (60.0, -60.0)  # atoms that only one law has: no loss

    def loss(d):
        return discriminator_loss(atoms(d, real), atoms(d, fake), kind)

    best = torch.tensor([*optimum, *apart], dtype=F64)
    assert loss(best).item() == pytest.approx(value, abs=1e-12)
    for step in (-0.1, 0.1):
        for atom in range(3):
            moved = best.clone()
            moved[atom] += step
            assert loss(moved) > loss(best)


def test_generator_losses():
    d = torch.tensor([-2.0, 0.5, 3.0], dtype=F64, requires_grad=True)
    assert generator_loss(d, "hinge").item() == pytest.approx(-0.5)
    assert generator_loss(d, "logistic").item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in d.tolist()) / 3)
    for kind, slope in (("hinge", torch.ones(3, dtype=F64)), ("logistic", torch.sigmoid(-d.detach()))):
        (gradient,) = torch.autograd.grad(generator_loss(d, kind), d)  # type: ignore[arg-type]
        torch.testing.assert_close(gradient, -slope / 3)


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    weight, x = normal(4, 2, 3), normal(5, 4, 2, 3, seed=1).requires_grad_()
    penalty = r1_penalty((x * weight).flatten(1).sum(1) + 0.3, x)
    assert penalty.item() == pytest.approx(weight.pow(2).sum().item(), rel=1e-12)


def test_r1_reaches_the_discriminators_weights():
    weight, x = normal(3).requires_grad_(), normal(5, 3, seed=1).requires_grad_()
    r1_penalty((x * weight).sum(1), x).backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


class Linear(nn.Module):
    """A discriminator that is linear in the noised latents."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(*SHAPE[1:], seed=9))

    def forward(self, x_t, t, text, backbone, counts=None):
        return (x_t * self.weight).flatten(1).sum(1)


def gan_scene(discriminator, backbone=None, theta=None, with_data=True):
    """Samples ``theta * z``; noise levels .3 and 1 (clamped to .98)."""
    z = normal(*SHAPE)
    theta = torch.tensor(0.5, dtype=F64, requires_grad=True) if theta is None else theta
    draw = FixedDraw(
        gan_t=torch.tensor([0.3, 1.0], dtype=F64),
        gan_noise_fake=normal(*SHAPE, seed=1), gan_noise_real=normal(*SHAPE, seed=2),
    )  # fmt: skip
    ones = torch.ones(SHAPE[:2])
    return scene(
        draw, {"discriminator": discriminator, "fake_score": backbone}, ((0, 2), (2, 4)),
        text=tiny_text(), data=normal(*SHAPE, seed=3) if with_data else None,
        generate=lambda grad: StudentSample(theta * z, ones, ones.bool()),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["logistic", "hinge"])
@pytest.mark.parametrize("r1", [0.0, 0.7])
def test_both_sides_are_compared_at_the_same_noise_level(kind, r1):
    discriminator, theta = Linear(), torch.tensor(0.5, dtype=F64, requires_grad=True)
    given_scene = gan_scene(discriminator, theta=theta)
    t = torch.tensor([0.3, 0.98], dtype=F64)[:, None].expand(2, 4)
    real = discriminator(schedule.add_noise(given_scene.data, normal(*SHAPE, seed=2), t), t, None, None)
    fake = discriminator(schedule.add_noise(theta * normal(*SHAPE), normal(*SHAPE, seed=1), t), t, None, None)
    values = discriminator.weight.numel()
    expected = discriminator_loss(real, fake, kind) + r1 * discriminator.weight.pow(2).sum() / values
    loss = GAN(kind, r1)
    assert loss("discriminator", given_scene).value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss("student", given_scene).value.item() == pytest.approx(generator_loss(fake, kind).item(), rel=1e-12)


def nets():
    torch.manual_seed(0)
    return FeatureHead(12, 2).double(), tiny_dit()


@pytest.mark.parametrize("r1", [0.0, 1.0])
def test_discriminator_learns_and_the_student_does_not(r1):
    head, backbone = nets()
    theta = torch.tensor(0.5, dtype=F64, requires_grad=True)
    GAN(r1=r1)("discriminator", gan_scene(head, backbone, theta)).value.backward()
    assert theta.grad is None
    assert all(p.grad is not None for p in head.parameters())
    assert head.mix.weight.grad.abs().max() > 0


def test_student_learns_through_the_backbone():
    head, backbone = nets()
    theta = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def loss():
        return GAN()("student", gan_scene(head, backbone, theta)).value

    (gradient,) = torch.autograd.grad(loss(), theta)
    with torch.no_grad():
        theta += 1e-5
        above = loss()
        theta -= 2e-5
        below = loss()
    assert gradient.item() == pytest.approx((above - below).item() / 2e-5, rel=1e-6)


def player(module):
    options = {"warmup": 0, "decay": "constant", "gradient_clip": 0.0, "ema": 0.0}
    optimizer = Bound("optimizer", {"name": "adamw", "lr": 0.01, "betas": [0.9, 0.999], "weight_decay": 0.0})
    return Player(module, optimizer, options, 1)


def weights_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_discriminators_turn_moves_the_head_and_not_the_backbone():
    head, backbone = nets()
    before, head_before = weights_of(backbone), weights_of(head)
    turn = player(head)
    player(backbone)
    turn.step(GAN()("discriminator", gan_scene(head, backbone)).value)
    assert torch.equal(weights_of(backbone), before)
    assert not torch.equal(weights_of(head), head_before)


@pytest.mark.parametrize("earlier", ["student", "discriminator"])
def test_other_turns_leave_nothing_behind_for_the_fake_score(earlier):
    """Adversarial turns differentiate through the backbone; its own next update must not hear of it."""

    def updated(turns):
        head, backbone = nets()
        theta = nn.Linear(1, 1, bias=False).double()
        players = {"student": player(theta), "discriminator": player(head), "fake_score": player(backbone)}
        given_scene = gan_scene(head, backbone, theta.weight.reshape(()))
        for name in turns:
            players[name].step(GAN()(name, given_scene).value)
        players["fake_score"].step(backbone(given_scene.data, torch.ones(SHAPE[:2]), given_scene.text).x0.sum())
        return weights_of(backbone)

    assert torch.equal(updated([earlier]), updated([]))


def test_r1_penalty_of_a_transformer_is_that_of_finite_differences():
    head, backbone = nets()
    given_scene = gan_scene(head, backbone)
    penalty = GAN(r1=1.0)("discriminator", given_scene).logs["r1"]
    t = torch.tensor([0.3, 0.98], dtype=F64)[:, None].expand(2, 4)
    real_t = schedule.add_noise(given_scene.data, normal(*SHAPE, seed=2), t)
    values = real_t[0].numel()
    squares = torch.zeros(2, dtype=F64)
    with torch.no_grad():
        for direction in torch.eye(values, dtype=F64).reshape(-1, *SHAPE[1:]):
            above, below = (head(real_t + h * direction, t, tiny_text(), backbone) for h in (1e-5, -1e-5))
            squares += ((above - below) / 2e-5) ** 2
    assert float(penalty) == pytest.approx(squares.mean().item() / values, rel=1e-6)


def test_needs_data():
    with pytest.raises(ValueError, match="needs data"):
        GAN()("discriminator", gan_scene(Linear(), with_data=False))


def test_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="'logistic' or 'hinge'"):
        GAN("wasserstein")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "taps", "expected"), [(4, 2, [1, 3]), (2, 2, [0, 1]), (5, 1, [4]), (3, 3, [0, 1, 2])]
)
def test_head_taps_are_spaced_evenly_and_end_with_the_last_layer(layers, taps, expected):
    assert list(FeatureHead(8, layers, taps).taps) == expected


@pytest.mark.parametrize("taps", [0, 3])
def test_head_refuses_more_taps_than_layers(taps):
    with pytest.raises(ValueError, match="taps must be 1 to"):
        FeatureHead(8, 2, taps)


def test_head_gives_one_logit_per_clip_from_every_frame():
    head, backbone = nets()
    x = normal(*SHAPE).requires_grad_()
    logits = head(x, torch.full(SHAPE[:2], 0.4, dtype=F64), tiny_text(), backbone)
    assert logits.shape == (2,)
    (gradient,) = torch.autograd.grad(logits[0], x)
    assert (gradient[0].flatten(1).abs().sum(1) > 0).all()
    assert gradient[1].abs().max() == 0  # clips do not mix


class Constant:
    """A loss of a given value per player."""

    def __init__(self, **values):
        self.players, self.values = tuple(values), values

    def __call__(self, player, given_scene):
        return LossOutput(torch.tensor(self.values[player]), {"seen": self.values[player]})


def test_sum_adds_per_player():
    loss = Sum([Constant(student=1.0, fake_score=5.0), Constant(student=2.0, discriminator=7.0)], [1.0, 0.5])
    assert loss.players == ("student", "fake_score", "discriminator")
    values = {player: loss(player, None).value.item() for player in loss.players}  # type: ignore[arg-type]
    assert values == {"student": 2.0, "fake_score": 5.0, "discriminator": 3.5}
    assert Sum([Constant(student=1.0), Constant(student=2.0)])("student", None).value.item() == 3.0  # type: ignore[arg-type]


def test_sum_logs_its_terms():
    logs = Sum([Constant(student=3.0)], [2.0])("student", None).logs  # type: ignore[arg-type]
    assert logs == {"constant": 3.0, "constant_seen": 3.0}
    two = Sum([Constant(student=3.0), Constant(student=4.0)], [2.0, 1.0])("student", None).logs  # type: ignore[arg-type]
    assert two == {"constant": 3.0, "constant_seen": 3.0, "constant_2": 4.0, "constant_2_seen": 4.0}


@pytest.mark.parametrize(("count", "weights"), [(2, [1.0]), (1, [1.0, 2.0]), (0, None)])
def test_sum_refuses_mismatched_weights(count, weights):
    with pytest.raises(ValueError, match="one weight per loss"):
        Sum([Constant(student=1.0)] * count, weights)


def test_dmd_and_gan_sum_to_three_players():
    head, backbone = nets()
    given_scene = gan_scene(head, backbone)
    given_scene.draw.numbers |= {"score_t": torch.tensor([0.4, 0.6], dtype=F64), "score_noise": normal(*SHAPE, seed=4)}
    teacher = GaussianDenoiser()
    given_scene = scene(
        given_scene.draw, {**given_scene.nets, "teacher": teacher}, given_scene.blocks, text=given_scene.text,
        unconditional=given_scene.text, data=given_scene.data, generate=given_scene.generate,
    )  # fmt: skip
    dmd, gan = DMD(), GAN()
    both = Sum([dmd, gan], [1.0, 0.3])
    assert both.players == ("student", "fake_score", "discriminator")
    expected = dmd("student", given_scene).value + 0.3 * gan("student", given_scene).value
    assert both("student", given_scene).value.item() == pytest.approx(expected.item(), rel=1e-12)
    only = gan("discriminator", given_scene).value.item()
    assert both("discriminator", given_scene).value.item() == pytest.approx(0.3 * only, rel=1e-12)


def test_logits_are_pooled_over_the_frames_that_count():
    """What stands in the other frames moves neither player's loss through the head."""
    torch.manual_seed(0)
    head, backbone = FeatureHead(24, 2, taps=1, hidden=8), PerFrame()
    x, t = torch.randn(2, 4, 2, 2, 2), torch.rand(2, 4)
    counts = torch.tensor([[True, True, False, False], [False, False, False, False]])
    logits = head(x, t, None, backbone, counts=counts)
    alone = head(x[:, :2], t[:, :2], None, backbone)
    torch.testing.assert_close(logits[0], alone[0])
    assert logits[1] == 0  # no frame of this clip counts
    torch.testing.assert_close(head(x, t, None, backbone), head(x, t, None, backbone, counts=torch.ones(2, 4).bool()))


class PerFrame(nn.Module):
    """Features of each frame from that frame alone."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(8, 24)

    def forward(self, x, t, text, return_features=()):
        tokens = self.map(x.flatten(2))[:, :, None]
        return type("Output", (), {"features": tuple(tokens for _ in return_features)})


@pytest.mark.parametrize("player", ["student", "discriminator"])
def test_a_gan_hands_on_which_frames_count(player):
    seen = []

    class Spy(Linear):
        def forward(self, x_t, t, text, backbone, counts=None):
            seen.append(counts)
            return super().forward(x_t, t, text, backbone)

    given_scene = gan_scene(Spy(), theta=torch.tensor(0.5, dtype=F64, requires_grad=True))
    wanted = given_scene.samples(False).counts
    GAN()(player, given_scene)
    assert seen and all(counts is not None and torch.equal(counts, wanted) for counts in seen)
