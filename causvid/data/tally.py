"""Counts that add up, and the list of what was put aside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from causvid.data.folders import Folder


@dataclass
class Tally:
    """What became of everything that was given; each thing is counted once."""

    given: int
    done: int = 0
    skipped: int = 0
    quarantine: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Sequence[Tally]) -> Tally:
        """What became of all shares together."""
        given, done, skipped = (sum(getattr(part, name) for part in parts) for name in ("given", "done", "skipped"))
        return cls(given, done, skipped, [row for part in parts for row in part.quarantine])

    def put_aside(self, name: str, reason: str) -> None:
        self.quarantine.append({"clip": name, "reason": " ".join(reason.split())})

    @property
    def status(self) -> int:
        """Exit status: 0 when all went through, 3 when some did not."""
        return 3 if self.quarantine else 0

    def as_json(self) -> dict[str, Any]:
        return {"given": self.given, "done": self.done, "skipped": self.skipped, "quarantined": len(self.quarantine)}

    def write(self, folder: Folder, name: str = "quarantine.jsonl") -> None:
        """The list of what was put aside, each with its reason; empty when nothing was.

        Raises:
            RuntimeError: something that was given is not accounted for.
        """
        if self.done + self.skipped + len(self.quarantine) != self.given:
            raise RuntimeError(f"counts don't add up: {self.as_json()}")
        write_lines(folder, name, self.quarantine)


def write_lines(folder: Folder, name: str, rows: Iterable[Any]) -> None:
    """JSON lines, in a file written whole or not at all."""
    lines = [json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows]
    folder.write(name, "".join(lines).encode("utf-8", "backslashreplace"))
