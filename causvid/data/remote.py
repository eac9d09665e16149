"""Files that lie elsewhere: asked for and fetched within a time limit, and whose fault it is when that fails.

An input that can't be read now costs itself (:class:`Unread`). A disk of this machine that is full, or can't be
written, costs no input: it stops the command (:class:`Halt`).
"""

from __future__ import annotations

import asyncio
import errno
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.memory import MemoryFileSystem

from causvid.data.folders import Folder, told
from causvid.data.pool import Halt, Unread
from causvid.errors import UserError

IN_TURN = threading.Lock()  # all who open one file of ``memory://`` share the place that they read at
ASK_SECONDS = 60.0  # at most, for what is no transfer
FULL = (errno.ENOSPC, errno.EDQUOT)
# What writing a copy here raises, and reading elsewhere doesn't.
OURS = (*FULL, errno.EROFS, errno.EMFILE, errno.ENFILE)


def ask(folder: Folder, method: str, *arguments: Any, seconds: float) -> Any:
    """What a filesystem's method returns; one that waits for a server is given up after ``seconds``.

    Raises:
        UserError: it took longer.
    """
    work = getattr(folder.fs, f"_{method}", None)
    if not (folder.fs.async_impl and asyncio.iscoroutinefunction(work)):
        return getattr(folder.fs, method)(*arguments)
    try:
        return sync(folder.fs.loop, work, *arguments, timeout=seconds)
    except FSTimeoutError as error:
        raise UserError(f"{folder} gave no answer, or not all of it, within {seconds:g} s") from error


def exists(folder: Folder, name: str, seconds: float = ASK_SECONDS) -> bool:
    """Whether there is something of that name.

    Raises:
        UserError: that can't be told, or not in so many seconds.
    """
    with told(f"{folder}/{name}"):
        return ask(folder, "exists", folder.join(name), seconds=seconds)


@contextmanager
def unread(name: str) -> Iterator[None]:
    """Whatever reading an input raises, as :class:`Unread`."""
    try:
        with told(name):
            yield
    except (Halt, Unread):
        raise
    except UserError as error:
        raise Unread(str(error)) from error.__cause__


@contextmanager
def ours(name: str) -> Iterator[None]:
    """Whatever a place of this command's own raises, as :class:`Halt`."""
    try:
        with told(name):
            yield
    except UserError as error:
        raise error if isinstance(error, Halt) else Halt(str(error)) from error.__cause__


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files, gone at the end of the block.

    Raises:
        Halt: none can be made.
    """
    with ours("a folder for temporary files (TMPDIR names another place)"):
        made = tempfile.TemporaryDirectory()
    with made as name:
        yield Path(name)


def fetch(folder: Folder, name: str, copy: Path, seconds: float) -> None:
    """Copy a file to this machine.

    Raises:
        Halt: the copy can't be written.
        Unread: the file can't be read, or not within ``seconds``.
    """
    with unread(f"{folder}/{name}"):
        try:
            with IN_TURN if isinstance(folder.fs, MemoryFileSystem) else nullcontext():
                ask(folder, "get_file", folder.join(name), str(copy), seconds=seconds)
        except OSError as error:
            if error.errno not in OURS and error.filename != str(copy):
                raise
            reason = "the disk is full; make room" if error.errno in FULL else f"{error.strerror}; mend that"
            raise Halt(
                f"{copy.parent} can't be written: {reason}, or for temporary files name another place in TMPDIR, and "
                "run the same command again"
            ) from error
