"""Sweeps: zipped keys, seeds, arms that fail, status, and what the page says."""

# ruff: noqa: E501
from __future__ import annotations

import csv
import io
import json

import pytest
from toy import toy_spec

from causvid import cli, experiment
from causvid.errors import UserError
from causvid.eval.sweep_page import Judged, csv_of, findings, pareto, render


def judged(values, level, seed_effect=0.0, latency=0.1, error=""):
    scores = [level + seed_effect + 0.01 * n for n in range(10)]
    return Judged(values, {} if error else {"ok": scores, "trajectory": [1 - s for s in scores], "size": scores},
                  {"latency_s": latency}, "/x/report.html", error)  # fmt: skip


def grown(level, key, seeds=6):
    return [
        judged({"init": key, "seed": s}, level, 0.01 * (s % 3 - 1), 0.1 if key == "ode" else 0.2) for s in range(seeds)
    ]


def test_zipped_keys_go_together_and_lists_make_a_grid(tmp_path):
    path = toy_spec(tmp_path, 'sweep: {"student.steps, student.shift": [[1, 2.0], [2, 3.0]], seed: [0, 1]}')
    assert experiment.grid(path, []) == [
        {"student.steps": a, "student.shift": b, "seed": s} for a, b in ((1, 2.0), (2, 3.0)) for s in (0, 1)
    ]
    for extra, word in [('{"student.steps, seed": [[1]]}', "each row gives 2"), ('{"seed, seed": [[1, 2]]}', "twice"),
                        ('{"seed, student.steps": [1]}', "each row gives 2"), ('{"seed": [1], "seed, student.steps": [[1, 2]]}', "twice")]:  # fmt: skip
        with pytest.raises(UserError, match=word):
            experiment.grid(toy_spec(tmp_path, f"sweep: {extra}"), [])


def test_an_arm_that_fails_is_told_and_does_not_stop_the_rest(tmp_path, monkeypatch, capsys):
    path = toy_spec(tmp_path, "sweep: {seed: [0, 1, 2]}")

    def run(arm, root):
        if arm["seed"] == 1:
            raise RuntimeError("out of memory")
        return experiment.Outcome(tmp_path / f"r{arm['seed']}", [], [], {"student.ok": 0.5}, {})

    monkeypatch.setattr(experiment, "run_spec", run)
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", path, "--runs", str(tmp_path / "runs"), "--json"])
    shown = capsys.readouterr()
    table = json.loads(shown.out.splitlines()[-1])
    assert end.value.code == 3 and "out of memory" in shown.err
    assert [row.get("error", "") for row in table["arms"]] == ["", "RuntimeError: out of memory", ""]
    page = next((tmp_path / "runs" / "sweeps").glob("*.html")).read_text()
    assert "out of memory" in page


def test_status_runs_nothing(tmp_path, capsys):
    path = toy_spec(tmp_path, "sweep: {seed: [0, 1]}")
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", path, "--status", "--runs", str(tmp_path / "runs"), "--json"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert end.value.code == 0 and [row["arm"] for row in rows] == [{"seed": 0}, {"seed": 1}]
    assert all(row["done"] == 0 and row["stages"] >= 6 and "never run" in row["next"] for row in rows)
    assert not (tmp_path / "runs").exists()


def test_arms_are_compared_with_the_first_over_their_seeds():
    page = findings("x", [*grown(0.3, "ode"), *grown(0.6, "teacher"), *grown(0.3, "random")])
    base, better, same = page.groups
    assert [group.seeds for group in page.groups] == [6, 6, 6] and base.cells["ok"].difference is None
    assert better.cells["ok"].difference.verdict == "better"
    assert better.cells["trajectory"].difference.verdict == "better"  # 0 is best, and it fell
    assert same.cells["ok"].difference.verdict == "inconclusive" and "size" not in page.measures


def test_one_seed_has_no_verdict():
    page = findings("x", [judged({"init": "a"}, 0.1), judged({"init": "b"}, 0.9)])
    assert page.groups[1].cells["ok"].difference.verdict == "one seed: no verdict"
    assert "one seed: no verdict" in render(page)


def test_a_failed_arm_has_no_cells_and_no_zero():
    page = findings("x", [*grown(0.3, "ode"), judged({"init": "bad", "seed": 0}, 0, error="RuntimeError: no")])
    assert page.groups[1].cells == {} and page.groups[1].seeds == 0 and "RuntimeError: no" in render(page)
    failed_base = findings("x", [judged({"init": "bad"}, 0, error="no"), *grown(0.3, "ode")])
    assert failed_base.groups[1].cells["ok"].difference is None


def test_the_front_is_what_none_beats_in_both():
    page = findings("x", [*grown(0.6, "ode"), *grown(0.3, "teacher"), *grown(0.9, "random")])
    assert [point["best"] for point in pareto(page.groups, "ok")] == [True, False, True]


def test_the_table_is_exported_and_names_are_escaped():
    page = findings("<b>x</b>", [*grown(0.3, "<i>"), *grown(0.6, "teacher")])
    rows = list(csv.DictReader(io.StringIO(csv_of(page))))
    assert len(rows) == 4 and rows[2]["verdict"] == "better" and float(rows[2]["difference"]) == pytest.approx(0.3)
    assert "<b>x</b>" not in render(page) and "&lt;b&gt;" in render(page) and "<i>" not in render(page)


@pytest.mark.slow
def test_a_sweep_runs_end_to_end(tmp_path, capsys):
    path = toy_spec(
        tmp_path, "evaluation: {metrics: [shapes_truth, vbench_exact, vbench_proxies]}\nsweep: {seed: [0, 1]}"
    )
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", path, "--runs", str(tmp_path / "runs"), "--json"])
    table = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert end.value.code == 0 and {"temporal_flickering", "proxy_dynamics", "ok"} <= set(
        table["comparisons"][0]["measures"]
    )
    assert all("student.temporal_flickering" in row["metrics"] for row in table["arms"])
