"""Sweeps: zipped keys, seeds, arms that fail, status, and what the page says."""

# ruff: noqa: E501
from __future__ import annotations

import csv
import io
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from toy import toy_spec

from causvid import arm_labels, cli, comparison, experiment, launch
from causvid.data.video import write_mp4
from causvid.errors import UserError
from causvid.eval import judging, quoted, side_by_side
from causvid.eval.aggregate import aggregate, scales, total_score
from causvid.eval.clips import Policy
from causvid.eval.dimensions import dimensions
from causvid.eval.results import Store
from causvid.eval.suites import Prompt
from causvid.eval.sweep_page import HELD_OUT, Judged, Scored, csv_of, findings
from causvid.eval.sweep_view import bars, costs, drift_charts, pareto, render


def judged(values, level, seed_effect=0.0, latency=0.1, error="", suite=None, **options):
    scores = [level + seed_effect + 0.01 * n for n in range(10)]
    table = {"ok": scores, "trajectory": [1 - s for s in scores], "size": scores}
    each = {name: {f"p{n}": v for n, v in enumerate(column)} for name, column in table.items()}
    suites = {} if error else {HELD_OUT: Scored(each, {"captions": "abc"}), **(suite or {})}
    return Judged(values, suites, {"latency_s": latency}, "report.html", error, label=called(values), **options)


def called(values):
    return ", ".join(f"{key}={value}" for key, value in values.items() if key != "seed")


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
    assert base.cells["trajectory"].mean == pytest.approx(1 - base.cells["ok"].mean)  # shown as it is measured
    assert base.cells["trajectory"].low < base.cells["trajectory"].mean < base.cells["trajectory"].high
    assert same.cells["ok"].difference.verdict == "inconclusive" and "size" not in page.measures
    assert 0 < page.could_see["ok"] < 0.3 and "can't be told from chance" in render(page)


def test_one_seed_has_no_verdict():
    page = findings("x", [judged({"init": "a"}, 0.1), judged({"init": "b"}, 0.9)])
    cell = page.groups[1].cells["ok"]
    assert (
        cell.difference.verdict == "one seed: no verdict"
        and cell.over == "prompts"
        and cell.low < cell.mean < cell.high
    )
    assert "one seed: no verdict" in render(page) and "over prompts" in render(page)


def test_a_failed_arm_has_no_cells_and_no_zero():
    page = findings("x", [*grown(0.3, "ode"), judged({"init": "bad", "seed": 0}, 0, error="RuntimeError: no")])
    assert page.groups[1].cells == {} and page.groups[1].seeds == 0 and "RuntimeError: no" in render(page)
    failed_base = findings("x", [judged({"init": "bad"}, 0, error="no"), *grown(0.3, "ode")])
    assert failed_base.groups[1].cells["ok"].difference is None


def test_the_front_is_what_none_beats_in_both():
    page = findings("x", [*grown(0.6, "ode"), *grown(0.3, "teacher"), *grown(0.9, "random")])
    assert [dot.best for dot in pareto(page.groups, "ok").dots] == [True, False, True]
    assert [row.arm for row in bars(page)[0].rows] == [0, 1, 2] and bars(page)[0].rows[0].zero < bars(page)[0].rows[
        0
    ].at


def test_the_table_is_exported_and_names_are_escaped():
    page = findings("<b>x</b>", [*grown(0.3, "<i>"), *grown(0.6, "teacher")])
    rows = list(csv.DictReader(io.StringIO(csv_of(page))))
    assert len(rows) == 4 and rows[2]["verdict"] == "better" and float(rows[2]["difference"]) == pytest.approx(0.3)
    assert "<b>x</b>" not in render(page) and "&lt;b&gt;" in render(page) and "<i>" not in render(page)


def test_all_sixteen_give_a_total_through_the_bootstrap():
    """The page's total is that of the means, and its interval comes from the whole aggregation."""

    def run(level, init, seed):
        table = {name: {f"{name} {n}": level + 0.01 * n + 0.002 * (seed % 3) for n in range(4)} for name in scales()}
        return judged({"init": init, "seed": seed}, level, suite={"vbench_long": Scored(table, {"a": 1})})

    page = findings("x", [run(level, init, s) for init, level in (("a", 0.4), ("b", 0.5)) for s in range(5)])
    cell = page.groups[1].cells["vbench_long/total"]
    means = dict.fromkeys(scales(), 0.5 + 0.015 + 0.002 * 0.8)
    assert cell.mean == pytest.approx(total_score(means)) and cell.difference.verdict == "better"
    assert page.measures[0] == "vbench_long/total" and {"vbench_long/quality", "vbench_long/color"} <= set(
        page.measures
    )


def test_different_protocols_are_refused_and_marked_on_every_table_where_asked_for():
    runs = [judged({"init": "a"}, 0.1), judged({"init": "b"}, 0.2)]
    other = Judged(
        {"init": "b"}, {HELD_OUT: Scored(runs[1].suites[HELD_OUT].scores, {"captions": "xyz"})}, label="init=b"
    )
    with pytest.raises(UserError, match="held-out clips: these results have different protocols.*captions"):
        findings("x", [runs[0], other])
    page = findings("x", [runs[0], other], across=True)
    text = render(page)
    assert "captions differ" in page.mark and text.count("<b>Mind:</b> DIFFERENT PROTOCOLS") >= 4
    assert all(row["mark"] == page.mark for row in csv.DictReader(io.StringIO(csv_of(page))))
    assert findings("x", runs).mark == "" and "Mind:" not in render(findings("x", runs))


def test_an_arm_that_lacks_videos_is_marked_on_every_table():
    runs = [judged({"init": "a"}, 0.1), judged({"init": "b"}, 0.2)]
    scored = runs[1].suites[HELD_OUT]
    short = Judged(
        {"init": "b"}, {HELD_OUT: Scored(scored.scores, scored.protocol, lacks="lacks 5 of 6 videos")}, label="init=b"
    )
    page = findings("x", [runs[0], short])
    assert page.mark.startswith("INCOMPLETE: init=b") and "lacks 5 of 6 videos" in page.mark
    assert render(page).count("<b>Mind:</b> INCOMPLETE") >= 4


def vbench(arm, seed, color):
    """A run that is judged .5 in all but colour, which has a score of some prompts."""
    table = {name: {f"p{n}": 0.5 for n in range(10)} for name in scales()} | {"color": color}
    return Judged({"about": arm, "seed": seed}, {"vbench": Scored(table, {"seeds": "s"})}, label=arm)


HALF = {f"p{n}": float(n < 5) for n in range(10)}
ALL, FOUND = dict.fromkeys(HALF, 1.0), {"p5": 1.0, "p6": 1.0}


def test_an_arms_score_is_its_own_and_differences_are_of_common_prompts_and_say_so():
    """Colour skips videos without the object: what one arm does not show says nothing of another's score."""
    runs = [vbench(arm, s, found) for arm, found in (("a", HALF), ("b", FOUND), ("c", ALL)) for s in range(2)]
    page = findings("x", runs)
    a, b, c = page.groups
    for group, color in ((a, 0.5), (b, 1.0), (c, 1.0)):
        assert group.cells["vbench/color"].mean == color
        means = dict.fromkeys(scales(), 0.5) | {"color": color}
        assert (
            group.cells["vbench/total"].mean
            == pytest.approx(total_score(means))
            == pytest.approx(aggregate(means).total)
        )
    assert a.cells["vbench/color"].note == c.cells["vbench/color"].note == c.cells["vbench/total"].note == ""
    assert b.cells["vbench/color"].difference.value == 1.0  # on p5 and p6, where a has 0
    assert c.cells["vbench/color"].difference.value == 0.5  # on all ten, whatever b shows
    assert b.cells["vbench/color"].note == "difference over 2 of 10 prompts"
    assert b.cells["vbench/total"].note == "difference over 2 of 10 prompts of color"
    assert b.cells["vbench/quality"].note == ""
    assert render(page).count("† difference over 2 of 10 prompts") == 3  # colour, total, semantic
    noted = {(row["arm"], row["measure"]): row["note"] for row in csv.DictReader(io.StringIO(csv_of(page)))}
    assert noted["b", "vbench/color"] == "difference over 2 of 10 prompts" and not noted["c", "vbench/color"]
    assert page.as_json()[1]["measures"]["vbench/color"]["note"] == "difference over 2 of 10 prompts"


def test_an_arm_without_an_object_anywhere_takes_no_score_from_others_and_is_marked():
    runs = [vbench(arm, s, found) for arm, found in (("a", HALF), ("b", {}), ("c", ALL)) for s in range(2)]
    page = findings("x", runs)
    a, b, c = page.groups
    assert {"vbench/color", "vbench/total"} <= set(a.cells) & set(c.cells) and "vbench/total" not in b.cells
    assert b.cells["vbench/quality"].difference.value == 0  # what colour is no part of
    assert page.mark == "INCOMPLETE: b has no score of vbench/total, vbench/semantic, vbench/color"
    text = render(page)
    assert text.count("<b>Mind:</b> INCOMPLETE: b") == 3 and text.count("† no score") == 3  # every table, every cell
    apart = findings("x", [vbench("a", 0, {"p1": 0.5}), vbench("b", 0, {"p2": 0.75})]).groups[1].cells["vbench/color"]
    assert (apart.mean, apart.difference, apart.note) == (0.75, None, "not compared: both have 0 of 2 prompts")
    one = findings("x", [vbench("a", 0, HALF), vbench("b", 0, ALL), vbench("b", 1, {}), vbench("b", 2, ALL)]).groups[1]
    assert one.cells["vbench/color"].mean == 1.0 and "2 of 3 seeds have a score" in one.cells["vbench/color"].note
    first = findings("x", [vbench("a", 0, {}), vbench("b", 0, ALL)])
    assert "a has no score of vbench/total" in first.mark
    assert first.groups[1].cells["vbench/color"].note == "not compared: the base has no score"
    none = findings("x", [vbench("a", 0, {}), vbench("b", 0, {})])  # asked, and found by none
    assert "vbench/color" not in none.measures and "INCOMPLETE: b has no score of vbench/color" in none.mark


def test_the_page_shows_the_score_that_the_judge_gave(tmp_path):
    """Of videos with the object, which prompts have more or fewer of; a mean over prompts would be another number."""
    pytest.importorskip("cv2")

    class Judge:
        label, weights, fast_weights, static_weights, lacks, mapping = "exact: test", {}, {}, {}, "", None
        dimension = dimensions()["color"]

        def score(self, clip, branch):
            return {"a-0.mp4": 0.25, "a-1.mp4": 0.5, "b-0.mp4": 0.75}.get(clip.name)

    for number, name in enumerate(("a-0", "a-1", "b-0", "b-1")):
        ground = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(number)) * 2 - 1
        write_mp4(tmp_path / "v" / f"{name}.mp4", ground, fps=8)
    prompts = [Prompt(text, ("color",)) for text in "ab"]
    with Store(tmp_path / "rows") as store:
        found = judging.judge_folder(tmp_path / "v", prompts, store, Policy(), 2, {"color": Judge()}).as_json()
    scored = comparison._suite(json.loads(json.dumps(found)))
    cell = findings("x", [Judged({}, {"vbench": scored}, label="a")]).groups[0].cells["vbench/color"]
    assert cell.mean == found["scores"]["color"] == 0.5 and cell.low <= 0.5 <= cell.high
    assert dict(scored.scores["color"]) == {"a": 0.375, "b": 0.75}


def test_curves_costs_and_videos_are_on_the_page():
    def run(init, seed, identity):
        points = [{"seconds": 2.0 * n, "mean": 0.5 - 0.1 * n, "low": 0.0, "high": 1.0, "videos": 2} for n in range(3)]
        change = {"proxy_dynamics": {"change": -0.2, "collapsed": 0.5}}
        scored = Scored(
            {"temporal_flickering": {"a cat": 0.9}}, {}, {"temporal_flickering": points}, change, "no total"
        )
        cost = {"teacher": ("shared", 5.0), "distill": (identity, 2.0)}
        return judged({"init": init, "seed": seed}, 0.5, suite={"long": scored}, cost=cost, videos={"a cat": "data:,x"})

    page = findings("x", [run("a", 0, "d1"), run("a", 1, "d2"), run("b", 0, "d3")])
    (_, chart), text = drift_charts(page)[0], render(page, "what it is about", {"csv": "t.csv"})
    assert [line.label for line in chart.lines] == ["1", "2"]
    assert [(row["own"], row["shared"]) for row in costs(page)] == [(4.0, 5.0), (2.0, 5.0)]
    for word in ("what it is about", 'href="t.csv"', "data:,x", "a cat", "no total", "motion collapsed", "0.50",
                 "Huang et al.", "@inproceedings{huang2024vbench", "94.7", "84.04", "92.69"):  # fmt: skip
        assert word in text, word
    rows = sum(len(table.rows) for table in quoted.TABLES)
    assert text.count('<span class="quoted">quoted</span>') == rows + 1  # every row is marked, and the heading


def twin(name, seeds, trial):
    """An arm of one spec: scores of ten prompts with an effect of the training seed, in eight measures."""
    g = torch.Generator().manual_seed(trial)
    out = []
    for seed in seeds:
        between = torch.randn(8, 1, generator=g) * 0.05
        values = (0.5 + torch.linspace(-0.2, 0.2, 10) + between + torch.randn(8, 10, generator=g) * 0.1).tolist()
        table = {f"m{m}": {f"p{p}": v for p, v in enumerate(row)} for m, row in enumerate(values)}
        out.append(Judged({"about": name, "seed": seed}, {HELD_OUT: Scored(table)}, label=name))
    return out


@pytest.mark.parametrize(("seeds", "trials"), [(2, 120), (4, 120), (5, 12)])
def test_a_a_arms_come_out_inconclusive_on_whole_pages(seeds, trials):
    """Two arms of one spec with disjoint training seeds: at most 5% of the pages may call any measure different."""
    wrong = 0
    for trial in range(trials):
        page = findings(
            "a/a", [*twin("a", range(seeds), 2 * trial), *twin("b", range(seeds, 2 * seeds), 2 * trial + 1)]
        )
        verdicts = {cell.difference.verdict for cell in page.groups[1].cells.values()}
        wrong += verdicts != {"inconclusive"}
    assert wrong / trials <= 0.05 + 2 * (0.05 * 0.95 / trials) ** 0.5


SPLIT = "evaluation: {metrics: [shapes_truth]}\nsweep: {student.steps: [1, 2], seed: [0, 1]}"


@pytest.mark.parametrize(
    "options", [["--launcher", "slurm", "--cluster-option", "slurm_partition=gpu"], ["--launcher", "local"]]
)
def test_a_dry_run_shows_what_would_be_submitted_and_runs_nothing(tmp_path, capsys, options):
    path = toy_spec(tmp_path, SPLIT)
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", path, "--runs", str(tmp_path / "runs"), "--dry-run", "--workers", "3", *options])
    out = capsys.readouterr().out
    assert end.value.code == 0 and not (tmp_path / "runs" / "distill").exists()
    assert all(f"student.steps={steps} seed={seed}" in out for steps in (1, 2) for seed in (0, 1))
    if "local" in options:  # a line that a shell can run
        assert shlex.split(out.splitlines()[0]) == launch.works(path, [])[0].command(tmp_path / "runs")
    if "slurm" in options:
        for line in ("#SBATCH --array=0-3%3", "#SBATCH --partition=gpu", "submitit.core._submit", "srun"):
            assert line in out, line


@pytest.mark.parametrize(
    ("options", "minutes"), [([], 5), (["timeout_min=600"], 600), (["slurm_time=30"], 30), (["slurm_qos=long"], 5)]
)
def test_the_five_minutes_that_slurm_is_asked_for_by_default_are_told(tmp_path, capsys, options, minutes):
    made = launch.executor(tmp_path, "slurm", options, 2, dry=True)
    err = " ".join(capsys.readouterr().err.split())
    assert ("5 minutes a job" in err and "timeout_min=" in err) == (minutes == 5)
    assert f"#SBATCH --time={minutes}\n" in launch.scripts([launch.Work("x", (), "a")], made)  # submitit's own default


def test_a_cluster_that_is_not_there_and_an_option_it_lacks_are_clear_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no cluster 'slurm' can be used here.*--dry-run"):
        launch.executor(tmp_path, "slurm", [], 2)
    with pytest.raises(UserError, match="partitio"):
        launch.executor(tmp_path, "slurm", ["slurm_partitio=gpu"], 2, dry=True)
    with pytest.raises(UserError, match="KEY=VALUE"):
        launch.executor(tmp_path, "slurm", ["gpu"], 2, dry=True)


def stand_in(monkeypatch, script):
    """Arms that run a line of Python in place of the experiment."""
    monkeypatch.setattr(launch.Work, "command", lambda self, root: [sys.executable, "-c", script, self.label])


def test_local_workers_are_bounded_and_a_failed_arm_stops_no_other(tmp_path, monkeypatch):
    stand_in(
        monkeypatch,
        f"""if True:
        import os, sys, time
        mine = {str(tmp_path)!r} + "/running" + sys.argv[1]
        open(mine, "w").close()
        count = len([n for n in os.listdir({str(tmp_path)!r}) if n.startswith("running")])
        open({str(tmp_path)!r} + "/seen" + sys.argv[1], "w").write(str(count))
        time.sleep(0.2); os.unlink(mine)
        sys.exit("error: out of memory" if sys.argv[1] == "2" else 0)""",
    )
    work = [launch.Work("x", (), f"{n}") for n in range(5)]
    errors = launch.local(work, tmp_path, 2, 1)
    assert [bool(error) for error in errors] == [False, False, True, False, False] and "out of memory" in errors[2]
    assert max(int((tmp_path / f"seen{n}").read_text()) for n in range(5)) == 2


@pytest.mark.slow
def test_submitits_local_executor_runs_a_sweep_and_a_failed_arm_is_reported(tmp_path):
    """Through the command line, with an arm that can't work; then the same arms as local workers, where all is done."""
    path = toy_spec(tmp_path, SPLIT + "\neval: [{name: vbench_long, per_prompt: 1, limit: 2, fps: 8}]")
    line = [sys.executable, "-m", "causvid.cli", "sweep", path, "--runs", str(tmp_path / "runs"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--launcher", "submitit", "--cluster-option", "timeout_min=10"]
    done = subprocess.run([*line, *options], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    table = json.loads(done.stdout.splitlines()[-1])
    assert len(table["arms"]) == 4 and all(
        "student.vbench_long.temporal_flickering" in a["metrics"] for a in table["arms"]
    )
    page = next((tmp_path / "runs" / "sweeps").glob("*.html")).read_text()
    assert "submitted 4 jobs" in done.stderr and "Over time" in page and "vbench_long" in page
    judged_files = sorted((tmp_path / "runs" / "evaluate").glob("*/vbench_long/results.json"))
    assert len(judged_files) == 4 and side_by_side.compare(judged_files)["mark"] == ""
    again = subprocess.run([*line, "--launcher", "local"], capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1])["comparisons"] == table["comparisons"]
    made = launch.executor(tmp_path / "bad", "local", [], 2)
    bad = [launch.Work(path, ("student.steps=1", "seed=0", "teacher_sampling.steps=0"), "bad")]
    errors = launch.cluster(bad, tmp_path / "bad", made, say=lambda text: None, poll_s=0.1)
    assert "UserError" in errors[0] or "steps" in errors[0]


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


def test_contrast_is_best_at_one_and_is_shown_as_it_is():
    def run(name, level, seed):
        table = {"contrast": {f"p{n}": level + 0.01 * (seed % 2) for n in range(4)}}
        return Judged({"seed": seed}, {HELD_OUT: Scored(table)}, label=name)

    page = findings("x", [run(n, level, s) for n, level in (("a", 0.9), ("b", 1.5), ("c", 1.0)) for s in range(6)])
    _, b, c = (group.cells["contrast"] for group in page.groups)
    assert b.mean == pytest.approx(1.505) and b.difference.verdict == "worse" and c.difference.verdict == "better"


@pytest.mark.parametrize(
    ("sweep", "names"),
    [
        ("{student.steps: [1, 2], seed: [0, 1]}", ["student.steps=1"] * 2 + ["student.steps=2"] * 2),
        # An option that equals its default is not told; one that differs is, alone.
        ("{student.input: [backward_simulation, {name: self_rollout, exit_step: random, given_blocks: 1}]}",
         ["student.input=backward_simulation", "student.input=self_rollout (given_blocks=1)"]),
        # noisy is the default of data, and the base has clean: what would read alike is told in full.
        ("{student.input: [data, {name: data, context: noisy}, {name: data, context: noisy, include_clean: true}]}",
         None),
        ("{student.input: [data, {name: data, context: noisy}]}",
         ["student.input=data", "student.input=data (context=noisy)"]),
        ("{loss: [{name: dmd, guidance: 1.25}, {name: sum, of: [{name: dmd, guidance: 2}, gan], weights: [1, 0.1]}]}",
         ["loss=dmd (guidance=1.25)", "loss=sum (of=[dmd (guidance=2), gan], weights=[1, 0.1])"]),
        ('{"student.steps, init": [[1, ode], [2, teacher]]}',
         ["student.steps=1, init=ode", "student.steps=2, init=teacher"]),
        ("{eval: [vbench_proxies, [vbench_proxies, shapes_truth]]}",
         ["eval=vbench_proxies", "eval=[vbench_proxies, shapes_truth]"]),
        ("{student: [{steps: 1}, {input: backward_simulation}]}",
         ["student={steps: 1}", "student={input: backward_simulation}"]),
        ("{seed: [0, 1]}", ["base", "base"]),
    ],
)  # fmt: skip
def test_arms_have_short_names_in_which_defaults_are_left_out(tmp_path, sweep, names):
    path = toy_spec(tmp_path, f"sweep: {sweep}")
    if names is None:  # the last two are one experiment, whatever is written out
        with pytest.raises(UserError, match="are one experiment"):
            experiment.arms_of(path, [])
        return
    arms = experiment.arms_of(path, [])
    assert arm_labels.labels(arms) == names
    seeded = arm_labels.labels(arms, seeds=True)
    assert len(set(seeded)) == len(arms) and all(
        "seed=" in n for (v, _), n in zip(arms, seeded, strict=True) if "seed" in v
    )


def test_the_short_names_are_told_in_the_status_and_by_launchers(tmp_path, capsys):
    path = toy_spec(tmp_path, "sweep: {student.input: [data, {name: self_rollout, given_blocks: 1}], seed: [3]}")
    with pytest.raises(SystemExit):
        cli.main(["sweep", path, "--status", "--runs", str(tmp_path / "runs")])
    told = capsys.readouterr().out
    assert "student.input=self_rollout (given_blocks=1), seed=3  " in told and "{" not in told
    assert launch.works(path, [])[0].label == "student.input=data, seed=3"


def test_a_launched_arm_of_zipped_keys_is_one_arm(tmp_path):
    """What launchers start is 'causvid run' with the arm's settings, which names every key of the row apart."""
    path = toy_spec(tmp_path, 'sweep: {"student.steps, about": [[1, one], [2, two]]}')
    specs_of = [experiment.single(path, work.overrides) for work in launch.works(path, [])]
    assert [(s["student.steps"], s["about"]) for s in specs_of] == [(1, "one"), (2, "two")]
    with pytest.raises(UserError, match="sweeps over about: .*with about=..."):
        experiment.single(path, ["student.steps=1"])


def test_an_arm_that_is_named_twice_is_refused(tmp_path):
    """Two copies of one training would pass for two seeds that agree to the last digit."""
    for sweep in ("{seed: [0, 0]}", "{student.steps: [1, 1]}", "{student.shift: [3, 3.0]}"):
        with pytest.raises(UserError, match="are one experiment; name each arm once"):
            experiment.arms_of(toy_spec(tmp_path, f"sweep: {sweep}"), [])
