"""The command line: statuses, one clear message, and nothing but results on stdout."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from toy import toy_spec

from causvid import cli


def call(capsys, *arguments):
    """(status, stdout, stderr) of a command in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "tiny/causvid", "los.name=dmd"], "did you mean 'loss'?"),
        (["run", "tiny/causvid", "distill.batch=many"], "distill.batch: "),
        (["run", "tiny/causvid", "loss=dmdd"], "accepted: dmd"),
        (["run", "tiny/nothing"], "no spec 'tiny/nothing'"),
        (["plan", "tiny/from_scratch", "student.steps=5"], "no state at t"),
        (["list", "lossy"], "did you mean 'loss'?"),
        (["show", "loss.dmdd"], "did you mean 'dmd'?"),
        (["show", "dmd"], "GROUP.NAME"),
        (["sweep", "tiny/from_scratch"], "no 'sweep:'"),
        (["check", "tiny/nothing"], "no spec"),
        (["run", "ablations/steps"], "choose one of them with student.steps=..."),
        (["plan", "ablations/steps"], "'causvid sweep ablations/steps'"),
        (["report", "ablations/steps"], "sweeps over student.steps"),
        (["generate", "a red circle moves left", "--run", "ablations/steps"], "sweeps over student.steps"),
        (["sweep", "ablations/steps", "student.steps=2"], "sets student.steps itself"),
        (["sweep", "ablations/steps", "student={steps: 2}"], "sets student.steps itself"),
    ],
)
def test_bad_input_ends_with_two_and_one_message(arguments, words, capsys):
    status, out, err = call(capsys, *arguments)
    assert (status, out) == (2, "") and words in err and err.count("error:") == 1 and "Traceback" not in err


@pytest.mark.parametrize("arguments", [["run"], ["fly"], ["run", "tiny/causvid", "--colour"]])
def test_wrong_usage_ends_with_two(arguments, capsys):
    assert call(capsys, *arguments)[0] == 2


def test_list_and_show_say_what_there_is(capsys):
    status, out, _ = call(capsys, "list", "loss")
    assert status == 0 and [line.split()[0] for line in out.splitlines()] == [
        "loss.dmd", "loss.edits", "loss.flow_matching", "loss.gan", "loss.ode_regression", "loss.sum",
    ]  # fmt: skip
    status, out, _ = call(capsys, "show", "loss.dmd")
    assert status == 0 and "guidance: float = 1.0" in out and "causvid/losses/dmd.py:" in out


def test_plan_in_json_is_one_line(capsys, tmp_path):
    status, out, _ = call(capsys, "plan", toy_spec(tmp_path), "--json", "--runs", str(tmp_path / "runs"))
    assert status == 0 and out.count("\n") == 1
    assert {row["state"] for row in json.loads(out)} == {"never run"} and not (tmp_path / "runs").exists()


def test_help_has_examples_and_imports_no_torch():
    code = (
        "import sys; from causvid import cli\ntry: cli.main(['run', '--help'])\nfinally: print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.rstrip().endswith("False") and "causvid run tiny/causvid" in found.stdout


def test_who_stops_a_command_that_keeps_nothing_is_told_so(capsys, monkeypatch):
    monkeypatch.setattr("causvid.generation.generate", lambda *_: signal.raise_signal(signal.SIGTERM))
    status, out, err = call(capsys, "generate", "a red circle moves left")
    assert (status, out) == (75, "") and "does it again" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_with_75_and_goes_on(number, tmp_path):
    command = [
        sys.executable, "-m", "causvid.cli", "run", toy_spec(tmp_path), "teacher_training.iterations=100000",
        "until=teacher", "--runs", str(tmp_path / "runs"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/teacher/*/checkpoint.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and out == "" and "goes on" in err and "Traceback" not in err


def run_of(folder, *overrides, spec=None):
    return [
        sys.executable, "-m", "causvid.cli", "run", spec or toy_spec(folder), *overrides, "--json",
        "--runs", str(folder / "runs"),
    ]  # fmt: skip


def test_the_command_that_was_stopped_ends_as_if_it_had_not_been(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = run_of(tmp_path, "teacher_training.iterations=300", "until=teacher")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/teacher/*/checkpoint.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "resumed at step" in again.stderr and json.loads(again.stdout)["executed"] == ["teacher"]
    (folder,) = tmp_path.glob("runs/teacher/*")
    assert [json.loads(line)["step"] for line in (folder / "curves.jsonl").read_text().splitlines()] == list(range(300))
    assert not (folder / "checkpoint.safetensors").exists()


def test_two_commands_at_once_share_the_work(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = run_of(tmp_path, "teacher_training.iterations=200", "until=teacher")
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    outcomes = [json.loads(out) for out, _ in outputs]
    assert sorted(outcome["executed"] for outcome in outcomes) == [[], ["teacher"]]
    assert outcomes[0]["run"] == outcomes[1]["run"]
    steps = [json.loads(line)["step"] for line in next(tmp_path.glob("runs/*/*/curves.jsonl")).read_text().splitlines()]
    assert steps == list(range(200))


def test_check_tells_what_is_right_and_everything_that_is_not(capsys, tmp_path):
    good, bad = toy_spec(tmp_path), tmp_path / "bad.yaml"
    assert call(capsys, "check", good)[:2] == (0, f"{good}: ok\n")
    bad.write_text(f"base: {good}\nlos: 1\nsteps: 2\n")
    status, out, err = call(capsys, "check", str(bad), good, "tiny/nothing")
    assert (status, out) == (2, "") and all(word in err for word in ("'los'", "'steps'", "tiny/nothing"))


def test_check_looks_into_every_arm_of_a_sweep(capsys, tmp_path):
    path = toy_spec(tmp_path, "sweep: {student.steps: [1, 2, 7]}")
    status, out, err = call(capsys, "check", path)
    assert (status, out) == (2, "") and "no state at t" in err
    for sweep, word in [("{seed: 3}", "list of values"), ("{seed: []}", "list of values"), ("{los: [1]}", "'los'")]:
        status, _, err = call(capsys, "check", toy_spec(tmp_path, f"sweep: {sweep}"))
        assert status == 2 and word in err


def test_list_in_json_names_every_component(capsys):
    status, out, err = call(capsys, "list", "--json")
    rows = json.loads(out)
    assert (status, err) == (0, "") and {"group", "name", "summary", "where"} == set(rows[0])
    assert {"dmd", "dit", "rollout", "muon"} <= {row["name"] for row in rows}
    for row in rows:
        status, shown, _ = call(capsys, "show", f"{row['group']}.{row['name']}")
        assert status == 0 and row["summary"] in shown and row["where"] in shown


@pytest.mark.parametrize(
    "command", ["run", "sweep", "plan", "list", "show", "check", "generate", "report", "convert", "weights"]
)
def test_every_command_has_an_example(command, capsys):
    status, out, _ = call(capsys, command, "--help")
    assert status == 0 and f"causvid {command}" in out.split("Example")[1]


@pytest.mark.parametrize("content", ["{", "[]", "3", "{}", '{"values": 3}', '{"values": {"los": 1}}'])
def test_generate_from_a_damaged_run(content, capsys, tmp_path):
    (tmp_path / "record.json").write_text(content)
    status, out, err = call(capsys, "generate", "a red circle moves left", "--run", str(tmp_path))
    assert (status, out) == (2, "") and err.count("error:") == 1 and "Traceback" not in err


def test_generate_and_report_before_a_run(capsys, tmp_path):
    for arguments in (["generate", "x", "--run"], ["report"]):
        status, out, err = call(capsys, *arguments, toy_spec(tmp_path), "--runs", str(tmp_path / "runs"))
        assert (status, out) == (2, "") and "run it first: causvid run" in err


def test_a_runs_folder_that_is_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, out, err = call(capsys, "run", toy_spec(tmp_path), "--runs", str(tmp_path / "file"))
    assert (status, out) == (2, "") and err.count("error:") == 1


def test_brackets_in_a_message_are_not_markup(capsys):
    _, _, err = call(capsys, "plan", "tiny/from_scratch", "loss={name: sum, of: [dmdd]}")
    assert "loss.of[0]" in err


def test_one_arm_of_a_sweep_can_be_chosen(capsys, tmp_path):
    path = toy_spec(tmp_path, "sweep: {student.steps: [1, 2]}")
    status, out, _ = call(capsys, "plan", path, "student.steps=2", "--runs", str(tmp_path / "runs"))
    assert status == 0 and "distill" in out


def test_a_run_that_ends_at_the_teacher_has_a_folder_and_no_report(capsys, tmp_path):
    arguments = [toy_spec(tmp_path), "until=teacher", "--runs", str(tmp_path / "runs")]
    status, out, err = call(capsys, "run", *arguments)
    (folder,) = (tmp_path / "runs" / "teacher").iterdir()
    assert (status, out) == (0, f"{folder}\n") and "teacher: done in" in err
    status, out, _ = call(capsys, "run", *arguments, "--json")
    found = json.loads(out)
    assert status == 0 and found["report"] is None and found["run"] == str(folder) and found["executed"] == []
