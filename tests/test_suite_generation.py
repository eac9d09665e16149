"""``causvid eval sample``: a suite from given weights in the released layout, and from the student of a run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from test_wan_generate import place  # noqa: F401  # the fixture: weights and specs of a cut size
from toy import toy_spec

from causvid import cli, experiment
from causvid import spec as specs
from causvid.eval import sampling
from causvid.eval.suites import read_suite
from causvid.wan_generation import Request, Studio

SUITE = [
    {"prompt_en": "a red fox", "dimension": ["temporal_flickering"]},
    {"prompt_en": "the snow", "dimension": ["aesthetic_quality"], "extended": "a red fox runs in the snow"},
]


def call(capsys, *arguments):
    """(status, last line of stdout, stderr)."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "sample", *map(str, arguments)])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out.strip().split("\n")[-1], " ".join(err.split())


@pytest.fixture
def wan(place, tmp_path):  # noqa: F811
    (tmp_path / "suite.json").write_text(json.dumps(SUITE))
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.pt").write_bytes((place / "model.pt").read_bytes())
    common = [
        place / "causal.yaml",
        "--weights",
        place / "Wan2.1-T2V-cut",
        "--model",
        tmp_path / "student" / "model.pt",
    ]
    common += ["--prompts", tmp_path / "suite.json", "--per-prompt", "1", "--seconds", "0.5", "--static-filter", "2"]
    return SimpleNamespace(common=common, tmp=tmp_path, place=place)


def test_given_weights_sample_a_suite_in_shards_and_again_after_a_stop(wan, capsys):
    whole, parts = wan.tmp / "whole", wan.tmp / "parts"
    code, path, err = call(capsys, *wan.common, "--out", whole)
    assert (code, path) == (0, str(whole.resolve())) and "made 3 videos" in err
    names = sorted(each.name for each in whole.glob("*.mp4"))
    assert names == ["a red fox-0.mp4", "a red fox-1.mp4", "the snow-0.mp4"]
    record = json.loads((whole / "sampling.json").read_text())
    assert record["frames"] == 9 and record["fps"] == 16 and record["seeds"] == sampling.SEEDS
    assert [call(capsys, *wan.common, "--out", parts, "--shard", f"{k}/2")[0] for k in (1, 0)] == [0, 0]
    (parts / "a red fox-1.mp4").unlink()
    assert "made 1 videos" in call(capsys, *wan.common, "--out", parts)[2]
    for name in [*names, "sampling.json"]:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


def test_each_video_is_that_of_its_generating_prompt_and_seed(wan, capsys):
    """Against the same network asked for one video: the extended prompt generates, the short one names the file."""
    assert call(capsys, *wan.common, "--out", wan.tmp / "v")[0] == 0
    request = Request(str(wan.common[0]), wan.common[2], [], wan.tmp, model=wan.common[4], frames=9)
    studio = Studio(request)
    text = studio.world.text_encoder.encode(["a red fox runs in the snow", studio.world.negative_prompt])
    seed = sampling.seed_of("the snow", 0)
    video = studio.video(text[:1], text[1:], seed, lambda done, note="": None)
    sampling.write_mp4(wan.tmp / "own.mp4", video, 16, 1, 10)
    assert (wan.tmp / "own.mp4").read_bytes() == (wan.tmp / "v" / "the snow-0.mp4").read_bytes()
    jobs = sampling.jobs(read_suite(wan.tmp / "suite.json"), 1, 2)
    assert {job.name: job.seed for job in jobs}["the snow-0.mp4"] == seed


def test_another_checkpoint_of_the_same_name_and_size_is_not_taken_for_this_one(wan, capsys):
    assert call(capsys, *wan.common, "--out", wan.tmp / "v", "--limit", "1")[0] == 0
    path = wan.tmp / "student" / "model.pt"
    size, state = path.stat().st_size, torch.load(path, weights_only=True)
    state["generator"] = {name: value + 0.01 for name, value in state["generator"].items()}
    torch.save(state, path)
    assert path.stat().st_size == size
    code, _, err = call(capsys, *wan.common, "--out", wan.tmp / "v", "--limit", "1")
    assert code == 2 and "sampled otherwise (student differ)" in err


def test_a_student_that_does_not_stream_says_how_long_it_samples(wan, capsys):
    both_ways = [wan.place / "bidirectional.yaml", *wan.common[1:]]
    code, _, err = call(capsys, *both_ways, "--out", wan.tmp / "v", "--seconds", "9")
    assert code == 2 and "lower --seconds" in err
    code, _, err = call(capsys, *both_ways, "--out", wan.tmp / "v", "--suite", "vbench", "--limit", "1")
    assert code == 0 and json.loads((wan.tmp / "v" / "sampling.json").read_text())["frames"] == 21


def test_an_arm_of_a_sweep_is_named_as_run_names_it(tmp_path, capsys):
    path = toy_spec(tmp_path, "sweep: {student.steps: [2, 1]}")
    spec = specs.load(path, ["student.steps=1"])
    (identity,) = (node.identity for node in experiment.plan(spec, "distill") if node.name == "distill")
    common = ["--runs", tmp_path, "--prompts", tmp_path / "none.txt"]
    code, _, err = call(capsys, path, "student.steps=1", *common)
    assert code == 2 and identity in err and "student.steps=1" in err.rpartition("causvid run")[2]
    code, _, err = call(capsys, path, *common)
    assert code == 2 and "choose one of them with student.steps=..." in err
    (tmp_path / "record.json").write_text("{}")
    code, _, err = call(capsys, tmp_path, "student.steps=2")
    assert code == 2 and "student.steps=2 goes with a spec" in err


@pytest.mark.slow
def test_the_student_of_a_run_samples_a_suite(tmp_path, capsys):
    path = toy_spec(tmp_path, "sweep: {student.steps: [2, 1]}")
    run = experiment.run(path, ["student.steps=1"], tmp_path / "runs")
    common = [
        path,
        "student.steps=1",
        "--runs",
        tmp_path / "runs",
        "--per-prompt",
        "2",
        "--seconds",
        "2",
        "--fps",
        "8",
        "--limit",
        "3",
    ]
    assert call(capsys, *common, "--out", tmp_path / "a")[0] == 0
    assert [call(capsys, *common, "--out", tmp_path / "b", "--shard", f"{k}/2")[0] for k in (0, 1)] == [0, 0]
    names = sorted(each.name for each in (tmp_path / "a").iterdir())
    assert len(names) == 7 and names == sorted(each.name for each in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert json.loads((tmp_path / "a" / "sampling.json").read_text())["student"] == run.folders["distill"].name
    code, _, err = call(capsys, path, "student.steps=2", *common[2:], "--out", tmp_path / "c")
    assert code == 2 and "run" in err  # that student was never trained
