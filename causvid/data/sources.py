"""The files that clips are made of: whether they are there, what tells one from another, copies of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from causvid import weights
from causvid.data.folders import Folder, marks, told
from causvid.data.manifest import Clip, Given
from causvid.data.pool import Refused
from causvid.data.remote import ASK_SECONDS, ask, fetch, ours, scratch_folder, unread
from causvid.errors import UserError


def origin(given: Given, clip: Clip, seconds: float = ASK_SECONDS) -> dict[str, str] | None:
    """What tells a clip's file from another at its place, or None where that can't be told, or not in so many seconds.

    Its size, with its time of change on this machine, and elsewhere with the tag that an object store gives it, or its
    times.
    """
    try:
        folder, name = given.place(clip)
        if folder.is_local:
            facts = Path(folder.join(name)).stat()
            return {"size": str(facts.st_size), "mtime_ns": str(facts.st_mtime_ns)}
        with told(str(folder)):
            found = ask(folder, "info", folder.join(name), seconds=min(seconds, ASK_SECONDS))
    except (UserError, OSError, ValueError):
        return None
    return {"size": str(found.get("size")), **marks(found)}


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


def is_file(folder: Folder, name: str, seconds: float = ASK_SECONDS) -> bool:
    """Whether there is a file of that name: no folder, no pipe.

    Raises:
        Unread: that can't be told, or not in so many seconds.
    """
    with unread(f"{folder}/{name}"):
        if folder.is_local:
            return Path(folder.join(name)).is_file()
        try:
            found = ask(folder, "info", folder.join(name), seconds=min(seconds, ASK_SECONDS))
        except FileNotFoundError as error:
            # fsspec calls every failure of a web server so, and says in the cause which it was.
            cause = error.__cause__ if folder.uri.startswith("http") else None
            if cause is None or isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410):
                return False
            raise cause from None
        return found["type"] != "directory"


@contextmanager
def copied(source: Folder, path: str, place: Folder, name: str, seconds: float) -> Iterator[Path]:
    """A copy of a file on this machine, on the disk where :func:`settle` puts it; gone at the end of the block.

    Raises:
        Refused: there is no such file.
        Unread: it can't be read, or not in so many seconds.
        Halt: the copy can't be written.
    """
    if not is_file(source, path, seconds):
        raise Refused("does not exist, or is no file")
    with scratch_folder() as scratch:
        copy = weights.partial_of(Path(place.join(name))) if place.is_local else scratch / "copy"
        with ours(f"{place}/{name}"):
            copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            fetch(source, path, copy, seconds)
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


def local_copy(given: Given, clip: Clip, scratch: Path, seconds: float) -> Path:
    """A clip's file on this machine, a copy in ``scratch`` where it lies elsewhere; its checksum is checked.

    Raises:
        Refused: it isn't there, or is empty.
        Unread: it can't be read, or not in so many seconds.
        Halt: the copy can't be written.
        UserError: it isn't the file that the manifest means.
    """
    with unread(clip.path):
        folder, name = given.place(clip)
    if not is_file(folder, name, seconds):
        raise Refused("does not exist, or is no file")
    if folder.is_local:
        path = Path(folder.join(name))
        with unread(str(path)):  # here, where a file that is closed to us is told from one that is no video
            path.open("rb").close()
    else:
        path = scratch / f"{clip.id}{PurePosixPath(name).suffix[:8]}"
        fetch(folder, name, path, seconds)
    return checked(path, clip)


def checked(path: Path, clip: Clip) -> Path:
    """A clip's file on this machine, if it is the one that the manifest means.

    Raises:
        Refused: it is empty.
        Unread: it can't be read.
        UserError: it is another one.
    """
    with unread(str(path)):
        size = path.stat().st_size
        found = sha256(path) if clip.sha256 is not None and size else None
    if size == 0:
        raise Refused("is empty")
    if found != clip.sha256:
        raise UserError("its SHA-256 is not the one in the manifest: the file changed, or is damaged")
    return path
