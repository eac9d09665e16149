"""Where the time of a stream goes: seconds per block in text, transformer, cache and codec."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

PARTS = ("text", "transformer", "cache", "codec")
MOST_ROWS = 4096  # blocks that are remembered one by one; sums go on


@dataclass(frozen=True)
class Row:
    """One block: seconds of each part, of the block as a whole, and when it was ready, from the stream's start."""

    block: int
    frames: int
    text: float
    transformer: float
    cache: float
    codec: float
    total: float
    at: float


class Ledger:
    """Seconds by part and block. On an accelerator its queue is drained at the end of each part.

    Args:
        device: where the stream computes.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._drains = torch.device(device).type != "cpu"
        self._start = time.perf_counter()
        self._open: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._sums = dict.fromkeys((*PARTS, "total"), 0.0)
        self._blocks = self._frames = 0
        self.rows: deque[Row] = deque(maxlen=MOST_ROWS)
        self.first_frame: float | None = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is done inside; what lies between two blocks is counted with the next one."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self._drains:
                torch.accelerator.synchronize()
            self._open[name] += time.perf_counter() - begin

    def close(self, block: int, frames: int, begin: float) -> Row:
        """End a block that was begun at ``begin`` (``time.perf_counter``)."""
        now = time.perf_counter()
        row = Row(block, frames, **self._open, total=now - begin, at=now - self._start)
        self._open = dict.fromkeys(PARTS, 0.0)
        if self.first_frame is None:
            self.first_frame = row.at
        for name in self._sums:
            self._sums[name] += getattr(row, name)
        self._blocks, self._frames = self._blocks + 1, self._frames + frames
        self.rows.append(row)
        return row

    def summary(self) -> dict[str, float]:
        """Blocks, frames, frames per second of busy time, seconds to the first frame, and of a block its median, its
        95th percentile and its jitter (their distance); the share of each part. Empty before the first block."""
        if not self.rows or self.first_frame is None:
            return {}
        seconds = [row.total for row in self.rows]
        median = statistics.median(seconds)
        p95 = sorted(seconds)[min(len(seconds) - 1, int(0.95 * len(seconds)))]
        whole = max(sum(self._sums[name] for name in PARTS), 1e-12)
        return {
            "blocks": self._blocks, "frames": self._frames, "fps": self._frames / max(self._sums["total"], 1e-12),
            "first_frame_s": self.first_frame, "block_s": median, "block_p95_s": p95, "jitter_s": p95 - median,
            **{f"{name}_share": self._sums[name] / whole for name in PARTS},
        }  # fmt: skip
