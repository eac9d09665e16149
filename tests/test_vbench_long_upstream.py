"""Faults of upstream's Long mode, shown on upstream's own functions, and that ours has them only where asked to.

Marked ``vbench``. What needs no upstream is in test_vbench_long.py.
"""

from __future__ import annotations

import json
import subprocess
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from videos import levels, video

from causvid.data.video import write_mp4
from causvid.errors import UserError
from causvid.eval import reference
from causvid.eval.clips import Mapping101, Policy, bounds, first_frames, fuse
from causvid.eval.footage import Footage
from causvid.eval.pooling import Judged, pool
from causvid.eval.suites import parse_name

pytestmark = pytest.mark.vbench
FAULTS = Path(__file__).with_name("vbench_long_faults.py")
CLEAN, UPSTREAM = Policy("clean"), Policy("upstream")
LINE = Mapping101(tuple(n / 100 for n in range(101)), tuple(n / 100 for n in range(101)))
FILM = Fraction(30000, 1001)  # frames per second


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """(what upstream did, the folder of its files)."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "grey").mkdir()
    (folder / "grey" / "even-0.mp4").write_bytes(video(levels(45), fps=8))
    (folder / "grey" / "film-0.mp4").write_bytes(video(levels(60), fps=FILM))
    for number, count in enumerate((3, 9)):
        noise = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(number)) * 2 - 1
        write_mp4(folder / "lengths" / f"x-{number}.mp4", noise * (number or 0.1), fps=8)
    line = [str(reference.interpreter()), "-I", str(FAULTS), str(folder)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), folder


def test_clips_are_those_of_upstream_at_a_whole_rate_and_shorter_at_another(upstream):
    facts, folder = upstream
    clips = {name: shown for name, shown in facts["clips"].items() if name.startswith("even")}
    cuts = bounds(45, UPSTREAM.clip_frames(8, 2))
    assert cuts == bounds(45, CLEAN.clip_frames(8, 2)) == [(0, 16), (16, 32), (29, 45)]
    assert [clips[name] for name in sorted(clips)] == [list(range(start, stop)) for start, stop in cuts]
    rate = Footage(folder / "grey" / "film-0.mp4").fps
    film = {name: shown for name, shown in facts["clips"].items() if name.startswith("film")}
    cuts = bounds(60, UPSTREAM.clip_frames(rate, 1))
    assert [film[name] for name in sorted(film)] == [list(range(start, stop)) for start, stop in cuts]
    assert cuts[0] == (0, 29) and bounds(60, CLEAN.clip_frames(rate, 1)) == [(0, 30), (30, 60)]  # a second of 29.97


def test_a_prompts_longest_clips_are_upstreams_and_an_unknown_prompt_ends_it(upstream):
    facts, _ = upstream
    names = ("overall_consistency", "aesthetic_quality", "imaging_quality")
    assert facts["seconds"] == {"plain": 2, "a": 10, "b": None} and facts["unknown_prompt"] == "TypeError"
    assert [UPSTREAM.seconds(name, names) for name in names] == [10, 10, 10]
    assert [CLEAN.seconds(name, names) for name in names] == [10, 2, 2]
    with pytest.raises(UserError, match="no clip length"):
        CLEAN.seconds("nothing", [])


def test_a_name_with_an_underscore_loses_the_fast_branch_upstream_and_so_does_a_score_of_zero(upstream):
    fused = upstream[0]["fused"]
    assert fused == pytest.approx({"plain": 0.75, "underscore": 0.9, "zero": 0.9})
    assert fuse(0.9, 0.6, LINE, CLEAN) == fuse(0.9, 0.6, LINE, UPSTREAM) == pytest.approx(fused["plain"])
    assert parse_name("a_b robot-0.mp4") == ("a_b robot", 0) and len(first_frames(bounds(45, 16))) == 3
    assert fuse(0.9, 0.0, LINE, UPSTREAM) == pytest.approx(fused["zero"])  # for comparable numbers
    assert fuse(0.9, 0.0, LINE, CLEAN) == pytest.approx(0.45)


def test_the_listing_decides_what_upstream_finds_and_half_written_clips_are_taken_for_whole(upstream):
    """Ours lists in the suite's order (test_vbench_long.py) and keeps no clips; rows are found by content."""
    facts, _ = upstream
    assert facts["clips_found"] == {"first": 0, "last": 2}
    assert facts["half_written"] == [None, 0]  # no error, and nothing to judge


def test_the_mean_of_subjects_depends_on_the_number_of_gpus_upstream(upstream):
    subject = upstream[0]["subject"]
    rows = [Judged(name, 0, score, 3 if name == "x-0.mp4" else 9) for name, score in subject["videos"].items()]
    assert len(rows) == 2 and abs(subject["one"] - subject["several"]) > 1e-4
    assert pool(rows, "frames", "upstream") == pytest.approx(subject["one"], abs=1e-6)
    assert pool(rows, "frames") == pytest.approx(subject["several"], abs=1e-6)
