"""One LMDB environment: opened once in a process, with a map that has room, and errors that a person can act on."""

from __future__ import annotations

import errno
import os
import shutil
import weakref
from pathlib import Path
from typing import ClassVar

import lmdb

from causvid.errors import UserError

FIRST_MAP = 1 << 20  # bytes; doubled whenever it is full
SPARE_MAP = 1 << 34  # bytes of address space that a reader keeps free, for what others add meanwhile
NEARLY_FULL = 64 << 20  # bytes
READERS = 1024
LOCK_BYTES = (READERS + 2) * 64  # what LMDB gives so many readers; a test compares


class Shard:
    """One open environment. A process must not open an environment twice, so it is shared while it is in use.

    Attributes:
        locked: whether writers know of its snapshots; not so in a folder that can't be written to from here.
    """

    opened: ClassVar[weakref.WeakValueDictionary[tuple[str, int], Shard]] = weakref.WeakValueDictionary()

    def __init__(self, folder: Path, write: bool) -> None:
        self.folder, self.write = folder, write
        try:
            size = (folder / "data.mdb").stat().st_size if (folder / "data.mdb").exists() else 0
            if not write and size == 0:
                raise UserError(f"{folder} is no store: it has no data.mdb, or an empty one; make it with 'data pack'")
            self.locked = write or os.access(folder, os.W_OK)
            if (
                self.locked
            ):  # LMDB maps this file, and writing to a map kills the process where the disk is full: room first
                with (folder / "lock.mdb").open("ab") as stream:
                    stream.write(bytes(max(0, LOCK_BYTES - stream.tell())))
            self.environment = lmdb.open(
                str(folder), map_size=max(FIRST_MAP, size if write else 2 * size + SPARE_MAP), readonly=not write,
                create=write, max_readers=READERS, lock=self.locked, readahead=True,
            )  # fmt: skip
        except (lmdb.Error, OSError) as error:
            if write and size == 0:  # half of an empty environment, which LMDB would not take again
                (folder / "data.mdb").unlink(missing_ok=True)
            raise storage_error(folder, error) from error
        if not write:
            check_size(self.environment, folder)

    @classmethod
    def open(cls, folder: Path, write: bool = False) -> Shard:
        name = (str(folder.resolve()), os.getpid())
        shard = cls.opened.get(name)
        if shard is not None and (write or shard.write):
            raise UserError(f"{folder} is in use in this process; let go of it before it is opened to write")
        if shard is None:
            shard = cls.opened[name] = cls(folder, write)
        return shard

    def begin(self) -> lmdb.Transaction:
        """A snapshot to read from; views of its rows hold on to it."""
        try:
            return self.environment.begin(buffers=True)
        except lmdb.MapResizedError as error:  # another map would take the place of this one, and views with it
            raise UserError(f"{self.folder} has grown while its rows are in use; let go of them first") from error
        except lmdb.Error as error:
            raise storage_error(self.folder, error) from error

    def unchanged(self, snapshot: lmdb.Transaction) -> bool:
        """Whether nothing was committed since; pages of an older state may be written anew where none can lock them."""
        return self.locked or self.environment.info()["last_txnid"] == snapshot.id()


class OtherLayout(UserError):
    """An LMDB that is no store of this project."""


def check_size(environment: lmdb.Environment, folder: Path) -> None:
    """Refuse a file that is cut short: reading behind its end would kill the process.

    Raises:
        UserError: it ends before its last page.
    """
    size = (folder / "data.mdb").stat().st_size
    if size < (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]:
        raise UserError(f"{folder}/data.mdb is cut short ({size} bytes); fetch or make it again")


def storage_error(folder: Path, error: Exception) -> UserError:
    """What went wrong below a store, said once: a full disk, no permission, damage."""
    full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
    # LMDB calls a write that went in only in part an input/output error.
    short = os.strerror(errno.EIO) in str(error) and shutil.disk_usage(folder).free < NEARLY_FULL
    if full or short:
        return UserError(f"{folder}: the disk is full; nothing was lost: make room and run the same command again")
    return UserError(f"{folder} can't be used as a store: {error}; is it a store, whole and readable?")


def shard_folders(folder: Path) -> list[Path]:
    """The environments of a store, in order.

    Raises:
        UserError: there is no store, or a shard of it is missing.
    """
    shards = sorted(path for path in folder.glob("shard-*") if path.is_dir())
    if (folder / "data.mdb").is_file():
        return [folder]
    if not shards:
        raise UserError(f"{folder} is no store: it has neither data.mdb nor shards; make it with 'causvid data pack'")
    count = shards[0].name.rpartition("-of-")[2]
    if count.isdigit() and len(shards) != int(count):
        raise UserError(f"{folder} has {len(shards)} of {int(count)} shards; fetch or make the others")
    return shards
