"""The mark of a finished store: ``digest.json``, the digest over all rows and a checksum per file, written last."""

from __future__ import annotations

from pathlib import Path

import xxhash

from causvid.data.folders import CHUNK, Folder
from causvid.data.lmdb_store import Reader

NAME = "digest.json"


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
