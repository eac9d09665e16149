"""Geometry of the report's charts, as plain numbers and SVG path strings; the page's template draws them.

Every chart is 360 units wide, so that text of 11 units is readable on a page of 400 px; charts go side by side where
there is room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

WIDTH, HEIGHT = 360, 216
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 38
ROW, LABELS = 24, 128  # height of a row of an interval chart, width of its labels
STAGE_ROW, GUTTER = 42, 62  # height of a stage, width of the lines between stages
BINS = 150  # of which the thin line shows the lowest and the highest value, where there are more points than this
LOG_FROM = 10  # highest over lowest value from which an axis is logarithmic

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One curve: ``smooth`` and ``raw`` are SVG paths, ``dots`` the points themselves where they are few."""

    label: str
    smooth: str
    raw: str = ""
    dots: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """A chart of curves over steps."""

    title: str
    x_label: str
    y_label: str
    log: bool
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    window: int
    cut: int
    summary: str
    note: str = ""


@dataclass(frozen=True)
class Interval:
    """A row of an interval chart: the mean at ``at``, its interval from ``low`` to ``high``, in drawing units."""

    label: str
    kind: str
    y: float
    at: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Intervals:
    """Means with their intervals, one row an arm."""

    title: str
    x_label: str
    height: float
    ticks: list[Tick]
    rows: list[Interval]


@dataclass(frozen=True)
class StageRow:
    """A stage of the graph. ``bar`` is its share of the longest stage's time."""

    name: str
    identity: str
    time: str
    finished: str
    y: float
    bar: float
    x: float = GUTTER - 10


@dataclass(frozen=True)
class Graph:
    """Stages from top to bottom, with a path from each to those that read it."""

    height: float
    rows: list[StageRow]
    arcs: list[str]


def number(value: float) -> str:
    """Short text of an axis value: 0.002, 350, 3×10⁻⁵."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)) + 1e-9)
    if -3 <= size < 5:
        return f"{value:.6g}"
    mantissa, power = value / 10**size, str(size).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{power}" if abs(mantissa - 1) < 1e-6 else f"{mantissa:.3g}×10{power}"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values within [low, high], about ``count`` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high]; with 2 and 5 between them where these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = list(range(first, last + 1))
    few = math.log10(high / low) < 2.5
    ticks = [m * 10.0**d for d in decades for m in ((1, 2, 5) if few else (1,)) if low <= m * 10.0**d <= high * 1.0001]
    return ticks if len(ticks) <= 7 else ticks[:: math.ceil(len(ticks) / 6)]


def running_median(points: Sequence[Point], window: int, count: int = 2 * BINS) -> list[Point]:
    """Medians over ``window`` points around each of about ``count`` points; over fewer at the ends."""
    half, places = window // 2, range(0, len(points), max(1, len(points) // count))
    chosen = [*places, *([len(points) - 1] if len(points) - 1 not in places else [])]
    return [(points[i][0], median(y for _, y in points[max(0, i - half) : i + half + 1])) for i in chosen]


def extremes(points: Sequence[Point], bins: int = BINS) -> list[Point]:
    """The points, or where they are many the lowest and the highest of each of ``bins`` groups, in order."""
    if len(points) <= 2 * bins:
        return list(points)
    size = math.ceil(len(points) / bins)
    out: list[Point] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        low, high = min(group, key=lambda p: p[1]), max(group, key=lambda p: p[1])
        out += sorted((low, high))
    return out


def path(points: Sequence[Point]) -> str:
    """SVG path through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def curves(
    title: str,
    y_label: str,
    x_label: str,
    series: Mapping[str, Sequence[Point]],
    total: int | None = None,
    note: str = "",
    exact: bool = False,
    may_log: bool = True,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Chart | None:
    """A chart of curves, each a list of (step, value) with finite values only; None where there are none.

    The y axis is logarithmic where all values are positive and span a factor of LOG_FROM or more, and it ``may_log``. A
    few stray values must not flatten the rest: the axis covers the middle 99% and all medians, what is beyond is cut at
    the frame. ``exact``: the points are drawn as they are, however many. ``bounds``: values that there can be; the axis
    ends there.
    """
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    window = (max(len(points) for points in series.values()) // 25 or 1) if not exact else 1
    smooth = {label: running_median(points, window) for label, points in series.items()}
    thin = len(series) == 1 and window > 1
    # Where only medians are drawn, only medians need room.
    raw = sorted(y for points in (series if thin else smooth).values() for _, y in points)
    trim = len(raw) // 200 if thin else 0
    medians = [y for points in smooth.values() for _, y in points]
    low, high = min(raw[trim], *medians), max(raw[-1 - trim], *medians)
    log = may_log and low > 0 and high / low >= LOG_FROM
    if not log:
        low = min(0.0, low) if low > 0 and low < 0.5 * high else low
        pad = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
        low, high = max(bounds[0], low - (pad if low != 0 else 0)), min(bounds[1], high + pad)
    elif high / low < 100:
        low, high = low / 1.2, high * 1.2
    start = min(points[0][0] for points in series.values())
    end = max(total - 1 if total else 0, max(points[-1][0] for points in series.values()), start + 1)
    x = scale(start, end, LEFT, WIDTH - RIGHT)
    y = scale(low, high, HEIGHT - BOTTOM, TOP, log)
    lines = []
    for label, points in series.items():
        drawn = [(x(step), y(value)) for step, value in smooth[label]]
        single = path([(x(step), y(value)) for step, value in extremes(points)]) if thin else ""
        lines.append(Line(label, path(drawn), single, drawn if len(points) < 20 else []))
    ticks = log_ticks(low, high) if log else nice_ticks(low, high)
    first, last = (f"{smooth[label][i][1]:.3g}" for label in [next(iter(series))] for i in (0, -1))
    return Chart(
        title, x_label, y_label, log,
        [Tick(x(v), number(v)) for v in nice_ticks(start, end) if v == int(v)],
        [Tick(y(v), number(v)) for v in ticks],
        lines, window, sum(not low <= value <= high for value in raw),
        f"{title}: {next(iter(series))} from {first} to {last}", note,
    )  # fmt: skip


def scale(low: float, high: float, start: float, stop: float, log: bool = False) -> Callable[[float], float]:
    """Values to drawing units, held within the frame."""

    def place(value: float) -> float:
        a, b, c = (math.log(v) for v in (low, high, max(value, low))) if log else (low, high, value)
        share = (c - a) / (b - a)
        return start + min(1.0, max(0.0, share)) * (stop - start)

    return place


def intervals(
    title: str,
    x_label: str,
    rows: Sequence[tuple[str, str, float, float, float]],
    bounds: tuple[float, float] | None = None,
    digits: int = 2,
) -> Intervals | None:
    """A chart of (label, kind, mean, low, high) rows; None where there are none. ``bounds``: ends of the axis."""
    if not rows:
        return None
    low, high = bounds or (min(row[3] for row in rows), max(row[4] for row in rows))
    if bounds is None:
        pad = 0.06 * (high - low) or 1.0
        low, high = low - pad, high + pad
    x = scale(low, high, LABELS, WIDTH - 48)
    drawn = [
        Interval(label, kind, TOP + (i + 0.5) * ROW, x(mean), x(start), x(stop), f"{mean:.{digits}f}")
        for i, (label, kind, mean, start, stop) in enumerate(rows)
    ]
    ticks = [Tick(x(v), number(v)) for v in nice_ticks(low, high, 4)]
    return Intervals(title, x_label, TOP + len(rows) * ROW + BOTTOM, ticks, drawn)


def graph(stages: Sequence[tuple[str, str, str, str, float | None]], edges: Mapping[str, Sequence[str]]) -> Graph:
    """Lay out (name, identity, time, finished, seconds) in order; ``edges`` maps a stage to what it reads."""
    longest = max([seconds or 0 for *_, seconds in stages], default=0) or 1
    place = {name: 16 + i * STAGE_ROW for i, (name, *_) in enumerate(stages)}
    rows = [
        StageRow(name, identity, time, finished, place[name], (seconds or 0) / longest)
        for name, identity, time, finished, seconds in stages
    ]
    order = [name for name, *_ in stages]
    arcs = []
    for reader in order:
        for source in edges.get(reader, ()):
            if source not in place:
                continue
            span = order.index(reader) - order.index(source)
            x, top, bottom = GUTTER - 10, place[source], place[reader]
            if span == 1:
                arcs.append(f"M{x} {top + 5}V{bottom - 5}")
            else:
                reach = x - min(x - 2, 9 * span)
                arcs.append(f"M{x - 4} {top + 2}C{reach} {top + 14} {reach} {bottom - 14} {x - 4} {bottom - 2}")
    return Graph(len(stages) * STAGE_ROW + 4, rows, arcs)
