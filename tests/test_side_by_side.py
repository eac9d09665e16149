"""Results side by side, power before a run, and what goes to outside loggers."""

from __future__ import annotations

import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from causvid import spec as specs
from causvid import tracking, weights
from causvid.cli import app
from causvid.errors import UserError
from causvid.eval import side_by_side
from causvid.eval.ablation import detectable, mean_of
from causvid.eval.aggregate import scales
from causvid.eval.sweep_page import HELD_OUT, Judged, Scored, findings
from causvid.runs import Context


def results(path, score, **protocol):
    missing = [name for name in scales() if name != "color"]
    totals = {"total": None, "quality": None, "semantic": None, "missing": missing}
    path.write_text(json.dumps({"protocol": {"seeds": "s", **protocol}, "scores": {"color": score, "scene": None},
                                "proxies": {"proxy_dynamics": 2.0}, "totals": totals}))  # fmt: skip
    return str(path)


def test_results_are_compared_and_other_protocols_refused(tmp_path):
    one, two = results(tmp_path / "1.json", 0.5), results(tmp_path / "2.json", 0.75)
    result = CliRunner().invoke(app, ["eval", "compare", one, two, "--json"])
    table = json.loads(result.stdout)
    assert table["mark"] == "" and [row["measure"] for row in table["rows"]] == ["color", "proxy_dynamics"]
    assert table["rows"][0] == {"measure": "color", "values": [0.5, 0.75], "differences": [0.0, 0.25]}
    other = results(tmp_path / "3.json", 0.9, seeds="t")
    with pytest.raises(UserError, match="different protocols.*seeds.*--across-protocols"):
        side_by_side.compare([tmp_path / "1.json", tmp_path / "3.json"])
    result = CliRunner().invoke(app, ["eval", "compare", one, other, "--across-protocols"])
    assert result.stdout.startswith("DIFFERENT PROTOCOLS") and "(+0.4000)" in result.stdout
    (tmp_path / "4.json").write_text("{}")
    for bad, word in ((["4.json", "1.json"], "no results.json"), (["1.json"], "two"), (["1.json", "9.json"], "exist"),
                      (["1.json", "1.json"], "twice")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            side_by_side.compare([tmp_path / name for name in bad])


def test_results_of_other_videos_are_refused_and_an_incomplete_one_is_marked(tmp_path):
    rows = [{"video": f"a-{n}.mp4", "prompt": "a", "score": 0.5} for n in range(6)]
    for name, kept in (("whole", rows), ("again", rows), ("short", rows[:1])):
        path = tmp_path / name
        results(path, 0.5)
        more = {"videos": {"color": kept}, "lacking": {"videos": 6 - len(kept), "of": 6}}
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    whole, again, short = (tmp_path / name for name in ("whole", "again", "short"))
    assert side_by_side.compare([whole, again])["mark"] == ""
    for pair, told in (
        ((whole, short), "whole lacks 0 of 6.*short lacks 5 of 6"),
        ((short, again), "short lacks 5 of 6"),
    ):
        with pytest.raises(UserError, match=f"different videos.*{told}.*--across-protocols"):
            side_by_side.compare(pair)
    mark = side_by_side.compare([whole, short], across=True)["mark"]
    assert "DIFFERENT VIDEOS, not comparable" in mark and f"INCOMPLETE: {short} lacks 5 of 6 videos" in mark
    (tmp_path / "twin").write_text(short.read_text())  # the same single video: comparable, and still incomplete
    result = CliRunner().invoke(app, ["eval", "compare", str(short), str(tmp_path / "twin")])
    assert result.exit_code == 0 and result.stdout.count("lacks 5 of 6 videos") == 2
    sifted = {"protocol": {"static_filter": 25}, "videos": {"temporal_flickering": rows[:2]}}
    other = sifted | {"videos": {"temporal_flickering": rows[2:]}}  # each model's own static videos
    for path, change in ((whole, sifted), (again, other)):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "DIFFERENT VIDEOS" not in side_by_side.compare([whole, again])["mark"]


@pytest.mark.parametrize(
    ("change", "told"),
    [({"scores": "abc"}, "scores is \"abc\""), ({"scores": [1]}, "scores is"), ({"protocol": None}, "protocol is null"),
     ({"totals": 3}, "totals is 3"), ({"proxies": 1}, "proxies is 1"), ({"videos": [1]}, "videos is"),
     ({"videos": {"color": [1]}}, "videos: color"), ({"scores": {"color": "x"}}, "color is \"x\""),
     ({"scores": {"color": float("nan")}}, "color is NaN"), ({"totals": {"total": 10**400}}, "total is 1000"),
     ({"totals": {"total": [1]}}, "total is [1]"), ({"totals": {"missing": "color"}}, "missing is \"color\""),
     ({"totals": {"missing": [1]}}, "missing is [1]"), ({"scores": {"missing": ["color"]}}, "missing is ["),
     ({"lacking": {"videos": 1}}, "lacking"), ({"scores": {"color": True}}, "color is true")],
)  # fmt: skip
def test_a_results_file_whose_parts_are_wrong_is_one_message(tmp_path, change, told):
    one, two = results(tmp_path / "1.json", 0.5), Path(results(tmp_path / "2.json", 0.75))
    two.write_text(json.dumps(json.loads(two.read_text()) | change))
    result = CliRunner().invoke(app, ["eval", "compare", one, str(two), "--across-protocols"])
    assert isinstance(result.exception, UserError)  # status 2
    assert str(two) in str(result.exception) and told in str(result.exception)


def test_upstreams_results_are_laid_beside_with_their_protocol_unknown(tmp_path):
    ours, theirs = results(tmp_path / "1.json", 0.5), tmp_path / "x_eval_results.json"
    theirs.write_text(json.dumps({"color": [0.75, [{"video_path": "a-0.mp4", "video_results": 0.75}]]}))
    (tmp_path / "y.json").write_text(theirs.read_text())
    for other in (ours, tmp_path / "y.json"):  # nor are two files of upstream known to be comparable
        with pytest.raises(UserError, match="protocol: .*not recorded.*--across-protocols"):
            side_by_side.compare([Path(other), theirs])
    table = side_by_side.compare([Path(ours), theirs], across=True)
    assert table["mark"].startswith("DIFFERENT PROTOCOLS")
    assert table["rows"][0] == {"measure": "color", "values": [0.5, 0.75], "differences": [0.0, 0.25]}
    (tmp_path / "z.json").write_text('{"colour": [0.5, []]}')
    with pytest.raises(UserError, match="neither a results.json.*unknown dimension 'colour'"):
        side_by_side.compare([Path(ours), tmp_path / "z.json"])


def test_power_is_told_from_a_pilot_and_not_from_one_seed(tmp_path):
    values = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)).double()
    tables = [{HELD_OUT: Scored({"ok": {str(p): v for p, v in enumerate(row)}})} for row in values.tolist()]
    runs = [Judged({"init": "a", "seed": n}, table, label="a") for n, table in enumerate(tables)]
    runs.append(Judged({"init": "b", "seed": 0}, runs[0].suites, label="b"))
    path = tmp_path / "sweep.json"
    weights.write_json(path, {"comparisons": findings("x", runs).as_json()})
    result = CliRunner().invoke(app, ["eval", "power", str(path), "--json"])
    found = json.loads(result.stdout)["ok"]
    assert findings("x", runs).could_see == {"ok": pytest.approx(found["3"])}  # the page's own seeds
    for seeds in side_by_side.SEEDS:
        assert found[str(seeds)] == pytest.approx(detectable({"s": {"ok": values}}, mean_of("ok"), seeds))
    assert found["2"] > found["3"] and found["5"] > found["10"]  # from five the prompts count, too
    assert "ok" in CliRunner().invoke(app, ["eval", "power", str(path)]).stdout
    with pytest.raises(UserError, match="a pilot needs two"):
        side_by_side.power(path, 2)
    with pytest.raises(UserError, match="arm 3"):
        side_by_side.power(path, 3)


@pytest.mark.parametrize(
    ("group", "told"),
    [({}, "arm 1 has no measures"), (1, "no measures"), ({"measures": {"ok": 1}}, "no measures"),
     ({"measures": [1]}, "no measures"), ({"measures": {}}, "a pilot needs two"),
     ({"measures": {"ok": {"deviation": "x"}}}, "ok of arm 1 has deviation \"x\""),
     ({"measures": {"ok": {"deviation": -1}}}, "deviation -1"), ({"measures": {"ok": {"deviation": True}}}, "true"),
     ({"measures": {"ok": {"deviation": float("inf")}}}, "Infinity"), ({"measures": {"ok": {}}}, "a pilot needs two"),
     ({"measures": {"ok": {"deviation": float("nan")}}}, "a pilot needs two")],
)  # fmt: skip
def test_a_pilot_file_whose_parts_are_wrong_is_one_message(tmp_path, group, told):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"comparisons": [group]}))
    result = CliRunner().invoke(app, ["eval", "power", str(path)])
    assert isinstance(result.exception, UserError), result.exception  # status 2
    assert told in str(result.exception)


class Fake(types.ModuleType):
    """What wandb is asked for, kept."""

    def __init__(self):
        super().__init__("wandb")
        self.logged, self.options, self.summary, self.finished = [], {}, {}, False

    def init(self, **options):
        self.options = options
        return self

    def define_metric(self, name, step_metric):
        self.logged.append({"defined": name})

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True

    def Table(self, columns, data):
        assert all(len(row) == len(columns) for row in data)
        return [dict(zip(columns, row, strict=True)) for row in data]

    def Video(self, path, caption, format):
        assert Path(path).read_bytes()[4:8] == b"ftyp"
        return caption


def evaluation(tmp_path, loggers):
    spec = specs.load("tiny/causvid", [f"runtime.loggers={loggers}"])
    videos = (torch.arange(3)[:, None, None, None, None] * 80).expand(3, 4, 3, 32, 32).byte()
    weights.write_tensors(tmp_path / "sample" / "student.safetensors", {"videos": videos})
    tracking.log(
        Context(spec, tmp_path, {"sample": tmp_path / "sample"}, print),
        {"student.ok": 0.5, "student.ok.low": 0.25, "student.ok.high": 0.75}, ["a", "b", "c"],
        {"student": {"ok": [1.0, 0.0, 1.0]}},
        {"long": {"videos": {}, "over_time": {"ok": [{"seconds": 0.0, "mean": 1.0}, {"seconds": 2.0, "mean": 0.5}]}}},
    )  # fmt: skip


def test_scalars_curves_tables_and_videos_go_to_wandb_and_only_if_asked(tmp_path, monkeypatch):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    evaluation(tmp_path, "[jsonl]")
    assert fake.options == {}
    monkeypatch.setattr(tracking, "suite_videos", lambda *_: [])
    evaluation(tmp_path, "[{name: wandb, project: p}]")
    logged = {key: value for each in fake.logged for key, value in each.items()}
    assert (fake.options["mode"], fake.options["project"], fake.finished) == ("offline", "p", True)
    assert fake.summary == {"student.ok": 0.5} and logged["videos/held_out"] == ["a", "b", "c"]
    assert logged["metrics"] == [{"arm": "student", "measure": "ok", "mean": 0.5, "low": 0.25, "high": 0.75}]
    assert logged["held_out"][1] == {"caption": "b", "ok": 0.0}
    assert [e["long/over_time/ok"] for e in fake.logged if "long/over_time/ok" in e] == [1.0, 0.5]


@pytest.mark.slow
def test_wandb_itself_takes_an_evaluation_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setattr(tracking, "suite_videos", lambda *_: [])
    evaluation(tmp_path, "[wandb]")
    (written,) = tmp_path.rglob("*.wandb")
    deadline = time.monotonic() + 60  # a process of its own writes it
    while written.stat().st_size <= 1000:
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.1)
    assert len(list(tmp_path.rglob("media/videos/**/*.mp4"))) == 3
    assert len(list(tmp_path.rglob("media/table/**/*.json"))) >= 2
