"""Rows of a store as bytes: named arrays and JSON facts, with a checksum over both. Knows numpy, no torch, no LMDB."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from causvid.errors import UserError

DTYPES = ("float16", "float32", "float64", "uint8", "int32", "int64")
ALIGNMENT = 64  # bytes
MAX_KEY = 400  # bytes; LMDB takes 511


@dataclass(frozen=True)
class Row:
    """One row: arrays by field, and facts that JSON can hold."""

    key: str
    arrays: Mapping[str, np.ndarray]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """What the index says of a row: dtype, shape and place of each array, facts, checksum."""

    key: str
    fields: Mapping[str, tuple[str, tuple[int, ...], int]]
    facts: Mapping[str, Any]
    checksum: bytes
    text: bytes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.fields[name][1]


def canonical(value: Any) -> bytes:
    """JSON in one form: equal values, equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def checksum(text: bytes, data: Any) -> bytes:
    """16 bytes over a row's index text and its arrays."""
    digest = xxhash.xxh3_128(text)
    digest.update(data)
    return digest.digest()


def pack_row(row: Row) -> tuple[bytes, bytes]:
    """(index entry, data) of a row, as they are written.

    Raises:
        ValueError: a key or an array that can't be stored.
    """
    if not row.key or len(row.key.encode("utf-8", "strict")) > MAX_KEY:
        raise ValueError(f"a row's key has 1 to {MAX_KEY} bytes, got {row.key!r}")
    places, parts, offset = {}, [], 0
    for name, array in sorted(row.arrays.items()):
        if array.dtype.name not in DTYPES:
            raise ValueError(f"{name}: dtype {array.dtype} can't be stored; accepted: {', '.join(DTYPES)}")
        content = np.ascontiguousarray(array).tobytes()
        gap = -offset % ALIGNMENT
        places[name] = [array.dtype.name, list(array.shape), offset + gap]
        parts += [b"\0" * gap, content]
        offset += gap + len(content)
    text, data = canonical({"fields": places, "facts": dict(row.facts)}), b"".join(parts)
    return checksum(text, data) + text, data


def parse_entry(key: str, value: bytes) -> Entry:
    """An index entry as it was written.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = json.loads(value[16:])
        places = {name: (str(np.dtype(d)), tuple(map(int, s)), int(o)) for name, (d, s, o) in content["fields"].items()}
        return Entry(key, places, dict(content["facts"]), value[:16], value[16:])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"row '{key}': its index entry is damaged; make the row again") from error


def check_header(header: Mapping[str, Any]) -> None:
    """Whether a header has the form that readers of a store count on.

    Raises:
        ValueError: what is wrong with it.
    """
    canonical(header)  # numbers that are not finite
    fields = header.get("fields")
    if not isinstance(fields, Mapping) or not all(_is_field(each) for each in fields.values()):
        raise ValueError("fields: expected dtype and shape of each")
    for name in ("codec", "text_encoder"):
        if not isinstance(header.get(name), Mapping | None):
            raise ValueError(f"{name}: expected a mapping, got {str(header[name])[:80]!r}")
    for name in ("text_length", "text_dim"):
        if name in header and not _is_size(header[name]):
            raise ValueError(f"{name}: expected a whole number of at least 1, got {str(header[name])[:80]!r}")
    if not isinstance(header.get("times", []), list) or not all(map(_is_number, header.get("times", []))):
        raise ValueError(f"times: expected numbers, got {str(header['times'])[:80]!r}")
    free = header.get("unconditional")
    if free is not None:
        length, dim = header["text_length"], header["text_dim"]
        rows = isinstance(free, list) and len(free) <= length and all(isinstance(row, list) for row in free)
        if not rows or not all(len(row) == dim and all(map(_is_number, row)) for row in free):
            raise ValueError(f"unconditional: expected at most {length} rows of {dim} numbers")


def _is_field(field: Any) -> bool:
    return (
        isinstance(field, Mapping)
        and field.get("dtype") in DTYPES
        and isinstance(field.get("shape"), list | tuple)
        and all(size is None or _is_size(size) for size in field["shape"])
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def check_fields(row: Row, fields: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether a row has the fields that a header promises.

    Raises:
        ValueError: another field, dtype or shape.
    """
    if set(row.arrays) != set(fields):
        raise ValueError(f"has fields {', '.join(sorted(row.arrays))}; the store's are {', '.join(sorted(fields))}")
    for name, wanted in fields.items():
        array, shape = row.arrays[name], wanted["shape"]
        fits = len(array.shape) == len(shape) and all(w in (None, s) for s, w in zip(array.shape, shape, strict=True))
        if array.dtype.name != wanted["dtype"] or not fits:
            expected = " x ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{name} is {array.dtype} {array.shape}; the store's is {wanted['dtype']} {expected}")


def trimmed(text: np.ndarray) -> np.ndarray:
    """Embeddings ``l d`` without the zeros after the prompt."""
    filled = np.flatnonzero(np.any(text != 0, axis=1))
    return text[: int(filled[-1]) + 1 if len(filled) else 0]


def padded(text: np.ndarray, length: int) -> np.ndarray:
    """Embeddings ``l d`` in fp32 with the zeros after the prompt put back."""
    out = np.zeros((length, text.shape[1]), np.float32)
    out[: len(text)] = text
    return out
