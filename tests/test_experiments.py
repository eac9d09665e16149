"""The shipped experiments and teachers belong together."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from causvid import build, checks, experiment, schedule, spec, weights
from causvid.errors import UserError
from causvid.eval.shapes_truth import ShapesTruth
from causvid.stages.sample import SPLIT, from_bytes, held_out, student_with

NAMES = sorted(
    str(path.relative_to(spec.experiments_folder()).with_suffix(""))
    for path in spec.experiments_folder().rglob("*.yaml")
)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_spec_says_what_it_is_for_and_fits(name):
    arm = spec.load(name)
    assert arm["about"].endswith(".") and experiment.check([name]) == [name]


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_a_shipped_teacher_is_small_and_the_one_of_its_record_and_denoises_clips_of_its_world(kind):
    arm = spec.load("tiny/causvid", [f"teacher={kind}"])
    path, world = build.shipped_teacher(arm), build.World(arm)
    assert path.stat().st_size <= 8_000_000
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["sha256"] == weights.digest(path) and record["spec"] in NAMES
    teacher = build.load_network(arm, world, build.teacher_rule(arm), path)
    x0, text, _ = world.batch(range(8), "test")
    t = torch.full(x0.shape[:2], 0.1)
    noisy = schedule.add_noise(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), t)
    error = (teacher(noisy, t, text).x0 - x0).pow(2).mean().item()
    assert -10 * math.log10(error / 4) > 34  # dB; what a world of other borders gets is less


@pytest.mark.slow
def test_the_tiny_world_is_hard_in_both_ways_that_the_method_is_about():
    """32 held-out pairs: a teacher draws them; in 4 steps it loses sharpness, its weights run causally the caption."""
    arm = spec.load("tiny/causvid")
    path, world, judge = build.shipped_teacher(arm), build.World(arm), ShapesTruth()
    teacher = build.load_network(arm, world, build.teacher_rule(arm), path)
    untrained = student_with(arm, world, build.load_network(arm, world, build.student_rule(arm), path))

    def scores(clips):
        videos = from_bytes(held_out(world, range(32), clips))
        found = judge(videos, world.prompts(range(32), SPLIT)[0])
        return [found[name].float().mean().item() for name in ("ok", "contrast")]

    def by_teacher(steps):
        sampler = build.teacher_sampler(arm, steps)
        return lambda text, free, draw: sampler(teacher, draw.normal("noise", *world.latent_shape), text, free).last

    (ok, contrast), (_, cut) = scores(by_teacher(50)), scores(by_teacher(4))
    assert ok >= 0.95 and cut <= contrast - 0.10
    assert scores(lambda text, free, draw: untrained(world.latent_shape, text, draw))[0] <= ok / 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.heads=8"], "model.heads is 8, the teacher's 4"),
        (["model.theta=10000"], "model.theta is 10000.0, the teacher's 20.0"),
        (["model.prediction=velocity", "until=teacher"], "model.prediction is velocity, the teacher's x0"),
        (["world.dataset.frames=15"], "world.dataset.frames is 15, the teacher's 12"),
        (["teacher=causal", "causal.mask.block_frames=2"], "causal.mask.block_frames is 2, the teacher's 3"),
    ],
)
def test_shipped_weights_are_refused_by_a_spec_that_they_were_not_trained_for(overrides, words):
    """Though every shape fits."""
    with pytest.raises(UserError, match=words):
        checks.check(spec.load("tiny/causvid", overrides))


def test_a_spec_that_no_shipped_teacher_fits_is_told_what_parts_it_from_the_nearest():
    with pytest.raises(UserError) as error:
        checks.check(spec.load("tiny/causvid", ["model.heads=8", "world.dataset.speed=[1, 2]"]))
    assert "world.dataset.speed is [1.0, 2.0], the teacher's [1.5, 2.5]; model.heads is 8, the teacher's 4." in str(
        error.value
    )
    with pytest.raises(
        UserError, match=r"no trained 'bidirectional' teacher ships for world 'store' \(looked at .*shapes"
    ):
        build.shipped_teacher(spec.load("tiny/clips"))


def test_of_two_worlds_of_one_dataset_each_has_the_teacher_whose_record_agrees(tmp_path, monkeypatch):
    teachers = tmp_path / "experiments" / "teachers"
    shutil.copytree(spec.experiments_folder() / "teachers" / "shapes", teachers / "shapes")
    shutil.copytree(teachers / "shapes", teachers / "a_slow_one")
    record = teachers / "a_slow_one" / "bidirectional.json"
    made = json.loads(record.read_text())
    made["values"]["world"]["dataset"]["speed"] = [0.5, 1.0]
    record.write_text(json.dumps(made))
    monkeypatch.setattr(build, "experiments_folder", lambda: tmp_path / "experiments")
    for changes, folder in (([], "shapes"), (["world.dataset.speed=[0.5, 1.0]"], "a_slow_one")):
        assert build.shipped_teacher(spec.load("tiny/causvid", changes)).parent.name == folder


@pytest.mark.parametrize("override", ["causal.mask.block_frames=2", "causal.kernel=sdpa", "seed=3"])
def test_shipped_weights_do_not_mind_what_they_do_not_depend_on(override):
    checks.check(spec.load("tiny/causvid", [override]))


@pytest.mark.parametrize("content", [None, "{", "{}", '{"values": 3}', '{"values": {"world": {}, "model": "dit"}}'])
def test_a_shipped_teacher_without_a_whole_record_is_refused(content, tmp_path, monkeypatch):
    shutil.copytree(spec.experiments_folder(), tmp_path / "experiments")
    record = tmp_path / "experiments" / "teachers" / "shapes" / "bidirectional.json"
    assert set(json.loads(record.read_text())["values"]) >= {"world", "model"}
    record.unlink() if content is None else record.write_text(content)
    monkeypatch.setattr(build, "experiments_folder", lambda: tmp_path / "experiments")
    with pytest.raises(UserError, match="does not say what it was trained for"):
        checks.check(spec.load("tiny/causvid"))
