"""Randomness as a function: (seed, stage, step, global sample index, purpose) -> numbers.

Nothing is drawn from a stream that a resume, another number of ranks or another micro-batch could move: each sample's
numbers depend on its own key alone, so two arms of an ablation see the same data and the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def key(*parts: object) -> int:
    """A 63-bit integer from any parts; the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Draw:
    """The random numbers of one step.

    Args:
        seed: the experiment's seed.
        stage: the stage's name, so that stages do not share noise.
        step: the training or sampling step.
        samples: global sample indices of this (micro-)batch, one per row.
        device: where the numbers are put; they are always made on the CPU, so every device sees the same.
    """

    def __init__(
        self, seed: int, stage: str, step: int, samples: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self._root = (seed, stage, step)
        self.samples = list(samples)
        self._device = torch.device(device)

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(key(*self._root, sample, purpose)) for sample in self.samples]

    def normal(self, purpose: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, ``b *shape``."""
        rows = [torch.randn(shape, generator=g, dtype=dtype) for g in self._generators(purpose)]
        return torch.stack(rows).to(self._device)

    def uniform(self, purpose: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [0, 1), ``b *shape``."""
        rows = [torch.rand(shape, generator=g, dtype=dtype) for g in self._generators(purpose)]
        return torch.stack(rows).to(self._device)

    def integer(self, purpose: str, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high), ``b *shape``."""
        rows = [torch.randint(high, shape, generator=g) for g in self._generators(purpose)]
        return torch.stack(rows).to(self._device)

    def shared_integer(self, purpose: str, high: int) -> int:
        """One uniform integer in [0, high) for the step as a whole: the same on every rank and micro-batch."""
        generator = torch.Generator().manual_seed(key(*self._root, "all", purpose))
        return int(torch.randint(high, (), generator=generator))

    def rows(self, rows: Sequence[int]) -> Draw:
        """The numbers of some of the batch's rows; what is shared by all stays shared."""
        return Draw(*self._root, [self.samples[row] for row in rows], self._device)

    def derive(self, purpose: str) -> Draw:
        """Independent numbers for a second use of the same component within one step."""
        seed, stage, step = self._root
        return Draw(seed, f"{stage}/{purpose}", step, self.samples, self._device)
