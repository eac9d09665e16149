"""Ship a trained teacher: copy a finished teacher run into experiments/teachers/ in fp16, with its record beside it.

    causvid run tiny/from_scratch until=teacher
    python benchmarks/ship_teacher.py tiny/from_scratch --runs runs

The record holds the digest of the weights, what they were made of (values, source digests, commit, versions) and the
training curves, averaged over hundredths of the run, so that a user sees what a healthy training looks like.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from causvid import experiment, runs, spec, weights
from causvid.errors import UserError
from causvid.eval.report import HELD_OUT

MOST_BYTES = 8_000_000


def curves(path: Path, points: int = 100) -> dict[str, Any]:
    """Each logged number averaged over ``points`` equal parts of the run; ``step`` is the last of each part.

    What a monitor judged stands under ``held_out``, with steps of its own.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    parts = [rows[len(rows) * i // points : len(rows) * (i + 1) // points] for i in range(points)]
    parts = [part for part in parts if part]
    out: dict[str, Any] = {"step": [part[-1]["step"] for part in parts]}
    for name in sorted({key for row in rows for key in row if not key.startswith("held_out.")} - {"step"}):
        known = [[row[name] for row in part if name in row and row[name] == row[name]] for part in parts]
        out[name] = [round(sum(values) / len(values), 6) if values else float("nan") for values in known]
    judged = [row for row in rows if any(key.startswith("held_out.") for key in row)]
    if judged:
        shown = {name: [round(row[f"held_out.{name}"], 4) for row in judged] for name in HELD_OUT}
        out["held_out"] = {"step": [row["step"] for row in judged], **shown}
    return out


def ship(name: str, overrides: list[str], root: Path, out: Path) -> Path:
    """Write KIND.safetensors and KIND.json into ``out``; returns the weights' path.

    Raises:
        UserError: the teacher has not been trained, or its file would be too large to ship.
    """
    arm = spec.load(name, [*overrides, "teacher_training.weights=train", "until=teacher"])
    store = runs.Store(root.resolve())
    node = experiment.plan(arm, "teacher")[-1]
    if not store.done(node):
        raise UserError(f"{name}: its teacher is not trained in {root}; causvid run {name} until=teacher")
    folder = store.folder(node)
    tensors = {k: v.to(torch.float16) for k, v in weights.read_tensors(folder / "weights.safetensors")[0].items()}
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    if size > MOST_BYTES:
        raise UserError(f"{name}: {size} bytes of weights; at most {MOST_BYTES} are shipped")
    target = out / f"{arm['teacher.name']}.safetensors"
    done = json.loads((folder / "DONE").read_text())
    weights.write_tensors(target, tensors)
    made = {"spec": name, "overrides": overrides, "sha256": weights.digest(target)}
    record = {**made, **json.loads(runs.canonical(node.record)), **done}
    weights.write_json(target.with_suffix(".json"), {**record, "curves": curves(folder / "curves.jsonl")})
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=spec.experiments_folder() / "teachers" / "shapes")
    options = parser.parse_args()
    print(ship(options.spec, options.overrides, options.runs, options.out))


if __name__ == "__main__":
    main()
