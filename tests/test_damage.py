"""Damaged inputs through every command: each is done, skipped or put aside, none is lost, and nothing hangs or crashes.

All go through the command line, in this process: a traceback fails the test, and so does a wrong exit status.

A pattern of damage is the same everywhere: half are single bits turned over, spread evenly over the file; a quarter
have eight bits turned over at random; a quarter are cut short, at places spread evenly.
"""

from __future__ import annotations

import json
import os
import random
import signal

import lmdb
import numpy as np
import pytest
from commands import command
from videos import levels, sound, video

from causvid.data import pack as packing
from causvid.data.clips import png
from causvid.data.digest import finish
from causvid.data.encode import from_file, to_file
from causvid.data.folders import Folder
from causvid.data.lmdb_store import Writer
from causvid.data.rows import Row

CLIPS, ENCODED, LATENTS, STORES, RELEASED, MANIFESTS, JSON = 96, 48, 96, 48, 24, 96, 32
OTHERS = {"files": 11, "rows": 36, "forms": 8}  # made by hand; each test counts its own
TOTAL = CLIPS + ENCODED + LATENTS + STORES + RELEASED + MANIFESTS + JSON + sum(OTHERS.values())
IDENTITY = {"codec": {"name": "time_fold", "frames": 2}, "text_encoder": {"name": "words"}}
FIELDS = {"latents": {"dtype": "float16", "shape": [None, 4, 8, 8]}}


def test_over_three_hundred_inputs_are_damaged():
    assert TOTAL == 495


@pytest.fixture(autouse=True)
def deadline():
    """A test that hangs fails."""

    def late(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(900)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def damaged(content, count):
    """``count`` variants of some bytes, each of them different from the whole."""
    for number in range(count):
        place, out, moments = number // 4 * 4 / count, bytearray(content), random.Random(number)
        if number % 4 == 3:
            yield content[: int(len(content) * place)]
            continue
        at = [int(len(content) * (number / count))] if number % 4 < 2 else moments.sample(range(len(out)), 8)
        for each in at:
            out[each] ^= 1 << moments.randrange(8)
        yield bytes(out)


@pytest.fixture
def call(capsys):
    """A command that ends with counts, which add up, and the list of what was put aside; None where it was refused."""

    def run(verb, source, target, *options):
        status, told, err = command(capsys, verb, source, target, *options)
        if status == 2:
            assert err.count("error: ") == 1 and not told
            return None
        listed = [json.loads(line) for line in (target / "quarantine.jsonl").read_text().splitlines()]
        assert told["given"] == told["done"] + told["skipped"] + told["quarantined"]
        assert told["quarantined"] == len(listed) and all(row["clip"] and row["reason"] for row in listed)
        assert status == (3 if listed else 0)
        return {name: told[name] for name in ("given", "done", "skipped", "quarantined")}, listed

    return run


FORM = ["--height", "16", "--width", "16", "--frames", "5", "--fps", "10", "--workers", "1", "--seconds", "60"]
PARTS = ["--codec", "{name: time_fold, frames: 2}", "--text-encoder", "{name: words, dim: 4, length: 6}"]


def row(number):
    latents = np.random.default_rng(number).standard_normal((2, 4, 8, 8)).astype(np.float16)
    return Row(f"r{number:03d}", {"latents": latents}, {"caption": f"caf\xe9 {number}"})


@pytest.mark.slow
def test_clips(tmp_path, call):
    """Damaged clips and files that are no clips, beside good ones, through process and encode."""
    good = video(np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), np.uint8))
    for number, broken in enumerate(damaged(good, CLIPS)):
        (tmp_path / f"bad{number:03d}.mp4").write_bytes(broken)
    others = {
        "empty": b"", "text": b"not a video at all\n" * 99, "zeros": bytes(4096), "sound": sound(),
        "png": png(levels(1)[0]),
        "zip": b"PK\x03\x04" + bytes(99), "list": b"#EXTM3U\n#EXTINF:1,\nok0.mp4\n#EXT-X-ENDLIST\n",
        "script": b"ffconcat version 1.0\nfile ok0.mp4\n", "tail": b"x" + good,
    }  # fmt: skip
    for name, content in others.items():
        (tmp_path / f"other-{name}.mp4").write_bytes(content)
    os.mkfifo(tmp_path / "other-pipe.mp4")
    (tmp_path / "other-link.mp4").symlink_to("other-link.mp4")
    for number in range(4):
        (tmp_path / f"ok{number}.mp4").write_bytes(video(levels(20 + number)))
    names = sorted(path.name for path in tmp_path.iterdir())
    listed = tmp_path / "all.json"
    listed.write_text(json.dumps(dict.fromkeys(names, "a cat")))
    counts, aside = call("process", listed, tmp_path / "out", *FORM)
    assert counts["given"] == CLIPS + OTHERS["files"] + 4
    put_aside = {row["clip"] for row in aside}
    assert {f"other-{name}.mp4" for name in (*others, "pipe", "link")} - {"other-tail.mp4"} <= put_aside
    assert not any(name.startswith("ok") for name in put_aside) and counts["quarantined"] >= CLIPS // 3

    made = (tmp_path / "out" / "clips").glob("ok0*.mp4")
    content = next(made).read_bytes()
    (tmp_path / "clips").mkdir()
    for number, broken in enumerate(damaged(content, ENCODED)):
        (tmp_path / "clips" / f"bad{number:03d}.mp4").write_bytes(broken)
    for number in range(4):  # an even number of frames does not fold in pairs after the first
        (tmp_path / "clips" / f"even{number}.mp4").write_bytes(video(levels(2 + 2 * number)))
    (tmp_path / "clips" / "ok.mp4").write_bytes(content)
    counts, listed = call("encode", tmp_path / "clips", tmp_path / "latents", *PARTS)
    assert counts["given"] == ENCODED + 4 + 1
    aside = {row["clip"] for row in listed}
    assert {f"even{number}.mp4" for number in range(4)} <= aside and "ok.mp4" not in aside
    for path in (tmp_path / "latents" / "latents").iterdir():  # what went through is whole
        assert np.isfinite(from_file(path.read_bytes()).arrays["latents"]).all()


def test_rows_of_manifests(tmp_path, call):
    """Rows with strange paths, captions and values, through download."""
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "in" / "ok.mp4").write_bytes(b"clip")
    (tmp_path / "in" / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "in" / "pipe.mp4")  # a reader would wait for a writer
    paths = [
        "../secret.mp4", "a/../../secret.mp4", "..\\secret.mp4", "a/..", "..", "~/secret.mp4", "~root/x.mp4",
        "a\u0000.mp4", "a\nb.mp4", "zip://ok.mp4::../secret.mp4", "http://127.0.0.1:9/x.mp4", "nowhere://x/y.mp4",
        "missing.mp4", "a/b/c.mp4",
        "folder.mp4", "ok.mp4/", "ok.mp4/x.mp4", ".", "x" * 5000, "/nonexistent/x.mp4", "pipe.mp4",
    ]  # fmt: skip
    whole = {"path": "ok.mp4", "caption": "a cat"}
    rows: list[object] = [{**whole, "path": path} for path in paths]
    rows += [{**whole, **change} for change in (
        {"caption": 7}, {"caption": {"a": 1}}, {"caption": "x" * 20_000}, {"start": -1}, {"start": "soon"}, {"end": 0},
        {"start": 2, "end": 1}, {"id": "../x"}, {"sha256": "zz"}, {"sha256": "0" * 64},
    )]  # fmt: skip
    rows += [{"caption": "no path"}, {**whole, "url": "ok.mp4"}, [1, 2], None]
    lines = [json.dumps(each).encode() for each in rows] + [b'{"path": "ok.mp4", "caption": "caf\xe9"}']
    assert len(lines) == OTHERS["rows"]
    lines = [json.dumps(whole).encode()] * 2 + lines
    (tmp_path / "in" / "m.jsonl").write_bytes(b"\n".join(lines))
    counts, _ = call("download", tmp_path / "in" / "m.jsonl", tmp_path / "out")
    assert counts == {"given": len(lines), "done": 1, "skipped": 1, "quarantined": OTHERS["rows"]}
    assert all(b"secret" not in path.read_bytes() for path in (tmp_path / "out").rglob("*.mp4"))


@pytest.mark.slow
def test_whole_manifests(tmp_path, call):
    """Manifests of all kinds: read to the last row, or refused as a whole with one error."""
    rows = [{"path": f"{n}.mp4", "caption": f"a caf\xe9 {n}"} for n in range(10)]
    content = {
        "m.jsonl": "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode(),
        "m.json": json.dumps(rows).encode(),
        "captions.json": json.dumps({r["path"]: r["caption"] for r in rows}).encode(),
        "m.csv": b"path,caption\n" + b"".join(f"{r['path']},{r['caption']}\n".encode() for r in rows),
    }  # fmt: skip
    refused = 0
    for name, whole in content.items():
        for broken in damaged(whole, MANIFESTS // len(content)):
            (tmp_path / name).write_bytes(broken)
            ended = call("download", tmp_path / name, tmp_path / "out")
            if ended is None:
                refused += 1
            elif name == "m.jsonl":
                assert ended[0]["given"] == len([line for line in broken.split(b"\n") if line.strip()])
            elif name.endswith(".json"):  # one that is read is whole: no flipped bit makes a row of ten
                assert ended[0]["given"] == len(rows)
            else:
                lines = broken.decode("utf-8-sig", "replace").splitlines()[1:]
                assert ended[0]["given"] == len([line for line in lines if line])
    assert 0 < refused < MANIFESTS


def test_latents(tmp_path, call, capsys):
    """Files of latents that are damaged, or whole and of another form, beside good ones, through pack."""
    folder = Folder(str(tmp_path / "latents"))
    whole = {**IDENTITY, "text_length": 6, "text_dim": 4, "unconditional": []}
    folder.write_json("recipe.json", whole)
    text = np.ones((2, 4), np.float32)

    def put(name, key, **arrays):
        content = to_file(Row(key, {"latents": row(1).arrays["latents"], "text": text, **arrays}, {"caption": "x"}))
        folder.write(f"latents/{name}.safetensors", content)
        return content

    for number in range(3):
        put(f"ok{number}", f"ok{number}")
    for number, broken in enumerate(damaged(put("ok0", "ok0"), LATENTS)):
        folder.write(f"latents/xbad{number:03d}.safetensors", broken)
    forms = [
        {"latents": np.zeros((2, 4, 8), np.float16)}, {"latents": np.zeros((2, 5, 8, 8), np.float16)},
        {"latents": np.zeros((2, 4, 8, 8), np.float32)}, {"latents": np.zeros((2, 4, 8, 8), np.int64)},
        {"text": np.zeros((2, 5), np.float32)}, {"text": np.zeros(8, np.float32)}, {"more": np.zeros(1, np.float16)},
    ]  # fmt: skip
    for number, arrays in enumerate(forms):
        put(f"xform{number}", f"xform{number}", **arrays)
    put("xother", "ok0")
    assert len(forms) + 1 == OTHERS["forms"]
    given = 3 + LATENTS + OTHERS["forms"]
    counts, _ = call("pack", tmp_path / "latents", tmp_path / "store")
    # Every file names its row, so none passes for another.
    assert counts == {"given": given, "done": 3, "skipped": 0, "quarantined": given - 3}
    status, told, _ = command(capsys, "verify", tmp_path / "store")
    assert status == 0 and told["done"] == 3


@pytest.mark.slow
def test_stores(tmp_path, call):
    """Each is refused, or lists its damaged rows."""
    with Writer(tmp_path / "s", {"fields": FIELDS}) as writer:
        writer.add([row(number) for number in range(8)])
    finish(tmp_path / "s")
    packing.pack(str(tmp_path / "s"), str(tmp_path / "whole"))
    content = (tmp_path / "whole" / "data.mdb").read_bytes()
    told_by = (tmp_path / "whole" / "digest.json").read_bytes()
    refused = listed = 0
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "digest.json").write_bytes(told_by)
    for broken in damaged(content, STORES):
        (tmp_path / "broken" / "data.mdb").write_bytes(broken)
        ended = call("verify", tmp_path / "broken", tmp_path / "told")
        if ended is None:
            refused += 1
            continue
        assert ended[0]["given"] == 8
        listed += bool(ended[1])
    assert refused + listed == STORES  # a file that differs in one bit never passes for the whole


@pytest.mark.slow
def test_released_layout(tmp_path, call):
    """It has no checksums: what is read right or wrong can't be told, but every row is counted and nothing crashes."""
    with lmdb.open(str(tmp_path / "old"), map_size=1 << 20) as environment, environment.begin(write=True) as write:
        write.put(b"latents_shape", b"8 2 4 8 8")
        for number in range(8):
            write.put(f"latents_{number}_data".encode(), row(number).arrays["latents"].tobytes())
            write.put(f"prompts_{number}_data".encode(), "caf\xe9".encode())
    content = (tmp_path / "old" / "data.mdb").read_bytes()
    (tmp_path / "broken").mkdir()
    read = 0
    for number, broken in enumerate(damaged(content, RELEASED)):
        (tmp_path / "broken" / "data.mdb").write_bytes(broken)
        ended = call("pack", tmp_path / "broken", tmp_path / f"new{number}")
        if ended is not None:
            assert ended[0]["given"] == 8
            read += 1
    assert 0 < read < RELEASED


@pytest.mark.slow
def test_what_the_commands_remember(tmp_path, call):
    """Damaged recipe.json, records and digest.json: one error, or the work is done again; never a wrong result."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").write_bytes(video(levels(20)))
    out = tmp_path / "out"
    call("process", tmp_path / "raw", out, *FORM)
    (record,) = (out / "records").iterdir()
    clip = next((out / "clips").iterdir()).read_bytes()
    with Writer(tmp_path / "s", {"fields": FIELDS}) as writer:
        writer.add([row(0)])
    finish(tmp_path / "s")
    packing.pack(str(tmp_path / "s"), str(tmp_path / "store"))
    for path in (out / "recipe.json", record, tmp_path / "store" / "digest.json"):
        whole = path.read_bytes()
        for broken in damaged(whole, {"recipe.json": 12, "digest.json": 12}.get(path.name, 8)):
            path.write_bytes(broken)
            if path.name == "digest.json":
                assert call("verify", tmp_path / "store", tmp_path / "told") is None
            else:
                ended = call("process", tmp_path / "raw", out, *FORM)
                assert ended is None or (
                    ended[0]["given"] == 1 and next((out / "clips").iterdir()).read_bytes() == clip
                )
            path.write_bytes(whole)
