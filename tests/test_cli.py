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
        (["run", "tiny/nothing"], "no spec 'tiny/nothing'"),
        (["plan", "tiny/from_scratch", "student.steps=5"], "no state at t"),
        (["list", "lossy"], "did you mean 'loss'?"),
        (["show", "loss.dmdd"], "did you mean 'dmd'?"),
        (["show", "dmd"], "GROUP.NAME"),
        (["sweep", "tiny/from_scratch"], "no 'sweep:'"),
        (["check", "tiny/nothing"], "no spec"),
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
        "loss.dmd", "loss.flow_matching", "loss.gan", "loss.ode_regression", "loss.sum",
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
