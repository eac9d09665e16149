"""Our driver against upstream called directly, on one set of random networks; needs the environment of the judge.

Marked ``vbench``: ``make vbench`` sets the environment up once, outside the clone, and runs these.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from causvid.cli import app
from causvid.data.video import write_mp4
from causvid.errors import UserError
from causvid.eval import judges, reference, suites
from causvid.eval.dimensions import dimensions
from causvid.eval.exact import flickering
from causvid.eval.footage import decode

pytestmark = pytest.mark.vbench
UPSTREAM = Path(__file__).with_name("vbench_upstream.py")


def without_our_path() -> dict[str, str]:
    """The environment of a clean clone: nothing of ours on upstream's path."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def texture(seed: int, frames: int) -> torch.Tensor:
    """A random ground that moves right by two pixels a frame, 128 pixels wide."""
    ground = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    ground = torch.nn.functional.interpolate(ground[None], scale_factor=8, mode="bilinear")[0]
    return torch.stack([ground[:, :, 2 * n : 2 * n + 128] for n in range(frames)])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(upstream's scores, ours) by dimension and file."""
    folder = tmp_path_factory.mktemp("parity")
    videos, weights = folder / "videos", folder / "weights"
    for number, frames in enumerate((4, 3)):
        write_mp4(videos / f"clip {number}-0.mp4", texture(number, frames), fps=8, crf=10)
    line = [str(reference.interpreter()), str(UPSTREAM), str(weights), str(videos)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=without_our_path())
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours: dict[str, dict[str, float | None]] = {}
    with reference.judge(weights, folder / "judge.log") as judge:
        for name, scores in theirs.items():
            style = "oil painting" if name == "appearance_style" else None
            ours[name] = {file: judge.ask(name, videos / file, file[:-6], {name: style}) for file in scores}
    return theirs, ours, videos, weights


@pytest.mark.parametrize(
    "name",
    ["subject_consistency", "background_consistency", "aesthetic_quality", "appearance_style", "imaging_quality",
     "dynamic_degree", "motion_smoothness", "temporal_flickering", "subject_consistency.fast",
     "background_consistency.fast", "temporal_flickering.static"],
)  # fmt: skip
def test_the_driver_is_upstream(both, name):
    theirs, ours, *_ = both
    assert len(theirs[name]) == 2 and ours[name] == pytest.approx(theirs[name], abs=1e-5)


def test_scores_are_not_all_the_same_so_that_equality_says_something(both):
    theirs, *_ = both
    assert sum(len({round(v, 6) for v in scores.values()}) == 2 for scores in theirs.values()) >= 6


def test_every_frame_counts_for_appearance_style_on_any_number_of_processes(both):
    """On several GPUs upstream pools what its last frame left behind; the judge is asked file by file."""
    theirs, ours, _, weights = both
    last_frames = json.loads((weights / "several_gpus.json").read_text())
    assert set(last_frames) == set(theirs["appearance_style"])
    for file, last in last_frames.items():
        assert abs(last - theirs["appearance_style"][file]) > 1e-5  # upstream's fault
        assert abs(last - ours["appearance_style"][file]) > 1e-5


def test_our_flickering_is_upstreams_on_the_same_files(both):
    theirs, _, videos, _ = both
    own = {path.name: flickering(decode(path).frames) for path in sorted(videos.glob("*.mp4"))}
    assert own == pytest.approx(theirs["temporal_flickering"], abs=1e-6)


def test_long_mode_does_not_import_as_it_is():
    """The fault that the worker goes around: current torchvision writes no videos, and Long imports what does."""
    code = "import torch; l = torch.library.Library('torchvision', 'DEF'); "
    code += "[l.define(n + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor') for n in ('nms', 'qnms')]; "
    line = [str(reference.interpreter()), "-c", code + "import vbench2_beta_long.subject_consistency"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=without_our_path())
    assert done.returncode != 0 and "write_video" in done.stderr, done.stderr[-500:]


def test_a_judge_without_weights_says_so_and_downloads_nothing(tmp_path, both):
    *_, videos, _ = both
    video = next(iter(sorted(videos.glob("*.mp4"))))
    with reference.judge(tmp_path / "none", tmp_path / "log") as judge:
        for name in ("subject_consistency", "background_consistency", "aesthetic_quality"):
            with pytest.raises(UserError, match=f"{name} can't be judged"):
                judge.ask(name, video)
        assert judge.ask("temporal_flickering", video) == pytest.approx(flickering(decode(video).frames), abs=1e-6)
    assert not any(path.is_file() for path in (tmp_path / "none").rglob("*"))


def test_the_command_asks_every_judge_that_is_ready(tmp_path, both):
    """Random networks have other sizes than the published ones, so only files without a known size are ready here."""
    theirs, _, videos, weights = both
    (tmp_path / "prompts.txt").write_text("clip 0\nclip 1\n")
    line = ["eval", "videos", str(videos), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*line, "--per-prompt", "1", "--weights", str(weights), "--json"])
    out = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 3 and out["problems"] == [] and "ViT-L-14.pt" in out["unjudged"]["aesthetic_quality"]
    for name in ("subject_consistency", "motion_smoothness", "dynamic_degree", "temporal_flickering"):
        mean = sum(theirs[name].values()) / len(theirs[name])
        assert out["scores"][name] == pytest.approx(mean, abs=1e-5), name
        assert name == "temporal_flickering" or out["protocol"]["judges"][name].startswith("reference: vbench 0.1.5")
    assert out["scores"]["aesthetic_quality"] is None and out["totals"]["quality"] is None
    assert any(file.endswith("raft-things.pth") for file in out["protocol"]["weights"])


def test_the_static_filter_goes_before_flickering(tmp_path, both):
    theirs, _, videos, weights = both
    (tmp_path / "prompts.txt").write_text("clip 0\nclip 1\n")
    line = ["eval", "videos", str(videos), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    line += ["--per-prompt", "1", "--weights", str(weights), "--dimension", "temporal_flickering"]
    result = CliRunner().invoke(app, [*line, "--static-filter", "1", "--json"])
    still = [name for name, kept in theirs["temporal_flickering.static"].items() if kept]
    if not still:
        assert isinstance(result.exception, UserError) and "keeps no video" in str(result.exception)
        return
    out = json.loads(result.stdout.splitlines()[-1])
    mean = sum(theirs["temporal_flickering"][name] for name in still) / len(still)
    assert out["scores"]["temporal_flickering"] == pytest.approx(mean, abs=1e-6)
    assert out["static_filter"]["videos"] == len(still) and out["protocol"]["static_filter"] == 1
    assert list(out["protocol"]["weights"]) == ["raft_model/models/raft-things.pth"]


def test_the_doctor_finds_what_is_there(both):
    *_, weights = both
    result = CliRunner().invoke(app, ["doctor", "vbench", "--weights", str(weights), "--json"])
    found = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 3 and found["subject_consistency"] == found["motion_smoothness"] == []
    assert "not 353,976,522 bytes" in found["background_consistency"][0][1]  # a random network is not the real one
    assert any("missing: put it at" in what for _, what in found["scene"])


def test_upstreams_list_of_prompts_is_read_whole():
    line = [str(reference.interpreter()), "-c", "import importlib.util as u; print(u.find_spec('vbench').origin)"]
    origin = subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    prompts = suites.read_suite(Path(origin).parent / "VBench_full_info.json")
    assert len(prompts) == 946 and len({prompt.text for prompt in prompts}) == 944
    per_suite = {"subject_consistency": 72, "scene": 86, "overall_consistency": 93, "temporal_flickering": 75,
                 "object_class": 79, "multiple_objects": 82, "human_action": 100, "color": 85,
                 "spatial_relationship": 84, "temporal_style": 100, "appearance_style": 90}  # fmt: skip
    counted = {name: sum(name in prompt.dimensions for prompt in prompts) for name in per_suite}
    assert counted == per_suite
    for name, dimension in dimensions().items():
        if dimension.scale is not None:
            assert sum(name in prompt.dimensions for prompt in prompts) == per_suite[dimension.suite]


SOUGHT = ("object_class", "multiple_objects", "color", "spatial_relationship", "scene", "appearance_style")
GRIT = Path(__file__).with_name("vbench_grit.py")


def asked(name, prompts, monkeypatch, folder, process):
    """Scores of a clip of each prompt, through the judge that the command would ask."""
    monkeypatch.setattr(reference, "needed", lambda name, long=False: ())
    judge, video = judges.Theirs(name, process, folder), folder / "a-0.mp4"
    if not video.is_file():
        write_mp4(video, texture(0, 3), fps=8)
    frames, out = decode(video).frames, {}
    for prompt in prompts:
        clip = judges.Clip(frames, 8.0, video.name, prompt.text, prompt.auxiliary, folder, video)
        out[prompt.text] = judge.score(clip, "slow")
    return out


def test_what_rules_look_for_is_given_as_upstream_reads_it(tmp_path, monkeypatch):
    """Every prompt of VBench's own list, read by upstream's own function."""
    rows = [row | {"video_list": ["a-0.mp4"]} for row in json.loads(reference.prompts_file().read_text())]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    line = [str(reference.interpreter()), "-I", str(GRIT), "--read", str(tmp_path / "rows.json"), *SOUGHT]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, given = json.loads(done.stdout.splitlines()[-1]), []

    class Process:
        def ask(self, dimension, video, prompt, auxiliary):
            given.append([prompt, auxiliary])

    every = suites.read_suite(reference.prompts_file())
    for name in SOUGHT:
        given.clear()
        asked(name, [prompt for prompt in every if name in prompt.dimensions], monkeypatch, tmp_path, Process())
        assert given == theirs[name] and len(given) >= 79, name


BOXES = {"bird": [0, 0, 10, 10], "cat": [90, 0, 100, 10], "person": [0, 80, 10, 90]}
# (dimension, prompt of VBench's list, score by its rule of what is seen in every frame)
RULED = [
    ("object_class", "a person", 1.0), ("object_class", "a bicycle", 0.0),
    ("multiple_objects", "a bird and a cat", 1.0), ("multiple_objects", "a cat and a dog", 0.0),
    ("color", "a red bicycle", 1.0), ("color", "a green bicycle", 0.0), ("color", "a red car", None),
    ("spatial_relationship", "a bird on the left of a cat, front view", 1.0),
    ("spatial_relationship", "a cat on the right of a dog, front view", 0.0),
    ("scene", "alley", 1.0), ("scene", "amusement park", 0.0),
]  # fmt: skip


@pytest.mark.parametrize("name", SOUGHT[:-1])
def test_upstreams_rules_look_for_what_the_prompt_says(tmp_path, monkeypatch, name):
    """Upstream's own functions in the worker, on detections that are given: GRiT needs detectron2, Tag2Text weights."""
    seen = {  # upstream takes all labels from the first box, of a caption and a label, or the caption as the label
        "color": [["a red bicycle", [0, 0, 9, 9], ["bicycle"]]],
        "spatial_relationship": [[label, box, [label]] for label, box in BOXES.items()],
    }.get(name, [["", [0, 0, 9, 9], list(BOXES)]])
    (tmp_path / "seen.json").write_text(json.dumps({"detections": seen, "caption": "a man in an alley"}))
    monkeypatch.setattr(reference, "WORKER", GRIT)
    expected = {text: score for dimension, text, score in RULED if dimension == name}
    prompts = [p for p in suites.read_suite(reference.prompts_file()) if p.text in expected and name in p.dimensions]
    with reference.judge(tmp_path, tmp_path / "judge.log") as process:
        assert asked(name, prompts, monkeypatch, tmp_path, process) == expected
