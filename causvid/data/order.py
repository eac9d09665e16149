"""In which order rows are read: a pure function of the seed and the step, so a resume needs the step and nothing else.

Rows of one shape form a bucket, and a batch is of one bucket: images (one frame) and videos alternate by batch. Each
bucket is read epoch after epoch, shuffled anew in each, with no row left out at an epoch's end: a batch may hold the
last rows of one epoch and the first of the next. Ranks take disjoint parts of a global batch, and so disjoint rows,
but where it spans the end of an epoch: a row may be among the last of one and among the first of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch

from causvid.randomness import key


@lru_cache(maxsize=64)
def permutation(seed: int, name: str, epoch: int, count: int) -> tuple[int, ...]:
    """The order of ``count`` rows in an epoch."""
    generator = torch.Generator().manual_seed(key(seed, "order", name, epoch))
    return tuple(torch.randperm(count, generator=generator).tolist())


def place(seed: int, name: str, sample: int, count: int) -> int:
    """Which of ``count`` rows the sample of that number reads, when samples are counted through all epochs."""
    epoch, within = divmod(sample, count)
    return permutation(seed, name, epoch, count)[within]


class Order:
    """Which rows each step of each rank reads.

    Args:
        buckets: keys of rows by shape.
        batch: rows of a step on one rank.
        seed: of the shuffling.
        rank, world: this process's number among how many.
        batches: rows of a step for single buckets, such as more for images; ``batch`` for the others.

    Raises:
        ValueError: no rows, or sizes that are not positive.
    """

    def __init__(
        self,
        buckets: Mapping[tuple[int, ...], Sequence[str]],
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        batches: Mapping[tuple[int, ...], int] | None = None,
    ) -> None:
        self.buckets = {name: tuple(keys) for name, keys in sorted(buckets.items(), key=lambda item: str(item[0]))}
        self.batches = {name: (batches or {}).get(name, batch) for name in self.buckets}
        if not self.buckets or not all(self.buckets.values()):
            raise ValueError("an order needs at least one row in every bucket")
        if min(self.batches.values()) < 1 or not 0 <= rank < world:
            raise ValueError(f"batches must be positive and 0 <= rank < world, got {self.batches}, {rank} of {world}")
        self.seed, self.rank, self.world = seed, rank, world
        # In a cycle each bucket gets the steps that its rows need, so large buckets come up more often.
        self._cycle = [
            name for name, keys in self.buckets.items() for _ in range(-(-len(keys) // (self.batches[name] * world)))
        ]

    def step(self, number: int) -> list[str]:
        """Keys of the rows that this rank reads at a step."""
        cycle, within = divmod(number, len(self._cycle))
        turns = [self._cycle[i] for i in permutation(self.seed, "cycle", cycle, len(self._cycle))]
        name = turns[within]
        before = cycle * self._cycle.count(name) + turns[:within].count(name)
        keys, batch = self.buckets[name], self.batches[name]
        first = (before * self.world + self.rank) * batch
        return [keys[place(self.seed, str(name), first + i, len(keys))] for i in range(batch)]

    def steps(self, start: int = 0, stop: int | None = None) -> Iterator[list[str]]:
        """The keys of every step from ``start`` on; without ``stop`` for ever."""
        number = start
        while stop is None or number < stop:
            yield self.step(number)
            number += 1
