"""Specs: inheritance, overrides, and every way to be wrong, each told clearly and all at once."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import toy_spec

from causvid import build, checks, experiment, spec
from causvid.errors import UserError
from causvid.spec import complete, inherited, load, merge

MINIMAL = {"world": {"dataset": "shapes"}, "model": {"name": "dit", "dim": 24, "ffn_dim": 32, "heads": 2, "layers": 1}}


def written(folder, text, name="spec.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_defaults_are_written_out():
    whole = complete(MINIMAL, "x")
    assert whole["loss"]["name"] == "dmd" and whole["loss"]["eps"] == 1e-4
    assert whole["student.input"] == {"name": "data", "include_clean": True, "context": "noisy"}


def test_a_changed_name_replaces_the_component_and_leaks_no_option():
    base = {"mask": {"name": "sink_window", "sink_frames": 2}}
    assert merge(base, {"mask": {"name": "block_causal"}}) == {"mask": {"name": "block_causal"}}
    assert merge(base, {"mask": "block_causal"}) == {"mask": {"name": "block_causal"}}
    assert merge(base, {"mask": "sink_window"}) == base
    assert merge(base, {"mask": {"block_frames": 1}}) == {
        "mask": {"name": "sink_window", "sink_frames": 2, "block_frames": 1}
    }
    assert merge({"loss": "dmd"}, {"loss": {"guidance": 2.0}}) == {"loss": {"name": "dmd", "guidance": 2.0}}


def test_a_base_has_a_base(tmp_path):
    written(tmp_path, "base: tiny/causvid\nseed: 3\n", "a.yaml")
    path = written(tmp_path, f"base: {tmp_path / 'a.yaml'}\nstudent: {{steps: 2}}\n", "b.yaml")
    arm = load(path)
    assert arm["seed"] == 3 and arm["student.steps"] == 2 and arm["model.dim"] == 128
    assert arm.differences() == [("student.steps", load("tiny/causvid")["student.steps"], 2)]


def test_overrides_reach_any_depth():
    arm = load(
        "tiny/causvid",
        ["loss.guidance=3", "student.steps=[1.0, 0.5]", "teacher=causal", "distill.discriminator.taps=1"],
    )
    assert arm["loss.guidance"] == 3.0 and arm["student.steps"] == [1.0, 0.5] and arm["teacher"] == {"name": "causal"}
    assert arm["distill.discriminator"]["taps"] == 1 and arm["distill.discriminator"]["name"] == "feature_head"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["los.name=dmd"], ["unknown key 'los'", "did you mean 'loss'?"]),
        (["student.steps=two"], ["student.steps", "whole number", "'two'"]),
        (["loss=dmdd"], ["unknown loss 'dmdd'", "did you mean 'dmd'?", "accepted: dmd, edits, flow_matching"]),
        (["loss.guidence=2"], ["unknown option 'guidence'", "did you mean 'guidance'?"]),
        (["student.input.context=dirty"], ["'dirty' is not accepted", "noisy, clean"]),
        (["ode_pairs.count=1.5"], ["ode_pairs.count", "whole number"]),
        (["distill.ema=much"], ["distill.ema", "a number"]),
        (["seed=true"], ["seed", "whole number"]),
        (["causal.mask=null"], ["causal.mask", "expected a name of group 'mask'"]),
        (["world=3"], ["world", "a mapping"]),
        (["evaluation.metrics=shapes_truth"], ["evaluation.metrics", "a list"]),
        (["loss={name: sum, of: [dmdd]}"], ["loss.of[0]", "did you mean 'dmd'?"]),
        (["loss={name: sum}"], ["loss.of", "required"]),
        (["steps"], ["key=value"]),
        (["evaluation.samples=0"], ["evaluation.samples", "at least 1"]),
        (["distill.batch=-1"], ["distill.batch", "at least 1"]),
        (["loss=no.such.module:Thing"], ["can't be imported"]),
    ],
)
def test_errors_say_what_where_and_what_is_accepted(overrides, words):
    with pytest.raises(UserError) as error:
        load("tiny/causvid", overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["student.steps=5"], ["no state at t =", "ode_pairs"]),
        (["student.steps=[1.0, 0.7]"], ["no state at t = 0.7000"]),
        (["student.steps=[0.9, 0.5]", "init=teacher"], ["pure noise"]),
        (["model.heads=5"], ["not a multiple of heads"]),
        (["causal.mask={name: sliding_window, window_frames: 2}"], ["window_frames"]),
        (["causal={mask: sink_window, position: window_relative, kernel: sdpa}"], ["'blockwise'"]),
        (["world.codec={name: time_fold, frames: 3}"], ["do not fit"]),
        (["ode_pairs.keep=[5]"], ["does not divide"]),
        (["loss={name: dmd, t_min: 0.9, t_max: 0.1}"], ["t_min"]),
        (["student.steps=4", "student.shift=3.0"], ["no state at t"]),
    ],
)
def test_what_does_not_fit_together_is_told_before_anything_runs(overrides, words):
    with pytest.raises(UserError) as error:
        checks.check(load("tiny/from_scratch", overrides))
    for word in words:
        assert word in str(error.value)


def test_all_errors_are_told_at_once():
    with pytest.raises(UserError) as error:
        load("tiny/causvid", ["los=1", "student.steps=x", "loss=dmdd"])
    assert all(word in str(error.value) for word in ("los", "student.steps", "dmdd"))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1,\n", "3", "base: 7\n", "\tx: 1"])
def test_files_that_are_not_specs(text, tmp_path):
    with pytest.raises(UserError):
        load(written(tmp_path, text))


def test_missing_files_directories_and_circles(tmp_path):
    with pytest.raises(UserError, match="did you mean 'tiny/causvid'"):
        load("tiny/causvd")
    with pytest.raises(UserError):
        load(str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00a: \x80")
    with pytest.raises(UserError):
        load(str(tmp_path / "bytes.yaml"))
    path = tmp_path / "me.yaml"
    path.write_text(f"base: {path}\n")
    with pytest.raises(UserError, match="comes back to itself"):
        load(str(path))


def test_a_component_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "class Fixed:\n    '''Mine.'''\n    players = ('student',)\n    def __init__(self, weight: float = 2.0):\n"
        "        self.weight = weight\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arm = load("tiny/causvid", ["loss={name: 'mine:Fixed', weight: 3}"])
    assert build.construct(arm["loss"]).weight == 3.0
    with pytest.raises(UserError, match="unknown option 'wait'"):
        load("tiny/causvid", ["loss={name: 'mine:Fixed', wait: 3}"])


def mappings(data, path=()):
    yield path
    for key, value in data.items():
        if isinstance(value, dict):
            yield from mappings(value, (*path, key))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_an_unknown_key_anywhere_is_an_error(data):
    plain = copy.deepcopy(inherited(spec.find("tiny/causvid"))[0])
    path = data.draw(st.sampled_from([p for p in mappings(plain) if p != ("sweep",)]))
    node = plain
    for key in path:
        node = node[key]
    node[data.draw(st.text("abcxyz_", min_size=1, max_size=8)) + "_no"] = 1
    with pytest.raises(UserError, match="unknown"):
        complete(plain, "x")


def test_every_shipped_spec_is_right():
    assert len(experiment.check([])) >= 9


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("teacher", set()),
        ("init", set()),
        ("steps", set()),
        ("student_input", set()),
        ("teacher_x_init", {"distill", "evaluation"}),
    ],
)
def test_an_ablation_differs_from_its_base_in_its_sweep_its_budget_and_its_judges_alone(name, budget):
    own, base = inherited(spec.find(f"ablations/{name}"))
    keys = {key for key in own if own.get(key) != (base or {}).get(key)}
    assert keys == {"about", "eval", "sweep"} | budget and own["sweep"]
    for values, arm in experiment.arms_of(f"ablations/{name}", []):
        for path, _, _ in load("tiny/causvid").differences() or arm.differences():
            assert any(path.startswith(key) for key in (*values, *budget, "eval"))


def test_a_sweep_is_checked_whole_before_it_runs(tmp_path):
    path = toy_spec(tmp_path, "sweep: {student.steps: [2, 5]}")
    with pytest.raises(UserError, match="no state at t"):
        experiment.sweep(path, [], tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="no 'sweep:'"):
        experiment.sweep("tiny/causvid", [], tmp_path / "runs")


@pytest.mark.parametrize("change", ["model.freq_dim=-1", "model.layers=-1", "model.dim=0", "model.ffn_dim=-3"])
def test_impossible_sizes_are_told_before_anything_runs(change):
    with pytest.raises(UserError):
        checks.check(load("tiny/from_scratch", [change]))
