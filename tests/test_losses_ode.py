"""ODE regression, and the teacher's trajectories against the closed form of the ODE for Gaussian data."""

from __future__ import annotations

import pytest
import torch
from closed_form import F64, FixedDraw, GaussianDenoiser, normal, numbers, scene
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from causvid.errors import UserError
from causvid.losses.ode import OdeRegression, gather_states
from causvid.samplers.ode import Euler
from causvid.samplers.unipc import UniPC
from causvid.schedule import state_indices
from causvid.types import DenoiserOutput, Trajectory

TIMES = torch.tensor([1.0, 0.9375, 0.5, 0.0], dtype=F64)
BLOCKS = ((0, 2), (2, 3))


def law(t, mean, std):
    """(mean, standard deviation) of x_t for data N(mean, std^2)."""
    return (1 - t) * mean, ((1 - t) ** 2 * std**2 + t**2) ** 0.5


def flow(noise, t, mean, std):
    """Where the exact ODE has carried x(1) = noise at time t: the quantiles stay."""
    at, deviation = law(t, mean, std)
    return at + deviation * noise


class Jump(nn.Module):
    """From any state of the exact trajectory to its end."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = (nn.Parameter(torch.tensor(value, dtype=F64)) for value in (mean, std))
        self.contexts = []

    def forward(self, x, t, text, *, context=None):
        self.contexts.append(context)
        at, deviation = law(t[..., None, None, None], self.mean, self.std)
        return DenoiserOutput(x, t, self.mean + self.std * (x - at) / deviation, "x0")


def pairs(mean=0.4, std=0.7, rows=2, frames=3):
    noise = normal(rows, frames, 1, 2, 2)
    return Trajectory(torch.stack([flow(noise, float(t), mean, std) for t in TIMES]), TIMES)


def loss_of(student, chosen, trajectory=None, **options):
    draw = FixedDraw(state=torch.tensor(chosen))
    trajectory = trajectory or pairs(rows=len(chosen))
    return OdeRegression(**options)("student", scene(draw, {"student": student}, BLOCKS, trajectory=trajectory))


def test_optimum_is_the_exact_jump():
    chosen = [[0, 1], [2, 0], [1, 3]]
    best, off = Jump(0.4, 0.7), Jump(0.5, 0.8)
    value = loss_of(best, chosen).value
    value.backward()
    assert value.item() < 1e-28
    assert best.mean.grad.abs() < 1e-13 and best.std.grad.abs() < 1e-13
    assert loss_of(off, chosen).value.item() > 1e-3


def test_value_is_the_mean_square_over_counted_frames():
    student, trajectory = Jump(0.0, 1.0), pairs()
    value = loss_of(student, [[0, 3], [3, 2]], trajectory).value.item()
    squares = []
    for row, frames, state in ((0, (0, 1), 0), (1, (2,), 2)):  # the others stand at t = 0
        at, deviation = law(float(TIMES[state]), 0.0, 1.0)
        guess = (trajectory.states[state] - at) / deviation
        squares += [(guess - trajectory.last)[row, frame].pow(2).mean().item() for frame in frames]
    assert value == pytest.approx(sum(squares) / 3, rel=1e-12)


@pytest.mark.parametrize("c", [0.01, 0.3, 10.0])
def test_pseudo_huber_of_each_frame(c):
    """sqrt(d^2 + c^2) - c: d - c far out, d^2 / 2c near by."""
    student, trajectory = Jump(0.1, 0.8), pairs()
    value = loss_of(student, [[0, 1], [1, 2]], trajectory, huber=c).value.item()
    distances = []
    for row, frame, state in ((0, 0, 0), (0, 1, 0), (0, 2, 1), (1, 0, 1), (1, 1, 1), (1, 2, 2)):
        at, deviation = law(float(TIMES[state]), 0.1, 0.8)
        guess = 0.1 + 0.8 * (trajectory.states[state] - at) / deviation
        square = (guess - trajectory.last)[row, frame].pow(2).mean().item()
        distances.append((square + c**2) ** 0.5 - c)
    assert value == pytest.approx(sum(distances) / 6, rel=1e-9)


def test_passed_through_blocks_send_no_gradient():
    output = normal(2, 3, 1, 2, 2, seed=5).requires_grad_()
    loss_of(lambda x, t, text, context: DenoiserOutput(x, t, output, "x0"), [[0, 3], [3, 2]]).value.backward()
    reached = output.grad.flatten(2).abs().sum(2) > 0
    assert reached.tolist() == [[True, True, False], [False, False, True]]


def test_nothing_counts_where_all_blocks_are_clean():
    student = Jump(0.0, 1.0)
    value = loss_of(student, [[3, 3]]).value
    value.backward()
    assert value.item() == 0
    assert student.mean.grad == 0


@pytest.mark.parametrize(("include_clean", "choices"), [(True, 4), (False, 3)])
def test_clean_states_are_drawn_or_not(include_clean, choices):
    draw = FixedDraw(state=torch.tensor([[0, 2]]))
    given_scene = scene(draw, {"student": Jump(0.4, 0.7)}, BLOCKS, trajectory=pairs(rows=1))
    OdeRegression(include_clean=include_clean)("student", given_scene)
    assert draw.highs == {"state": choices}


def test_clean_context_is_the_end_of_the_trajectory():
    student, trajectory = Jump(0.4, 0.7), pairs()
    loss_of(student, [[0, 1], [1, 2]], trajectory)
    loss_of(student, [[0, 1], [1, 2]], trajectory, context="clean")
    assert student.contexts[0] is None
    assert torch.equal(student.contexts[1], trajectory.last)


def test_gathering_picks_each_frame_from_its_state():
    trajectory, chosen = pairs(), torch.tensor([[0, 3, 1], [2, 2, 0]])
    x, t = gather_states(trajectory, chosen)
    for row in range(2):
        for frame in range(3):
            state = int(chosen[row, frame])
            assert torch.equal(x[row, frame], trajectory.states[state, row, frame])
            assert t[row, frame] == TIMES[state]


def test_wanted_times_are_found():
    assert state_indices(TIMES, [1.0, 0.5, 0.0]) == [0, 2, 3]
    assert state_indices(TIMES, [0.93750001, 0.0]) == [1, 3]  # rounding is forgiven


@pytest.mark.parametrize("time", [0.52, 0.9, 0.001])
def test_a_neighbouring_time_is_refused(time):
    with pytest.raises(UserError, match=rf"no state at t = {time:.4f}.*1\.0000, 0\.9375, 0\.5000, 0\.0000"):
        state_indices(TIMES, [1.0, time, 0.0])


@pytest.mark.parametrize("times", [[1.0, 0.5, 0.0], [1.0, 0.9, 0.5, 0.1], [1.0, 0.5, 0.9, 0.0]])
def test_states_without_their_times_are_refused(times):
    wrong = Trajectory(pairs().states, torch.tensor(times))
    with pytest.raises(UserError, match="4 states need a time each, descending to 0"):
        loss_of(Jump(0.4, 0.7), [[0, 1], [1, 2]], wrong)


def test_needs_trajectories():
    with pytest.raises(ValueError, match="needs trajectories"):
        OdeRegression()("student", scene(None, {}, BLOCKS))


def euler_by_product(noise, times, mean, std):
    """Euler's steps in closed form: v = d mean/dt + (variance'/2 / variance) (x - mean), and the mean is a line."""
    factor = 1.0
    for now, after in zip(times[:-1], times[1:], strict=True):
        factor *= 1 + (after - now) * (now - (1 - now) * std**2) / ((1 - now) ** 2 * std**2 + now**2)
    return (1 - times[-1]) * mean + factor * noise


def solve(steps, mean=0.4, std=0.7, shift=3.0, kind="velocity", guidance=1.0, free=0.0, keep=None):
    solver = Euler(steps, shift, guidance)
    network, noise = GaussianDenoiser(std, 0.0, kind), normal(2, 3, 1, 2, 2)
    return solver(network, noise, numbers(mean, mean), numbers(free, free), keep), solver.times


@settings(deadline=None, max_examples=30)
@given(
    steps=st.integers(1, 20), mean=st.floats(-2, 2), std=st.floats(0.2, 2), shift=st.floats(0.5, 8),
    kind=st.sampled_from(["velocity", "x0"]),
)  # fmt: skip
def test_euler_is_the_product_of_its_steps(steps, mean, std, shift, kind):
    out, times = solve(steps, mean, std, shift, kind)
    expected = euler_by_product(normal(2, 3, 1, 2, 2), times.tolist(), mean, std)
    torch.testing.assert_close(out.last, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("guidance", "free"), [(4.5, -0.3), (1.0, -0.3), (0.0, 0.8)])
def test_guidance_moves_the_mean_linearly(guidance, free):
    out, times = solve(12, guidance=guidance, free=free)
    moved = free + guidance * (0.4 - free)  # of equal variances, only the means differ
    expected = euler_by_product(normal(2, 3, 1, 2, 2), times.tolist(), moved, 0.7)
    torch.testing.assert_close(out.last, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("interval", [(0.6, 1.0), (0.0, 0.6), (0.0, 1.0), (0.97, 0.98)])
def test_guidance_in_an_interval_moves_the_mean_there_alone(interval):
    """Two legs, each of them the product of its steps: where it is guided, and where it is not."""
    solver, network, noise = Euler(8, 3.0, 2.5, interval), GaussianDenoiser(0.7, 0.0, "velocity"), normal(2, 3, 1, 2, 2)
    x, times = noise, solver.times.tolist()
    for now, after in zip(times[:-1], times[1:], strict=True):
        mean = -0.3 + 2.5 * 0.7 if interval[0] <= now <= interval[1] else 0.4
        x = euler_by_product(x - (1 - now) * mean, [now, after], mean, 0.7)
    out = solver(network, noise, numbers(0.4, 0.4), numbers(-0.3, -0.3))
    torch.testing.assert_close(out.last, x, rtol=0, atol=1e-10)
    assert sum(len(call.x) for call in network.calls) == 2 * solver.evaluations  # two clips


@pytest.mark.parametrize("sampler", [Euler, UniPC])
@pytest.mark.parametrize("interval", [(0.5,), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.5)])
def test_a_samplers_interval_that_is_none_is_refused(sampler, interval):
    with pytest.raises(ValueError, match="guidance_interval needs 0 <= lowest <= highest <= 1"):
        sampler(4, guidance_interval=interval)


def test_many_steps_approach_the_exact_solution():
    exact = flow(normal(2, 3, 1, 2, 2), 0.0, 0.4, 0.7)
    coarse, fine = ((solve(n)[0].last - exact).abs().max().item() for n in (200, 400))
    assert fine < 0.01
    assert fine / coarse == pytest.approx(0.5, abs=0.02)  # first order


def test_kept_states_are_those_of_the_whole_trajectory():
    whole, times = solve(8, keep=range(9))
    kept, _ = solve(8, keep=[4, 0, 8])
    assert torch.equal(kept.times, times[[0, 4, 8]])
    assert torch.equal(kept.states, whole.states[[0, 4, 8]])
    assert torch.equal(whole.states[0], normal(2, 3, 1, 2, 2))
    exact = torch.stack([flow(whole.states[0], float(t), 0.4, 0.7) for t in times])
    assert (solve(400, keep=range(0, 401, 50))[0].states - exact).abs().max() < 0.01


@pytest.mark.parametrize(("guidance", "evaluations"), [(1.0, 6), (3.0, 12)])
def test_evaluations_are_counted(guidance, evaluations):
    assert Euler(6, guidance=guidance).evaluations == evaluations
    assert Euler(6, 1.0, guidance, (0.5, 1.0)).evaluations == (6 if guidance == 1.0 else 10)  # 1, .83, .67 and .5


def test_explicit_times():
    assert Euler([1.0, 0.757, 0.522]).times.tolist() == [1.0, 0.757, 0.522, 0.0]
