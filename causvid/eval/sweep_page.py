"""What a sweep says: every arm's scores over its training seeds, and whether it differs from the first, the base."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from causvid.errors import UserError
from causvid.eval import ablation
from causvid.eval.ablation import Arm, Difference, Spread, Statistic
from causvid.eval.aggregate import half_score, total_score
from causvid.eval.dimensions import scales
from causvid.eval.results import require_comparable
from causvid.eval.statistics import interval, over_seeds

SEED = "seed"  # the key whose values are trainings of one arm
HELD_OUT = "held-out clips"  # judged beside the suites
# Shown first, where judged; the rest in the order of the judge.
FIRST = ("ok", "colour", "shape", "direction", "fidelity", "contrast", "temporal_flickering")
# Neither more nor less of it is better.
LEFT_OUT = ("size", "ground", "start_x", "start_y", "speed", "proxy_saturation")
LESS_IS_BETTER = ("trajectory",)
BEST_AT = {"contrast": 1.0}  # a ratio to the truth: twice as strong is as wrong as too weak
TOTALS: dict[str, Statistic] = {
    "total": total_score, "quality": lambda means: half_score(means, "quality"),
    "semantic": lambda means: half_score(means, "semantic"),
}  # fmt: skip


def _needed(total: str) -> tuple[str, ...]:
    """The dimensions of one of VBench's totals."""
    return tuple(name for name, scale in scales().items() if total in ("total", scale.half))


@dataclass(frozen=True)
class Scored:
    """One suite's judgement of one run: scores by measure and prompt, curves over time, and under which protocol."""

    scores: Mapping[str, Mapping[str, float]]  # measure -> prompt -> mean over its videos
    protocol: Mapping[str, Any] = field(default_factory=dict)
    over_time: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    drift: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    note: str = ""  # what can't be computed, and why
    lacks: str = ""  # how many of the suite's videos it is without
    own: Mapping[str, float] = field(default_factory=dict)  # measure -> the judge's score; else the mean over prompts


@dataclass(frozen=True)
class Judged:
    """One run: what it sets, judgements by suite, timings, costs, videos and report; or why it failed."""

    values: Mapping[str, Any]
    suites: Mapping[str, Scored]
    timings: Mapping[str, float] = field(default_factory=dict)
    report: str = ""
    error: str = ""
    cost: Mapping[str, tuple[str, float]] = field(default_factory=dict)  # stage -> (identity, seconds)
    videos: Mapping[str, str] = field(default_factory=dict)  # prompt -> source of a video
    label: str = field(kw_only=True)  # the arm's name; its runs differ in the training seed alone


@dataclass(frozen=True)
class Cell:
    """A measure of an arm: its own mean over all it was judged on, and the difference to the base on what both have.

    ``low`` and ``high``: 95% interval over ``seeds`` (of one: over prompts). ``note`` tells where seeds are without the
    measure, or prompts that only one of both has, so that the difference is of fewer, or there is none.
    """

    mean: float
    low: float
    high: float
    over: str
    difference: Difference | None
    note: str = ""
    spread: Spread = ablation.UNKNOWN  # of its trainings


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
    """All that the page shows; the first group is the base. ``mark`` is on every table."""

    name: str
    measures: Sequence[str]  # SUITE/MEASURE; those of the held-out clips have no suite before them
    groups: Sequence[Group]
    protocols: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)  # suite -> arm -> protocol
    mark: str = ""
    could_see: Mapping[str, float] = field(default_factory=dict)  # least difference found in 80% of such sweeps

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"arm": group.label, "seeds": group.seeds, "latency_s": group.latency_s, "mark": self.mark,
             "measures": {name: {"mean": c.mean, "low": c.low, "high": c.high, "over": c.over,
                                 "deviation": c.spread.seeds, "prompt_deviation": c.spread.prompts, "note": c.note,
                                 "to_base": c.difference.as_json() if c.difference else None}
                          for name, c in group.cells.items()}}
            for group in self.groups
        ]  # fmt: skip


def findings(name: str, runs: Sequence[Judged], across: bool = False) -> Findings:
    """Group runs into arms, and compare each with the first, with Holm's correction over all that is compared.

    Raises:
        UserError: arms were judged under different protocols, and ``across`` was not asked for.
    """
    parts: dict[str, list[Judged]] = {}
    for run in runs:
        parts.setdefault(run.label, []).append(run)
    protocols, mark = _protocols(parts, across)
    tables = {label: _scores(group) for label, group in parts.items()}
    measures = _ordered(tables.values())
    base = next(iter(tables.values()), {})
    pairs = {
        (label, m): _pair(table[m], base[m])
        for label, table in tables.items()
        if table is not base
        for m in measures
        if m in table and m in base
    }
    compared = {
        (label, m): ablation.compare(m, *pair.tables, statistic_of(m))
        for (label, m), pair in pairs.items()
        if pair.tables
    }
    held = dict(zip(compared, ablation.holm(list(compared.values())), strict=True))
    groups = []
    for label, group in parts.items():
        cells = {}
        for m, scores in tables[label].items():
            notes = [scores.note, pairs[label, m].note if (label, m) in pairs else ""]
            if base and tables[label] is not base and m not in base:
                notes.append("not compared: the base has no score")
            cells[m] = _cell(scores, m, held.get((label, m)), "; ".join(filter(None, notes)))
        latencies = [run.timings["latency_s"] for run in group if "latency_s" in run.timings]
        groups.append(Group(label, group, cells, sum(latencies) / len(latencies) if latencies else None))
    could = {m: _could_see(base[m], statistic_of(m)) for m in measures if m in base}
    return Findings(
        name, measures, groups, protocols, "; ".join(filter(None, [mark, _without(parts, tables, measures)])),
        {m: value for m, value in could.items() if value is not None},
    )  # fmt: skip


def shown_as(measure: str) -> Statistic:
    """A measure's mean, or VBench's totals."""
    suite, _, name = measure.rpartition("/")
    return TOTALS[name] if suite and name in TOTALS else ablation.mean_of(name)


def statistic_of(measure: str) -> Statistic:
    """A measure turned so that more is better: verdicts read "better" and "worse"."""
    plain, name = shown_as(measure), measure.rpartition("/")[2]
    if name in BEST_AT:
        return lambda means: -(plain(means) - BEST_AT[name]).abs()
    return (lambda means: -plain(means)) if name in LESS_IS_BETTER else plain


def _protocols(parts: Mapping[str, Sequence[Judged]], across: bool) -> tuple[dict[str, dict[str, Any]], str]:
    """(protocols by suite and arm, the mark that they differ, or that an arm lacks videos)."""
    found: dict[str, dict[str, Any]] = {}
    short: list[str] = []
    for label, group in parts.items():
        for run in group:
            for suite, scored in run.suites.items():
                name = label if SEED not in run.values else f"{label}, seed {run.values[SEED]}"
                found.setdefault(suite, {})[name] = scored.protocol
                short += [f"INCOMPLETE: {name} {scored.lacks} of {suite}"] if scored.lacks else []
    marks = []
    for suite, each in found.items():
        try:
            marks.append(require_comparable(each, across))
        except UserError as error:
            raise UserError(f"{suite}: {error}") from error
    return found, "; ".join(dict.fromkeys(filter(None, [*marks, *short])))


@dataclass(frozen=True)
class _Scores:
    """A measure in those runs of an arm that have it: one dimension, or the sixteen of a total."""

    dimensions: tuple[str, ...]
    runs: Sequence[Scored]
    trained: int  # runs of the arm, those without the measure too

    @property
    def arm(self) -> Arm:
        """Each run's own score by dimension, as a table of one column."""
        own = {
            name: [[run.own.get(name, sum(run.scores[name].values()) / len(run.scores[name]))] for run in self.runs]
            for name in self.dimensions
        }
        return {"own": {name: torch.tensor(values, dtype=torch.float64) for name, values in own.items()}}

    @property
    def note(self) -> str:
        return "" if len(self.runs) == self.trained else f"{len(self.runs)} of {self.trained} seeds have a score"

    def by_prompt(self, prompts: Mapping[str, tuple[str, ...]]) -> Arm:
        """(seeds, prompts) by dimension, those of the same prompts together, as the bootstrap draws them."""
        out: dict[str, dict[str, Tensor]] = {}
        numbers: dict[tuple[str, ...], str] = {}
        for name in self.dimensions:
            values = [[run.scores[name][prompt] for prompt in prompts[name]] for run in self.runs]
            group = numbers.setdefault(prompts[name], f"prompts {len(numbers)}")
            out.setdefault(group, {})[name] = torch.tensor(values, dtype=torch.float64)
        return out


@dataclass(frozen=True)
class _Pair:
    """Tables of an arm and of the base, with what to tell of them; None where nothing can be paired."""

    tables: tuple[Arm, Arm] | None
    note: str


def _pair(arm: _Scores, base: _Scores) -> _Pair:
    """The prompts that every run of both has a score of: only these can be paired."""
    runs = [*base.runs, *arm.runs]
    every = {name: dict.fromkeys(p for run in runs for p in run.scores[name]) for name in arm.dimensions}
    common = {
        name: tuple(p for p in prompts if all(p in run.scores[name] for run in runs)) for name, prompts in every.items()
    }
    fewer = [
        f"{len(common[name])} of {len(every[name])} prompts" + (f" of {name}" if len(every) > 1 else "")
        for name in every
        if len(common[name]) < len(every[name])
    ]
    told = _first(fewer, 3)
    if not all(common.values()):
        return _Pair(None, f"not compared: both have {told}")
    return _Pair((arm.by_prompt(common), base.by_prompt(common)), told and f"difference over {told}")


def _scores(runs: Sequence[Judged]) -> dict[str, _Scores]:
    """An arm's measures, and the totals of suites that have all sixteen dimensions; empty where every run failed."""
    good, out = [run for run in runs if run.suites and not run.error], {}
    for suite in dict.fromkeys(suite for run in good for suite in run.suites):
        found, front = [run.suites[suite] for run in good if suite in run.suites], _front(suite)
        parts = {m: (m,) for each in found for m in each.scores if m not in LEFT_OUT}
        for measure, needed in {**parts, **({total: _needed(total) for total in TOTALS} if front else {})}.items():
            if having := [each for each in found if all(each.scores.get(name) for name in needed)]:
                out[f"{front}{measure}"] = _Scores(needed, having, len(good))
    return out


def _front(suite: str) -> str:
    return "" if suite == HELD_OUT else f"{suite}/"


def _without(
    parts: Mapping[str, Sequence[Judged]], tables: Mapping[str, Mapping[str, _Scores]], measures: Sequence[str]
) -> str:
    """The mark that arms are without a measure that was asked for, or that others have, as colour without an object."""
    asked = {
        f"{_front(suite)}{m}": None
        for runs in parts.values() for run in runs for suite, each in run.suites.items()
        for m in each.scores if m not in LEFT_OUT
    }  # fmt: skip
    marks = []
    for label, table in tables.items():
        lacking = [m for m in dict.fromkeys([*measures, *asked]) if m not in table]
        if table and lacking:
            marks.append(f"INCOMPLETE: {label} has no score of {_first(lacking, 5)}")
    return "; ".join(marks)


def _first(told: Sequence[str], most: int) -> str:
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")


def _ordered(tables: Any) -> list[str]:
    known = dict.fromkeys(measure for table in tables for measure in table)
    totals = [m for m in known if "/" in m and m.rpartition("/")[2] in TOTALS]
    first = [*totals, *(m for m in FIRST if m in known)]
    return [*first, *(m for m in known if m not in first)]


def _cell(scores: _Scores, measure: str, difference: Difference | None, note: str) -> Cell:
    statistic = shown_as(measure)
    seeds = ablation.per_seed(scores.arm, statistic)
    (mean, low, high), over = over_seeds(seeds), "seeds"
    prompts = list(scores.runs[0].scores[scores.dimensions[0]].values())
    if len(seeds) == len(scores.dimensions) == 1 and len(prompts) > 1:
        each, over = torch.tensor(prompts, dtype=torch.float64), "prompts"
        low, high = interval(each.bool() if bool(((each == 0) | (each == 1)).all()) else each)
        low, high = min(low, mean), max(high, mean)  # prompts of more videos weigh more in a judge's own score
    return Cell(mean, low, high, over, difference, note, _spread(scores, statistic_of(measure)))


def _spread(scores: _Scores, statistic: Statistic) -> Spread:
    """Of an arm's trainings, on the prompts that all of them have a score of."""
    first, *others = (run.scores for run in scores.runs)
    common = {
        name: tuple(p for p in first[name] if all(p in each[name] for each in others)) for name in scores.dimensions
    }
    return ablation.spread(scores.by_prompt(common), statistic) if all(common.values()) else ablation.UNKNOWN


def _could_see(scores: _Scores, statistic: Statistic) -> float | None:
    """None of one seed, and where all scores of all seeds agree, which says nothing of their spread."""
    of = _spread(scores, statistic)
    return ablation.detectable_at(of, len(scores.runs)) if of.known else None


def number(value: float | None, places: int = 3) -> str:
    """Text of a number; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{places}f}".replace("-", "−")


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def csv_of(page: Findings) -> str:
    """One row an arm and measure."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["arm", "seeds", "measure", "mean", "low", "high", "interval_over", "difference", "d_low", "d_high",
                     "p", "verdict", "note", "mark"])  # fmt: skip
    for group in page.groups:
        for name, cell in group.cells.items():
            d = cell.difference
            rest = [d.value, d.low, d.high, d.p, d.verdict] if d else [""] * 5
            writer.writerow(
                [group.label, group.seeds, name, cell.mean, cell.low, cell.high, cell.over, *rest, cell.note, page.mark]
            )
    return stream.getvalue()
