"""Nothing is lost: kills at random moments of every step, full disks, an S3-compatible store."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from commands import command
from videos import levels, video

from causvid import cli, cli_data
from causvid.data import manifest, steps
from causvid.data import pack as packing
from causvid.data.clips import Wanted
from causvid.data.encode import encode, from_file, to_file
from causvid.data.folders import Folder
from causvid.data.latents import StoreDataset
from causvid.data.lmdb_store import Reader, Writer
from causvid.data.rows import Row, pack_row
from causvid.errors import UserError
from causvid.models.codecs import TimeFold
from causvid.models.text import Words

WANTED = Wanted(16, 16, 5, 10.0)
FORM = ["--height", "16", "--width", "16", "--frames", "5", "--fps", "10"]
PARTS = ["--codec", "{name: time_fold, frames: 2}", "--text-encoder", "{name: words, dim: 4, length: 6}"]
IDENTITY = {"codec": {"name": "time_fold", "frames": 2}, "text_encoder": {"name": "words"}}
FIELDS = {"latents": {"dtype": "float16", "shape": [None, 4, 8, 8]}}


def row(number):
    generator = np.random.default_rng(number)
    return Row(
        f"r{number:03d}", {"latents": generator.standard_normal((2, 4, 8, 8)).astype(np.float16)}, {"caption": "x"}
    )


def noise(folder, count):
    """Clips of random pixels, with captions and checksums; returns their manifest."""
    folder.mkdir()
    rows = []
    for number in range(count):
        content = video(np.random.default_rng(number).integers(0, 256, (20, 48, 64, 3), np.uint8))
        (folder / f"{number:02d}.mp4").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        rows.append({"path": f"{number:02d}.mp4", "caption": "a cat", "id": f"c{number:02d}", "sha256": sha256})
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "m.jsonl"


def many(latents, target, times):
    """A folder of latents with each row as often under other names, so that a store takes several transactions."""
    (target / "latents").mkdir(parents=True)
    shutil.copy(latents / "recipe.json", target)
    for path in (latents / "latents").iterdir():
        one = from_file(path.read_bytes())
        for number in range(times):
            key = f"{number:03d}-{one.key}"
            (target / "latents" / f"{key}.safetensors").write_bytes(to_file(Row(key, one.arrays, one.facts)))
    return target


def content(folder):
    """All that counts in a step's folder: names with bytes, rows of latents with their checksums, a store's digest."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":  # the order of what stands in its head may differ
            found[name] = pack_row(from_file(path.read_bytes()))
        elif path.suffix != ".mdb":
            found[name] = path.read_bytes()
    if "digest.json" in found:  # the sums of its files may differ
        tally, survey = packing.verify(str(folder))
        assert tally.done == survey["rows"] > 0 and not tally.quarantine
        found["digest.json"] = survey["digest"]
    return found


@pytest.fixture(scope="module")
def programs():
    """Starts commands as processes of their own, forked from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["causvid.cli", "causvid.data.steps", "causvid.data.encode", "causvid.data.pack"])

    def start(*arguments):
        process = context.Process(target=cli.main, args=([str(each) for each in ("data", *arguments)],))
        process.start()
        return process

    def status(*arguments):
        process = start(*arguments)
        process.join()
        return process.exitcode

    assert status("verify", "--help") == 0  # the first has to wait for the imports
    return start, status


def killed(process, moment):
    """Whether the process was killed after so many seconds; one that had ended before was not."""
    time.sleep(moment)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.slow
@pytest.mark.parametrize("step", ["download", "process", "encode", "pack", "pack in shards", "verify"])
def test_kill_nine_at_ten_moments(step, programs, tmp_path):
    """Ten times from the start: killed after a random share of the time that it takes, then run again to its end."""
    start, status = programs
    source = noise(tmp_path / "raw", 12)
    if step in ("encode", "pack", "pack in shards", "verify"):
        steps.process(str(source), str(tmp_path / "clips"), WANTED, workers=1)
        source = tmp_path / "clips"
    if step in ("pack", "pack in shards", "verify"):
        encode(str(source), str(tmp_path / "latents"), TimeFold(2), Words(("a", "cat"), 4, 6), IDENTITY)
        source = many(tmp_path / "latents", tmp_path / "many", 25)
    if step == "verify":
        packing.pack(str(source), str(tmp_path / "store"))
        source = tmp_path / "store"
    options = {"process": [*FORM, "--workers", 1], "encode": PARTS, "pack in shards": ["--shards", 3]}.get(step, [])
    verb = step.partition(" ")[0]
    begin = time.monotonic()
    assert status(verb, source, tmp_path / "wanted", *options) == 0
    whole = time.monotonic() - begin
    wanted, moments = content(tmp_path / "wanted"), random.Random(step)
    before = content(source) if verb == "verify" else {}
    for number in range(10):
        target = tmp_path / f"killed{number}"
        moment = whole * moments.random()
        while not killed(start(verb, source, target, *options), moment):  # quicker this time than it was alone
            shutil.rmtree(target, ignore_errors=True)
            moment *= 0.8
        assert status(verb, source, target, *options) == 0
        assert content(target) == wanted
    assert verb != "verify" or content(source) == before


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


COMMANDS = {
    "download": ["--workers", "2"],  # with as many as there are clips, all may be half written when the disk is full
    "process": [*FORM, "--workers", "1"],
    "encode": PARTS,
    "pack": [],
    "pack in shards": ["--shards", "3"],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What each command takes, and what it makes of it where there is room."""
    folder = tmp_path_factory.mktemp("sources")
    given = {"download": noise(folder / "raw", 8), "process": folder / "raw" / "m.jsonl"}
    steps.download(str(given["download"]), str(folder / "wanted" / "download"))
    steps.process(str(given["process"]), str(folder / "wanted" / "process"), WANTED, workers=1)
    given["encode"] = folder / "wanted" / "process"
    encode_as_told(given["encode"], folder / "wanted" / "encode")
    given["pack"] = given["pack in shards"] = many(folder / "wanted" / "encode", folder / "many", 16)
    packing.pack(str(given["pack"]), str(folder / "wanted" / "pack"))
    packing.pack(str(given["pack"]), str(folder / "wanted" / "pack in shards"), shards=3)
    return given, folder / "wanted"


def encode_as_told(source, target):
    """What the command makes with ``PARTS``."""
    captions = (clip.caption for clip in manifest.read(str(source)).clips)
    parts, identity = cli_data._encoders({"codec": PARTS[1], "text_encoder": PARTS[3]}, captions)
    encode(str(source), str(target), parts["codec"], parts["text_encoder"], identity)


@pytest.mark.parametrize("share", [0, 0.1, 0.6])
@pytest.mark.parametrize("step", COMMANDS)
def test_a_command_on_a_full_disk_tells_it_once_and_goes_on_when_there_is_room(
    step, share, sources, small_disk, capsys
):
    """The disk has room for a share of what the command writes."""
    given, wanted = sources
    size = sum(path.stat().st_blocks * 512 for path in (wanted / step).rglob("*") if path.is_file())
    disk = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(disk.f_bavail * disk.f_frsize - int(size * share)))
    arguments = (step.partition(" ")[0], given[step], small_disk / "out", *COMMANDS[step])
    status, counts, err = command(capsys, *arguments)
    assert status == 2 and err.count("error:") == 1 and "the disk is full" in err and not counts, err
    assert not list((small_disk / "out").rglob("*.partial"))
    (small_disk / "other").unlink()
    status, counts, err = command(capsys, *arguments)
    assert (status, counts["quarantined"], counts["done"] + counts["skipped"]) == (0, 0, counts["given"]), err
    assert counts["skipped"] > 0 or share < 0.6 or step == "pack in shards"  # what was done is not done again
    assert content(small_disk / "out") == content(wanted / step)


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
        assert found[1:] == (
            False,
            "the worker crashed" if harm is crash else "the worker took more than 5 s, or crashed",
        )
        assert [result for _, _, result in pool.map(os.path.basename, ["a/b"], work)] == ["b"]


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
