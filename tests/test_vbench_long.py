"""Suites, clips, mapping and pooling: by hand, and each known fault of upstream's long mode shown and avoided."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causvid.errors import UserError
from causvid.eval import judges, reference
from causvid.eval.clips import Mapping101, Policy, bounds, first_frames, fuse, read_mapping
from causvid.eval.pooling import Judged, per_video, pool
from causvid.eval.suites import check_case, file_name, parse_name, read_suite, scan

CLEAN, UPSTREAM = Policy("clean"), Policy("upstream")
OVERALL = ("overall_consistency", "aesthetic_quality", "imaging_quality")
LINE = Mapping101(tuple(n / 100 for n in range(101)), tuple(n / 100 for n in range(101)))


def suite(tmp_path, rows):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(rows))
    return read_suite(path)


def row(text, *dimensions, **auxiliary):
    return {"prompt_en": text, "dimension": list(dimensions or ["color"]), "auxiliary_info": auxiliary}


# One row of each kind, as VBench_full_info.json has them.
LOOKED_FOR = [
    row("a person", "object_class", object_class={"object": "person"}),
    row("a bird and a cat", "multiple_objects", multiple_objects={"object": "bird and cat"}),
    row("a red car", "color", color={"color": "red"}),
    row("a bicycle on the left of a car, front view", "spatial_relationship", spatial_relationship={
        "spatial_relationship": {"object_a": "bicycle", "object_b": "car", "relationship": "on the left of"}}),
    row("alley", "scene", scene={"scene": {"scene": "alley"}}),
    row("a bear, Van Gogh style", "appearance_style", appearance_style={"appearance_style": "Van Gogh style"}),
]  # fmt: skip


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_clips_by_hand():
    assert bounds(81, 32) == [(0, 32), (32, 64), (49, 81)]
    assert bounds(64, 32) == [(0, 32), (32, 64)] and bounds(31, 32) == [(0, 31)] and bounds(1, 32) == [(0, 1)]


@given(st.integers(1, 500), st.integers(1, 200))
def test_clips_cover_every_frame_and_are_as_long_as_asked(frames, length):
    cuts = bounds(frames, length)
    assert {n for start, stop in cuts for n in range(start, stop)} == set(range(frames))
    assert all(stop - start == min(length, frames) for start, stop in cuts) and cuts == sorted(cuts)


def test_clip_length_of_aesthetic_quality_is_its_own_and_under_upstream_its_neighbours():
    assert [CLEAN.seconds(name, OVERALL) for name in OVERALL] == [10, 2, 2]
    assert [UPSTREAM.seconds(name, OVERALL) for name in OVERALL] == [10, 10, 10]
    assert CLEAN.seconds("color", ["color"]) == UPSTREAM.seconds("color", ["color"]) == 2


def test_a_fractional_rate_is_rounded_at_the_clip_and_under_upstream_cut_off_before():
    assert CLEAN.clip_frames(30000 / 1001, 10) == 300 and UPSTREAM.clip_frames(30000 / 1001, 10) == 290
    assert CLEAN.clip_frames(16, 2) == UPSTREAM.clip_frames(16, 2) == 32


@pytest.mark.parametrize("fps", [0.0, -1.0, math.nan, math.inf])
def test_an_unreadable_duration_is_one_clear_error(fps):
    for policy in (CLEAN, UPSTREAM):
        with pytest.raises(UserError, match="frame rate"):
            policy.clip_frames(fps, 2)
    with pytest.raises(UserError, match="no clip length"):
        CLEAN.seconds("nothing", [])
    with pytest.raises(TypeError):
        int(None)  # type: ignore[arg-type]  # what upstream does of a video whose prompt it does not find


def test_only_upstream_encodes_clips_again_and_the_label_says_so():
    assert UPSTREAM.reencode and not CLEAN.reencode
    assert "upstream" in UPSTREAM.label and "re-encoded" in UPSTREAM.label and "clean" in CLEAN.label


def test_first_frames_are_those_of_the_clips_and_one_clip_has_no_fast_branch():
    assert first_frames(bounds(81, 32)) == ((0, 1), (32, 33), (49, 50))
    assert first_frames(bounds(81, 200)) == ()


def upstreams_pseudo_video_names(clips):
    """How upstream finds a clip's long video: by the file name up to the first underscore."""
    return {os.path.basename(clip).split("_")[0] for clip in clips}


def test_a_prompt_with_an_underscore_keeps_its_fast_branch(tmp_path):
    text = "a snake_case robot"
    assert upstreams_pseudo_video_names([f"{text}-0_000.mp4"]) == {"a snake"}  # which is no video: its score is lost
    prompts = suite(tmp_path, [row(text, "background_consistency")])
    found = scan(touch(tmp_path / "v", file_name(text, 0)), prompts, 1)
    assert [v.prompt for v in found.videos] == [text] and parse_name(f"{text}-3.mp4") == (text, 3)
    # Upstream then looks the long video up, does not find it, takes 0, and reads the mapped 0 as no branch at all.
    assert fuse(0.9, 0.0, LINE, UPSTREAM) == 0.9
    assert fuse(0.9, 0.0, LINE, CLEAN) == pytest.approx(0.45)


def test_the_order_in_which_a_folder_is_listed_decides_nothing(tmp_path, monkeypatch):
    texts = ["b", "a", "z"]
    folder = touch(tmp_path / "v", *(file_name(text, i) for text in texts for i in range(2)))
    (folder / "split_clip").mkdir()
    prompts = suite(tmp_path, [row(text) for text in texts])
    expected = [("b", 0), ("b", 1), ("a", 0), ("a", 1), ("z", 0), ("z", 1)]
    listing = sorted(os.listdir(folder), key=lambda name: name != "split_clip")
    postfix = os.path.splitext(listing[0])[1]  # upstream takes the ending of the first entry
    assert postfix == "" and not any(name == f"b-0{postfix}" for name in listing)  # and then finds no video at all
    for turn in (listing, listing[::-1]):
        monkeypatch.setattr(type(folder), "iterdir", lambda self, turn=turn: iter([self / name for name in turn]))
        assert [(v.prompt, v.index) for v in scan(folder, prompts, 2).videos] == expected


def test_files_that_do_not_belong_are_listed_with_what_is_wrong(tmp_path):
    prompts = suite(tmp_path, [row("a cat"), row("A cat"), row("a dog")])
    names = ["a cat-0.mp4", "A cat-0.mp4", "A DOG-0.mp4", "a cat-9.mp4", "a cow-0.mp4", "a cat.mp4", "notes.txt", ".x"]
    found = scan(touch(tmp_path / "v", *names), prompts, 1)
    assert [v.path.name for v in found.videos] == ["a cat-0.mp4", "A cat-0.mp4"] and found.absent == ("a dog-0.mp4",)
    told = dict(found.problems)
    assert sorted(told) == ["A DOG-0.mp4", "a cat-9.mp4", "a cat.mp4", "a cow-0.mp4", "notes.txt"]
    assert "case only" in told["A DOG-0.mp4"] and "index 9" in told["a cat-9.mp4"] and "no index" in told["a cat.mp4"]
    assert "no prompt of the suite" in told["a cow-0.mp4"] and "no .mp4" in told["notes.txt"]


def test_prompts_that_differ_in_case_need_a_file_system_that_does(tmp_path, monkeypatch):
    prompts = suite(tmp_path, [row("A fantasy landscape"), row("a fantasy landscape")])
    check_case(tmp_path, prompts)
    monkeypatch.setattr("causvid.eval.suites.folds_case", lambda folder: True)
    check_case(tmp_path, prompts[:1])
    with pytest.raises(UserError, match="share a file"):
        check_case(tmp_path, prompts)


def test_what_a_rule_looks_for_is_read_from_upstreams_nesting(tmp_path):
    prompts = suite(tmp_path, LOOKED_FOR)
    assert [prompt.auxiliary for prompt in prompts] == [row["auxiliary_info"] for row in LOOKED_FOR]
    bare = row("a cat", "color")  # of no use to the judge, which says so; flickering does not ask
    assert suite(tmp_path, [bare])[0].auxiliary == {}


def test_a_judge_is_given_what_upstreams_function_reads(tmp_path, monkeypatch):
    """Upstream hands its function ``auxiliary_info[dimension]`` of the row, whatever the keys in it are called."""
    asked = []

    class Process:
        def ask(self, dimension, video, prompt, auxiliary):
            asked.append((dimension, prompt, auxiliary))

    monkeypatch.setattr(reference, "needed", lambda name, long=False: ())
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    for prompt in suite(tmp_path, LOOKED_FOR):
        (name,) = prompt.dimensions
        clip = judges.Clip(frames, 8.0, "a-0.mp4", prompt.text, prompt.auxiliary, tmp_path, tmp_path / "a-0.mp4")
        judges.Theirs(name, Process(), tmp_path).score(clip, "slow")
        with pytest.raises(UserError, match=f"does not say what {name} looks for"):
            judges.Theirs(name, Process(), tmp_path).score(replace(clip, auxiliary={}), "slow")
    expected = [(r["dimension"][0], r["prompt_en"], r["auxiliary_info"][r["dimension"][0]]) for r in LOOKED_FOR]
    assert asked == expected and asked[0][2]["object"] == "person" and asked[4][2]["scene"]["scene"] == "alley"


@pytest.mark.parametrize(
    ("rows", "word"),
    [([row("a/b")], "slash"), ([row("x" * 260)], "too long"), ([row("a", "colour")], "did you mean 'color'"),
     ([{"prompt_en": "a"}], "no dimension"),
     ([row("a", ["scene"])], "unknown dimension"), ([{**row("a"), "auxiliary_info": [1]}], "an object by dimension"),
     ([row("a", color="red")], 'a\' has auxiliary_info .*"red".*: {"color": ...}} is accepted'),
     ([row("a", "object_class", object_class={"object_class": "cat"})], '{"object": ...}} is accepted'),
     ([row("a", object_clas={"object": "cat"})], "did you mean 'object_class'"),
     ([row("a", temporal_flickering={"x": "cat"})], "look for something"),
     ([{**row("a"), "extended": 5}], "extended 5"), ([3], "a row is"), ([], "no prompts"), ({}, "a list of prompts")],
)  # fmt: skip
def test_bad_suites_are_refused(tmp_path, rows, word):
    with pytest.raises(UserError, match=word):
        suite(tmp_path, rows)


def test_custom_prompts_are_lines_of_text(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a red circle moves left\n\na blue star moves up\n")
    prompts = read_suite(path)
    assert [p.text for p in prompts] == ["a red circle moves left", "a blue star moves up"]
    assert "temporal_flickering" in prompts[0].dimensions and "color" not in prompts[0].dimensions


def test_the_mapping_is_linear_between_its_points_and_flat_beyond():
    table = Mapping101(tuple(n / 100 for n in range(101)), tuple((n / 100) ** 0.5 for n in range(101)))
    assert table(0.25) == 0.5 and table(-1) == 0 and table(2) == 1
    assert table(0.255) == pytest.approx((0.5 + 0.26**0.5) / 2)


def test_a_mapping_file_is_checked(tmp_path):
    path = tmp_path / "map.yaml"
    path.write_text("".join(f"{n / 100}: {n / 100}\n" for n in range(101)))
    assert read_mapping(path) == LINE
    for text, word in [
        ("0.0: 0.0\n", "101"),
        ("a: b", "not a mapping"),
        ("- 1", "not a mapping"),
        ("", "not a mapping"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=word):
            read_mapping(path)
    with pytest.raises(UserError, match="does not exist"):
        read_mapping(tmp_path / "none.yaml")


def test_branches_are_averaged_and_a_single_clip_has_one():
    assert fuse(0.8, 0.6, LINE, CLEAN) == fuse(0.8, 0.6, LINE, UPSTREAM) == pytest.approx(0.7)
    assert fuse(0.8, None, LINE, CLEAN) == 0.8


ROWS = [Judged("a", 0, 0.5, 33), Judged("a", 1, 0.7, 33), Judged("b", 0, 0.9, 11)]


def test_videos_weigh_the_same_and_clips_within_them():
    assert per_video(ROWS) == {"a": pytest.approx(0.6), "b": 0.9}
    assert pool(ROWS, "clips_then_videos") == pool(ROWS, "frames") == pytest.approx(0.75)


def upstreams_subject_mean(shards):
    """By frame on one GPU, by video on several."""
    if len(shards) == 1:
        return sum(r.score * (r.frames - 1) for r in shards[0]) / sum(r.frames - 1 for r in shards[0])
    rows = [r for shard in shards for r in shard]
    return sum(r.score for r in rows) / len(rows)


def test_the_number_of_processes_changes_no_mean():
    one, two = upstreams_subject_mean([ROWS]), upstreams_subject_mean([ROWS[:1], ROWS[1:]])
    assert one != pytest.approx(two)  # upstream's fault
    assert pool(ROWS, "frames", "upstream") == pytest.approx(one)
    for order in (ROWS, ROWS[::-1], ROWS[1:] + ROWS[:1]):
        assert pool(order, "frames") == pool(ROWS, "frames")
        assert pool(order, "frames", "upstream") == pytest.approx(one)


def test_a_video_without_the_object_does_not_count_and_none_is_not_zero():
    rows = [Judged("a", 0, None), Judged("b", 0, 0.5)]
    assert pool(rows, "found_only") == 0.5 and pool(rows[:1], "found_only") is None and pool([], "frames") is None
    with pytest.raises(ZeroDivisionError):
        sum([]) / len(defaultdict(list))  # what upstream's division does there
    with pytest.raises(ValueError, match="no score"):
        pool(rows, "clips_then_videos")
    with pytest.raises(ValueError, match="nan"):
        pool([Judged("a", 0, math.nan)], "frames")
