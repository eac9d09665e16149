"""Totals of VBench against published rows, an independent computation, and every kind of bad table."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from causvid.cli import app
from causvid.errors import UserError
from causvid.eval import aggregate as vbench
from causvid.eval import quoted
from causvid.eval.dimensions import Dimension, dimensions, quality, scales
from causvid.registry import register

NAMES = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality", "object_class", "multiple_objects", "human_action", "color",
    "spatial_relationship", "scene", "appearance_style", "temporal_style", "overall_consistency",
)  # fmt: skip
# ruff: noqa: E501
# The golden row, percent, then its total, quality and semantic score; and the other rows of the same published table.
GOLDEN = (
    [97.53, 97.19, 96.24, 98.05, 92.69, 64.15, 68.88, 92.99, 72.15, 99.80, 80.17, 64.65, 56.58, 24.27, 25.33, 27.51],
    (84.27, 85.65, 78.75),
)
ROWS = {name: (list(values[3:]), values[:3]) for name, values in quoted.LEADERBOARD.rows}


def test_the_golden_row_is_the_published_one():
    assert ROWS["CausVid"] == (GOLDEN[0], GOLDEN[1]) and quoted.ORDER == NAMES and len(ROWS) == 8


def table(row: str = "CausVid") -> dict[str, float]:
    return dict(zip(NAMES, ROWS[row][0], strict=True))


def run(tmp_path, content: str, *options: str):
    path = tmp_path / "scores.json"
    path.write_text(content)
    return CliRunner().invoke(app, ["eval", "aggregate", str(path), *options])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("form", ["percent", "fractions", "spaces", "upstream"])
def test_published_rows(tmp_path, row, form):
    scores: dict = table(row)
    if form in ("fractions", "upstream"):
        scores = {name: value / 100 for name, value in scores.items()}
    if form == "spaces":
        scores = {name.replace("_", " "): value for name, value in scores.items()}
    if form == "upstream":
        scores = {name: [value, [{"video_path": "a-0.mp4", "video_results": value}]] for name, value in scores.items()}
    result = run(tmp_path, json.dumps(scores), "--json")
    out = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0 and list(out) == ["total", "quality", "semantic"]
    assert [out[key] for key in out] == pytest.approx(ROWS[row][1], abs=0.011)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(0, 1), min_size=16, max_size=16))
def test_the_totals_are_the_weighted_sums_that_the_benchmark_defines(values):
    ranges = {0: (0.1462, 1), 1: (0.2615, 1), 2: (0.6293, 1), 3: (0.706, 0.9975), 12: (0, 0.8222)}
    ranges |= {13: (0.0009, 0.2855), 14: (0, 0.364), 15: (0, 0.364)}
    scaled = [(v - ranges.get(i, (0, 1))[0]) / (ranges.get(i, (0, 1))[1] - ranges.get(i, (0, 1))[0])
              for i, v in enumerate(values)]  # fmt: skip
    first, second = (sum(scaled[:7]) - scaled[4] / 2) / 6.5, sum(scaled[7:]) / 9
    totals = vbench.aggregate(dict(zip(NAMES, values, strict=True)))
    assert (totals.quality, totals.semantic) == pytest.approx((first, second), abs=1e-12)
    assert totals.total == pytest.approx((4 * first + second) / 5, abs=1e-12)


@pytest.mark.parametrize(
    ("absent", "null"),
    [(["color"], ["total", "semantic"]), (["dynamic_degree"], ["total", "quality"]), (list(NAMES), ["total", "quality", "semantic"])],
)  # fmt: skip
def test_a_missing_dimension_is_null_and_named_and_never_zero(tmp_path, absent, null):
    scores = {name: value for name, value in table().items() if name not in absent}
    result = run(tmp_path, json.dumps(scores), "--json")
    out = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 3 and sorted(out["missing"]) == sorted(absent)
    assert [key for key in ("total", "quality", "semantic") if out[key] is None] == null
    assert absent[0] in result.stderr and "not computable" in result.stderr
    if out["quality"] is not None:
        assert out["quality"] == pytest.approx(85.65, abs=0.011) and "8 of 9" in result.stderr


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"color": NaN}', "color is nan"), ('{"color": Infinity}', "finite"), ('{"color": -1}', "finite"),
        ('{"color": 100.5}', "finite"), ('{"color": null}', "leave a missing dimension out"),
        ('{"color": true}', "color is true"), ('{"color": "80"}', "color"), ('{"colour": 1}', "did you mean 'color'"),
        ('{"color": 1, "color": 2}', "twice"), ('{"object class": 1, "object_class": 2}', "twice"),
        ('{"proxy_dynamics": 1}', "never enters a total"), ("[1]", "list"), ("{", "not readable JSON"), ("", "not readable"),
        ('{"color": ' + "9" * 400 + "}", "color is 999"), ("[" * 100_000, "not readable JSON"),
        ('{"color": []}', "color"), ('{"color": [NaN, []]}', "nan"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused(tmp_path, content, word):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(UserError, match=word):
        vbench.read_scores(tmp_path / "scores.json")


def test_no_file_is_one_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        vbench.read_scores(tmp_path / "scores.json")


def test_sixteen_dimensions_have_a_scale_and_no_proxy_can():
    assert sorted(scales()) == sorted(NAMES)
    assert {name for name, d in dimensions().items() if d.fidelity == "proxy"}.isdisjoint(scales())
    with pytest.raises(TypeError, match="never enters a total"):

        class Cheat(Dimension):
            """A proxy that would be counted."""

            fidelity, scale = "proxy", quality()

    with pytest.raises(UserError, match="proxy"):
        vbench.aggregate({"proxy_dynamics": 0.5})


def test_a_dimension_is_registered_once():
    with pytest.raises(ValueError, match="twice"):
        register("dimension", "color")(type("Other", (Dimension,), {"__doc__": "x."}))


def test_the_command_prints_for_eyes_too(tmp_path):
    result = run(tmp_path, json.dumps(table()))
    assert result.stdout.split() == [
        "total",
        "84.27",
        "quality",
        "85.65",
        "semantic",
        "78.74",
    ]  # 78.745, rounded up when published


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.5, 10**400, True, "0.5", None])
def test_a_value_that_is_no_fraction_enters_no_total(value):
    with pytest.raises(UserError, match=r"color is .*a score is a number in \[0, 1\]"):
        vbench.aggregate({**dict.fromkeys(NAMES, 0.5), "color": value})


def test_fractions_above_the_range_are_told(tmp_path):
    high = {name: value / 100 for name, value in table().items()} | {"appearance_style": 0.99}
    result = run(tmp_path, json.dumps(high), "--json")
    assert json.loads(result.stdout.splitlines()[-1])["semantic"] > 100
    assert "above the range of their dimension: appearance_style (99%)" in result.stderr
    assert all(not vbench.out_of_range({n: v / 100 for n, v in table(row).items()}) for row in ROWS)


def test_fractions_among_percent_are_told(tmp_path):
    """By the rule all are percent then, and the total is as odd as the table."""
    mixed = {name: value / 100 for name, value in table().items()} | {"color": 80.17}
    result = run(tmp_path, json.dumps(mixed), "--json")
    assert result.exit_code == 0 and json.loads(result.stdout.splitlines()[-1])["total"] < 0
    assert "warning" in result.stderr and "subject_consistency (0.9753%)" in result.stderr
    assert "warning" not in run(tmp_path, json.dumps(table()), "--json").stderr
