"""The mark of a finished store: ``digest.json``, the digest over all rows and a checksum per file, written last."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import xxhash

from causvid.data.folders import CHUNK, Folder
from causvid.data.lmdb_store import Reader
from causvid.errors import UserError

NAME = "digest.json"


@dataclass(frozen=True)
class Finished:
    """What a store was finished with: the digest over all rows, their number, a checksum per file."""

    digest: str
    rows: int
    files: dict[str, str]


def read(store: Path, name: str) -> Finished:
    """What the mark of a store says.

    Args:
        name: the store, for messages.

    Raises:
        UserError: there is none, as its pack was stopped, or it is damaged.
    """
    try:
        told = json.loads((store / NAME).read_bytes())
        return Finished(str(told["digest"]), int(told["rows"]), {str(key): str(s) for key, s in told["files"].items()})
    except FileNotFoundError as error:
        raise UserError(f"{name} is not finished: it has no {NAME}; run 'causvid data pack' again") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{name}/{NAME} is damaged; run 'causvid data pack' again") from error


def file_sum(path: Path) -> str:
    """Checksum of a whole file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while part := stream.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()


def finish(store: Path) -> None:
    """Say that a store is whole; no writer may hold it."""
    reader = Reader(store)
    sums = {str(path.relative_to(store)): file_sum(path) for path in sorted(store.rglob("data.mdb"))}
    Folder(str(store)).write_json(NAME, {"digest": reader.digest(), "rows": len(reader), "files": sums})
