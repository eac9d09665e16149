"""The files that clips are made of: whether they are there, what tells one from another, copies of them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from causvid import weights
from causvid.data.folders import Folder, told
from causvid.data.manifest import Clip, Given
from causvid.data.pool import Refused
from causvid.errors import UserError


def origin(given: Given, clip: Clip) -> dict[str, str] | None:
    """What tells a clip's file from another at its place, or None where that can't be told.

    Its size, with its time of change on this machine and the tag that an object store gives it elsewhere.
    """
    try:
        folder, name = given.place(clip)
        if folder.is_local:
            facts = Path(folder.join(name)).stat()
            return {"size": str(facts.st_size), "mtime_ns": str(facts.st_mtime_ns)}
        with told(str(folder)):
            found = folder.fs.info(folder.join(name))
    except (UserError, OSError, ValueError):
        return None
    return {key.lower(): str(found[key]) for key in ("size", "ETag", "etag", "created") if found.get(key)}


def sha256(file: Path | tuple[Folder, str]) -> str:
    """SHA-256 of a file as it is now, in hexadecimal.

    Args:
        file: its path, or its folder and name.

    Raises:
        UserError: it isn't there, or can't be read.
    """
    folder, name = (Folder(str(file.parent)), file.name) if isinstance(file, Path) else file
    with told(f"{folder}/{name}"), folder.fs.open(folder.join(name), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_file(folder: Folder, name: str) -> bool:
    """Whether there is a file of that name: no folder, no pipe."""
    with told(f"{folder}/{name}"):
        if folder.is_local:
            return Path(folder.join(name)).is_file()
        try:
            return folder.fs.info(folder.join(name))["type"] != "directory"
        except FileNotFoundError:
            return False


@contextmanager
def copied(source: Folder, path: str, place: Folder, name: str) -> Iterator[Path]:
    """A copy of a file on this machine, on the disk where :func:`settle` puts it; gone at the end of the block.

    Raises:
        Refused: there is no such file.
        UserError: it can't be read, or the copy not be written.
    """
    if not is_file(source, path):
        raise Refused("does not exist, or is no file")
    with tempfile.TemporaryDirectory() as scratch:
        copy = weights.partial_of(Path(place.join(name))) if place.is_local else Path(scratch) / "copy"
        with told(f"{place}/{name}"):
            copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            with told(f"{source}/{path}"):
                source.fs.get_file(source.join(path), str(copy))
            yield copy
        finally:
            copy.unlink(missing_ok=True)


def settle(copy: Path, place: Folder, name: str) -> None:
    """Let a copy be a folder's file of that name, whole or not at all, without holding it in memory.

    Raises:
        UserError: it can't be written.
    """
    with told(f"{place}/{name}"):
        if place.is_local:
            with copy.open("rb+") as stream:
                os.fsync(stream.fileno())
            copy.replace(place.join(name))
            return
        place.fs.makedirs(place.join(name).rpartition("/")[0], exist_ok=True)
        place.fs.put_file(str(copy), place.join(name))


def local_copy(given: Given, clip: Clip, scratch: Path) -> Path:
    """A clip's file on this machine, a copy in ``scratch`` where it lies elsewhere; its checksum is checked.

    Raises:
        Refused: it isn't there, is empty, or isn't the file that the manifest means.
        UserError: it can't be read.
    """
    folder, name = given.place(clip)
    if not is_file(folder, name):
        raise Refused("does not exist, or is no file")
    if folder.is_local:
        path = Path(folder.join(name))
    else:
        path = scratch / f"{clip.id}{PurePosixPath(name).suffix[:8]}"
        with told(str(folder)):
            folder.fs.get_file(folder.join(name), str(path))
    return checked(path, clip)


def checked(path: Path, clip: Clip) -> Path:
    """A clip's file on this machine, if it is the one that the manifest means.

    Raises:
        Refused: it is empty.
        UserError: it is another one, or can't be read.
    """
    with told(str(path)):
        size = path.stat().st_size
    if size == 0:
        raise Refused("is empty")
    if clip.sha256 is not None and sha256(path) != clip.sha256:
        raise UserError("its SHA-256 is not the one in the manifest: the file changed, or is damaged")
    return path
