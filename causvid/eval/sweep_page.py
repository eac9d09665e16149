"""The page of a sweep: every arm's scores over its training seeds, and whether it differs from the first arm."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from causvid.eval import ablation
from causvid.eval.ablation import Difference
from causvid.eval.statistics import over_seeds

TEMPLATE = Path(__file__).with_name("sweep.html.j2")
SEED = "seed"  # the key whose values are trainings of one arm
# Shown first, where judged; the rest in the order of the judge.
FIRST = ("ok", "colour", "shape", "direction", "fidelity", "contrast", "temporal_flickering")
LEFT_OUT = ("size", "ground", "start_x", "start_y", "speed")  # neither more nor less of it is better
LESS_IS_BETTER = ("trajectory",)


@dataclass(frozen=True)
class Judged:
    """One run: what it sets, its student's scores by prompt, its timings and report; or why it failed."""

    values: Mapping[str, Any]
    scores: Mapping[str, Sequence[float]]
    timings: Mapping[str, float]
    report: str
    error: str = ""


@dataclass(frozen=True)
class Cell:
    """A measure of an arm: its mean over seeds with an interval (NaN of one seed), and the difference to the base."""

    mean: float
    low: float
    high: float
    difference: Difference | None


@dataclass(frozen=True)
class Group:
    """An arm: its runs differ in the training seed alone."""

    label: str
    runs: Sequence[Judged]
    cells: Mapping[str, Cell]
    latency_s: float | None

    @property
    def seeds(self) -> int:
        return sum(not run.error for run in self.runs)


@dataclass(frozen=True)
class Findings:
    """All that the page shows; the first group is the base."""

    name: str
    measures: Sequence[str]
    groups: Sequence[Group]

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"arm": group.label, "seeds": group.seeds, "latency_s": group.latency_s,
             "measures": {name: {"mean": c.mean, "low": c.low, "high": c.high,
                                 "to_base": c.difference.as_json() if c.difference else None}
                          for name, c in group.cells.items()}}
            for group in self.groups
        ]  # fmt: skip


def findings(name: str, runs: Sequence[Judged]) -> Findings:
    """Group runs into arms, and compare each with the first, with Holm's correction over all that is compared."""
    parts: dict[str, list[Judged]] = {}
    for run in runs:
        values = {key: value for key, value in run.values.items() if key != SEED}
        parts.setdefault(", ".join(f"{k}={json.dumps(v)}" for k, v in values.items()) or "base", []).append(run)
    scored = next((run.scores for run in runs if run.scores), {})
    measures = [m for m in (*FIRST, *(m for m in scored if m not in FIRST)) if m in scored and m not in LEFT_OUT]
    tables = {label: _table(group, measures) for label, group in parts.items()}
    base = next(iter(tables.values()), {})
    compared = {
        (label, m): ablation.compare(m, {"prompts": {m: table[m]}}, {"prompts": {m: base[m]}}, _statistic(m))
        for label, table in tables.items()
        for m in measures
        if table and base and table is not base and table[m].shape[1] == base[m].shape[1]
    }
    held = dict(zip(compared, ablation.holm(list(compared.values())), strict=True))
    groups = []
    for label, group in parts.items():
        cells = {
            m: Cell(*over_seeds(values.mean(1).tolist()), held.get((label, m)))
            for m, values in tables[label].items()
        }  # fmt: skip
        latencies = [run.timings["latency_s"] for run in group if "latency_s" in run.timings]
        groups.append(Group(label, group, cells, sum(latencies) / len(latencies) if latencies else None))
    return Findings(name, measures, groups)


def _statistic(measure: str) -> ablation.Statistic:
    """The measure's mean, turned so that more is better: verdicts read "better" and "worse"."""
    sign = -1.0 if measure in LESS_IS_BETTER else 1.0
    return lambda means: sign * means[measure]


def _table(runs: Sequence[Judged], measures: Sequence[str]) -> dict[str, torch.Tensor]:
    """(seeds, prompts) of each measure; empty where every run failed."""
    good = [run.scores for run in runs if run.scores]
    return {m: torch.tensor([s[m] for s in good], dtype=torch.float64) for m in measures} if good else {}


def number(value: float | None, places: int = 3) -> str:
    """Text of a number; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{places}f}".replace("-", "−")


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def pareto(groups: Sequence[Group], measure: str) -> list[dict[str, Any]]:
    """Points of quality against latency in drawing units of 360 x 216; ``best`` where none is better in both."""
    known = [(g.label, g.latency_s, g.cells[measure].mean) for g in groups if g.latency_s and measure in g.cells]
    if not known:
        return []
    fast, slow = min(x for _, x, _ in known), max(x for _, x, _ in known)
    low, high = min(y for *_, y in known), max(y for *_, y in known)
    out = []
    for label, x, y in known:
        best = not any(a <= x and b >= y and (a, b) != (x, y) for _, a, b in known)
        across, up = (x - fast) / (slow - fast or 1), (y - low) / (high - low or 1)
        out.append({"label": label, "x": 50 + 290 * across, "y": 180 - 160 * up, "best": best,
                    "text": f"{label}: {1000 * x:.0f} ms, {number(y)}"})  # fmt: skip
    return out


def csv_of(page: Findings) -> str:
    """One row an arm and measure."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["arm", "seeds", "measure", "mean", "low", "high", "difference", "d_low", "d_high", "p", "verdict"])
    for group in page.groups:
        for name, cell in group.cells.items():
            d = cell.difference
            rest = [d.value, d.low, d.high, d.p, d.verdict] if d else [""] * 5
            writer.writerow([group.label, group.seeds, name, cell.mean, cell.low, cell.high, *rest])
    return stream.getvalue()


def render(page: Findings) -> str:
    """The page as one HTML file."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(number=number, signed=signed)
    measure = page.measures[0] if page.measures else ""
    points = pareto(page.groups, measure)
    return environment.get_template(TEMPLATE.name).render(f=page, points=points, measure=measure)
