"""The LMDB layout of CausVid's released data, read as rows: ``latents_shape``, ``latents_0_data``, ``prompts_0_data``.

``latents_shape`` is text, ``n f c h w`` for latents and ``n k f c h w`` for ODE pairs; data are fp16. It has neither
checksums nor the times of the pairs' states, and its ``n`` counts rows wrongly when its writer met duplicates: rows are
found by their keys here, and times must be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from causvid.data.lmdb_shard import check_size, storage_error
from causvid.data.rows import Row
from causvid.errors import UserError


class Released:
    """An LMDB of the released layout.

    Args:
        folder: where it is.
        shape: shape of one row, where the file does not hold it.
        times: times of the states, for ODE pairs, from noise (1) to data (0).

    Attributes:
        promised: how many rows it says that it has; 0 where it does not say.

    Raises:
        UserError: not of this layout, or shape or times are missing or do not fit.
    """

    def __init__(self, folder: Path, shape: Sequence[int] = (), times: Sequence[float] = ()) -> None:
        try:
            self._environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=True)
            with self._environment.begin() as transaction:
                told = bytes(transaction.get(b"latents_shape") or b"")
                self.numbers = sorted(_numbers(transaction))
        except (lmdb.Error, OSError) as error:
            raise storage_error(folder, error) from error
        first = told.split()[:1]
        self.promised = int(first[0]) if first and first[0].isdigit() else 0
        try:
            self.shape = tuple(shape) or tuple(int(size) for size in told.split())[1:]
        except ValueError as error:
            raise UserError(f"{folder}: latents_shape is {told[:80]!r}, not numbers; give --shape") from error
        if not self.numbers:
            raise UserError(
                f"{folder} is neither a store of this project nor of the released layout (no latents_0_data)"
            )
        if shape and (len(self.shape) not in (4, 5) or min(self.shape) < 1):
            raise UserError(f"--shape: expected 4 or 5 sizes of at least 1, as in 21,16,60,104, got {list(shape)}")
        if len(self.shape) not in (4, 5) or min(self.shape) < 1:
            raise UserError(f"{folder}: the shape of a row is not stored; give --shape, as in 21,16,60,104")
        self.times = tuple(times)
        wanted = self.shape[0] if len(self.shape) == 5 else 0
        if len(self.times) != wanted:
            raise UserError(f"{folder}: rows hold {wanted} states; give as many --times, as in 1,0.757,0.522,0")
        if self.times:
            exact = np.array(self.times, np.float32)  # as they are read
            if not (exact[0] <= 1 and (np.diff(exact) < 0).all() and exact[-1] == 0):  # NaN is none of these
                raise UserError(f"--times: expected times that fall from at most 1 to 0, got {list(self.times)}")

    @property
    def field(self) -> str:
        return "states" if self.times else "latents"

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = {
            "fields": {self.field: {"dtype": "float16", "shape": list(self.shape)}},
            "codec": {"name": "unknown"}, "text_encoder": None, "provenance": {"from": "released layout"},
        }  # fmt: skip
        return header | ({"times": list(self.times)} if self.times else {})

    def rows(self) -> Iterator[tuple[str, Row | str]]:
        """(key, row, or why it can't be read)."""
        for number in self.numbers:
            key = f"{number:08d}"
            with self._environment.begin() as transaction:
                data = transaction.get(f"latents_{number}_data".encode())
                prompt = transaction.get(f"prompts_{number}_data".encode())
            if data is None or prompt is None:
                yield key, "its latents or its prompt are missing"
            elif len(data) != 2 * int(np.prod(self.shape)):
                yield key, f"has {len(data)} bytes; rows of shape {self.shape} have {2 * int(np.prod(self.shape))}"
            else:
                try:
                    array = np.frombuffer(bytes(data), np.float16).reshape(self.shape)
                    caption = bytes(prompt).decode()
                    if not np.isfinite(array).all():
                        raise ValueError("holds numbers that are not finite")
                    yield key, Row(key, {self.field: array}, {"caption": caption})
                except ValueError as error:
                    yield key, str(error)


def _numbers(transaction: lmdb.Transaction) -> set[int]:
    numbers = set()
    for key in transaction.cursor().iternext(values=False):
        name, _, rest = bytes(key).partition(b"_")
        if name in (b"latents", b"prompts") and rest.endswith(b"_data") and rest[:-5].isdigit():
            numbers.add(int(rest[:-5]))
    return numbers


def scan(folder: Path) -> int:
    """How many entries there are; every page that leads to one is read, so that damage shows here and not later.

    Raises:
        UserError: the file is cut short or damaged.
    """
    count, last = 0, b""
    try:
        with lmdb.open(str(folder), readonly=True, lock=False) as environment:
            check_size(environment, folder)
            with environment.begin(buffers=True) as transaction:
                for key, _ in transaction.cursor():
                    if bytes(key) <= last:
                        raise UserError(f"{folder} is damaged: its keys are out of order; fetch it again")
                    last, count = bytes(key), count + 1
    except (lmdb.Error, OSError) as error:
        raise storage_error(folder, error) from error
    return count
