"""What a server can stream: the causal teacher that ships, students of finished runs, Wan from given weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causvid import generation, wan_generation
from causvid.errors import UserError
from causvid.spec import experiments_folder
from causvid.streaming.engine import Engine

SHIPPED = "tiny world, shipped teacher"


@dataclass(frozen=True)
class Checkpoint:
    """Where an engine comes from: ``run`` is the folder of a finished run, ``wan`` a request for given weights."""

    name: str
    run: Path | None = None
    wan: wan_generation.Request | None = None
    prompt: str = "a red circle moves left"
    fps: int = 8

    def load(self) -> Engine:
        """The engine, with its weights.

        Raises:
            UserError: weights are missing or do not fit.
        """
        if self.wan is not None:
            studio = wan_generation.Studio(self.wan)
            if not studio.streams:
                raise UserError(f"spec '{self.wan.spec}' samples no causal student: it does not stream")
            return studio.engine
        if self.run is not None:
            return generation.engine_of(str(self.run), self.run)
        return generation.shipped_engine(steps=4)


def found(runs: Path, given: Any = None) -> dict[str, Checkpoint]:
    """Checkpoints by name, the default first: what was given, then runs, the newest first, then what ships."""
    out: dict[str, Checkpoint] = {}
    if given is not None:
        out[given.name] = given
    records = sorted(runs.glob("report/*/record.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in records[:32]:
        try:
            record = json.loads(path.read_text())
            causal = record["values"]["student"]["causal"] and "distill" in record["inputs"]
            name = f"{record.get('name') or 'run'} {path.parent.name[:8]}"
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if causal and (path.parent / "DONE").is_file():
            out[name] = Checkpoint(name, run=path.parent)
    if (experiments_folder() / "teachers" / "shapes" / "causal.safetensors").is_file():
        out[SHIPPED] = Checkpoint(SHIPPED)
    return out
