"""Whatever a person writes into a spec: it is taken as it stands, or there is one clear error; never a traceback."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import toy_spec

from causvid import build, checks, experiment, registry, spec
from causvid.errors import UserError
from causvid.spec import complete, inherited, load
from causvid.validate import Bound

# The clean context of tiny/causvid is for causal students alone.
NOISY = ["student.input.context=noisy", "ode_init.loss.context=noisy"]


def written(folder, content, name="spec.yaml"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refused(*arguments):
    with pytest.raises(UserError) as error:
        load(*arguments)
    return str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00a", b"\x00", b"\x80abc: 1", "a: &a [*a]\n", "a: &a {b: *a}\n", "about: ${about}\n", "about: ${x",
        "about: ${nothing}\n", "seed: 1\nseed: 2\n", "? [1, 2]\n: 3\n", "1: 2\n", "null: 2\n", "1.5: 1\n",
        "about: 2026-01-01\n", "about: !!python/object:os.system x\n", "about: !!binary aGk=\n", "--- {}\n--- {}\n",
        "base: [1]\n", "base: ''\n", "base: {a: 1}\n", "base: /\n", "word", "'1'", "{}: 1", "[" * 3000, "{" * 3000,
    ],
)  # fmt: skip
def test_any_content_of_a_file_is_a_spec_or_one_error(content, tmp_path):
    assert len(refused(written(tmp_path, content))) < 4000


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=40), st.text("ab:{}[]-&*!'\"${}\n 01#|>?,%", max_size=40)))
def test_random_bytes_are_no_spec(content, tmp_path):
    refused(written(tmp_path, content))


@pytest.mark.parametrize("name", ["", ".", "/", "tiny", "tiny/", "no/such", "tiny/causvid/x", "a" * 300, "\n"])
def test_names_of_nothing(name):
    refused(name)


JUNK = [None, -1, 1.5, float("nan"), "x", "", True, [], [None], ["x"], {}, {"x": 1}, {"name": 3}, {"name": None}, [[]]]


def leaves(data, path=()):
    for key, value in data.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def plain(data):
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    return [plain(item) for item in data] if isinstance(data, list) else data


WHOLE = plain(load("tiny/from_scratch").data)


def put(path, value):
    data = copy.deepcopy(WHOLE)
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return data


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_junk_anywhere_is_taken_or_refused_by_its_path(data):
    path = data.draw(st.sampled_from(list(leaves(WHOLE))))
    value = data.draw(st.sampled_from(JUNK))
    try:
        complete(put(path, value), "x")
    except UserError as error:
        assert path[0] in str(error) or path[-1] in str(error)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_taken_builds_or_is_refused(data):
    path = data.draw(st.sampled_from(list(leaves(WHOLE))))
    value = data.draw(st.sampled_from([0, 1, -1, 7, 0.5, 1e9, "x", "sum", "euler", "few_step", [], [1], [2, 1]]))
    with contextlib.suppress(UserError):
        checks.check(complete(put(path, value), "x"))


def test_a_written_out_spec_means_the_same():
    again = complete(WHOLE, "x").data
    assert again == load("tiny/from_scratch").data
    assert isinstance(again["loss"], Bound) and again["loss"].group == "loss"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3"])
def test_numbers_are_read_in_overrides_as_in_files(text, tmp_path):
    path = written(tmp_path, f"base: tiny/from_scratch\ndistill: {{optimizer: {{lr: {text}}}}}\n")
    assert load(path)["distill.optimizer.lr"] == 1e-3
    assert load("tiny/from_scratch", [f"distill.optimizer.lr={text}"])["distill.optimizer.lr"] == 1e-3


def test_small_numbers_survive_a_sweep(tmp_path):
    from causvid import experiment

    path = toy_spec(tmp_path, "sweep: {distill.optimizer.lr: [0.00001, 3.0e-7]}")
    assert [arm["distill.optimizer.lr"] for _, arm in experiment.arms_of(path, [])] == [1e-5, 3e-7]


@pytest.mark.parametrize(
    "override", ["", "=", "=1", "seed", "seed=[", "seed={", "about=${x}", "seed=&a [*a]", "a..b=1"]
)
def test_strange_overrides(override):
    refused("tiny/from_scratch", [override])


def test_a_text_may_hold_the_sign_of_an_override():
    assert load("tiny/from_scratch", ["about=x=1"])["about"] == "x=1"


@pytest.mark.parametrize(
    "override",
    [
        "teacher_training.iterations=-1", "distill.iterations=0", "ode_init.batch=0", "ode_pairs.count=0",
        "ode_pairs.steps=0", "ode_pairs.keep=[0]", "evaluation.teacher_steps=[4, 0]", "evaluation.rollout_factor=0",
        "distill.ema=1.5", "distill.ema=-0.1", "distill.gradient_clip=-1", "distill.warmup=-1", "runtime.threads=-1",
        "distill.critic_updates=-1", "student.shift=0", "distill.gradient_clip=.nan", "student.shift=.nan",
        "runtime.checkpoint_seconds=-1",
    ],
)  # fmt: skip
def test_numbers_out_of_range(override):
    assert override.split("=")[0] in refused("tiny/from_scratch", [override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["student.steps=0"], "student.steps"),
        (["student.steps=[]"], "student.steps"),
        (["student.sampler=few_step"], "does not stream"),
        (["student.sampler=euler", "student.causal=false", *NOISY], "student.sampler"),
        (["teacher_sampling=rollout"], "times"),
        (["teacher_sampling.steps=[1.0, 0.5]"], "teacher_sampling.steps"),
        (["evaluation.samples=3"], "rollout_samples"),
        (["ode_pairs.keep=[]"], "no state at t"),
        (["ode_init.loss=dmd"], "ode_init.loss"),
        (["model.patch=[5, 5]"], "height and width must be multiples of 5"),
        (["model.freq_dim=15"], "freq_dim must be even"),
        (["causal.kernel=flex"], "no backward on the CPU"),
        (["ode_init.loss=flow_matching"], "'flow_matching' needs data, and this stage has edits and trajectory"),
        (["loss=ode_regression"], "'ode_regression' needs trajectory, and this stage has data and edits and samples"),
        (["loss={name: sum, of: [dmd, ode_regression]}"], "'sum' needs trajectory"),
        (["student.causal=false", *NOISY], "'rollout' streams, and student.causal is false"),
        (
            ["student.causal=false", "student.sampler=few_step", *NOISY, "student.input=self_rollout"],
            "'self_rollout' streams, and student.causal is false",
        ),
        (
            [
                "student.causal=false",
                "ode_init.loss.context=noisy",
                "student.sampler=few_step",
                "student.input={name: mixed, of: [data, self_rollout]}",
            ],
            "'mixed' streams, and student.causal is false",
        ),
        (
            ["student.input={name: mixed, of: [data, data]}", "distill.batch=1"],
            "1 samples are too few for 2 student inputs in 1 process,",
        ),
        (
            ["student.input={name: mixed, of: [data, data]}", "distill.batch=2", "runtime.gpus=2"],
            "2 samples are too few for 2 student inputs in 2 processes,",
        ),
        (["student.input={name: self_rollout, given_blocks: 4}"], "must be below the 4 blocks of a clip, got 4"),
        (
            ["student.input={name: mixed, of: [data, {name: self_rollout, given_blocks: 5}]}"],
            "must be below the 4 blocks of a clip, got 5",
        ),
        (["student.input={name: mixed, of: []}"], "at least one student input"),
        (["student.input={name: mixed, of: [data, {name: mixed, of: [data]}]}"], "can't hold a mixture"),
        (["world.text_encoder.length=3"], "takes 3"),
        (["loss={name: gan, r1: 1.0}", "distill.activation_checkpointing=true"], "r1 penalty"),
        (["teacher_training.start=nonsense"], "teacher_training.start: unknown teacher 'nonsense'"),
        (["teacher_training.weights=shipped", "teacher_training.start=nonsense"], "teacher_training.start"),
        (["teacher_training.iterations=0"], "teacher_training.iterations: must be at least 1"),
        (["teacher_training.loss.context=clean"], "teacher_training.loss.context"),
        (
            ["student={causal: false, sampler: few_step, input: {name: data, context: clean}}", "init=teacher"],
            "student.input.context",
        ),
        (
            ["student={causal: false, sampler: few_step}", *NOISY, "ode_init.loss.context=clean"],
            "ode_init.loss.context",
        ),
        (["teacher_training.loss=gan"], "teacher_training.loss"),
        (["distill.optimizer={name: adamw, betas: [0.9]}"], "optimizer.betas: expected 2 numbers, got 1"),
        (["distill.critic_optimizer={name: adamw, betas: []}"], "critic_optimizer.betas: expected 2 numbers, got 0"),
        (["ode_init.optimizer.lr=-1"], "ode_init.optimizer.lr: must be at least 0, got -1"),
    ],
)
def test_choices_that_cannot_work_are_told_before_anything_runs(overrides, words):
    with pytest.raises(UserError, match=words):
        checks.check(load("tiny/from_scratch", overrides))


@pytest.mark.parametrize("taps", [1, 2])
def test_choices_that_can_work_pass(taps):
    critic = "distill.critic_optimizer=adamw"
    for overrides in (
        ["loss={name: sum, of: [dmd, {name: gan, r1: 1.0}]}", f"distill.discriminator.taps={taps}", critic],
        ["teacher=causal", "teacher_training.loss.context=clean", "causal.kernel=sdpa"],
        ["student={causal: false, sampler: few_step, input: backward_simulation}", "init=teacher"],
    ):
        checks.check(load("tiny/from_scratch", overrides))


@pytest.mark.parametrize("causal", [True, False])
def test_a_bidirectional_student_sees_everything_whatever_its_teacher_sees(causal):
    arm = load("tiny/from_scratch", ["teacher=causal", f"student.causal={causal}".lower()])
    assert build.student_rule(arm).causal is causal and build.teacher_rule(arm).causal


def test_a_self_rollout_commits_when_the_sampler_does():
    arm = load("tiny/from_scratch", ["student.input=self_rollout", "student.sampler.context_t=0.1"])
    assert build.student_input(arm).context_t == 0.1
    assert "accepted: exit_step" in refused("tiny/from_scratch", ["student.input={name: self_rollout, context_t: 0}"])
    mixed = load(
        "tiny/from_scratch", ["student.input={name: mixed, of: [data, self_rollout]}", "student.sampler.context_t=0.1"]
    )
    assert build.student_input(mixed).of[1].context_t == 0.1
    said = refused("tiny/from_scratch", ["student.input={name: mixed, of: [data, {name: self_rollout, given: 1}]}"])
    assert "student.input.of[1].self_rollout: unknown option 'given'" in said
    said = refused("tiny/from_scratch", ["student.input={name: mixed, of: data}"])
    assert "student.input.of: expected a list of student_input components, got 'data'" in said


def test_a_sums_flow_matching_has_the_times_of_the_kind_of_teacher():
    for teacher in ("bidirectional", "causal"):
        arm = load(
            "tiny/from_scratch", [f"teacher={teacher}", "teacher_training.loss={name: sum, of: [flow_matching]}"]
        )
        times = build.construct(arm["teacher"]).times
        assert build.construct(arm["teacher_training.loss"], times=times).of[0].times == times
    assert times == "per_block"


def test_another_cache_than_in_training_is_a_mismatch_that_is_named():
    def differs(*overrides):
        return build.train_stream_mismatch(load("tiny/causvid", list(overrides)), 12)

    assert differs("student.cache=trained") == "" and differs("student.cache=window") == ""  # two ways to write it
    sink = differs()
    assert "trained under SlidingWindow" in sink and "streams under SinkWindow" in sink and "WindowRelative" in sink
    assert differs("student.causal=false", "student.sampler=few_step") == ""
    _, lines = experiment.explained("tiny/causvid", ["student.cache=full"], Path("nowhere"))
    assert any(line.startswith("train_stream_mismatch: trained under SlidingWindow") for line in lines)


def test_a_stream_of_the_tiny_world_sees_in_a_clips_length_what_training_showed_and_never_more_frames():
    arm = load("tiny/causvid")
    mask, cache = build.causal_rule(arm), build.stream_cache(arm["student.cache"], build.causal_rule(arm), 12)
    frame = torch.arange(120)
    seen, trained = (rule.sees(frame[:, None], frame[None]) for rule in (cache.rule, mask))
    assert torch.equal(seen[:12, :12], trained[:12, :12])
    for row in seen[12:]:
        visible = frame[row]
        assert len(visible) == 12 and visible[:3].tolist() == [0, 1, 2]  # the first block, and a window of nine frames
        assert cache.position.place(visible, visible).tolist() == list(range(12))


def test_a_cache_that_can_not_be_is_refused_before_anything_runs():
    with pytest.raises(UserError, match="cache 'window'"):
        checks.check(load("tiny/causvid", ["student.cache={name: window, window_frames: 2}"]))
    assert "accepted" in refused("tiny/causvid", ["student.cache=ring"])
    several = ["student.causal=false", "student.sampler=few_step", *NOISY, "student.input=backward_simulation"]
    checks.check(load("tiny/causvid", [*several, "init=teacher"]))  # a cache of what does not stream says nothing


class Slow:
    """A many-step sampler of a user's own, on a grid of its own."""

    def __init__(self, steps: int = 4):
        self.times = torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 2


def test_a_users_sampler_of_the_teacher_is_the_one_that_is_used():
    arm = load("tiny/from_scratch", [f"teacher_sampling={{name: '{__name__}:Slow', steps: 8}}", "ode_pairs.keep=[2]"])
    assert isinstance(build.teacher_sampler(arm), Slow) and len(build.teacher_sampler(arm).times) == 9
    assert isinstance(build.teacher_sampler(arm, 3), Slow) and len(build.teacher_sampler(arm, 3).times) == 4
    assert build.stored_times(arm).tolist() == pytest.approx([1.0, 0.25, 0.0])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.dim=0", "model.dim: must be at least 1 and at most 65536, got 0"),
        ("model.patch=[16]", "model.patch: expected 2 numbers, got 1"),
        ("model.dim=99999999999999999999", "model.dim: expected a whole number"),
        ("loss.guidance=.inf", "loss.guidance: expected a number"),
        ("loss.t_min=1.5", "loss.t_min: must be at least 0 and at most 1, got 1.5"),
        ("student.steps=20000", "student.steps: must be at least 0 and at most 10000"),
        ("loss=no.such_module:Loss", "is its folder on PYTHONPATH"),
    ],
)
def test_what_is_out_of_bounds_is_told_with_its_bounds(override, words):
    with pytest.raises(UserError, match=re.escape(words)):
        load("tiny/from_scratch", [override])


def test_a_component_of_another_name_takes_over_no_option_of_the_default(tmp_path):
    (tmp_path / "base.yaml").write_text("base: tiny/causvid\nstudent: {sampler: {context_t: 0.1}}\n")
    (tmp_path / "arm.yaml").write_text("base: base.yaml\nstudent: {sampler: few_step}\n")
    assert load(str(tmp_path / "base.yaml"))["student.sampler"] == {
        "name": "rollout",
        "context_t": 0.1,
        "window_blocks": 1,
    }
    assert load(str(tmp_path / "arm.yaml"))["student.sampler"] == {"name": "few_step"}


def test_options_alone_change_the_default_component():
    arm = load("tiny/from_scratch", ["student.sampler.context_t=0.1", "ode_init.loss.context=clean"])
    assert (
        arm["student.sampler"] == {"name": "rollout", "context_t": 0.1, "window_blocks": 1}
        and arm["ode_init.loss.context"] == "clean"
    )


def test_a_section_in_part_keeps_the_defaults_of_the_whole():
    minimal = {"world": {"dataset": "shapes"}, "model": WHOLE["model"]}
    whole, part = (
        complete(minimal, "x"),
        complete({**minimal, "ode_init": {"batch": 3}, "ode_pairs": {"batch": 3}}, "x"),
    )
    assert part["ode_init"] == {**whole["ode_init"], "batch": 3}
    assert part["ode_pairs"] == {**whole["ode_pairs"], "batch": 3}


def test_a_base_may_stand_beside_its_spec(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    written(tmp_path, "base: tiny/from_scratch\nseed: 3\n", "a.yaml")
    path = written(tmp_path / "sub", "base: ../a.yaml\n", "b.yaml")
    monkeypatch.chdir("/")
    assert load(path)["seed"] == 3


def test_bases_in_a_circle_of_three(tmp_path, monkeypatch):
    for name, base in [("a", "b"), ("b", "c"), ("c", "a")]:
        written(tmp_path, f"base: ./{base}.yaml\n", f"{name}.yaml")
    monkeypatch.chdir(tmp_path)
    assert "comes back to itself" in refused("a.yaml")


def test_a_base_does_not_pass_on_its_sweep(tmp_path):
    path = written(tmp_path, "base: ablations/steps\n")
    assert load(path)["sweep"] == {} and load("ablations/steps")["sweep"] != {}


@pytest.mark.parametrize(
    "name",
    [":", ":x", "x:", "..x:y", "os:nothing", "os:sep", "math:pi", "broken_module:Thing", "a b:c", "json.:x", "::"],
)
def test_components_that_cannot_be_imported(name, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = refused("tiny/from_scratch", [f"loss='{name}'"])
    assert "loss" in message and "can't be imported" in message


def test_a_component_of_a_users_package_with_any_signature(tmp_path, monkeypatch):
    (tmp_path / "their_pkg").mkdir()
    (tmp_path / "their_pkg" / "__init__.py").write_text("")
    (tmp_path / "their_pkg" / "parts.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    n: int = 1\n    players = ('student',)\n"
        "class B:\n    players = ('student',)\n"
        "def c(*args, weight=1, **options):\n    return weight\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load("tiny/from_scratch", ["loss={name: 'their_pkg.parts:A', n: 3}"])["loss.n"] == 3
    assert load("tiny/from_scratch", ["loss='their_pkg.parts:B'"])["loss"] == {"name": "their_pkg.parts:B"}
    assert build.construct(load("tiny/from_scratch", ["loss={name: 'their_pkg.parts:c', weight: 2}"])["loss"]) == 2
    assert "loss.n" in refused("tiny/from_scratch", ["loss={name: 'their_pkg.parts:A', n: x}"])
    sys.modules.pop("their_pkg.parts", None)


def test_groups_refuse_what_is_taken_or_unknown():
    with pytest.raises(registry.UnknownName, match="did you mean 'loss'"):
        registry.register("los", "x")
    with pytest.raises(registry.UnknownName, match="groups:"):
        registry.components("nothing")
    registry.components("loss")
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("loss", "dmd")(lambda: None)
    for group in registry.GROUPS:
        for component in registry.components(group).values():
            assert component.summary.endswith((".", "?")) and ":" in component.where


def test_every_default_of_every_shipped_component_is_valid():
    folder = spec.experiments_folder()
    for path in folder.rglob("*.yaml"):
        data, _ = inherited(path)
        complete(data, path.stem)
