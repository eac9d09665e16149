"""From finished arms of a sweep to the page that compares them, with its exports."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from causvid import arm_labels, experiment, progress, runs, weights
from causvid import spec as specs
from causvid.data.video import encode_mp4
from causvid.eval import sweep_page, sweep_view
from causvid.eval.results import lacks
from causvid.eval.sweep_page import HELD_OUT, Judged, Scored
from causvid.eval.tables import FREE
from causvid.experiment import Arm, Outcome

SHOWN = 8  # prompts whose videos are on the page
FPS, CRF, WIDTH = 8, 24, 128  # of the videos of the held-out clips
INLINE = 300_000  # bytes up to which a suite's file is part of the page; larger ones are linked


def finished(spec: str, overrides: Sequence[str], root: Path, errors: Sequence[str]) -> list[Arm]:
    """Arms that a launcher ran, as their results are in the store; one that failed has its error."""
    store, out, arms = runs.Store(root.resolve()), [], experiment.arms_of(spec, overrides)
    for (values, arm), label, error in zip(arms, arm_labels.labels(arms), errors, strict=True):
        nodes = experiment.plan(arm)
        waiting = [node.name for node in nodes if not store.done(node)]
        if error or waiting:
            out.append(Arm(values, label, None, error or f"not finished: {', '.join(waiting)} to do"))
        else:
            out.append(Arm(values, label, experiment.outcome(nodes, store)))
    return out


def write(spec: str, arms: Sequence[Arm], root: Path, across: bool = False) -> Path:
    """Write the arms' settings, metrics and comparisons as JSON, CSV and a page; show the main numbers.

    Raises:
        UserError: arms were judged under different protocols, and ``across`` was not asked for.
    """
    rows = [
        {"arm": a.values, "label": a.label, **(a.outcome.as_json() if a.outcome else {"error": a.error})} for a in arms
    ]
    identity = hashlib.sha256(runs.canonical([spec, [row["arm"] for row in rows]]).encode()).hexdigest()[:16]
    path = root.resolve() / "sweeps" / f"{identity}.json"
    page = sweep_page.findings(spec, [judged(arm, path.parent) for arm in arms], across)
    show(spec, page)
    files = {kind: path.with_suffix(f".{kind}").name for kind in ("csv", "json")}
    weights.write_json(path, {"spec": spec, "arms": rows, "comparisons": page.as_json(), "mark": page.mark})
    weights.write_bytes(path.with_suffix(".csv"), sweep_page.csv_of(page).encode())
    about = specs.load(spec)["about"]
    weights.write_bytes(path.with_suffix(".html"), sweep_view.render(page, about, files).encode())
    return path


def show(name: str, page: sweep_page.Findings) -> None:
    """The first measures of every arm, as a table for eyes."""
    from rich.table import Column, Table

    measures = page.measures[:5]
    arm = Column("arm", overflow="fold", min_width=24)  # names are read, numbers may be cut
    table = Table(arm, "seeds", *map(sweep_view.heading, measures), title=f"{name}  {page.mark}".strip())
    for group in page.groups:
        cells = [group.cells.get(measure) for measure in measures]
        shown = ["-" if c is None else f"{c.mean:.3f}{'†' if c.note else ''}" + _verdict(c.difference) for c in cells]
        table.add_row(group.label, str(group.seeds), *shown)
    noted = [(g.label, m, g.cells[m].note) for g in page.groups for m in measures if m in g.cells and g.cells[m].note]
    table.caption = "\n".join(f"† {label}, {sweep_view.heading(m)}: {note}" for label, m, note in noted) or None
    progress.console.print(table)


def _verdict(difference: Any) -> str:
    return f" {difference.verdict}" if difference and difference.verdict in ("better", "worse") else ""


def judged(arm: Arm, page_folder: Path) -> Judged:
    """What the page needs of an arm."""
    outcome = arm.outcome
    if outcome is None or "evaluate" not in outcome.folders:
        return Judged(arm.values, {}, error=arm.error, label=arm.label)
    folder = outcome.folders["evaluate"]
    table = json.loads((folder / "scores.json").read_text())
    suites = {HELD_OUT: _held_out(table)}
    path = folder / "suites.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    suites |= {name: _suite(results) for name, results in found.items()}
    cost = {name: (each.name, _seconds(each)) for name, each in outcome.folders.items() if name != "report"}
    videos = _suite_videos(found, outcome, page_folder) or _clips(outcome, table["captions"])
    report = _relative(outcome.report, page_folder)
    return Judged(arm.values, suites, outcome.timings, report, "", cost, videos, label=arm.label)


def _held_out(table: Mapping[str, Any]) -> Scored:
    """The student's held-out clips. A caption that comes again is another prompt: its clip has other noise."""
    names: list[str] = []
    for caption in table["captions"]:
        count = sum(name == caption or name.startswith(f"{caption} #") for name in names)
        names.append(f"{caption} #{count + 1}" if count else caption)
    scores = table["scores"].get("student", {})
    each = {m: dict(zip(names, values, strict=False)) for m, values in scores.items() if m not in FREE}
    return Scored(each, table.get("protocol", {}))


def _suite(results: Mapping[str, Any]) -> Scored:
    """A suite's results by measure and prompt: the mean over a prompt's videos."""
    scores: dict[str, dict[str, float]] = {}
    for measure, rows in results["videos"].items():
        by_prompt: dict[str, list[float]] = {}
        for row in rows:
            if row["score"] is not None:
                by_prompt.setdefault(row["prompt"], []).append(row["score"])
        scores[measure] = {prompt: sum(values) / len(values) for prompt, values in by_prompt.items()}
    own = {name: score for name, score in {**results["scores"], **results["proxies"]}.items() if score is not None}
    return Scored(
        scores, results["protocol"], results["over_time"], results["drift"], results["note"], lacks(results), own
    )


def _seconds(folder: Path) -> float:
    return float(json.loads((folder / "DONE").read_text()).get("seconds") or 0.0)


def _relative(path: Path | None, beside: Path) -> str:
    """A path as a page in ``beside`` links it, so that the store can be moved as a whole; empty where there is none."""
    return os.path.relpath(path.resolve(), beside.resolve()) if path else ""


def _suite_videos(found: Mapping[str, Any], outcome: Outcome, beside: Path) -> dict[str, str]:
    """The first video of the first prompts of the first suite."""
    out: dict[str, str] = {}
    for suite, results in found.items():
        for row in next(iter(results["videos"].values()), ()):
            path = outcome.folders["sample_suites"] / suite / row["video"]
            if row["prompt"] not in out and len(out) < SHOWN and path.is_file():
                out[row["prompt"]] = _source(path, beside)
        break
    return out


def _source(path: Path, beside: Path) -> str:
    if path.stat().st_size > INLINE:
        return _relative(path, beside)
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


def _clips(outcome: Outcome, captions: Sequence[str]) -> dict[str, str]:
    """The student's first held-out clips, one a caption."""
    path = outcome.folders["sample"] / "student.safetensors"
    if not path.is_file():
        return {}
    videos, out = weights.read_tensors(path)[0]["videos"], {}
    for number, caption in enumerate(captions):
        if caption not in out and len(out) < SHOWN:
            video = videos[number]
            content = encode_mp4(video, FPS, max(1, -(-WIDTH // video.shape[-1])), CRF)
            out[caption] = "data:video/mp4;base64," + base64.b64encode(content).decode()
    return out
