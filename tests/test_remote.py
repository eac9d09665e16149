"""Clips that lie elsewhere: what can't be read costs itself, in bounded time; what this machine lacks costs no clip."""

from __future__ import annotations

import errno
import functools
import http.server
import json
import os
import re
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import command
from fsspec.implementations.memory import MemoryFileSystem
from videos import levels, video

from causvid.data import remote
from causvid.data.folders import EXTRAS, Folder, told
from causvid.errors import UserError

FORM = ["--height", "16", "--width", "16", "--frames", "5", "--fps", "10", "--workers", "1"]
PARTS = ["--codec", "{name: time_fold, frames: 2}", "--text-encoder", "{name: words, dim: 4, length: 6}"]
STEPS = {"download": [], "process": FORM, "encode": PARTS}


@pytest.fixture(scope="module")
def film():
    return video(levels(21))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves films; those of some names are missing, broken, refused, or never end."""

    content: bytes
    ended: threading.Event

    def answer(self, body):
        status = {"missing": 404, "broken": 500}.get(self.path.strip("/").split(".")[0], 200)
        if "silent" in self.path:
            self.ended.wait(60)
        self.send_response(status)
        self.send_header("Content-Length", str(len(self.content) if status == 200 else 0))
        self.end_headers()
        if body and status == 200:
            self.wfile.write(self.content[: 100 if "stalled" in self.path else None])
            if "stalled" in self.path:
                self.ended.wait(60)

    do_GET = functools.partialmethod(answer, True)
    do_HEAD = functools.partialmethod(answer, False)

    def log_message(self, *details):
        pass


@pytest.fixture
def address(film):
    pytest.importorskip("aiohttp")
    handler = type("Films", (Server,), {"content": film, "ended": threading.Event()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        handler.ended.set()
        server.shutdown()


@pytest.mark.parametrize(("step", "seconds"), [("download", 1), pytest.param("process", 3, marks=pytest.mark.slow)])
def test_a_web_server_that_stalls_or_fails_costs_single_clips(step, seconds, address, tmp_path, capsys):
    names = ("good", "missing", "broken", "silent", "stalled")
    lines = "".join(f"{address}/{name}.mp4,{name}\n" for name in names)
    (tmp_path / "m.csv").write_text("path,id\n" + lines)
    begin = time.monotonic()
    status, counts, err = command(
        capsys, step, tmp_path / "m.csv", tmp_path / "out", *STEPS[step], "--seconds", seconds
    )
    assert time.monotonic() - begin < 30
    assert (status, counts["given"], counts["done"], counts["quarantined"]) == (3, 5, 1, 4), err
    told = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {row["clip"].rpartition("/")[2]: row["reason"] for row in told}
    assert reasons["missing.mp4"] == "does not exist, or is no file"
    assert "can't be read" in reasons["broken.mp4"] and "500" in reasons["broken.mp4"]
    for name in ("silent.mp4", "stalled.mp4"):
        assert f"within {seconds} s" in reasons[name]


def test_a_server_that_does_not_answer_is_given_up(address):
    with pytest.raises(UserError, match="gave no answer, or not all of it, within 0.5 s"):
        remote.exists(Folder(address), "silent.mp4", seconds=0.5)
    assert remote.exists(Folder(address), "good.mp4") and not remote.exists(Folder(address), "missing.mp4")


def with_old_latents(tmp_path, film, capsys, name):
    """A remote clip, latents of it, and then a newer clip at its place; returns the arguments that encode it again."""
    raw = Folder(f"memory://{name}")
    raw.write("a.mp4", film)
    arguments = ("encode", raw, tmp_path / "latents", *PARTS)
    assert command(capsys, *arguments)[0] == 0
    raw.write("a.mp4", video(levels(7)))
    return arguments


def kept(tmp_path):
    return {path.name: path.read_bytes() for path in (tmp_path / "latents" / "latents").iterdir()}


FULL, QUOTA, CLOSED, ELSE = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES


@pytest.mark.parametrize(
    ("step", "number", "reason"),
    [
        ("download", FULL, "the disk is full"),
        ("process", FULL, "the disk is full"),
        ("encode", FULL, "the disk is full"),
        ("encode", QUOTA, "the disk is full"),
        ("encode", CLOSED, "Read-only"),
        ("encode", ELSE, "Permission denied"),
    ],
)
def test_a_place_for_copies_that_can_not_be_written_stops_the_command(
    step, number, reason, film, tmp_path, monkeypatch, capsys
):
    arguments = with_old_latents(tmp_path, film, capsys, f"full-{step}-{number}")
    before = kept(tmp_path)

    def get_file(self, source, target, **more):
        raise OSError(number, os.strerror(number), *([str(target)] if number == ELSE else []))

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    if step != "encode":
        arguments = (step, arguments[1], tmp_path / "out", *STEPS[step])
    status, counts, err = command(capsys, *arguments)
    assert status == 2 and not counts and err.count("error:") == 1
    assert reason in err and "can't be written" in err and "TMPDIR" in err
    assert "full-" not in err.partition("error:")[2]  # the place, and not the clip's
    assert kept(tmp_path) == before
    assert not (tmp_path / "out" / "quarantine.jsonl").exists()


def test_no_folder_for_temporary_files_stops_the_command(film, tmp_path, monkeypatch, capsys):
    arguments = with_old_latents(tmp_path, film, capsys, "nowhere")
    before = kept(tmp_path)
    monkeypatch.setattr(remote.tempfile, "tempdir", str(tmp_path / "gone"))
    status, counts, err = command(capsys, *arguments)
    assert (status, counts) == (2, {}) and "TMPDIR" in err and kept(tmp_path) == before


def test_latents_of_a_clip_that_can_not_be_read_now_stay(film, tmp_path, monkeypatch, capsys):
    arguments = with_old_latents(tmp_path, film, capsys, "broken")
    before = kept(tmp_path)
    with monkeypatch.context() as during:
        during.setattr(MemoryFileSystem, "get_file", lambda *given, **more: (_ for _ in ()).throw(OSError("hung up")))
        status, counts, _ = command(capsys, *arguments)
    assert (status, counts["quarantined"]) == (3, 1)
    assert "hung up" in (tmp_path / "latents" / "quarantine.jsonl").read_text()
    assert kept(tmp_path) == before
    assert command(capsys, *arguments)[1]["done"] == 1 and kept(tmp_path) != before


@pytest.mark.parametrize("address", ["s3://bucket/x", "gs://bucket/x", "hf://owner/name"])
def test_an_address_whose_package_is_missing_tells_what_to_install(address):
    extra = re.escape(f"pip install 'causvid[{address[:2]}]'")
    with pytest.raises(UserError, match=f"^{address}: .*{extra} .no module"), told(address):
        raise ImportError("no module")
    options = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) <= set(options["optional-dependencies"])


@pytest.mark.parametrize("seconds", ["inf", "1e20", "nan", "0", "-3"])
def test_a_time_limit_that_is_none_is_refused(seconds, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").write_bytes(b"x")
    for step, options in STEPS.items():
        status, counts, err = command(capsys, step, tmp_path / "raw", tmp_path / "o", *options, "--seconds", seconds)
        assert status == 2 and not counts and "--seconds" in err
    assert not (tmp_path / "o").exists()


def test_two_threads_that_read_one_file_in_memory_get_all_of_it(tmp_path):
    """``memory://`` gives every reader the same stream."""
    folder, content = Folder("memory://two-readers"), os.urandom(5 << 22)  # several reads
    folder.write("a.mp4", content)

    def read(number):
        remote.fetch(folder, "a.mp4", tmp_path / str(number), 60)
        return (tmp_path / str(number)).read_bytes() == content

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(16)))
