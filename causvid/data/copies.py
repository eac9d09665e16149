"""Copies of remote stores on this machine: fetched once for each state of a store, and bounded in size.

They lie in ``remote-stores`` below ``CAUSVID_CACHE``; nothing outside of it, and no name that isn't a copy's, is ever
touched. A copy is named by its store's address and by what the filesystem tells of each file: tag, checksum or time of
change. Where it tells nothing of the kind, a store is fetched at every use, and its copy named by what it holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from causvid.data.folders import TAGS, Folder, marks, told
from causvid.errors import UserError

CACHE_GB = 50.0
NAME = re.compile("[0-9a-f]{24}")
WHOLE = ".complete"  # the mark of a whole copy; its time is that of the last use


def cached(uri: str, anew: bool = False) -> Path:
    """A folder as a local one: itself, or a copy that is fetched once for each state of it.

    Copies lie in ``CAUSVID_CACHE`` (default ``~/.cache/causvid``); those unused for longest are deleted once all
    together exceed ``CAUSVID_CACHE_GB`` (default 50).

    Args:
        anew: whether to fetch it whatever copy there is.

    Raises:
        UserError: it can't be fetched, is larger than the cache may be, or ``CAUSVID_CACHE_GB`` is no number.
    """
    folder = Folder(uri)
    if folder.is_local:
        return Path(folder.path)
    from causvid import weights  # here, as Folder.write says

    limit, facts = _limit(), folder.facts()
    size = sum(int(each["size"] or 0) for each in facts.values())
    if not facts:
        raise UserError(f"{uri} does not exist, or is empty")
    if size > limit:
        raise UserError(f"{uri} has {size / 1e9:.1f} GB; the cache takes {limit / 1e9:g}: CAUSVID_CACHE_GB")
    if wrong := next((name for name in facts if "" in name.split("/")), None):
        raise UserError(f"{uri} holds '{wrong}', a name that no folder here can have; rename it there")
    root = weights.cache_folder() / "remote-stores"
    with told(uri):
        state = _state(folder, facts)
    with told(f"{root} (CAUSVID_CACHE)"), _alone(root, _name(folder.uri)):
        place = root / _name(folder.uri, state)
        if state is None or anew or not (place / WHOLE).exists():
            partial = root / f".{_name(folder.uri)}"
            shutil.rmtree(partial, ignore_errors=True)
            _make_room(root, limit - size)
            for name in facts:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                with told(f"{uri}/{name}"):
                    folder.fs.get_file(folder.join(name), str(partial / name))
            with told(uri):
                if _state(folder, folder.facts()) != state:
                    raise UserError(f"{uri} changed while it was fetched; wait for its writer, and run it again")
            place = place if state is not None else root / _name(folder.uri, _sums(partial))
            if state is None and not anew and (place / WHOLE).exists():  # the very same, which others may be reading
                shutil.rmtree(partial)
            else:
                (partial / WHOLE).write_text(uri)
                shutil.rmtree(place, ignore_errors=True)
                partial.rename(place)
        os.utime(place / WHOLE)
    return place


def _state(folder: Folder, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]] | None:
    """What tells the content of a folder's files from any other, or None where the filesystem does not."""
    state = {}
    for name, listed in facts.items():
        found = marks(listed) or marks(folder.fs.info(folder.join(name)))
        if not found.keys() & TAGS:
            with suppress(Exception):  # one that doesn't know says so in its own way
                found["modified"] = str(folder.fs.modified(folder.join(name)))
        if not found.keys() - {"created"}:  # what was made then may have been changed since
            return None
        state[name] = {"size": str(listed["size"]), **found}
    return state


def _sums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as stream:
            sums[str(path.relative_to(folder))] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def _name(uri: str, state: Any = None) -> str:
    return hashlib.sha256(json.dumps([uri, state], sort_keys=True).encode()).hexdigest()[:24]


def _limit() -> float:
    told_by = os.environ.get("CAUSVID_CACHE_GB") or CACHE_GB
    try:
        gigabytes = float(told_by)
    except ValueError:
        gigabytes = math.nan
    if not gigabytes >= 0:
        raise UserError(
            f"CAUSVID_CACHE_GB: expected a number of gigabytes, 0 or more, got {told_by!r}; mend or unset it"
        )
    return gigabytes * 1e9


@contextmanager
def _alone(root: Path, name: str) -> Iterator[None]:
    """One process fetches, the others wait and find the copy; a lock ends with its process."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _make_room(root: Path, limit: float) -> None:
    for partial in root.iterdir():  # of fetches that were killed: nobody holds their lock
        if partial.name.startswith(".") and NAME.fullmatch(partial.name[1:]):
            with (root / f"{partial.name[1:]}.lock").open("w") as stream, suppress(BlockingIOError):
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)
    whole = [path / WHOLE for path in root.iterdir() if NAME.fullmatch(path.name) and (path / WHOLE).is_file()]
    copies = sorted(whole, key=lambda path: path.stat().st_mtime)
    sizes = {path.parent: sum(f.stat().st_size for f in path.parent.rglob("*") if f.is_file()) for path in copies}
    total = sum(sizes.values())
    for place, size in sizes.items():
        if total <= limit:
            return
        shutil.rmtree(place, ignore_errors=True)
        total -= size
