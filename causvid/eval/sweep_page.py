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
from causvid.eval.dimensions import dimensions, scales
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


@dataclass(frozen=True)
class Scored:
    """One suite's judgement of one run: scores by measure and prompt, curves over time, and under which protocol."""

    scores: Mapping[str, Mapping[str, float]]  # measure -> prompt -> mean over its videos
    protocol: Mapping[str, Any] = field(default_factory=dict)
    over_time: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    drift: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    note: str = ""  # what can't be computed, and why
    lacks: str = ""  # how many of the suite's videos it is without


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
    """A measure of an arm: mean, 95% interval over ``seeds`` (of one: over prompts), and the difference to the base."""

    mean: float
    low: float
    high: float
    over: str
    difference: Difference | None
    spread: Spread = field(default=Spread(math.nan, math.nan), kw_only=True)  # of its trainings


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
                                 "deviation": c.spread.seeds, "prompt_deviation": c.spread.prompts,
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
    prompts = _common(runs)
    tables = {label: _table(group, prompts) for label, group in parts.items()}
    measures = _ordered(tables.values())
    base = next(iter(tables.values()), {})
    compared = {
        (label, measure): ablation.compare(measure, table[measure], base[measure], statistic_of(measure))
        for label, table in tables.items()
        if table is not base
        for measure in measures
        if measure in table and measure in base
    }
    held = dict(zip(compared, ablation.holm(list(compared.values())), strict=True))
    groups = []
    for label, group in parts.items():
        cells = {m: _cell(arm, shown_as(m), held.get((label, m))) for m, arm in tables[label].items() if m in measures}
        latencies = [run.timings["latency_s"] for run in group if "latency_s" in run.timings]
        groups.append(Group(label, group, cells, sum(latencies) / len(latencies) if latencies else None))
    could = {m: _could_see(base[m], statistic_of(m)) for m in measures if m in base}
    return Findings(
        name, measures, groups, protocols, mark, {m: value for m, value in could.items() if value is not None}
    )


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


def _common(runs: Sequence[Judged]) -> dict[tuple[str, str], list[str]]:
    """Prompts of each suite's measure that every run has a score of, in order: only these can be paired."""
    out: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for suite, scored in run.suites.items():
            for measure, scores in scored.scores.items():
                kept = out.get((suite, measure))
                out[suite, measure] = list(scores) if kept is None else [prompt for prompt in kept if prompt in scores]
    return out


def _table(runs: Sequence[Judged], prompts: Mapping[tuple[str, str], Sequence[str]]) -> dict[str, Arm]:
    """An arm's scores by measure, (seeds, prompts) within their suite of prompts; empty where every run failed."""
    good, out = [run for run in runs if run.suites and not run.error], {}
    for suite in good[0].suites if good else ():
        values = {
            measure: torch.tensor(
                [[run.suites[suite].scores[measure][prompt] for prompt in prompts[suite, measure]] for run in good],
                dtype=torch.float64,
            )
            for measure in good[0].suites[suite].scores
            if all(measure in run.suites.get(suite, Scored({})).scores for run in good) and prompts[suite, measure]
        }
        front = "" if suite == HELD_OUT else f"{suite}/"
        out |= {f"{front}{m}": {"prompts": {m: v}} for m, v in values.items() if m not in LEFT_OUT}
        if front and set(scales()) <= set(values):
            out |= dict.fromkeys((f"{front}{total}" for total in TOTALS), _by_prompts(values))
    return out


def _by_prompts(values: Mapping[str, Tensor]) -> Arm:
    """All sixteen dimensions, those of one suite of prompts together, as the bootstrap draws them."""
    out: dict[str, dict[str, Tensor]] = {}
    for name in scales():
        # Dimensions of one suite share its prompts, but for prompts that a judge had nothing to say of.
        out.setdefault(f"{dimensions()[name].suite} {values[name].shape[1]}", {})[name] = values[name]
    return out


def _ordered(tables: Any) -> list[str]:
    known = dict.fromkeys(measure for table in tables for measure in table)
    totals = [m for m in known if "/" in m and m.rpartition("/")[2] in TOTALS]
    first = [*totals, *(m for m in FIRST if m in known)]
    return [*first, *(m for m in known if m not in first)]


def _cell(arm: Arm, statistic: Statistic, difference: Difference | None) -> Cell:
    seeds = ablation.per_seed(arm, statistic)
    (mean, low, high), over = over_seeds(seeds), "seeds"
    values = [values for scores in arm.values() for values in scores.values()]
    if len(seeds) == 1 and len(values) == 1 and values[0].shape[1] > 1:
        each, over = values[0][0], "prompts"
        low, high = interval(each.bool() if bool(((each == 0) | (each == 1)).all()) else each)
        return Cell(float(each.mean()), low, high, over, difference)
    return Cell(mean, low, high, over, difference, spread=ablation.spread(arm, statistic))


def _could_see(arm: Arm, statistic: Statistic) -> float | None:
    """None of one seed, and where all seeds agree to the last digit, which says nothing of their spread."""
    of, seeds = ablation.spread(arm, statistic), len(ablation.per_seed(arm, statistic))
    return ablation.detectable_at(of, seeds) if of.seeds > 0 else None


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
                     "p", "verdict", "mark"])  # fmt: skip
    for group in page.groups:
        for name, cell in group.cells.items():
            d = cell.difference
            rest = [d.value, d.low, d.high, d.p, d.verdict] if d else [""] * 5
            writer.writerow(
                [group.label, group.seeds, name, cell.mean, cell.low, cell.high, cell.over, *rest, page.mark]
            )
    return stream.getvalue()
