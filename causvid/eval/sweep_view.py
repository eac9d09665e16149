"""The page of a sweep: drawings and HTML of what :mod:`causvid.eval.sweep_page` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from causvid.eval import charts, quoted
from causvid.eval.results import identity
from causvid.eval.sweep_page import HELD_OUT, SEED, TOTALS, Findings, Group, number, signed
from causvid.eval.tables import CAPTION, PICTURE

TEMPLATE = Path(__file__).with_name("sweep.html.j2")
HUES = 8  # colours of the page; from the ninth arm on they come again, on squares and dashed lines
SHOWN_FIRST = 3  # prompts whose videos are open when the page opens
DRIFT_FIRST = (
    "total",
    "ok",
    "temporal_flickering",
    "contrast",
    "proxy_dynamics",
    "proxy_saturation",
    "proxy_sharpness",
)
UNITS = {measure.key: (measure.heading, measure.unit, measure.meaning) for measure in (*CAPTION, *PICTURE)}
MEANINGS = {
    "temporal_flickering": "VBench, exact: 1 is still; of static videos where the protocol has a static filter",
    "proxy_dynamics": "proxy: speed of the fastest pixels, px per frame at 256 px",
    "proxy_smoothness": "proxy: 1 - error of frames warped by optical flow",
    "proxy_consistency": "proxy: overlap of colour histograms",
    "proxy_sharpness": "proxy: spread of the Laplacian",
    "proxy_saturation": "proxy: strength of colours",
}


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart, in drawing units: from ``zero`` to ``at``, whisker from ``low`` to ``high`` where known."""

    arm: int
    label: str
    y: float
    zero: float
    at: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Bars:
    """Means of one measure, one bar an arm."""

    title: str
    note: str
    height: float
    ticks: Sequence[charts.Tick]
    rows: Sequence[Bar]


@dataclass(frozen=True)
class Dot:
    """An arm in the plot of quality against latency; ``best``: none is better in both."""

    arm: int
    x: float
    y: float
    best: bool
    text: str


@dataclass(frozen=True)
class Pareto:
    """Quality against latency of every arm that has both."""

    measure: str
    dots: Sequence[Dot]
    x_ticks: Sequence[charts.Tick]
    y_ticks: Sequence[charts.Tick]


def pareto(groups: Sequence[Group], measure: str) -> Pareto | None:
    """Points of quality against latency; None where nothing is known of either."""
    known = [
        (i, g, g.latency_s, g.cells[measure].mean) for i, g in enumerate(groups) if g.latency_s and measure in g.cells
    ]
    if not known:
        return None
    x, x_ticks = _axis([1000 * s for *_, s, _ in known], charts.LEFT, charts.WIDTH - charts.RIGHT)
    y, y_ticks = _axis([q for *_, q in known], charts.HEIGHT - charts.BOTTOM, charts.TOP)
    dots = [
        Dot(
            i, x(1000 * s), y(q), not any(b <= s and c >= q and (b, c) != (s, q) for *_, b, c in known),
            f"{g.label}: {1000 * s:.0f} ms, {number(q)}",
        )
        for i, g, s, q in known
    ]  # fmt: skip
    return Pareto(measure, dots, x_ticks, y_ticks)


def _axis(values: Sequence[float], start: float, stop: float) -> tuple[Any, list[charts.Tick]]:
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    place = charts.scale(low - pad, high + pad, start, stop)
    return place, [charts.Tick(place(v), charts.number(v)) for v in charts.nice_ticks(low - pad, high + pad, 4)]


def bars(page: Findings) -> list[Bars]:
    """A chart for each measure: every arm's mean from zero, with its interval."""
    out = []
    for measure in page.measures:
        rows = [(i, g, g.cells[measure]) for i, g in enumerate(page.groups) if measure in g.cells]
        ends = [v for *_, c in rows for v in (c.mean, c.low, c.high) if v == v]
        if not ends:
            continue
        low, high = min(0.0, *ends), max(0.0, *ends) or 1.0
        x = charts.scale(low, high, charts.LABELS, charts.WIDTH - 48)
        drawn = [
            Bar(i, f"{i + 1}", charts.TOP + (n + 0.5) * charts.ROW, x(0.0), x(c.mean),
                x(c.low) if c.low == c.low else None, x(c.high) if c.high == c.high else None, number(c.mean))
            for n, (i, g, c) in enumerate(rows)
        ]  # fmt: skip
        ticks = [charts.Tick(x(v), charts.number(v)) for v in charts.nice_ticks(low, high, 3)]
        height = charts.TOP + len(rows) * charts.ROW + charts.BOTTOM - 12
        out.append(Bars(heading(measure), meaning(measure), height, ticks, drawn))
    return out


def heading(measure: str) -> str:
    """A measure's name for readers, with its suite where it has one."""
    suite, _, name = measure.rpartition("/")
    words = UNITS[name][0] if name in UNITS else name.replace("_", " ")
    return f"{words} · {suite}" if suite else words


def meaning(measure: str) -> str:
    """What a measure says; empty where its name says all."""
    name = measure.rpartition("/")[2]
    return UNITS[name][2] if name in UNITS else MEANINGS.get(name, "")


def drift_charts(page: Findings) -> list[tuple[str, charts.Chart]]:
    """(suite, chart) of scores over time, one line an arm, its mean over seeds."""
    out = []
    suites = dict.fromkeys(suite for group in page.groups for run in group.runs for suite in run.suites)
    for suite in suites:
        names = dict.fromkeys(
            name for g in page.groups for run in g.runs if suite in run.suites for name in run.suites[suite].over_time
        )
        for name in sorted(names, key=lambda n: (DRIFT_FIRST.index(n) if n in DRIFT_FIRST else len(DRIFT_FIRST), n)):
            series = {f"{i + 1}": _over_seeds(group, suite, name) for i, group in enumerate(page.groups)}
            chart = charts.curves(heading(name), "", "seconds", {k: v for k, v in series.items() if v}, exact=True)
            if chart is not None and name not in ("size", "ground", "start_x", "start_y"):
                out.append((suite, chart))
    return out


def _over_seeds(group: Group, suite: str, name: str) -> list[tuple[float, float]]:
    at: dict[float, list[float]] = {}
    for run in group.runs:
        for point in run.suites[suite].over_time.get(name, ()) if suite in run.suites else ():
            at.setdefault(point["seconds"], []).append(point["mean"])
    return [(second, sum(values) / len(values)) for second, values in sorted(at.items())]


def collapses(page: Findings) -> list[dict[str, Any]]:
    """For each arm and long suite: how scores end against how they began, and what came to rest or ran away."""
    rows = []
    for i, group in enumerate(page.groups):
        for suite in dict.fromkeys(s for run in group.runs for s in run.suites if run.suites[s].drift):
            each = [run.suites[suite].drift for run in group.runs if suite in run.suites]

            def mean(name: str, key: str, each: Any = each) -> float | None:
                values = [d[name][key] for d in each if key in d.get(name, {}) and d[name][key] is not None]
                return sum(values) / len(values) if values else None

            rows.append({"arm": i, "suite": suite, "flickering": mean("temporal_flickering", "change"),
                         "motion": mean("proxy_dynamics", "change"), "collapsed": mean("proxy_dynamics", "collapsed"),
                         "saturation": mean("proxy_saturation", "change"),
                         "saturated": mean("proxy_saturation", "saturated")})  # fmt: skip
    return rows


def costs(page: Findings) -> list[dict[str, Any]]:
    """For each arm seconds by stage, and which of them it shares with another arm."""
    users: dict[tuple[str, str], set[int]] = {}
    for i, group in enumerate(page.groups):
        for run in group.runs:
            for stage, (folder, _) in run.cost.items():
                users.setdefault((stage, folder), set()).add(i)
    rows = []
    for i, group in enumerate(page.groups):
        seen = {(s, folder): seconds for run in group.runs for s, (folder, seconds) in run.cost.items()}
        own = sum(seconds for key, seconds in seen.items() if len(users[key]) == 1)
        stages: dict[str, float] = {}
        for (stage, _), seconds in seen.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
        rows.append({"arm": i, "own": own, "shared": sum(seen.values()) - own, "stages": stages})
    return rows


def drilldown(page: Findings) -> list[dict[str, Any]]:
    """Prompts with the arms' videos side by side and their main score, those first on which arms differ most."""
    rows = []
    scored = page.measures[0] if page.measures else ""
    suite, _, name = scored.rpartition("/")
    for prompt in dict.fromkeys(p for group in page.groups for run in group.runs for p in run.videos):
        cells = []
        for i, group in enumerate(page.groups):
            run = next((run for run in group.runs if prompt in run.videos), None)
            if run is None:
                continue
            judged = {
                s: {m: v[prompt] for m, v in found.scores.items() if prompt in v} for s, found in run.suites.items()
            }
            main = [r.suites[suite or HELD_OUT].scores[name][prompt] for r in group.runs
                    if prompt in r.suites.get(suite or HELD_OUT, _NOTHING).scores.get(name, {})]  # fmt: skip
            cells.append({"arm": i, "source": run.videos[prompt], "seed": run.values.get(SEED),
                          "main": sum(main) / len(main) if main else None, "judged": judged})  # fmt: skip
        known = [cell["main"] for cell in cells if cell["main"] is not None]
        rows.append({"prompt": prompt, "cells": cells, "spread": max(known) - min(known) if known else 0.0})
    return sorted(rows, key=lambda row: -row["spread"])


class _Nothing:
    scores: Mapping[str, Mapping[str, float]] = {}


_NOTHING = _Nothing()


def verdicts(page: Findings) -> dict[str, int]:
    """How many comparisons came out how."""
    out: dict[str, int] = {}
    for group in page.groups:
        for cell in group.cells.values():
            if cell.difference:
                out[cell.difference.verdict] = out.get(cell.difference.verdict, 0) + 1
    return out


def cards(page: Findings) -> list[dict[str, Any]]:
    """For each suite its protocol, once for all arms that share it."""
    out = []
    for suite, each in page.protocols.items():
        groups: dict[str, dict[str, Any]] = {}
        for arm, protocol in each.items():
            card = groups.setdefault(
                identity(protocol), {"suite": suite, "id": identity(protocol), "arms": [], "facts": {}}
            )
            card["arms"].append(arm)
            card["facts"] = {k: _fact(v) for k, v in protocol.items() if v not in (None, {}, [])}
        out += list(groups.values())
    return out


def _fact(value: Any) -> Any:
    """A protocol's value for eyes: components of a list by name, with what options they have."""
    if not isinstance(value, (list, tuple)):
        return value
    parts = [dict(each) if isinstance(each, Mapping) else {"name": each} for each in value]
    return ", ".join(
        str(part.pop("name", "")) + (f" ({', '.join(f'{k}={v}' for k, v in part.items())})" if part else "")
        for part in parts
    )


def notes(page: Findings) -> list[tuple[str, str]]:
    """What can't be computed of each suite, and of which arms where it is not so of all."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for group in page.groups:
        for suite, scored in ((s, f) for run in group.runs for s, f in run.suites.items()):
            found.setdefault((suite, scored.note), {})[group.label] = None
    same = {suite for suite, _ in found if sum(each == suite for each, _ in found) == 1}
    return [(suite if suite in same else f"{suite}, {'; '.join(arms)}", note)
            for (suite, note), arms in found.items() if note]  # fmt: skip


def render(page: Findings, about: str = "", files: Mapping[str, str] | None = None) -> str:
    """The page as one HTML file; ``files``: names of the exports beside it."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=number, signed=signed, heading=heading, meaning=meaning)
    return environment.get_template(TEMPLATE.name).render(
        f=page, c=charts, about=about, files=files or {},
        pareto=pareto(page.groups, page.measures[0]) if page.measures else None,
        bars=bars(page), drift=drift_charts(page), collapses=collapses(page), costs=costs(page), rows=drilldown(page),
        verdicts=verdicts(page), cards=cards(page), notes=notes(page), quoted=quoted, hues=HUES, shown=SHOWN_FIRST,
        seed=SEED, totals=list(TOTALS),
    )  # fmt: skip
