"""Results of judged folders side by side, and what a comparison could see, from the files that commands leave."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from causvid.errors import UserError
from causvid.eval.ablation import Spread, detectable_at
from causvid.eval.aggregate import aggregate, is_finite, read_scores
from causvid.eval.results import lacks, require_comparable, require_same_videos

TOTALS = ("total", "quality", "semantic")
SEEDS = (2, 3, 5, 10)


def read(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: unreadable, or something else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; a JSON object is accepted")
    return found


def compare(files: Sequence[Path], across: bool = False) -> dict[str, Any]:
    """{"mark", "names", "rows": [{"measure", "values", "differences"}]}; differences are to the first file.

    Raises:
        UserError: a file of no results, ours or upstream's; different protocols, or other videos, where ``across`` was
            not asked for.
    """
    if len(files) < 2:
        raise UserError("give two results.json or more")
    tables = {}
    for path in files:
        found = read(path)
        tables[str(path)] = ours(path, found) if {"protocol", "scores", "totals"} <= set(found) else upstreams(path)
    if len(tables) < len(files):
        raise UserError("a file is given twice")
    marks = [
        require_comparable({name: each["protocol"] for name, each in tables.items()}, across),
        require_same_videos(tables, across),
        *(f"INCOMPLETE: {name} {short}" for name, each in tables.items() if (short := lacks(each))),
    ]
    mark = "; ".join(filter(None, marks))
    columns = [{**{name: each["totals"].get(name) for name in TOTALS}, **each["scores"], **each["proxies"]}
               for each in tables.values()]  # fmt: skip
    rows = []
    for measure in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(measure) for column in columns]
        first = values[0]
        away = [None if v is None or first is None else v - first for v in values]
        if any(value is not None for value in values):
            rows.append({"measure": measure, "values": values, "differences": away})
    return {"mark": mark, "names": list(tables), "rows": rows}


def ours(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """A results.json of ours whose parts are what they should be.

    Raises:
        UserError: a part is not.
    """
    known = {"proxies": {}, "videos": {}, "lacking": {}} | found
    problems = [
        f"{part} is {json.dumps(known[part])[:40]}; an object is accepted"
        for part in ("protocol", "scores", "proxies", "totals", "videos", "lacking")
        if not isinstance(known[part], dict)
    ]
    for part in ("scores", "proxies", "totals"):
        for name, value in known[part].items() if isinstance(known[part], dict) else ():
            if (part, name) == ("totals", "missing"):  # dimensions, where there are not all sixteen
                if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                    problems.append(f"totals: missing is {json.dumps(value)[:40]}; a list of names is accepted")
            elif value is not None and not is_finite(value):
                problems.append(f"{part}: {name} is {json.dumps(value)[:40]}; a finite number or null is accepted")
    if isinstance(known["videos"], dict):
        for name, rows in known["videos"].items():
            if not (
                isinstance(rows, list) and all(isinstance(r, dict) and isinstance(r.get("video"), str) for r in rows)
            ):
                problems.append(f"videos: {name} is no list of {{video, prompt, score}}")
    if isinstance(known["lacking"], dict) and set(known["lacking"]) not in (set(), {"videos", "of"}):
        problems.append("lacking: {videos, of} is accepted")
    if problems:
        raise UserError(f"{path} is no results.json of 'causvid eval videos': " + "; ".join(problems[:5]))
    return known


def upstreams(path: Path) -> dict[str, Any]:
    """Upstream's results file, or a plain table of scores, as one of ours; its protocol is not known.

    Raises:
        UserError: it is neither.
    """
    try:
        scores = read_scores(path)
    except UserError as error:
        raise UserError(f"{path} is neither a results.json of 'causvid eval videos' nor upstream's: {error}") from error
    if not scores:
        raise UserError(f"{path} is no results.json of 'causvid eval videos', and holds no scores")
    unknown = {"protocol": f"not recorded in {path}"}  # so two such files are not taken for comparable either
    return {"protocol": unknown, "scores": scores, "proxies": {}, "totals": aggregate(scores).as_json()}


def text(table: Mapping[str, Any]) -> str:
    """The table for eyes; totals are in percent."""
    lines = [table["mark"]] if table["mark"] else []
    lines += [f"{number}: {name}" for number, name in enumerate(table["names"])]
    for row in table["rows"]:
        cells = [
            "-" if value is None else f"{value:.4f}" + (f" ({away:+.4f})" if number and away is not None else "")
            for number, (value, away) in enumerate(zip(row["values"], row["differences"], strict=True))
        ]
        lines.append(f"{row['measure']:<24} " + "  ".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def power(path: Path, arm: int) -> dict[str, dict[str, float]]:
    """For each measure of a pilot arm the least difference that SEEDS training seeds would find.

    Raises:
        UserError: no such arm, a file that is none of a sweep, or an arm of a single seed, which says nothing of the
            spread between trainings.
    """
    groups = read(path).get("comparisons")
    if not isinstance(groups, list) or not 1 <= arm <= len(groups):
        raise UserError(f"{path} is no sweep with an arm {arm}")
    group, out = groups[arm - 1], {}
    cells = group.get("measures") if isinstance(group, dict) else None
    if not isinstance(cells, dict) or not all(isinstance(cell, dict) for cell in cells.values()):
        raise UserError(f"{path} is not what 'causvid sweep' wrote: arm {arm} has no measures; run the sweep again")
    for measure, cell in cells.items():
        parts = [math.nan if (part := cell.get(name)) is None else part for name in ("deviation", "prompt_deviation")]
        bad = [part for part in parts if part == part and not (is_finite(part) and part >= 0)]  # NaN: of one seed
        if bad:
            raise UserError(
                f"{path} is not what 'causvid sweep' wrote: {measure} of arm {arm} has deviation "
                f"{json.dumps(bad[0])[:40]}; a number of at least 0 is accepted"
            )
        of = Spread(*parts)
        if of.known:
            out[measure] = {str(seeds): detectable_at(of, seeds) for seeds in SEEDS}
    if not out:
        raise UserError(
            f"arm {arm}, '{group.get('arm')}', of {group.get('seeds')} training seed(s), does not say how far they "
            "vary: a pilot needs two or more that don't agree in all; list seeds in the sweep, seed: [0, 1], and run it"
        )
    return out


def power_text(table: Mapping[str, Mapping[str, float]]) -> str:
    """The table for eyes."""
    lines = [f"{'least difference found, seeds:':<36}" + "".join(f"{seeds:>10}" for seeds in SEEDS)]
    return "\n".join(
        [*lines, *(f"{name:<36}" + "".join(f"{row[str(s)]:>10.4f}" for s in SEEDS) for name, row in table.items())]
    )
