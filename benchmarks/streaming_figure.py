"""The figure of docs/streaming.md: a stream of 100 times the training length, from what ``streaming.py long`` wrote.

python benchmarks/streaming_figure.py streaming.json docs/long_stream.svg
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path

from causvid.eval import charts

COLOURS = ("#1f5fa8", "#c2571a", "#3b7d3b")
STYLE = "font: 11px sans-serif; fill: #333"


def drawn(chart: charts.Chart, shift: int) -> str:
    """A chart as SVG, ``shift`` units to the right."""
    bottom, right = charts.HEIGHT - charts.BOTTOM, charts.WIDTH - charts.RIGHT
    out = [f'<g transform="translate({shift} 24)">']
    out.append(f'<text x="{charts.LEFT}" y="-6" font-weight="bold">{escape(chart.title)}</text>')
    for tick in chart.y_ticks:
        out.append(f'<path d="M{charts.LEFT} {tick.at:.1f}H{right}" stroke="#ddd"/>')
        out.append(f'<text x="{charts.LEFT - 6}" y="{tick.at + 4:.1f}" text-anchor="end">{escape(tick.label)}</text>')
    for tick in chart.x_ticks:
        out.append(f'<text x="{tick.at:.1f}" y="{bottom + 15}" text-anchor="middle">{escape(tick.label)}</text>')
    out.append(f'<text x="{right}" y="{bottom + 30}" text-anchor="end">{escape(chart.x_label)}</text>')
    for number, (line, colour) in enumerate(zip(chart.lines, COLOURS, strict=False)):
        place = f'x="{right - 8}" y="{bottom * 0.45 + 14 * number:.0f}" text-anchor="end"'
        out.append(f'<path d="{line.smooth}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        out.append(f'<text {place} style="fill: {colour}">{escape(line.label)}</text>')
    return "\n".join([*out, "</g>"])


def main() -> None:
    """Draw the three charts beside each other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", type=Path)
    parser.add_argument("out", type=Path)
    told = parser.parse_args()
    measured = json.loads(told.measured.read_text())
    count, rows, places = measured["prompts"], measured["long"]["rows"], measured["long"]["places"]
    series = {
        f"truth metrics, {count} captions": {
            name: [(int(begin), scores[key]) for begin, scores in places]
            for name, key in {"ok (colour, shape, direction)": "ok", "contrast of the texture": "contrast"}.items()
        },
        f"processor seconds per block of {count} streams": {"": [(block, seconds) for block, seconds, _, _ in rows]},
        "memory, MiB": {
            "resident": [(block, resident / 2**20) for block, _, resident, _ in rows],
            "keys and values": [(block, kept / 2**20) for block, _, _, kept in rows],
        },
    }  # fmt: skip
    parts = []
    for number, (title, lines) in enumerate(series.items()):
        chart = charts.curves(title, "", "block", lines, exact=True)
        parts.append(drawn(chart, number * charts.WIDTH) if chart else "")
    size = f"{len(parts) * charts.WIDTH} {charts.HEIGHT + 24}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" style="{STYLE}">'
    told.out.write_text("\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n")
    print(told.out)


if __name__ == "__main__":
    main()
