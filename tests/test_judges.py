"""The reference judge without upstream: the worker runs isolated, a stand-in package answers, failures are told."""

from __future__ import annotations

import json
import subprocess
import venv

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from causvid.cli import app
from causvid.data.video import write_mp4
from causvid.errors import UserError
from causvid.eval import judges, judging, reference, sampling
from causvid.eval.clips import Mapping101, Policy
from causvid.eval.dimensions import Weights, dimensions
from causvid.eval.footage import Footage, decode
from causvid.eval.results import Store
from causvid.eval.scenes import scenes
from causvid.eval.suites import CUSTOM, Prompt, read_suite

pytest.importorskip("cv2", reason="judging files needs OpenCV: pip install 'causvid[eval]'")

STAND_IN = {
    "temporal_flickering": "import statistics\n\ndef cal_score(video):\n    return statistics.mean([0.25, 0.75])\n",
    "human_action": """
def human_action(weights, videos, device):
    name = videos[0].rsplit("/", 1)[1]
    if "crash" in name:
        import os
        os._exit(7)
    if "fail" in name:
        raise RuntimeError("no hands")
    return (1.0 if "person is " in name else 0.0), None
""",
    "scene": "raise ImportError('fairscale is not there')\n",
}


TORCH = """
import random, statistics  # as the real one does: a module of ours of that name must not be found

statistics.mean([1])

class library:
    class Library:
        def __init__(self, *names): pass
        def define(self, schema): pass
"""


@pytest.fixture
def upstream(tmp_path, monkeypatch):
    """An environment of its own, as ``causvid vbench setup`` makes one, whose torch and vbench are a few lines."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    for package, files in {"vbench": {"__init__": "", **STAND_IN}, "torch": {"__init__": TORCH}}.items():
        (site / package).mkdir()
        for name, source in files.items():
            (site / package / f"{name}.py").write_text(source)
    monkeypatch.setattr(reference, "interpreter", lambda: tmp_path / "env" / "bin" / "python")
    return tmp_path


def ask(folder, *questions):
    with reference.judge(folder, folder / "judge.log") as judge:
        out = []
        for name, video in questions:
            try:
                out.append(judge.ask(name, folder / video, "a person is waving", None))
            except UserError as error:
                out.append((type(error).__name__, str(error)))
        return out


def test_no_module_of_ours_hides_one_of_pythons(upstream):
    """causvid/eval/statistics.py lies beside the worker, and upstream imports Python's."""
    assert ask(upstream, ("temporal_flickering", "a.mp4")) == [0.5]
    worker = [str(reference.interpreter()), str(reference.WORKER), "--weights", "."]  # the fault: not isolated
    question = json.dumps({"dimension": "temporal_flickering", "video": "a", "prompt": "", "auxiliary": None})
    done = subprocess.run(worker, input=question, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "causvid" in done.stderr


def test_failures_are_told_apart_and_a_judge_that_ends_starts_again(upstream):
    found = ask(
        upstream, ("human_action", "a person is waving-0.mp4"), ("human_action", "fail-0.mp4"), ("scene", "a.mp4"),
        ("human_action", "crash-0.mp4"), ("human_action", "other-0.mp4"),
    )  # fmt: skip
    assert (found[0], found[4]) == (1.0, 0.0)
    assert found[1][0] == "UserError" and "no hands" in found[1][1]
    assert found[2][0] == "Unusable" and "fairscale" in found[2][1]
    assert found[3][0] == "UserError" and "ended (7)" in found[3][1]
    last = ask(upstream, *[("human_action", "crash-0.mp4")] * reference.MOST_ENDS)[-1]
    assert last[0] == "Unusable"


def moving(seed, frames, size=32):
    ground = torch.rand(3, size, size + frames, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.stack([ground[:, :, n : n + size] for n in range(frames)])


def test_judge_folder_asks_both_and_a_lost_dimension_is_null_and_never_zero(upstream, monkeypatch):
    prompts = [
        Prompt(text, ("human_action", "scene", "temporal_flickering"), {"scene": {"scene": {"scene": "alley"}}})
        for text in ("a person is waving", "fail")
    ]
    for number, prompt in enumerate(prompts):
        write_mp4(upstream / "v" / f"{prompt.text}-0.mp4", moving(number, 8), fps=8)
    monkeypatch.setattr(judges, "readiness", lambda names, folder, sifts: {"color": "no"})
    (upstream / "w.pth").write_bytes(b"x")
    monkeypatch.setattr(reference, "needed", lambda name, long=False: (Weights("w.pth", "nowhere"),))
    names = ["temporal_flickering", "human_action", "scene"]
    with (
        Store(upstream / "rows") as store,
        judges.judges(names, upstream, upstream / "log") as (asked, unjudged),
    ):
        found = judging.judge_folder(upstream / "v", prompts, store, Policy(), 1, asked, unjudged)
    out = found.as_json()
    assert out["scores"]["human_action"] == 1.0 and out["scores"]["scene"] is None and out["scores"]["color"] is None
    assert out["totals"]["total"] is None and "fairscale" in out["unjudged"]["scene"]
    assert [problem[0] for problem in out["problems"]] == ["fail-0.mp4"] and "no hands" in out["problems"][0][1]
    rows = [json.loads(line) for line in (upstream / "rows").read_text().splitlines()]
    assert {row["dimension"] for row in rows} == {"temporal_flickering", "human_action"}
    action = next(row for row in rows if row["dimension"] == "human_action")
    assert "vbench 0.1.5" in action["judge"] and "a person is waving" in action["prompt"] and action["weights"]
    with pytest.raises(UserError, match="'color' can't be judged: no"):
        judges.require(["color"], upstream, False)


def test_the_doctor_wants_all_that_upstream_loads_of_its_size(tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSVID_CACHE", str(tmp_path / "cache"))
    (tmp_path / "caption_model").mkdir()
    (tmp_path / "caption_model" / "tag2text_swin_14m.pth").write_bytes(b"xx")
    found = {need.name: need.what for need in reference.missing_files("scene", tmp_path)}
    assert "has 2 bytes, not about 4.5 GB" in found["caption_model/tag2text_swin_14m.pth"]
    assert {"bert-base-uncased/vocab.txt", "bert-base-uncased/model.safetensors"} < set(found)
    for name in ("object_class", "multiple_objects", "color", "spatial_relationship"):
        assert "bert-base-uncased/vocab.txt" in {need.name for need in reference.missing_files(name, tmp_path)}
    site = reference.environment() / "lib" / "python3.11" / "site-packages"
    labels = []
    for version in ("1", "2"):
        (site / f"timm-{version}.dist-info").mkdir(parents=True)
        labels.append(reference.label())
        (site / f"timm-{version}.dist-info").rmdir()
    assert labels[0] != labels[1]  # another package is another judge


class Recorder:
    """A judge that notes what it is given, and answers with the mean of the frames."""

    label, weights, fast_weights, static_weights, lacks = "exact: test", {}, {}, {}, ""

    def __init__(self, name, mapping=None):
        self.dimension, self.mapping, self.seen = dimensions()[name], mapping, []

    def score(self, clip, branch):
        content = decode(clip.path).frames
        self.seen.append(
            (branch, clip.name, clip.path.parent != clip.scratch, len(content), np.array_equal(content, clip.raw))
        )
        return float(clip.frames.mean()) / 255


LINE = Mapping101(tuple(n / 100 for n in range(101)), tuple(n / 100 for n in range(101)))


def judged(folder, judge, policy, prompts=None):
    prompts = prompts or [Prompt("x", CUSTOM)]
    with Store(folder / f"rows{policy.label}") as store:
        return judging.judge_folder(folder / "v", prompts, store, policy, 1, {"subject_consistency": judge})


def test_a_short_video_is_judged_as_it_is_and_clips_of_a_long_one_lose_nothing(tmp_path):
    write_mp4(tmp_path / "v" / "x-0.mp4", moving(0, 8), fps=8, crf=20)
    judge = Recorder("subject_consistency")
    judged(tmp_path, judge, Policy())
    assert judge.seen == [("slow", "x-0.mp4", True, 8, True)]
    write_mp4(tmp_path / "v" / "x-0.mp4", moving(0, 44), fps=8, crf=20)
    judge = Recorder("subject_consistency", LINE)
    found = judged(tmp_path, judge, Policy())
    assert [seen[:3] for seen in judge.seen] == [("slow", f"x-0_{n:03d}.mp4", False) for n in range(3)] + [
        ("fast", "x-0.mp4", False)
    ]
    assert [seen[3] for seen in judge.seen] == [16, 16, 16, 3] and all(seen[4] for seen in judge.seen)
    frames = decode(tmp_path / "v" / "x-0.mp4").frames / 255
    slow = np.mean([frames[a:b].mean() for a, b in ((0, 16), (16, 32), (28, 44))])
    fast = frames[[0, 16, 28]].mean()
    assert found.scores["subject_consistency"] == pytest.approx(0.5 * slow + 0.5 * fast, abs=1e-6)
    judge = Recorder("subject_consistency", LINE)
    judged(tmp_path, judge, Policy("upstream"))
    assert not any(seen[4] for seen in judge.seen)  # encoded again, with loss, as upstream does


def test_a_long_video_without_its_fast_branch_is_not_judged_by_half(tmp_path):
    write_mp4(tmp_path / "v" / "x-0.mp4", moving(0, 44), fps=8)
    judge = Recorder("subject_consistency")
    judge.lacks = "dinov2_vitb14_pretrain.pth missing"
    with pytest.raises(UserError, match="of long videos: dinov2"):
        judged(tmp_path, judge, Policy())
    assert judge.seen == []


@pytest.mark.parametrize("answer", [None, float("nan"), float("inf")])
def test_an_answer_that_is_no_score_is_listed_and_is_no_zero(tmp_path, monkeypatch, answer):
    for number in range(2):
        write_mp4(tmp_path / "v" / f"{'xy'[number]}-0.mp4", moving(number, 8), fps=8)
    judge = Recorder("subject_consistency")
    monkeypatch.setattr(judge, "score", lambda clip, branch: 0.5 if clip.name == "x-0.mp4" else answer)
    found = judged(tmp_path, judge, Policy(), [Prompt("x", CUSTOM), Prompt("y", CUSTOM)])
    assert found.scores == {"subject_consistency": 0.5} and [name for name, _ in found.problems] == ["y-0.mp4"]
    other = Recorder("motion_smoothness")
    monkeypatch.setattr(other, "score", lambda clip, branch: answer)
    both = {"subject_consistency": judge, "motion_smoothness": other}
    with Store(tmp_path / "rows") as store:
        prompts = [Prompt("x", CUSTOM), Prompt("y", CUSTOM)]
        out = judging.judge_folder(tmp_path / "v", prompts, store, Policy(), 1, both).as_json()
    assert out["scores"] == {"subject_consistency": 0.5, "motion_smoothness": None}  # null where no video has one
    assert "no video" in out["unjudged"]["motion_smoothness"] and len(out["problems"]) == 3


def test_minutes_are_read_in_parts_and_going_back_finds_the_same_frames(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving(3, 40), fps=8)
    whole, footage = decode(tmp_path / "a.mp4").frames, Footage(tmp_path / "a.mp4")
    for start, stop in ((0, 16), (16, 32), (24, 40), (3, 5)):
        assert np.array_equal(footage.frames(start, stop), whole[start:stop])
    assert footage.count == 40 and footage.seconds == 5.0


def test_scenes_are_found_and_no_clip_shows_two(tmp_path):
    pytest.importorskip("scenedetect")
    red, blue = torch.full((30, 3, 32, 32), -1.0), torch.full((50, 3, 32, 32), -1.0)
    red[:, 0], blue[:, 2] = 1.0, 1.0
    write_mp4(tmp_path / "v" / "x-0.mp4", torch.cat([red, blue]), fps=10)
    assert scenes(tmp_path / "v" / "x-0.mp4", 80) == [(0, 30), (30, 80)]
    judge = Recorder("subject_consistency", LINE)
    found = judged(tmp_path, judge, Policy(semantic=True))
    with Store(tmp_path / f"rows{Policy(semantic=True).label}") as store:
        rows = [json.loads(line) for line in store.path.read_text().splitlines()]
    slow = [row["frames"] for row in rows if row["branch"] == "slow"]
    assert slow == [[0, 20], [10, 30], [30, 50], [50, 70], [60, 80]] and "cut at scenes" in found.protocol.clip_policy
    assert [row["frames"] for row in rows if row["branch"] == "fast"] == [[0, 30], [30, 80]]
    write_mp4(tmp_path / "still.mp4", blue, fps=10)
    assert scenes(tmp_path / "still.mp4", 50) == [(0, 50)]


def test_prompts_that_suites_share_keep_what_each_looks_for():
    a = Prompt("a red cat", ("color",), {"color": {"color": "red"}})
    b = Prompt("a red cat", ("scene",), {"scene": {"scene": "alley"}}, "a very red cat")
    both = judging.merged([a, b])["a red cat"]
    assert both.dimensions == ("color", "scene") and set(both.auxiliary) == {"color", "scene"}
    assert both.extended == "a very red cat"


def test_answers_of_other_judgements_are_taken_over(tmp_path, monkeypatch):
    write_mp4(tmp_path / "v" / "x-0.mp4", moving(0, 8), fps=8)
    (tmp_path / "p.txt").write_text("x")
    line = ["eval", "videos", str(tmp_path / "v"), "--prompts", str(tmp_path / "p.txt"), "--per-prompt", "1", "--out"]
    assert CliRunner().invoke(app, [*line, str(tmp_path / "one")]).exit_code == 0
    first = (tmp_path / "one" / "rows.jsonl").read_bytes()
    partial = tmp_path / "partial.jsonl"
    partial.write_bytes(first + b'{"half')
    from causvid.eval import evaluate_suite

    monkeypatch.setattr(judges.Ours, "score", lambda *_: pytest.fail("computed again"))
    evaluate_suite.evaluate(tmp_path / "v", [Prompt("x", CUSTOM)], tmp_path / "two", Policy(), 1, others=[partial])
    assert (tmp_path / "two" / "rows.jsonl").read_bytes() == first


PROMPTS = [Prompt("a", CUSTOM), Prompt("b", CUSTOM, extended="a long b"), Prompt("a", ("color",))]


def make(jobs):
    return [moving(job.seed, 4) for job in jobs]


def sampled(folder, shard=(0, 1), maker=make, record=None):
    return sampling.sample(folder, PROMPTS, 3, maker, record or {"frames": 4, "student": "s"}, 8, 1, 10, 2, shard)


def test_sampling_is_resumed_and_shared_without_moving_a_byte(tmp_path):
    assert sampled(tmp_path / "whole") == 6
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.mp4"))
    assert names == [f"{text}-{index}.mp4" for text in "ab" for index in range(3)]
    texts = {job.name: job.text for job in sampling.jobs(PROMPTS, 3)}
    assert texts["b-0.mp4"] == "a long b" and len({job.seed for job in sampling.jobs(PROMPTS, 3)}) == 6
    assert [sampled(tmp_path / "shards", (k, 2)) for k in (1, 0)] == [2, 4]

    calls = []

    def dies(jobs):
        calls.append(jobs)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make(jobs)

    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path / "killed", maker=dies)
    (tmp_path / "killed" / "a-0.mp4").unlink()
    assert sampled(tmp_path / "killed") == 5 and sampled(tmp_path / "killed") == 0
    for other in ("shards", "killed"):
        for name in [*names, "sampling.json"]:
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    told = sampling.recorded(tmp_path / "whole")
    assert told.length == "4 frames at 8 fps" and told.codec == "h264 crf 10, scale 1" and told.seeds == sampling.SEEDS


def suite(path, **extended):
    """A list of prompts in upstream's form: each name's ``extended`` text, or None."""
    rows = [{"prompt_en": text, "dimension": ["temporal_flickering"]} for text in extended]
    rows = [row | ({"extended": extended[row["prompt_en"]]} if extended[row["prompt_en"]] else {}) for row in rows]
    path.write_text(json.dumps(rows))
    return path


def test_videos_of_another_text_are_not_reused_and_the_record_forgets_none(tmp_path):
    def ask(**extended):
        prompts = read_suite(suite(tmp_path / "p.json", **extended))
        return sampling.sample(tmp_path / "v", prompts, 2, make, {"frames": 4, "student": "s"}, 8, 1, 10)

    assert ask(a=None, b="a long b") == 4
    before = {path.name: path.read_bytes() for path in (tmp_path / "v").iterdir()}
    for changed, other in (
        ("a", {"a": "a long a", "b": "a long b"}),
        ("b", {"a": None, "b": None}),
        ("b", {"b": "another b", "c": None}),
    ):
        with pytest.raises(UserError, match=f"sampled otherwise .what generates '{changed}' differ"):
            ask(**other)
    assert {path.name: path.read_bytes() for path in (tmp_path / "v").iterdir()} == before
    assert ask(a=None, b="a long b", c="a long c") == 2  # a list may grow, and shrink
    assert ask(a=None) == 0
    known = json.loads((tmp_path / "v" / "sampling.json").read_text())["prompts"]
    assert known == {"a": "a", "b": "a long b", "c": "a long c"}
    with pytest.raises(UserError, match="what generates 'c'"):
        ask(a=None, c=None)
    record = json.loads((tmp_path / "v" / "sampling.json").read_text())
    (tmp_path / "v" / "sampling.json").write_text(json.dumps(record | {"prompts": 3}))  # of unknown texts
    with pytest.raises(UserError, match="prompts differ"):
        ask(a=None)
    with pytest.raises(UserError, match="'a' is extended in two ways"):
        path = suite(tmp_path / "p.json", a="one")
        path.write_text(json.dumps(json.loads(path.read_text()) * 2).replace("one", "two", 1))
        read_suite(path)


def test_the_protocol_says_what_generated_the_videos_and_not_what_a_list_says(tmp_path):
    def protocol(folder, path, out):
        line = ["eval", "videos", str(tmp_path / folder), "--prompts", str(path), "--per-prompt", "1", "--json"]
        result = CliRunner().invoke(app, [*line, "--out", str(tmp_path / out)])
        if isinstance(result.exception, UserError):
            raise result.exception
        return json.loads(result.stdout.splitlines()[-1])["protocol"]

    plain = suite(tmp_path / "plain.json", a=None, b=None)
    long = suite(tmp_path / "long.json", a=None, b="a long b")
    for folder, path in (("plain", plain), ("long", long)):
        sampling.sample(tmp_path / folder, read_suite(path), 1, make, {"frames": 4, "student": "s"}, 8, 1, 10)
    short, extended = protocol("plain", plain, "1"), protocol("long", long, "2")
    assert short["generating_prompts"] != extended["generating_prompts"]
    assert protocol("long", plain, "3") == extended  # VBench's own list knows nothing of the longer texts
    with pytest.raises(UserError, match="videos of 'b' were generated from 'b', and the list .* 'a long b'"):
        protocol("plain", long, "4")
    (tmp_path / "plain" / "sampling.json").unlink()  # of files that were made elsewhere the list is all that is known
    assert protocol("plain", long, "5")["generating_prompts"] == extended["generating_prompts"]


def test_videos_of_another_model_are_not_taken_for_this_ones(tmp_path):
    sampled(tmp_path)
    with pytest.raises(UserError, match="sampled otherwise.*student"):
        sampled(tmp_path, record={"frames": 4, "student": "t"})
    (tmp_path / "sampling.json").unlink()
    with pytest.raises(UserError, match="holds videos and no sampling.json"):
        sampled(tmp_path, record={"frames": 4, "student": "t"})
    assert not (tmp_path / "sampling.json").exists()
    for text in ("1", "2/2", "a/b", "-1/2"):
        with pytest.raises(UserError, match="K/N"):
            sampling.shard_of(text)
    assert sampling.shard_of("1/4") == (1, 4)
