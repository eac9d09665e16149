"""Suites that a spec names: sampled by a stage of their own, judged by evaluate, several at once, and over time."""

from __future__ import annotations

import json

import pytest
import torch
from toy import toy_spec

from causvid import experiment, registry
from causvid import spec as specs
from causvid.errors import UserError
from causvid.eval import drift
from causvid.eval.pooling import Judged
from causvid.stages.suites import suites_of


def stage_names(path, *overrides):
    return [node.name for node in experiment.plan(specs.load(path, overrides))]


def test_without_suites_nothing_is_sampled_for_them(tmp_path):
    assert "sample_suites" not in stage_names(toy_spec(tmp_path))
    assert "sample_suites" not in stage_names(toy_spec(tmp_path), "eval=shapes_truth")
    assert stage_names(toy_spec(tmp_path), "eval=vbench_long")[-3:] == ["sample_suites", "evaluate", "report"]


def test_eval_takes_one_or_many_suites_metrics_and_files(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle moves left\na blue square moves up\n")
    one = f"{{name: prompts, file: {prompts}}}"
    spec = specs.load(toy_spec(tmp_path), [f"eval=[vbench, {one}, {one}, vbench_proxies]"])
    assert [suite.name for suite in suites_of(spec)] == ["vbench", "prompts", "prompts#2"]
    assert {bound.group for bound in spec["eval"]} == {"suite", "metric"}
    assert not set(registry.components("suite")) & set(registry.components("metric"))  # a name means one thing


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("vbench_lon", ["unknown suite 'vbench_lon'", "did you mean 'vbench_long'"]),
        ("{name: vbench, per_promt: 2}", ["unknown option 'per_promt'"]),
        ("{name: vbench, per_prompt: 0}", ["must be positive"]),
        ("{name: prompts, file: none.txt}", ["none.txt does not exist"]),
        ("{name: vbench, dimensions: [colour]}", ["unknown dimension 'colour'"]),
        ("{name: vbench, dimensions: [aesthetic_quality]}", ["'aesthetic_quality' can't be judged", "ViT-L-14.pt"]),
    ],
)  # fmt: skip
def test_what_can_not_be_sampled_or_judged_is_told_before_anything_runs(tmp_path, monkeypatch, value, words):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "no weights"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as told:
        experiment.plan(specs.load(toy_spec(tmp_path), [f"eval={value}"]))
    assert all(word in str(told.value) for word in words), str(told.value)


def test_prompts_that_the_world_can_not_read_and_lengths_that_a_student_can_not_make_are_told(tmp_path):
    (tmp_path / "p.txt").write_text("a purple whale sings")
    with pytest.raises(UserError, match="unknown word 'purple'"):
        experiment.plan(specs.load(toy_spec(tmp_path), [f"eval={{name: prompts, file: {tmp_path / 'p.txt'}}}"]))
    few = ["eval=vbench_long", "student.causal=false", "student.sampler=few_step", "student.input.context=noisy"]
    with pytest.raises(UserError, match="bidirectional student makes"):
        experiment.plan(specs.load(toy_spec(tmp_path), few))


def test_judging_options_sample_nothing_anew_and_new_weights_are_judged(tmp_path, monkeypatch):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "weights"))

    def identities(value):
        return {n.name: n.identity for n in experiment.plan(specs.load(toy_spec(tmp_path), [f"eval={value}"]))}

    first, other = identities("vbench_long"), identities("{name: vbench_long, long_compat: upstream}")
    assert first["sample_suites"] == other["sample_suites"] and first["evaluate"] != other["evaluate"]
    assert first["sample_suites"] != identities("{name: vbench_long, seconds: 9}")["sample_suites"]
    path = tmp_path / "weights" / "raft_model" / "models" / "raft-things.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    third = identities("vbench_long")
    assert third["sample_suites"] == first["sample_suites"] and third["evaluate"] != first["evaluate"]


def clips(video, scores, step=2.0):
    return [Judged(video, n, score, 16, step * n) for n, score in enumerate(scores)]


def test_drift_by_hand():
    rows = {"proxy_dynamics": [*clips("a", [8.0, 4.0, 1.0]), *clips("b", [4.0, 4.0, 4.0])],
            "proxy_saturation": [*clips("a", [0.4, 0.5, 0.6]), *clips("b", [0.4, 0.4, 0.4])],
            "temporal_flickering": clips("a", [0.9])}  # fmt: skip
    curves, ends = drift.curves(rows), drift.summary(rows)
    assert [(p["seconds"], p["mean"], p["videos"]) for p in curves["proxy_dynamics"]] == [
        (0, 6, 2),
        (2, 4, 2),
        (4, 2.5, 2),
    ]
    assert "temporal_flickering" not in curves and "temporal_flickering" not in ends  # one clip has no drift
    assert ends["proxy_dynamics"]["change"] == -3.5 and ends["proxy_dynamics"]["collapsed"] == 0.5
    assert ends["proxy_saturation"]["saturated"] == 0.5 and ends["proxy_saturation"]["first"] == pytest.approx(0.4)


@pytest.mark.slow
def test_suites_are_sampled_judged_and_reported(tmp_path):
    """Several suites at once through a whole run; a second run does nothing; the truth is judged over time, too."""
    path = toy_spec(
        tmp_path,
        "eval: [vbench_proxies, {name: vbench_long, per_prompt: 2, limit: 3, seconds: 6, fps: 8}, "
        "{name: vbench, limit: 2}]",
    )
    outcome = experiment.run(path, [], tmp_path / "runs")
    assert {"student.ok", "student.proxy_dynamics", "student.vbench_long.temporal_flickering",
            "student.vbench.proxy_sharpness.low"} <= set(outcome.metrics)  # fmt: skip
    found = json.loads((outcome.folders["evaluate"] / "suites.json").read_text())
    long = found["vbench_long"]
    assert len(long["videos"]["temporal_flickering"]) == 6 and long["problems"] == [] and long["absent"] == []
    assert long["totals"]["total"] is None and long["scores"]["aesthetic_quality"] is None
    assert len(long["over_time"]["temporal_flickering"]) == 4 and "ok" in long["over_time"]
    assert "seeds" in long["protocol"] and long["protocol"]["length"] == "49 frames at 8.0 fps"
    assert len(found["vbench"]["videos"]["temporal_flickering"]) == 10
    clips = sorted(path.name for path in (outcome.folders["sample_suites"] / "vbench_long").glob("*.mp4"))
    assert len(clips) == 6 and clips[0].endswith("-0.mp4")
    again = experiment.run(path, [], tmp_path / "runs")
    assert again.executed == [] and torch.tensor(list(again.metrics.values())).isfinite().all()
