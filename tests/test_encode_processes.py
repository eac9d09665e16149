"""Encoding by processes of torchrun: every clip once, one list of what was put aside; killed, it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from videos import levels, video

from causvid.data import pack as packing
from causvid.data.lmdb_store import Reader

PARTS = ["--codec", "{name: time_fold, frames: 2}", "--text-encoder", "{name: words, dim: 4, length: 6}"]


def start(*command):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


CLIPS = 120  # so many that two processes are killed at work


def torchrun(source, target):
    return start("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "causvid.cli",
                 "data", "encode", source, target, *PARTS, "--json")  # fmt: skip


@pytest.mark.slow
def test_two_processes_of_torchrun_share_the_clips_and_go_on_after_a_kill(tmp_path):
    (tmp_path / "raw").mkdir()
    for number in range(CLIPS):
        (tmp_path / "raw" / f"{number:02d}.mp4").write_bytes(video(levels(5 + 2 * (number % 3))))
    alone = start("causvid.cli", "data", "encode", tmp_path / "raw", tmp_path / "alone", *PARTS)
    assert alone.wait() == 0
    killed = torchrun(tmp_path / "raw", tmp_path / "shared")
    while killed.poll() is None and len(list((tmp_path / "shared").glob("latents/*"))) < 3:
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = len(list((tmp_path / "shared").glob("latents/*.safetensors")))
    assert 3 <= before < CLIPS  # it was killed at work
    # A clip that the codec does not take, in the share of the first: the other must end its own all the same.
    (tmp_path / "raw" / "00-even.mp4").write_bytes(video(levels(4)))
    (tmp_path / "raw" / "99-cut.mp4").write_bytes(video(levels(5))[:500])
    again = torchrun(tmp_path / "raw", tmp_path / "shared")
    out, _ = again.communicate()
    assert again.returncode == 1  # torchrun's own status for any that is not 0
    counts = json.loads(out.strip().splitlines()[-1])
    assert counts == {
        "given": CLIPS + 2, "done": CLIPS - before, "skipped": before, "quarantined": 2,
        "output": str(tmp_path / "shared"),
    }  # fmt: skip
    listed = (tmp_path / "shared" / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["clip"] for line in listed) == ["00-even.mp4", "99-cut.mp4"]
    for name in ("alone", "shared"):
        packing.pack(str(tmp_path / name), str(tmp_path / "stores" / name))
    digests = [Reader(tmp_path / "stores" / name).digest() for name in ("alone", "shared")]
    assert digests[0] == digests[1] and len(Reader(tmp_path / "stores" / "shared")) == CLIPS
