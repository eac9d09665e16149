"""A whole experiment: from a spec's name to what ran and what came out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causvid import build, progress, registry, runs, spec as specs
from causvid.errors import UserError
from causvid.spec import Spec


@dataclass(frozen=True)
class Outcome:
    """What a run did and where its results are."""

    run: Path
    executed: list[str]
    skipped: list[str]
    metrics: dict[str, float]
    timings: dict[str, float]

    @property
    def report(self) -> Path:
        return self.run / "report.html"

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run), "report": str(self.report), "executed": self.executed, "skipped": self.skipped,
            "metrics": self.metrics, "timings": self.timings,
        }  # fmt: skip


def stages() -> dict[str, runs.Stage]:
    """Every registered stage, by name."""
    return {name: found.target() for name, found in registry.components("stage").items()}


def plan(spec: Spec) -> list[runs.Node]:
    """The stages of a checked spec, inputs first."""
    build.check(spec)
    return runs.graph(spec, stages(), spec["until"])


def set_threads(spec: Spec) -> None:
    if spec["runtime.threads"] > 0:
        torch.set_num_threads(spec["runtime.threads"])


def run(name: str, overrides: Sequence[str], root: Path) -> Outcome:
    """Run what is not done of a spec.

    Raises:
        UserError: the spec is wrong, or a stage refuses its input.
    """
    return run_spec(specs.load(name, overrides), root)


def run_spec(spec: Spec, root: Path) -> Outcome:
    """Run what is not done of a loaded spec."""
    set_threads(spec)
    store = runs.Store(root.resolve())
    nodes = plan(spec)
    executed, skipped = store.execute(nodes, spec, progress.console.print)
    folders = {node.name: store.folder(node) for node in nodes}
    metrics = _json(folders["evaluate"] / "metrics.json") if "evaluate" in folders else {}
    timings = _json(folders["sample"] / "timings.json") if "sample" in folders else {}
    return Outcome(folders[nodes[-1].name], executed, skipped, metrics, timings)


def _json(path: Path) -> dict[str, float]:
    return json.loads(path.read_text())


def sweep(name: str, overrides: Sequence[str], root: Path) -> list[tuple[dict[str, Any], Outcome]]:
    """Run every arm of a spec's ``sweep`` mapping (dotted keys to lists): their grid, in order.

    Raises:
        UserError: no sweep in the spec, or a key or value that is wrong in any arm; nothing has run then.
    """
    arms = [(values, specs.load(name, [*overrides, *_as_overrides(values)])) for values in grid(name, overrides)]
    for _, arm in arms:
        plan(arm)
    return [(values, run_spec(arm, root)) for values, arm in arms]


def grid(name: str, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The arms of a sweep, each a mapping of dotted keys to values."""
    keys = specs.load(name, overrides)["sweep"]
    if not keys:
        raise UserError(f"{name} has no 'sweep:' (a mapping of dotted keys to lists); use 'causvid run' for a single arm")
    for key, values in keys.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{name}: sweep.{key}: expected a list of values, got {values!r}")
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*keys.values())]


def _as_overrides(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
