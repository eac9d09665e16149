"""Folders on any filesystem: plain paths, ``s3://``, ``gs://``, ``hf://``, ``memory://``, through fsspec.

A file is written whole or not at all, here and on object stores. What a filesystem raises becomes one clear error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from causvid.errors import UserError

CHUNK = 1 << 20  # bytes
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}  # of ours, by kind of address
# What filesystems tell of a file's content, their keys in small letters: tags and checksums, and times of change.
TAGS = frozenset((
    "etag", "md5", "md5hash", "md5checksum", "contentmd5", "crc", "crc32c", "checksum", "digest", "sha", "sha256",
    "hex", "blobid", "generation", "versionid",
))  # fmt: skip
TIMES = frozenset((
    "mtime", "modified", "lastmodified", "modify", "modifiedtime", "modificationtime", "lastwritetime", "updated",
    "created",
))  # fmt: skip


@contextmanager
def told(name: str) -> Iterator[None]:
    """Whatever the filesystem raises, as one error that names the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{name} does not exist") from error
    except ImportError as error:
        extra = EXTRAS.get(name.partition("://")[0])
        hint = f": pip install 'causvid[{extra}]'" if extra else ""
        raise UserError(f"{name}: this kind of address needs another package{hint} ({error})") from error
    except Exception as error:  # clients of object stores raise types of their own
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise UserError(f"{name} can't be written: the disk is full; make room and run it again") from error
        reason = getattr(error, "strerror", None) or f"{error}" or type(error).__name__
        raise UserError(f"{name} can't be read or written: {reason}") from error


class Folder:
    """A folder; names of files in it are relative, with ``/`` between parts.

    Raises:
        UserError: its path is empty, or no address that can be reached from here.
    """

    def __init__(self, uri: str) -> None:
        if not str(uri).strip():  # not the root of the disk
            raise UserError("the path of INPUT, OUTPUT or another folder is empty; name a folder, '.' for this one")
        self.uri = str(uri).rstrip("/") or "/"
        with told(self.uri):
            self.fs, self.path = fsspec.core.url_to_fs(self.uri)
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def __str__(self) -> str:
        return self.uri

    def join(self, name: str) -> str:
        """The file's address on this filesystem."""
        return f"{self.path.rstrip('/')}/{name}"

    def exists(self, name: str = "") -> bool:
        with told(f"{self.uri}/{name}"):
            return self.fs.exists(self.join(name) if name else self.path)

    def read(self, name: str) -> bytes:
        """The whole of a file.

        Raises:
            UserError: it isn't there, or can't be read.
        """
        with told(f"{self.uri}/{name}"), self.fs.open(self.join(name), "rb") as stream:
            return stream.read()

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            UserError: it can't be written; nothing is left of it.
        """
        with told(f"{self.uri}/{name}"):
            if not self.is_local:
                self.fs.makedirs(str(PurePosixPath(self.join(name)).parent), exist_ok=True)
                self.fs.pipe_file(self.join(name), content)
                return
            from causvid import weights  # here, so that a worker that writes nothing imports no torch

            path = Path(self.join(name))
            try:
                weights.write_bytes(path, content)
            except OSError:
                weights.partial_of(path).unlink(missing_ok=True)
                raise

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def facts(self) -> dict[str, dict[str, Any]]:
        """Every file below the folder with what a listing tells of it, but for hidden ones; nothing for no folder."""
        with told(self.uri):
            self.fs.invalidate_cache()
            if not self.fs.exists(self.path):
                return {}
            found = self.fs.find(self.path, detail=True)
        start = len(self.path.rstrip("/")) + 1
        names = {path[start:]: facts for path, facts in found.items()}
        return {name: names[name] for name in sorted(names) if not any(p.startswith(".") for p in name.split("/"))}

    def sizes(self) -> dict[str, int]:
        """Every file below the folder with its size in bytes, but for hidden ones; nothing where there is no folder."""
        return {name: int(facts["size"] or 0) for name, facts in self.facts().items()}

    def clear_partials(self) -> None:
        """Remove what killed processes of this machine left half-written; those of living ones stay."""
        if self.is_local:
            for path in Path(self.path).rglob(".*.partial"):
                rest, _, number = path.name.removesuffix(".partial").rpartition(".")
                if rest.endswith(f".{platform.node()}") and number.isdigit() and not _lives(int(number)):
                    path.unlink(missing_ok=True)

    def claim(self, recipe: Mapping[str, Any]) -> None:
        """Say in ``recipe.json`` how the folder's content is made; refuse a folder whose content is made otherwise.

        Raises:
            UserError: it holds the result of another recipe.
        """
        self.clear_partials()
        recipe = json.loads(json.dumps(recipe))  # as it is read again: lists for tuples
        if self.exists("recipe.json"):
            try:
                other = json.loads(self.read("recipe.json"))
            except ValueError as error:
                raise UserError(
                    f"{self.uri}/recipe.json is damaged; choose another folder, or delete this one"
                ) from error
            if other != recipe:
                names = {**other, **recipe} if isinstance(other, dict) else recipe
                differs = ", ".join(n for n in names if not isinstance(other, dict) or other.get(n) != recipe.get(n))
                raise UserError(f"{self.uri} was made with other options ({differs}); choose another folder")
            return
        self.write_json("recipe.json", recipe)

    @contextmanager
    def local(self, name: str, scratch: Path) -> Iterator[Path]:
        """A file as a local path: itself, or a copy in ``scratch`` that is deleted afterwards."""
        if self.is_local:
            yield Path(self.join(name))
            return
        copy = scratch / f"{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}{PurePosixPath(name).suffix}"
        try:
            with told(f"{self.uri}/{name}"):
                self.fs.get_file(self.join(name), str(copy))
            yield copy
        finally:
            copy.unlink(missing_ok=True)


def marks(facts: Mapping[str, Any]) -> dict[str, str]:
    """What a filesystem tells of a file's content: its tags and checksums or, where there are none, its times."""
    plain = {re.sub("[^a-z0-9]", "", key.lower()): str(value) for key, value in facts.items() if value}
    tags, times = ({key: plain[key] for key in sorted(plain) if key in kind} for kind in (TAGS, TIMES))
    return tags or times


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def unlisted(folder: Folder) -> list[tuple[str, str]]:
    """Folders in a folder of this machine whose files a listing leaves out, each with why; not hidden ones."""
    found: list[tuple[str, str]] = []

    def tell(path: str, reason: str) -> None:
        name = os.path.relpath(path, folder.path)
        if not any(part.startswith(".") for part in PurePosixPath(name).parts) or name == ".":
            found.append((name, reason))

    if folder.is_local:
        closed = lambda error: tell(error.filename, f"can't be looked into: {error.strerror}")  # noqa: E731
        for parent, names, _ in os.walk(folder.path, onerror=closed):
            for path in (os.path.join(parent, name) for name in sorted(names)):
                if os.path.islink(path):
                    tell(path, "is a link to a folder, and those are not followed; give that folder by itself")
    return found


def _true_place(folder: Folder) -> str:
    path = os.path.realpath(folder.path) if folder.is_local else folder.path
    return folder.fs.unstrip_protocol(path).rstrip("/")


def apart(source: str, target: str, inside: bool = False) -> None:
    """Refuse an output that is its own input, or lies in it, where the next run would read it.

    Args:
        inside: whether the output may lie in the input.

    Raises:
        UserError: it is, or does.
    """
    left, right = (_true_place(Folder(each)) for each in (source, target))
    if left == right:
        raise UserError(f"{target}: OUTPUT is the same place as INPUT; choose another folder")
    if right.startswith(f"{left}/") and not inside:
        raise UserError(f"{target}: OUTPUT lies inside INPUT, and would be read as a part of it; choose another folder")
