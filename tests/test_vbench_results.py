"""The store of rows: interrupted anywhere, it ends the same; bad files are told and never count as zero."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import av
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from causvid.cli import app
from causvid.data.video import write_mp4
from causvid.errors import UserError
from causvid.eval import side_by_side
from causvid.eval.aggregate import read_scores
from causvid.eval.footage import Footage, decode
from causvid.eval.pooling import Judged
from causvid.eval.results import Question, Row, Store, require_comparable, write_upstream

cv2 = pytest.importorskip("cv2", reason="judging files needs OpenCV: pip install 'causvid[eval]'")

QUESTION = Question("ab", 0, (0, 8), "temporal_flickering", 1, "exact", {}, "opencv", "clean")


def clip(seed: int, frames: int = 12) -> torch.Tensor:
    still = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (still + torch.linspace(0, 0.5, frames)[:, None, None, None]).clamp(-1, 1)


@pytest.fixture
def folder(tmp_path):
    texts = ["a cat", "a dog", "a_b robot"]
    for number, text in enumerate(texts):
        for index in range(2):
            write_mp4(tmp_path / "v" / f"{text}-{index}.mp4", clip(10 * number + index))
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    return tmp_path


def command(folder, out, *options):
    return ["eval", "videos", str(folder / "v"), "--prompts", str(folder / "prompts.txt"), "--out", str(out),
            "--per-prompt", "2", *options]  # fmt: skip


def judge(folder, out, *options):
    result = CliRunner().invoke(app, command(folder, out, *options))
    return result, (out / "results.json").read_bytes() if (out / "results.json").is_file() else b""


def test_a_row_is_found_by_what_was_asked_and_by_nothing_else(tmp_path):
    with Store(tmp_path / "rows") as store:
        store.append(Row(QUESTION, 0.5))
        store.append(Row(Question(**{**QUESTION.__dict__, "dimension": "color"}), None))  # no object, which is no zero
        store.append(Row(Question(**{**QUESTION.__dict__, "dimension": "proxy_dynamics"}), 7.0))  # in pixels
    with Store(tmp_path / "rows") as store:
        assert QUESTION in store and store[QUESTION] == 0.5 and len(store) == 3
        changes = {"video_sha256": "cd", "clip": 2, "version": 2, "judge": "x", "weights": {"a": "1"}}
        changes |= {"decoder": "pyav", "clip_policy": "upstream", "dimension": "scene", "frames": (0, 9)}
        for change in ({name: value} for name, value in changes.items()):
            assert Question(**{**QUESTION.__dict__, **change}) not in store
        for score, told in ((float("nan"), "NaN"), (7.0, "7, beyond 1"), (None, "no score")):
            with pytest.raises(ValueError, match=f"temporal_flickering: the judge gave .*{told}"):
                store.append(Row(QUESTION, score))


def test_a_line_cut_short_anywhere_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "rows"
    with Store(path) as store:
        for number in range(3):
            store.append(Row(Question(**{**QUESTION.__dict__, "clip": number}), 0.1 * number))
    whole = path.read_bytes()
    start = whole.rfind(b"\n", 0, -1) + 1
    for cut in (start + 1, start + 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with Store(path) as store:
            assert len(store) == 2
            store.append(Row(Question(**{**QUESTION.__dict__, "clip": 2}), 0.2))
        assert path.read_bytes() == whole


def test_two_evaluations_do_not_write_one_file_and_a_damaged_one_is_told(tmp_path):
    with Store(tmp_path / "rows"), pytest.raises(UserError, match="in use"):
        Store(tmp_path / "rows")
    (tmp_path / "bad").write_text("hello\n")
    with pytest.raises(UserError, match="line 1"):
        Store(tmp_path / "bad")


@pytest.mark.parametrize(
    ("damage", "told"),
    [({"score": "abc"}, 'the score "abc" of temporal_flickering'), ({"score": float("nan")}, "the score NaN"),
     ({"score": True}, "the score true"), ({"score": None}, "no score of temporal_flickering"),
     ({"score": 7.0}, "the score 7, beyond 1"), ({"score": [0.5]}, "the score [0.5]"), ({"dimension": [1]}, "no row")],
)  # fmt: skip
def test_a_row_whose_score_is_none_is_told_with_its_line_and_is_not_pooled(tmp_path, damage, told):
    path, kept = tmp_path / "rows.jsonl", tmp_path / "other"
    other = Question(**{**QUESTION.__dict__, "clip": 1})
    with Store(path) as store:
        store.append(Row(QUESTION, 0.25))
        store.append(Row(other, 0.5))
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(json.loads(second) | damage)}\n")
    kept.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="line 2") as error:
        Store(path)
    assert told in str(error.value)
    path.write_text(first + "\n")  # the line removed, as the message says
    with Store(path) as store:
        assert len(store) == 1
    with Store(tmp_path / "mine", [kept]) as store:  # nor is it taken over from another file
        assert QUESTION in store and other not in store


def test_a_folder_is_judged_and_a_second_time_nothing_is_computed(folder, monkeypatch):
    result, first = judge(folder, folder / "e", "--json")
    out = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0 and out["problems"] == out["absent"] == []
    assert 0.9 < out["scores"]["temporal_flickering"] < 1 and out["totals"]["total"] is None
    assert set(out["proxies"]) == {
        "proxy_dynamics", "proxy_smoothness", "proxy_consistency", "proxy_sharpness", "proxy_saturation",
    }  # fmt: skip
    assert out["scores"]["aesthetic_quality"] is None and "--weights" in out["unjudged"]["aesthetic_quality"]
    assert len(out["videos"]["temporal_flickering"]) == 6
    from causvid.eval.exact import TemporalFlickering

    monkeypatch.setattr(TemporalFlickering, "score", lambda self, frames: pytest.fail("computed again"))
    assert judge(folder, folder / "e")[1] == first
    again = json.loads((folder / "e" / "upstream_eval_results.json").read_text())
    assert again["temporal_flickering"][0] == out["scores"]["temporal_flickering"]


def test_bad_files_are_listed_and_change_no_score(folder):
    _, content = judge(folder, folder / "good")
    good = json.loads(content)["scores"]["temporal_flickering"]
    videos = folder / "v"
    (folder / "prompts.txt").write_text("a cat\na dog\na_b robot\na cow\na hen")
    whole = (videos / "a dog-0.mp4").read_bytes()
    (videos / "a cow-0.mp4").write_bytes(whole[: len(whole) // 2])  # corrupt
    (videos / "a cow-1.mp4").write_bytes(whole)  # a copy
    write_mp4(videos / "a hen-0.mp4", clip(1, 1))  # a single frame
    (videos / "a hen-1.mp4").write_bytes(b"")  # empty
    (videos / "a pig-0.mp4").write_bytes(whole)  # no prompt of the suite
    result, content = judge(folder, folder / "bad")
    out = json.loads(content)
    told = dict(out["problems"])
    assert result.exit_code == 3 and out["scores"]["temporal_flickering"] == good
    assert sorted(told) == ["a cow-0.mp4", "a cow-1.mp4", "a hen-0.mp4", "a hen-1.mp4", "a pig-0.mp4"]
    assert "copy of" in told["a cow-1.mp4"] and "single frame" in told["a hen-0.mp4"]
    assert "no prompt" in told["a pig-0.mp4"] and "read" in told["a cow-0.mp4"] + told["a hen-1.mp4"]
    assert all(name in result.stderr for name in told)
    assert out["lacking"] == {"videos": 4, "of": 10} and json.loads((folder / "good" / "results.json").read_text())[
        "lacking"
    ] == {"videos": 0, "of": 6}
    pair = [folder / "good" / "results.json", folder / "bad" / "results.json"]
    with pytest.raises(UserError, match="different protocols.*judged_prompts"):  # another list of prompts
        side_by_side.compare(pair)
    assert f"INCOMPLETE: {pair[1]} lacks 4 of 10 videos" in side_by_side.compare(pair, across=True)["mark"]


def test_two_judged_folders_are_compared_though_dimensions_are_missing(folder):
    """What 'eval videos' writes without weights: totals are null, and what they lack is named."""
    judge(folder, folder / "one")
    other = folder / "other"
    (folder / "v").rename(folder / "kept")
    for number, path in enumerate(sorted((folder / "kept").iterdir())):
        write_mp4(folder / "v" / path.name, clip(100 + number) * 0.5)
    judge(folder, other)
    files = [folder / "one" / "results.json", other / "results.json"]
    first, second = (json.loads(path.read_text()) for path in files)
    assert len(first["totals"]["missing"]) == 15 and first["totals"]["total"] is None
    result = CliRunner().invoke(app, ["eval", "compare", *map(str, files), "--json"])
    assert result.exit_code == 0, result.exception
    rows = {row["measure"]: row for row in json.loads(result.stdout)["rows"]}
    assert set(rows) == {"temporal_flickering", *first["proxies"]}
    scores = [each["scores"]["temporal_flickering"] for each in (first, second)]
    assert scores[0] != scores[1] and rows["temporal_flickering"]["values"] == scores
    assert rows["temporal_flickering"]["differences"] == [0.0, scores[1] - scores[0]]
    shown = CliRunner().invoke(app, ["eval", "compare", *map(str, files)]).stdout
    assert f"({scores[1] - scores[0]:+.4f})" in shown and "missing" not in shown


def test_frames_that_the_decoder_made_up_are_listed_and_never_scored(folder):
    """Damage in the middle: OpenCV reads as many frames as ever, and some show what was never filmed."""
    ground = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ground = torch.nn.functional.interpolate(ground[None], scale_factor=4, mode="bilinear")[0]
    path = folder / "v" / "a cow-0.mp4"
    write_mp4(path, torch.stack([ground[:, :, n : n + 64] for n in range(40)]), fps=8, crf=20)
    whole, middle, concealed = path.read_bytes(), 0, 0
    true = decode(path).frames
    for start in range(40, 1000, 120):
        middle = len(whole) * start // 1100  # the index is at the end
        path.write_bytes(whole[:middle] + bytes(b ^ 0x5A for b in whole[middle : middle + 200]) + whole[middle + 200 :])
        capture = cv2.VideoCapture(str(path))
        frames = [frame for more, frame in iter(capture.read, (False, None)) if more]
        if len(frames) == 40 and not np.array_equal(frames, true):
            concealed += 1
            with pytest.raises(UserError, match="damaged near"):
                Footage(path)
            break
    assert concealed, "no damage was concealed, so nothing was tested"
    (folder / "prompts.txt").write_text("a cat\na dog\na_b robot\na cow")
    result, content = judge(folder, folder / "e")
    out = json.loads(content)
    assert result.exit_code == 3 and "damaged" in dict(out["problems"])["a cow-0.mp4"]
    assert not any(video["video"] == "a cow-0.mp4" for rows in out["videos"].values() for video in rows)


def test_a_file_that_is_cut_short_is_told_with_how_much_of_it_is_left(tmp_path):
    """Its index comes first and is whole, so it opens, and what is left decodes without an error."""
    write_mp4(tmp_path / "whole.mp4", clip(0, 40), fps=8)
    path = tmp_path / "short.mp4"
    with av.open(str(tmp_path / "whole.mp4")) as source:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        with av.open(str(path), "w", options={"movflags": "faststart"}) as out:
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in packets:
                packet.stream = stream
                out.mux(packet)
            sizes = [packet.size for packet in packets]
    assert Footage(path).count == 40
    content = path.read_bytes()
    path.write_bytes(content[: content.find(b"mdat") + 4 + sum(sizes[:30])])
    with pytest.raises(UserError, match=r"cut short: \d+ of 40 frames"):
        Footage(path)


def test_an_empty_folder_is_an_error_and_one_that_is_none_leaves_nothing(folder, monkeypatch):
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["eval", "videos", str(folder / "x"), "--prompts", str(folder / "prompts.txt")])
    assert isinstance(result.exception, UserError) and "is not a folder" in str(result.exception)
    assert not (folder / "evaluation").exists()
    (folder / "w").mkdir()
    result = CliRunner().invoke(app, ["eval", "videos", str(folder / "w"), "--prompts", str(folder / "prompts.txt")])
    assert isinstance(result.exception, UserError) and "no video" in str(result.exception)


def test_long_videos_are_cut_and_upstream_judges_encoded_clips(tmp_path):
    (tmp_path / "prompts.txt").write_text("long")
    noise = torch.rand(44, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_mp4(tmp_path / "v" / "long-0.mp4", noise, fps=8, crf=0)
    scores = {}
    for compat in ("clean", "upstream"):
        judge(tmp_path, tmp_path / compat, "--long-compat", compat, "--dimension", "temporal_flickering")
        rows = [json.loads(line) for line in (tmp_path / compat / "rows.jsonl").read_text().splitlines()]
        length = 16 if compat == "clean" else 44  # a prompt of overall consistency: 10 s clips under upstream
        assert rows[0]["frames"] == [0, length] and all(compat in row["clip_policy"] for row in rows)
        scores[compat] = json.loads((tmp_path / compat / "results.json").read_text())
    assert [row["frames"] for row in map(json.loads, (tmp_path / "clean" / "rows.jsonl").read_text().splitlines())] == [
        [0, 16], [16, 32], [28, 44],
    ]  # fmt: skip
    raw = {name: each["scores"]["temporal_flickering"] for name, each in scores.items()}
    assert raw["clean"] != raw["upstream"]
    with pytest.raises(UserError, match="clip_policy"):
        require_comparable({name: each["protocol"] for name, each in scores.items()})
    mark = require_comparable({name: each["protocol"] for name, each in scores.items()}, across=True)
    assert "not comparable" in mark and scores["clean"]["protocol_id"] != scores["upstream"]["protocol_id"]
    assert require_comparable({"a": scores["clean"]["protocol"], "b": scores["clean"]["protocol"]}) == ""


def test_upstreams_results_are_read_and_written(tmp_path):
    path = tmp_path / "x_eval_results.json"
    rows = {
        "imaging_quality": [Judged("a-0.mp4", 0, 0.625)],
        "color": [Judged("b-0.mp4", 0, None), Judged("c-0.mp4", 0, 0.5)],
    }
    write_upstream(path, {"imaging_quality": 0.625, "color": 0.5}, rows)
    table = json.loads(path.read_text())
    assert table["imaging_quality"] == [0.625, [{"video_path": "a-0.mp4", "video_results": 62.5}]]
    assert table["color"] == [0.5, [{"video_path": "c-0.mp4", "video_results": 0.5}]]  # no object is no zero
    assert read_scores(path) == {"imaging_quality": 0.625, "color": 0.5}


def test_killed_ten_times_it_ends_with_the_same_file(folder):
    for number in range(12):
        write_mp4(folder / "v" / f"p{number}-0.mp4", clip(100 + number, 40))
    (folder / "prompts.txt").write_text("\n".join(["a cat", "a dog", "a_b robot", *(f"p{n}" for n in range(12))]))
    chance, out = random.Random(0), folder / "killed"
    judge(folder, folder / "whole")
    rows, kills = out / "rows.jsonl", 0
    for _ in range(10):
        before = rows.stat().st_size if rows.exists() else 0
        child = os.fork()
        if child == 0:  # no new interpreter: its imports would take most of the time
            judge(folder, out)
            os._exit(0)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (rows.exists() and rows.stat().st_size > before):
            time.sleep(0.001)
        time.sleep(chance.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        kills += os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert kills == 10
    judge(folder, out)
    for name in ("rows.jsonl", "results.json", "upstream_eval_results.json"):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes()
