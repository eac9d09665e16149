"""What a store holds and whether it is sound. Imports no torch: it runs in a worker, where damage may crash it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from causvid.data.lmdb_shard import OtherLayout
from causvid.data.lmdb_store import Reader
from causvid.data.released_lmdb import scan


def survey(folder: str) -> dict[str, Any]:
    """What a store holds and which of its rows are damaged; run in a process of its own, as damage can crash LMDB.

    Raises:
        UserError: it can't be read as a whole.
    """
    path = Path(folder)
    try:
        reader = Reader(path, whole=False)
    except OtherLayout:
        reader = None
    if reader is None:
        gc.collect()  # LMDB takes an environment once in a process: let go of it before it is opened again
        return {"kind": "released", "entries": scan(path)}
    shapes: dict[str, int] = {}
    for entry in reader.entries.values():
        text = ", ".join(f"{n} {d} {' x '.join(map(str, s))}" for n, (d, s, _) in sorted(entry.fields.items()))
        shapes[text] = shapes.get(text, 0) + 1
    captions = [str(entry.facts.get("caption", "")) for entry in reader.entries.values()]
    damaged = reader.broken | reader.damaged()
    return {
        "kind": "store", "rows": len(reader) + len(reader.broken), "shapes": shapes, "damaged": damaged,
        "digest": reader.digest(),
        "bytes": sum(p.stat().st_size for p in path.rglob("data.mdb")), "header": reader.header,
        "captions": len(set(captions)), "without_caption": captions.count(""),
    }  # fmt: skip
