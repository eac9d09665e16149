"""Nothing in a training step is tied to the CPU: losses, inputs and networks on another device, that of no numbers.

Its tensors refuse to be mixed with the CPU's, so a number that is made on the wrong device is found here without an
accelerator.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from toy import toy_spec

from causvid import build, checks, spec, world
from causvid.errors import UserError
from causvid.randomness import Draw
from causvid.samplers.ode import Euler
from causvid.types import Edits, Scene, Text, Trajectory
from causvid.validate import Bound

DEVICE = torch.device("meta")


def scene(arm, nets, trajectory=None):
    """A step's scene with everything on the device."""
    world_shape = (6, 6, 32, 32)
    draw = Draw(0, "device", 0, [0, 1], DEVICE)
    text = Text(torch.zeros(2, 5, 32, device=DEVICE))
    data = draw.normal("data", *world_shape)
    blocks = tuple(build.student_rule(arm).blocks(world_shape[0]))
    return Scene(draw, text, text, nets, blocks, data=data, trajectory=trajectory)


@pytest.mark.parametrize(
    "student_input",
    ["data", "backward_simulation", "self_rollout", "{name: mixed, of: [data, self_rollout]}"],
)
def test_a_step_of_distillation_stays_on_its_device(student_input, tmp_path):
    arm = spec.load(toy_spec(tmp_path), [f"student.input={student_input}"])
    world = build.World(arm)
    roles = {"student": build.student_rule(arm), "teacher": build.teacher_rule(arm)}
    roles["fake_score"] = roles["teacher"]
    nets = {name: build.network(arm, world, rule).to(DEVICE) for name, rule in roles.items()}
    loss = build.construct(arm["loss"])
    for player in loss.players:
        given = scene(arm, nets)
        made = cache(partial(build.student_input(arm), given, build.student_times(arm)))
        output = loss(player, Scene(**{**vars(given), "generate": made}))
        assert output.value.device.type == DEVICE.type
        output.value.backward()
        assert all(p.grad is None or p.grad.device.type == DEVICE.type for p in nets[player].parameters())


def test_regression_and_the_teachers_sampler_stay_on_their_device(tmp_path):
    arm = spec.load(toy_spec(tmp_path))
    world = build.World(arm)
    model = build.network(arm, world, build.student_rule(arm)).to(DEVICE)
    states = torch.zeros(3, 2, 6, 6, 32, 32, device=DEVICE)
    given = scene(arm, {"student": model}, Trajectory(states, torch.tensor([1.0, 0.5, 0.0])))
    build.construct(arm["ode_init.loss"])("student", given).value.backward()
    text, clip = given.text, torch.zeros(2, 6, 6, 32, 32, device=DEVICE)
    edits = Edits(clip, clip, text, text, torch.zeros(2, dtype=torch.long, device=DEVICE))
    build.construct(Bound("loss", {"name": "edits"}))("student", replace(given, edit=lambda: edits)).value.backward()
    end = Euler(2, 5.0, 2.0)(model, given.data, given.text, given.unconditional).last
    assert end.device.type == DEVICE.type


def test_a_device_that_is_not_here_is_told(tmp_path):
    arm = spec.load(toy_spec(tmp_path), ["runtime.device=cuda:7"])
    with pytest.raises(UserError, match="runtime.device: there is no 'cuda:7' here"):
        build.World(arm)
    assert build.device(spec.load(toy_spec(tmp_path), ["runtime.device=auto"])).type in ("cpu", "cuda", "mps")


def test_what_a_kernel_can_not_do_is_told_for_the_device_of_the_run_and_no_other(tmp_path, monkeypatch):
    arm = spec.load(toy_spec(tmp_path), ["causal.kernel=flex"])
    with pytest.raises(UserError, match="no backward on the CPU"):
        checks.check(arm)
    monkeypatch.setattr(world, "device", lambda spec: DEVICE)
    checks.check(arm)
    sinks = "causal.mask={name: sink_window, block_frames: 3, window_frames: 6}"
    relative = spec.load(toy_spec(tmp_path), ["causal.kernel=flex", "causal.position=window_relative", sinks])
    with pytest.raises(UserError, match="use kernel 'blockwise'"):
        checks.check(relative)
