"""The whole recipe at toy size: what runs, what is skipped, what comes out, and that a stop changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from toy import toy_spec

from causvid import build, cli, experiment, generation, runs, spec, training, weights
from causvid.data.clips import png
from causvid.data.video import read_mp4, to_bytes
from causvid.errors import UserError
from causvid.randomness import Draw
from causvid.stages import distill, sample
from causvid.streaming import record as records

ALL = ["teacher", "ode_pairs", "ode_init", "distill", "sample_teacher", "sample_start", "sample", "evaluate", "report"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="module")
def first(folder):
    return experiment.run(toy_spec(folder), [], folder / "runs")


def test_a_first_run_does_everything_and_reports(first):
    assert sorted(first.executed) == sorted(ALL) and first.skipped == []
    assert first.report.is_file()
    for key in ("teacher.ok", "untrained.ok", "ode_init.ok", "student.ok"):
        assert 0 <= first.metrics[key] <= 1
    assert {"student.ok_first_tenth", "student.ok_last_tenth"} <= set(first.metrics)
    told = first.timings
    assert 0 < told["latency_s"] < told["clip_s"]  # the first block, and all of them
    assert told["latency_ratio"] == pytest.approx(told["teacher_s"] / told["latency_s"])
    assert told["throughput_ratio"] == pytest.approx(told["teacher_s"] / told["clip_s"])
    assert first.metrics["real.ok"] == 1
    # Where a clip begins says nothing of the last part of a long one.
    assert "rollout_first.start_gap" in first.metrics
    assert not {"rollout_last.start_gap", "rollout_last.caption_gap"} & first.metrics.keys()


def test_every_arm_is_sampled_from_its_own_weights_on_held_out_captions(first, folder):
    arm = spec.load(toy_spec(folder))
    world, count = build.World(arm), arm["evaluation.samples"]
    captions, text, free = world.prompts(range(count), "test")
    draw = Draw(0, "evaluation", 0, range(count))
    assert captions == json.loads((first.folders["evaluate"] / "scores.json").read_text())["captions"]
    assert captions != world.prompts(range(count), "train")[0]

    def written(stage, name):
        return weights.read_tensors(first.folders[stage] / f"{name}.safetensors")[0]["videos"]

    for name, source, stage in (("untrained", "teacher", "sample_start"), ("ode_init", "ode_init", "sample_start"),
                                ("student", "distill", "sample")):  # fmt: skip
        student = sample.load_student(arm, world, first.folders[source])
        made = to_bytes(world.codec.decode(student(world.latent_shape, text, draw)))
        assert (made.int() - written(stage, name).int()).abs().max() <= 1, name
    teacher = build.load_network(arm, world, build.teacher_rule(arm), first.folders["teacher"] / "weights.safetensors")
    noise = draw.normal("noise", *world.latent_shape)
    for steps in (arm["teacher_sampling.steps"], *arm["evaluation.teacher_steps"]):
        made = to_bytes(world.codec.decode(build.teacher_sampler(arm, steps)(teacher, noise, text, free).last))
        assert (made.int() - written("sample_teacher", f"teacher_{steps}").int()).abs().max() <= 1, steps


def test_the_ends_of_a_rollout_are_judged_each_by_itself(first, folder):
    rollout, _ = weights.read_tensors(first.folders["sample"] / "rollout.safetensors")
    length, whole = rollout["first"].shape[1], rollout["whole"]
    assert whole.shape[1] >= 9 * length
    assert torch.equal(rollout["first"], whole[:, :length]) and torch.equal(rollout["last"], whole[:, -length:])
    assert not torch.equal(rollout["first"], rollout["last"])
    plain = experiment.run(toy_spec(folder, "evaluation: {metrics: ['test_recipe:Plain']}"), [], folder / "runs")
    for end in ("first", "last"):
        expected = float((sample.from_bytes(rollout[end]).mean() + 1) / 2)
        assert plain.metrics[f"student.ok_{end}_tenth"] == pytest.approx(expected, abs=1e-6)


def test_stored_trajectories_are_the_teachers_under_guidance_to_the_caption(first, folder):
    arm = spec.load(toy_spec(folder))
    world, count = build.World(arm), arm["ode_pairs.count"]
    _, text, free = world.prompts(range(count))
    rule, path = build.teacher_rule(arm), first.folders["teacher"] / "weights.safetensors"
    noise = Draw(0, "ode_pairs", 0, range(count)).normal("noise", *world.latent_shape)
    solver = build.teacher_sampler(arm, arm["ode_pairs.steps"])
    ended = solver(build.load_network(arm, world, rule, path), noise, text, free).last
    pairs = build.stored_pairs(arm, world, first.folders["ode_pairs"] / "pairs")
    stored, _ = pairs.rows(range(count), world.text_encoder)
    assert len(pairs) == count
    torch.testing.assert_close(stored.states[-1], ended, atol=2e-3, rtol=2e-3)  # kept in half precision


def test_each_player_of_distillation_sees_as_it_should(first, folder):
    arm = spec.load(toy_spec(folder))
    inputs = {name: first.folders[name] for name in ("teacher", "ode_init")}
    context = runs.Context(arm, folder, inputs, lambda text: None)
    nets = distill.networks(context, build.World(arm), ("student", "fake_score"))
    assert nets["student"].mask == build.student_rule(arm) != build.teacher_rule(arm)
    assert nets["fake_score"].mask == nets["teacher"].mask == build.teacher_rule(arm)
    assert not any(p.requires_grad for p in nets["teacher"].parameters())
    start, given = (weights.read_tensors(inputs[name] / "weights.safetensors")[0] for name in ("ode_init", "teacher"))
    name = next(iter(start))
    assert torch.equal(nets["student"].state_dict()[name], start[name])
    assert torch.equal(nets["fake_score"].state_dict()[name], given[name])
    players = distill._players(nets, ("student", "fake_score"), arm["distill"])
    assert players["student"].decay == arm["distill.ema"] > 0 and players["fake_score"].average is None


def test_a_second_run_does_nothing(first, folder):
    def files():
        return {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}

    before = files()
    again = experiment.run(toy_spec(folder), [], folder / "runs")
    assert again.executed == [] and again.metrics == first.metrics and files() == before


def test_a_monitor_judges_what_trains_and_changes_no_weight(first, folder, tmp_path):
    """Its last judgement is that of the run's end; the teacher is sampled as a teacher."""
    watched = experiment.run(toy_spec(folder), ["runtime.monitor={name: held_out, times: 2}"], tmp_path / "runs")
    assert sorted(watched.executed) == sorted(ALL)
    for stage, role, steps in (("teacher", "teacher", (0, 1, 3)), ("ode_init", "ode_init", (0, 1, 3)),
                               ("distill", "student", (0, 1, 2))):  # fmt: skip
        plain, seen = first.folders[stage], watched.folders[stage]
        assert plain.name == seen.name
        assert (plain / "weights.safetensors").read_bytes() == (seen / "weights.safetensors").read_bytes()
        rows = [json.loads(line) for line in (seen / "curves.jsonl").read_text().splitlines()]
        judged = {row["step"]: row for row in rows if "held_out.ok" in row}
        assert tuple(judged) == steps
        assert judged[0]["held_out.fidelity"] != judged[steps[-1]]["held_out.fidelity"]
        for name in ("ok", "fidelity", "contrast"):
            assert judged[steps[-1]][f"held_out.{name}"] == pytest.approx(first.metrics[f"{role}.{name}"], abs=1e-4)
    page = watched.report.read_text()
    assert page.count("Held-out pairs") == 2 * 3 and "Held-out pairs" not in first.report.read_text()


def test_a_student_streams_under_its_cache_policy_as_one_whose_mask_that_is(first, folder):
    """The stream under another rule is that of a network with this rule as its mask."""
    toy = toy_spec(folder)
    arm = spec.load(toy, ["student.cache=full"])
    other = spec.load(toy, ["student.cache=trained", "causal.mask=block_causal"])
    weights = next((folder / "runs" / "distill").glob("*/weights.safetensors")).parent
    world = build.World(arm)
    text, shape = (
        world.text_encoder.encode(["a red circle moves left"]),
        (4 * world.latent_shape[0], *world.latent_shape[1:]),
    )
    videos = [
        sample.load_student(each, world, weights)(shape, text, Draw(0, "test", 0, [0]))
        for each in (arm, other, spec.load(toy))
    ]
    assert (videos[0] - videos[1]).abs().max() < 1e-5 and (videos[0] - videos[2]).abs().max() > 1e-3


def test_fewer_steps_run_again_only_what_depends_on_them(first, folder):
    changed = experiment.run(toy_spec(folder), ["student.steps=2"], folder / "runs")
    assert changed.skipped == ["teacher", "ode_pairs", "sample_teacher"]
    assert sorted(changed.executed) == ["distill", "evaluate", "ode_init", "report", "sample", "sample_start"]
    reasons = {row["stage"]: row["state"] for row in experiment.explain(toy_spec(folder), ["seed=5"], folder / "runs")}
    assert reasons["ode_pairs"].startswith("would run: teacher is new")
    assert "seed: 0 -> 5" in reasons["distill"]


def test_without_ode_init_its_stages_are_pruned(first, folder):
    outcome = experiment.run(toy_spec(folder, "init: teacher"), [], folder / "runs")
    assert not {"ode_pairs", "ode_init"} & {*outcome.executed, *outcome.skipped}
    assert outcome.report.is_file() and "ode_init.ok" not in outcome.metrics


class Plain:
    """A metric of a user's own: what the protocol asks for and no more."""

    def __call__(self, videos, prompts):
        brightness = (videos.mean((1, 2, 3, 4)) + 1) / 2
        return {"brightness": brightness, "ok": brightness}


@pytest.mark.parametrize(
    "extra",
    [
        "student: {causal: false, sampler: few_step, input: backward_simulation}",
        "causal: {mask: {name: sink_window, block_frames: 2, window_frames: 2, sink_frames: 1}, "
        "position: window_relative}",
        "loss: {name: sum, of: [dmd, {name: gan, r1: 1.0}], weights: [1, 0.1]}\nstudent: {input: self_rollout}\n"
        "distill: {discriminator: {taps: 1}}",
        "teacher: causal\ninit: random\nstudent: {input: {name: data, context: clean}}",
        "world: {codec: identity}\nevaluation: {metrics: [shapes_truth, 'test_recipe:Plain'], rollout_samples: 1}",
    ],
)
def test_variants_run_end_to_end(extra, tmp_path):
    outcome = experiment.run(toy_spec(tmp_path, extra), [], tmp_path / "runs")
    assert outcome.report.is_file() and 0 <= outcome.metrics["student.ok"] <= 1


def test_generate_streams_ten_times_the_training_length(first, folder):
    out = generation.generate(
        "a red circle moves left", toy_spec(folder), folder / "long.mp4", 110, 0, 8, 4, folder / "runs"
    )
    with av.open(str(out)) as video:
        frames = [frame for frame in video.decode(video=0)]
    assert len(frames) == 110 and (frames[0].width, frames[0].height) == (128, 128)
    by_folder = generation.generate("a red circle moves left", str(first.run), folder / "b.mp4", None, 0, 8, 4, folder)
    assert by_folder.is_file()


def test_generate_refuses_what_it_cannot_do(first, folder):
    with pytest.raises(UserError, match="unknown word 'purple'"):
        generation.generate("a purple circle moves left", str(first.run), folder / "x.mp4", None, 0, 8, 4, folder)
    with pytest.raises(UserError, match="run it first"):
        generation.generate("a red circle moves left", toy_spec(folder), folder / "x.mp4", None, 0, 8, 4, folder / "no")
    assert not (folder / "x.mp4").exists()


def test_a_finished_run_still_generates_when_the_source_has_changed(first, folder, monkeypatch):
    """By its folder: its record names its student, whatever identity today's source would give."""
    monkeypatch.setattr(runs, "sources", lambda module, values: {"changed": "since"})
    with pytest.raises(UserError, match="run it first"):
        generation.generate("a red circle moves left", toy_spec(folder), folder / "x.mp4", 5, 0, 8, 4, folder / "runs")
    assert generation.generate(
        "a red circle moves left", str(first.run), folder / "c.mp4", 5, 0, 8, 4, folder
    ).is_file()


def test_a_picture_too_large_is_refused_before_it_is_made(first, folder):
    with pytest.raises(UserError, match="at most 4096 along a side: scale 128 or less"):
        generation.generate("a red circle moves left", str(first.run), folder / "x.mp4", 5, 0, 8, 3000, folder)
    assert not (folder / "x.mp4").exists()


def generated(folder, capsys, *arguments):
    """(status, stdout, stderr) of ``causvid generate`` from the toy run."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--run", toy_spec(folder), "--runs", str(folder / "runs"), *map(str, arguments)])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out.strip(), " ".join(err.split())


def test_everything_may_happen_in_a_stream_and_it_replays(first, folder, capsys):
    a, b = "a red circle moves left", "a blue square moves up"
    picture = folder / "p.png"
    picture.write_bytes(png(np.full((40, 60, 3), 90, np.uint8)))
    steered = ["--prompts-at", f"0:{a};12:{b}", "--on-prompt", "recache", "--image", picture, "--image-as", "first",
               "--cache", "{name: sink_window, window_frames: 3}", "--steps", "2", "--seed", "3"]  # fmt: skip
    status, out, err = generated(
        folder, capsys, *steered, "--frames", 23, "--stream", "--out", folder / "g.mp4", "--record", folder / "r"
    )
    assert status == 0 and "first frame after" in err, err
    grown = read_mp4(Path(out)).pixels
    assert grown.shape == (23, 3, 256, 256)
    status, out, err = generated(folder, capsys, "--replay", folder / "r", "--out", folder / "again.mp4")
    assert status == 0 and (read_mp4(Path(out)).pixels - grown).abs().mean() < 0.02, err
    status, _, err = generated(
        folder, capsys, a, "--video", f"file://{folder}/g.mp4", "--strength", "0.7", "--out", folder / "v.mp4"
    )
    assert status == 0 and len(read_mp4(folder / "v.mp4").pixels) == 23, err
    (folder / "r").write_bytes((folder / "r").read_bytes().replace(b"circle", b"square"))
    status, _, err = generated(folder, capsys, "--replay", folder / "r", "--out", folder / "no.mp4")
    assert status == 2 and "changed or damaged" in err and not (folder / "no.mp4").exists()


def test_raw_frames_go_to_a_pipe_that_may_close(first, folder):
    command = [sys.executable, "-m", "causvid.cli", "generate", "a red circle moves left", "--run", toy_spec(folder),
               "--runs", str(folder / "runs"), "--stream", "--out", "-", "--scale", "1", "--frames"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run([*command, "17"], capture_output=True, env=environment, check=True)
    assert len(whole.stdout) == 17 * 32 * 32 * 3
    command += ["100000", "--record", str(folder / "piped")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as run:
        assert run.stdout and run.stderr and run.stdout.read(5 * 3072) == whole.stdout[: 5 * 3072]
        run.stdout.close()
        assert run.wait(60) == 0
        said = run.stderr.read()
        assert b"Traceback" not in said and b"the reader has gone" in said
    assert 0 < records.read(folder / "piped").blocks < 10000  # what was made is recorded all the same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--prompts-at", "0:a"], "give a prompt, or"),
        (["--prompts-at", "5:a"], "ascend from 0"),
        (["--prompts-at", "0:a;x"], "unknown word"),
        (["--prompts-at", "a"], "is not FRAME:PROMPT"),
        (["a", "--record", "pyproject.toml/x"], "session file pyproject.toml/x can't be written"),
        (["a", "--record", "tests"], "it is a folder"),
        (["--prompts-at", "0:a;48:a", "--frames", "23"], "frame 48 is not in a video of 23 frames"),
        (["a", "--strength", "0.5"], "--strength says how --video is taken"),
        (["a", "--image-as", "first"], "--image-as says how --image is taken"),
        (["a", "--on-prompt", "keep"], "--on-prompt says how --prompts-at"),
        (["--prompts-at", "0:a", "--on-prompt", "kep"], "accepted: keep, recache"),
        (["a", "--cache", "{name: windw}"], "did you mean 'window'"),
        (["a", "--cache", "{name"], "neither a name nor a mapping"),
        (["a", "--image", "nowhere.png"], "can't be read as a picture"),
        (["a", "--video", "nowhere.mp4"], "can't be read"),
        (["a", "--video", "nowhere://x"], "can't be read"),
        (["a", "--replay", "x"], "give a prompt, or"),
        (["--replay", "nowhere"], "does not exist"),
        (["--replay", "x", "--seed", "1"], "all that happens in it is in the file"),
        (["a", "--out", "-"], "add --stream"),
        (["a", "--stream", "--seed", "1", "--seed", "2"], "told of one video"),
        (["a", "--cache", "window", "--prompts", "x"], "give a prompt, or"),
    ],
)
def test_what_is_wrong_with_a_stream_is_one_error(arguments, message, first, folder, capsys):
    told = [arguments[0].replace("a", "a red circle moves left"), *arguments[1:]] if arguments[0] == "a" else arguments
    told = [value.replace(":a", ":a red circle moves left") if ":a" in value else value for value in told]
    status, out, err = generated(folder, capsys, *told, *([] if "--out" in told else ["--out", folder / "no.mp4"]))
    assert status == 2 and message in err and not out and not (folder / "no.mp4").exists(), err


def test_a_students_draws_do_not_depend_on_who_else_trains(folder, monkeypatch):
    """Arms that differ in the loss or in the critics' updates give the student the same data and noise."""
    seen = {}

    class Watched(Draw):
        def __init__(self, seed, stage, step, samples, device="cpu"):
            super().__init__(seed, stage, step, samples, device)
            seen.setdefault(stage, []).append((step, tuple(samples)))

    monkeypatch.setattr(distill, "Draw", Watched)
    drawn = []
    for overrides in (
        ["distill.critic_updates=1"],
        ["loss={name: sum, of: [dmd, gan]}", "distill.discriminator.taps=1"],
    ):
        arm = spec.load(toy_spec(folder), overrides)
        seen.clear()
        runs.Store(folder / "runs").execute(experiment.plan(arm, "distill"), arm, lambda text: None)
        drawn.append(dict(seen))
    assert drawn[0]["distill/student"] == drawn[1]["distill/student"] == [(n, (2 * n, 2 * n + 1)) for n in range(3)]
    assert [step for step, _ in drawn[1]["distill/discriminator"]] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in drawn[1]["distill/fake_score"]] == [0, 1, 2, 3, 4, 5]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["teacher", "ode_init", "distill"])
def test_a_stopped_training_continues_to_the_same_bytes(stage, first, folder, tmp_path, monkeypatch):
    def result(root):
        nodes = experiment.plan(spec.load(toy_spec(folder)), "distill")
        node = next(node for node in nodes if node.name == stage)
        return runs.Store(root).folder(node), nodes

    arm = spec.load(toy_spec(folder))
    store = runs.Store(tmp_path / "runs")
    after = training.Session.after

    def stop(self, step, *arguments, **numbers):
        after(self, step, *arguments, **numbers)
        if step == 1 and self._context.folder.parent.name == stage:
            raise Killed

    monkeypatch.setattr(training.Session, "after", stop)
    path, nodes = result(tmp_path / "runs")
    with pytest.raises(Killed):
        store.execute(nodes, arm, print)
    assert not (path / "DONE").exists() and (path / "checkpoint.safetensors").exists()
    monkeypatch.undo()
    store.execute(nodes, arm, print)
    wanted, _ = result(folder / "runs")
    assert (path / "weights.safetensors").read_bytes() == (wanted / "weights.safetensors").read_bytes()
    steps = [json.loads(line)["step"] for line in (path / "curves.jsonl").read_text().splitlines()]
    assert steps == list(range(len(steps)))


@pytest.mark.slow
def test_kill_nine_after_each_stage_changes_nothing(first, folder, tmp_path):
    """Kill the run whenever it has finished a stage more, as the next begins, until it gets through."""
    root = tmp_path / "runs"
    command = [sys.executable, "-m", "causvid.cli", "run", toy_spec(folder), "--runs", str(root), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = -1
    kills = 0
    while True:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(root.glob("*/*/DONE"))) <= finished:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        time.sleep(0.01 * (kills % 3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        finished = len(list(root.glob("*/*/DONE")))
    assert process.returncode == 0 and kills >= 3
    arm = spec.load(toy_spec(folder))
    for node in experiment.plan(arm):
        ours, wanted = runs.Store(tmp_path / "runs").folder(node), runs.Store(folder / "runs").folder(node)
        for name in ("weights.safetensors", "metrics.json", "fake_score.safetensors"):
            if (wanted / name).exists():
                assert (ours / name).read_bytes() == (wanted / name).read_bytes(), f"{node.name}/{name}"
    assert json.loads((Path(ours) / "DONE").read_text())["stage"] == "report"


@pytest.mark.slow
def test_two_processes_judge_what_one_does(folder, tmp_path):
    name = toy_spec(folder)
    change = ["until=distill", "runtime.monitor=held_out"]
    one = experiment.run(name, change, tmp_path / "one")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "causvid.cli",
    ]
    subprocess.run([*command, "run", name, *change, "--runs", str(tmp_path / "two")], check=True, timeout=600,
                   env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)  # fmt: skip
    for stage in ("teacher", "ode_init", "distill"):
        curves = [tmp_path / count / stage / one.folders[stage].name / "curves.jsonl" for count in ("one", "two")]
        rows, others = ([json.loads(line) for line in path.read_text().splitlines()] for path in curves)
        assert [set(row) for row in rows] == [set(row) for row in others]
        for row, other in zip(rows, others, strict=True):
            seen = {key for key in row if key == "loss" or key.startswith("held_out.")}
            assert [row[key] for key in seen] == pytest.approx([other[key] for key in seen], rel=1e-3, abs=1e-4)
            assert all((row[key] == row[key]) == (other[key] == other[key]) for key in row)  # known in both, or in none
