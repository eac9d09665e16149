"""The report page: what it decides on numbers made by hand, and that it is whole, escaped and self-contained."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from causvid import spec as specs
from causvid.data import shapes
from causvid.data.video import encode_mp4, read_mp4
from causvid.eval.report import (
    Cell,
    Findings,
    Row,
    StageRecord,
    Training,
    environments,
    latency,
    render,
    training_charts,
)
from causvid.eval.statistics import wilson
from causvid.eval.tables import arms, fewest_equal, interval_charts, ratio, seconds, tables, verdicts
from causvid.runs import Context
from causvid.stages.report import Report
from causvid.weights import write_json, write_tensors

VOID = {"meta", "link", "img", "br", "input", "hr", "source"}
TIMINGS = {
    "latency_s": 0.02, "clip_s": 0.08, "teacher_s": 2.0, "latency_ratio": 100.0, "throughput_ratio": 25.0,
    "latency_ratio_vs_4": 8.0, "throughput_ratio_vs_4": 2.0, "latency_ratio_vs_16": 32.0, "throughput_ratio_vs_16": 8.0,
}  # fmt: skip


class Page(HTMLParser):
    """A parsed page; refuses tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close the tag that is open"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def arm_metrics(arm, ok, fidelity=35.0, contrast=0.95, half=0.02):
    out = {}
    for key, value, width in (("ok", ok, half), ("fidelity", fidelity, 0.5), ("contrast", contrast, 0.01)):
        out |= {f"{arm}.{key}": value, f"{arm}.{key}.low": value - width, f"{arm}.{key}.high": value + width}
    return out | {f"{arm}.size_gap": 0.05, f"{arm}.start_x": 3.0}


def metrics(*names):
    out = {}
    for name in names:
        out |= arm_metrics(name, 0.9)
    out |= {key.replace("teacher_50", "teacher"): v for key, v in out.items() if key.startswith("teacher_50.")}
    return out


def findings(**changes):
    clip = encode_mp4(torch.zeros(2, 3, 16, 16))
    cells = [Cell("truth", "rendered", clip), Cell("student", "4 steps", clip, [("colour", True), ("shape", False)])]
    rows = [{"step": i, "loss": 1 / (1 + i), "gradient_norm": 2.0, "x0_error_t0.25": math.nan} for i in range(100)]
    plain = Findings(
        name="tiny/test", about="A test.", spec_yaml="seed: 0\n",
        differences=[("student.steps", "4", "2")], has_base=True,
        metrics={**metrics("real", "teacher_50", "teacher_4", "teacher_16", "untrained", "ode_init", "student",
                           "rollout_first", "rollout_last"),
                 "student.ok_first_tenth": 0.91, "student.ok_last_tenth": 0.89},
        timings=TIMINGS, full_steps=50, teacher_steps=(4, 16), student_steps=4, causal=True, rollout_factor=10,
        samples=[Row("a red circle moves left", cells)], rollouts=[Row("a red circle moves left", cells[1:])],
        training={"distill": Training(rows, 100, "dmd: words")},
        stages=[StageRecord("teacher", "0" * 16, (), 1.5, "today", {"threads": 2}),
                StageRecord("distill", "1" * 16, ("teacher",)),
                StageRecord("report", "2" * 16, ("teacher", "distill"))],
        metric_notes={"shapes_truth": "Exact judgement."}, environment={"packages": {"torch": "2"}, "threads": 1},
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def assert_self_contained(text: str) -> Page:
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base"), tag
        for name in ("src", "href", "poster", "srcset", "action", "data", "xlink:href"):
            if name in attributes:
                wanted = "#" if name == "href" else "data:"
                assert str(attributes[name]).startswith(wanted), (tag, name, attributes[name])
    without_videos = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    for external in ("http:", "https:", "@import", "url(", "//cdn", "fetch(", "import("):
        assert external not in without_videos
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {str(a["href"])[1:] for _, a in page.tags if "href" in a} <= targets
    return page


def test_the_page_is_whole_and_self_contained():
    page = assert_self_contained(render(findings()))
    assert page.count("video") == 3
    assert page.count("h1") == 1
    for text in ("tiny/test", "A test.", "0.900", "100×", "0.910 → 0.890", "student.steps", "torch 2", "unknown"):
        assert text in page.words
    assert "8.0× against 4 steps" in page.words  # all arms are alike here, so 4 steps are as good as the student
    assert "✓ colour" in page.words and "✗ shape" in page.words
    assert {"videos", "metrics", "latency", "training", "stages", "spec", "provenance"} <= {
        attributes.get("id") for _, attributes in page.tags
    }
    assert "prefers-color-scheme: dark" in render(findings())


def test_videos_play_from_the_page(tmp_path):
    sources = re.findall(r'src="data:video/mp4;base64,([^"]+)"', render(findings()))
    (tmp_path / "clip.mp4").write_bytes(base64.b64decode(sources[0]))
    assert read_mp4(tmp_path / "clip.mp4").pixels.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("where", ["about", "name", "spec_yaml"])
def test_hostile_text_stays_text(where):
    hostile = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}"
    page = assert_self_contained(render(findings(**{where: hostile})))
    assert hostile in " ".join(page.text)
    assert page.count("script") == 1 and page.count("img") == 0


def test_hostile_captions_and_values_stay_text():
    hostile = '"><script>alert(1)</script>'
    row = Row(hostile, [Cell(hostile, hostile, b"", [(hostile, True)])])
    page = assert_self_contained(
        render(
            findings(
                samples=[row], rollouts=[row], differences=[(hostile,) * 3], metric_notes={hostile: hostile},
                metrics={**metrics("student"), f"student.{hostile}": 0.5},
            )
        )
    )  # fmt: skip
    assert page.count("script") == 1


def test_absent_arms_rollouts_and_curves_are_left_out():
    """Init from the teacher, a bidirectional student, a shipped teacher, and timings that were lost."""
    text = render(
        findings(
            metrics=metrics("real", "teacher_50", "untrained", "student"), rollouts=[], samples=[], training={},
            timings={}, causal=False, differences=[], has_base=False, about="", stages=[],
        )
    )  # fmt: skip
    page = assert_self_contained(text)
    for absent in ("ODE init", "rollout", "Latency", "Training", "Differences"):
        assert absent not in page.words
    assert "It has no base" in page.words
    assert assert_self_contained(render(findings(metrics={}, timings={}))).count("video") == 3


def judged(ok=0.95, fidelity=34.5, contrast=0.93, count=8, of=200):
    """Metrics of a student and of its teacher in ``count`` steps; ``of`` videos were judged."""
    out = {"student.fidelity": 35.0, "student.contrast": 0.95, f"teacher_{count}.fidelity": fidelity,
           f"teacher_{count}.contrast": contrast}  # fmt: skip
    for arm, share in (("student", 0.97), (f"teacher_{count}", ok)):
        low, high = wilson(share * of, of)
        out |= {f"{arm}.ok": share, f"{arm}.ok.low": low, f"{arm}.ok.high": high}
    return {key: value for key, value in out.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"ok": 1.0}, []),
        ({"ok": 0.97 - 1e-12}, []),
        ({"ok": 0.9}, ["ok is 0.900, against 0.970"]),
        ({"fidelity": 34.01}, []),
        ({"fidelity": 33.9}, ["fidelity is 1.1 dB lower"]),
        ({"fidelity": 60.0}, []),
        ({"contrast": 0.905}, []),
        ({"contrast": 0.89}, ["contrast is 0.89, against 0.95"]),
        ({"contrast": 1.05}, []),
        ({"contrast": 1.2}, ["contrast is 1.20, against 0.95"]),  # sharper than the truth is wrong, too
        ({"fidelity": None, "contrast": None}, []),
        ({"ok": 0.5, "fidelity": 20.0, "contrast": 0.1}, ["ok", "fidelity", "contrast"]),
    ],
)
def test_as_good_as_the_student(changes, reasons):
    (verdict,) = verdicts(judged(**changes), 50, [8])
    assert verdict.steps == 8
    assert verdict.equal == (not reasons)
    assert len(verdict.reasons) == len(reasons)
    assert all(found.startswith(wanted) for found, wanted in zip(verdict.reasons, reasons, strict=True))


def test_fewest_steps_of_equal_quality():
    numbers = judged(ok=0.9, count=4) | judged(count=8) | judged(count=16) | judged(count=60)
    found = verdicts(numbers, 50, [16, 4, 8, 50, 60, 32])  # 32 was not sampled; 50 and 60 are not fewer
    assert [(v.steps, v.equal) for v in found] == [(4, False), (8, True), (16, True)]
    assert fewest_equal(found, 50) == 8
    assert fewest_equal(verdicts(judged(ok=0.1), 50, [8]), 50) == 50
    assert verdicts({"student.fidelity": 1.0}, 50, [8]) == []


def test_latency_is_told_against_each_number_of_steps():
    rows = latency(findings(), verdicts(findings().metrics, 50, (4, 16)), 4)
    assert [(r["label"], r["first"], r["clip"], r["sooner"], r["faster"]) for r in rows] == [
        ("student, 4 steps", "20 ms", "80 ms", "", ""),
        ("teacher, 50 steps", "2.00 s", "2.00 s", "100×", "25.0×"),
        ("teacher, 16 steps", "640 ms", "640 ms", "32.0×", "8.0×"),
        ("teacher, 4 steps", "160 ms", "160 ms", "8.0×", "2.0×"),
    ]
    assert [r["quality"] for r in rows] == ["", "", "as good", "as good, and the fewest steps that are"]


def test_arms_and_tables():
    numbers = {**metrics("student", "teacher_4", "real", "teacher_16", "teacher_50", "mine"), "student.lpips": 0.25}
    numbers |= {"student.ok_first_tenth": 0.5, "teacher_4.ok": None}
    labels = [label for _, label in arms(numbers, 50)]
    assert labels == ["real data", "teacher, 50 steps", "teacher, 16 steps", "teacher, 4 steps", "student", "mine"]
    first, second, third, other = tables(numbers, 50)
    assert [[c.key for c in t["columns"]] for t in (first, second, third, other)] == [
        ["ok"], ["fidelity", "contrast"], ["size_gap"], ["lpips"],
    ]  # fmt: skip
    assert [row["label"] for row in first["rows"]] == labels
    assert first["rows"][1]["cells"] == [{"value": "0.900", "interval": "0.880–0.920"}]
    assert first["rows"][3]["cells"][0]["value"] == "–"
    assert [row["label"] for row in other["rows"]] == ["student"]
    assert [len(chart.rows) for chart in interval_charts(numbers, 50)] == [5, 6, 6]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "unknown"), (0.0213, "21 ms"), (3.14, "3.14 s"), (59.6, "60 s"), (153, "2 min 33 s"), (7260, "2 h 01 min")],
)
def test_seconds(value, text):
    assert seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0.374, "0.37×"), (4.46, "4.5×"), (100.4, "100×")])
def test_ratio(value, text):
    assert ratio(value) == text


def test_training_charts_group_bands_and_drop_what_is_not_finite():
    rows = [
        {"step": i, "student_gradient_norm": 1.0, "loss": 1.0, "fake_score_loss": 0.5, "gradient": 0.1,
         "e_t0.25": math.nan if i % 2 else 1.0, "e_t0.75": None if i == 0 else 2.0, "word": "x"}
        for i in range(10)
    ]  # fmt: skip
    drawn = training_charts("distill", Training(rows, 10, ""))
    assert [chart.title for chart in drawn] == [
        "Student loss",
        "Fake score loss",
        "Gradient",
        "E",
        "Student gradient norm",
    ]
    assert [(line.label, len(line.dots)) for line in drawn[3].lines] == [("t 0.25", 5), ("t 0.75", 9)]
    assert "DMD" in drawn[0].note
    assert all(chart.x_label and chart.y_label and chart.y_ticks for chart in drawn)


def make_run(root, arms_of, rollouts, curves=True):
    """Folders of a finished run with real clips in all arms."""
    pixels, captions = shapes.Shapes().batch(range(2), "test")
    videos = ((pixels + 1) * 127.5).to(torch.uint8)
    folders = {}
    for stage, names in arms_of.items():
        folders[stage] = root / stage / f"{len(stage):016x}"
        folders[stage].mkdir(parents=True)
        for name in names:
            write_tensors(folders[stage] / f"{name}.safetensors", {"videos": videos})
        write_json(folders[stage] / "record.json", {"inputs": {"teacher": "0"} if stage != "teacher" else {}})
        write_json(folders[stage] / "DONE", {"stage": stage, "identity": folders[stage].name, "seconds": 1.25})
    if rollouts:
        write_tensors(folders["sample"] / "rollout.safetensors", {"whole": videos.repeat(1, 3, 1, 1, 1)})
    if curves:
        lines = [json.dumps({"step": i, "loss": float(i), "x0_error_t0.00": math.nan}) for i in range(3)]
        (folders["distill"] / "curves.jsonl").write_text("\n".join(lines) + "\n")
    ends = ("rollout_first", "rollout_last") if rollouts else ()
    names = [name for names in arms_of.values() for name in names] + ["real", *ends]
    right = {name: [1.0, 0.0] for name in ("colour", "shape", "direction", "ok")}
    write_json(folders["evaluate"] / "scores.json", {"captions": captions, "scores": dict.fromkeys(names, right)})
    write_json(folders["evaluate"] / "metrics.json", metrics(*names))
    write_json(folders["sample"] / "timings.json", TIMINGS)
    return folders


STAGES = {
    "teacher": (), "ode_pairs": (), "ode_init": (), "distill": (), "sample_teacher": ("teacher_50", "teacher_4"),
    "sample_start": ("untrained", "ode_init"), "sample": ("student",), "evaluate": (),
}  # fmt: skip
WITHOUT_ODE = {name: STAGES[name] for name in STAGES if not name.startswith("ode")} | {"sample_start": ("untrained",)}


@pytest.mark.parametrize(
    ("overrides", "stages", "rollouts", "videos"),
    [([], STAGES, True, 12), (["init=teacher", "student.causal=false"], WITHOUT_ODE, False, 8)],
)
def test_the_stage_writes_the_page(tmp_path, overrides, stages, rollouts, videos):
    spec = specs.load("tiny/causvid", ["about='a <b> & c'", *overrides])
    folders = make_run(tmp_path, stages, rollouts)
    assert set(Report().inputs(spec)) == set(folders)
    folder = tmp_path / "report" / ("f" * 16)
    folder.mkdir(parents=True)
    Report().run(Context(spec, folder, folders, print))
    text = (folder / "report.html").read_text()
    page = assert_self_contained(text)
    assert page.count("video") == videos
    assert "a <b> & c" in page.words
    assert ("ODE init" in page.words) == rollouts
    assert ("Long rollouts" in page.words) == rollouts
    assert "1.25 s" in page.words
    assert all(path.is_file() for path in Report().outside(spec))


def test_an_environment_is_told_once_however_its_record_is_ordered():
    stages = [StageRecord("a", "0" * 16, environment={"threads": 1, "packages": {"numpy": "1", "torch": "2"}})]
    (found,) = environments(stages, {"packages": {"torch": "2", "numpy": "1"}, "threads": 1})
    assert found["stages"] == ["report", "a"]
