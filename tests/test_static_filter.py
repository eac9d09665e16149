"""The static filter before temporal flickering: which videos are sampled, asked, kept and judged."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
from test_judges import Recorder, moving

from causvid.data.video import write_mp4
from causvid.errors import UserError
from causvid.eval import evaluate_suite, judges, judging, reference, sampling, suites
from causvid.eval.clips import Policy
from causvid.eval.dimensions import dimensions
from causvid.eval.exact import flickering
from causvid.eval.footage import decode
from causvid.eval.results import Store
from causvid.eval.suites import Prompt


class Sifter:
    """Temporal flickering behind a static filter: a clip is static where its name says so; notes what is asked."""

    label, weights, fast_weights, mapping, lacks = "exact: test", {}, {}, None, ""
    static_weights = {"raft": "abc"}  # noqa: RUF012

    def __init__(self, moving=(), broken=()):
        self.dimension, self.moving, self.broken, self.asked = dimensions()["temporal_flickering"], moving, broken, []

    def score(self, clip, branch):
        if branch == "static":
            self.asked.append(clip.name)
            return float(clip.name not in self.moving)
        if clip.name in self.broken:
            raise UserError("no answer")
        return flickering(clip.frames)


FLICKER = [Prompt("still", ("temporal_flickering",)), Prompt("other", ("aesthetic_quality",))]


def sifted(folder, judge, policy=Policy(), per_prompt=2, static_filter=12):
    with Store(folder / f"rows {policy.label} {static_filter}") as store:
        return judging.judge_folder(
            folder / "v", FLICKER, store, policy, per_prompt, {"temporal_flickering": judge, "proxy_sharpness": PROXY},
            static_filter=static_filter,
        )  # fmt: skip


PROXY = judges.Ours(dimensions()["proxy_sharpness"])


def test_of_many_videos_the_first_five_static_ones_are_judged_and_the_others_are_no_zero(tmp_path):
    """As upstream: in order of the files' names, 10 before 2; asked no further than needed."""
    for number in range(12):
        write_mp4(tmp_path / "v" / f"still-{number}.mp4", moving(number, 4), fps=8)
    write_mp4(tmp_path / "v" / "other-0.mp4", moving(20, 4), fps=8)
    judge = Sifter(moving=("still-1.mp4", "still-11.mp4"), broken=("still-2.mp4",))
    found = sifted(tmp_path, judge)
    kept = [f"still-{n}.mp4" for n in (0, 10, 3, 4, 5)]
    assert judge.asked == [f"still-{n}.mp4" for n in (0, 1, 10, 11, 2, 3, 4, 5)]
    assert list(found.videos["temporal_flickering"]) == kept and found.problems == (
        [("still-2.mp4", "temporal_flickering: no answer")]
    )
    own = [flickering(decode(tmp_path / "v" / name).frames) for name in kept]
    assert found.scores["temporal_flickering"] == pytest.approx(np.mean(own), abs=1e-9)
    # What is there for the filter alone is judged in nothing else.
    assert set(found.videos["proxy_sharpness"]) == {"still-0.mp4", "still-1.mp4", "other-0.mp4"}
    out = found.as_json()
    assert out["static_filter"] == {"videos": 5, "clips": 5, "fewer": {}} and out["protocol"]["static_filter"] == 12
    assert out["protocol"]["weights"] == {"raft": "abc"}
    again = Sifter(moving=judge.moving)
    assert sifted(tmp_path, again).protocol == found.protocol and again.asked == []
    plain = sifted(tmp_path, Recorder("temporal_flickering"), static_filter=0)
    assert plain.protocol.static_filter is False and plain.protocol.id != found.protocol.id


def test_where_flickering_is_not_judged_the_filter_is_no_part_of_the_protocol(tmp_path):
    write_mp4(tmp_path / "v" / "still-0.mp4", moving(0, 4), fps=8)
    with Store(tmp_path / "rows") as store:
        without, other = (
            judging.judge_folder(
                tmp_path / "v", FLICKER, store, Policy(), 2, {"proxy_sharpness": PROXY},
                {"temporal_flickering": "no RAFT"}, static_filter=count,
            )
            for count in (0, 25)
        )  # fmt: skip
    assert other.protocol == without.protocol and other.sifted is None


def test_where_no_video_is_static_there_is_no_score(tmp_path):
    for number in range(3):
        write_mp4(tmp_path / "v" / f"still-{number}.mp4", moving(number, 4), fps=8)
    found = sifted(tmp_path, Sifter(moving=[f"still-{n}.mp4" for n in range(3)])).as_json()
    assert found["scores"]["temporal_flickering"] is None and found["totals"]["quality"] is None
    assert "keeps no video" in found["unjudged"]["temporal_flickering"]
    assert found["static_filter"] == {"videos": 0, "clips": 0, "fewer": {"still": 0}}


def test_of_long_videos_static_clips_are_judged_of_five_videos_and_under_upstream_five_clips(tmp_path):
    """Upstream counts clips, so a prompt's score may come from two videos; five videos is what it says it wants."""
    for number in range(7):
        write_mp4(tmp_path / "v" / f"still-{number}.mp4", moving(number, 44), fps=8)
    moves = ("still-0_001.mp4",)
    clean = sifted(tmp_path, Sifter(moves), per_prompt=7)
    assert list(clean.videos["temporal_flickering"]) == [f"still-{n}.mp4" for n in range(5)]
    assert [row.clip for row in clean.rows["temporal_flickering"]][:4] == [0, 2, 0, 1]
    assert len(clean.rows["temporal_flickering"]) == 14
    upstream = sifted(tmp_path, Sifter(moves), Policy("upstream"), per_prompt=7)
    assert [(row.video, row.clip) for row in upstream.rows["temporal_flickering"]] == [
        ("still-0.mp4", 0), ("still-0.mp4", 2), *(("still-1.mp4", n) for n in range(3))
    ]  # fmt: skip


def test_videos_for_the_filter_are_sampled_of_its_prompts_alone(tmp_path):
    names = [job.name for job in sampling.jobs(FLICKER, 5, 25)]
    assert len(names) == 30 and names[:2] == ["still-0.mp4", "other-0.mp4"] and names[-1] == "still-24.mp4"
    assert len(sampling.jobs(FLICKER, 5)) == 10
    assert not scan_of(tmp_path, [f"still-{n}.mp4" for n in range(25)] + [f"other-{n}.mp4" for n in range(5)]).problems
    assert "indices 0 to 4" in scan_of(tmp_path, ["other-5.mp4"]).problems[0][1]


def scan_of(folder, names):
    for name in names:
        (folder / name).write_bytes(b"x")
    return suites.scan(folder, FLICKER, 5, 25)


def test_the_filter_needs_raft_and_says_so(tmp_path):
    for folder, word in ((None, "--weights"), (tmp_path, "raft-things.pth missing")):
        missing = judges.readiness(["temporal_flickering"], folder, True)["temporal_flickering"]
        assert word in missing or "not set up" in missing
        assert "temporal_flickering" not in judges.readiness(["temporal_flickering"], folder)
        with pytest.raises(UserError, match="'temporal_flickering' can't be judged"):
            judges.require(["temporal_flickering"], folder, False, True)


def test_the_filter_is_asked_of_the_reference_judge_and_flickering_is_ours(tmp_path, monkeypatch):
    asked = []

    class Process:
        def ask(self, dimension, video, prompt="", auxiliary=None):
            asked.append((dimension, video.name))
            return 0.0 if video.name == "still-1.mp4" else 1.0

    @contextmanager
    def process(folder, log, device="cpu"):
        yield Process()

    monkeypatch.setattr(reference, "judge", process)
    monkeypatch.setattr(reference, "doctor", lambda folder: {"dynamic_degree": []})
    raft = tmp_path / "weights" / "raft_model" / "models" / "raft-things.pth"
    raft.parent.mkdir(parents=True)
    raft.write_bytes(b"flow")
    for number in range(3):
        write_mp4(tmp_path / "v" / f"still-{number}.mp4", moving(number, 4), fps=8)
    found = evaluate_suite.evaluate(
        tmp_path / "v", FLICKER[:1], tmp_path / "out", Policy(), 1, ["temporal_flickering"], tmp_path / "weights",
        static_filter=3,
    )  # fmt: skip
    assert asked == [("temporal_flickering.static", f"still-{n}.mp4") for n in range(3)]
    own = [flickering(decode(tmp_path / "v" / f"still-{n}.mp4").frames) for n in (0, 2)]
    assert found.scores["temporal_flickering"] == pytest.approx(np.mean(own), abs=1e-9)
    assert "static filter: vbench 0.1.5" in found.protocol.judges["temporal_flickering"]
    assert list(found.protocol.weights) == ["raft_model/models/raft-things.pth"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [(row["branch"], row["score"]) for row in rows][2:3] == [("static", 0.0)] and len(rows) == 5
