"""The store of latents and trajectories: LMDB with a header, a checksum per row, and a map that grows.

A store is a folder: one LMDB environment (``data.mdb``), or a folder of such ``shard-*``, read as one. Keys:

    header     JSON: format, version, fields (dtype and shape, None where it varies), codec, text encoder, provenance
    i:ROW      16 bytes of checksum, then JSON: where each array of the row lies, and the row's facts (its caption)
    x:ROW      the arrays, each at a multiple of 64 bytes

Index entries are small and apart from the data, so shapes and captions of all rows are read without touching it. Rows
are written in transactions: a reader sees a whole row or none. This file knows numpy and no torch.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import mmap
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lmdb
import numpy as np

from causvid.data.rows import Entry, Row, canonical, check_fields, checksum, pack_row, parse_entry
from causvid.errors import UserError

FORMAT, VERSION = "causvid-store", 1
FIRST_MAP = 1 << 20  # bytes; doubled whenever it is full
NEARLY_FULL = 64 << 20  # bytes
READERS = 1024
LOCK_BYTES = (READERS + 2) * 64  # what LMDB gives so many readers; a test compares
PAGE = mmap.PAGESIZE
MADV_WILLNEED = 3  # the same on Linux and macOS
_LIBC = ctypes.CDLL(None)


class _Shard:
    """One open environment. A process must not open an environment twice, so it is shared while it is in use."""

    opened: ClassVar[weakref.WeakValueDictionary[tuple[str, int], _Shard]] = weakref.WeakValueDictionary()

    def __init__(self, folder: Path, write: bool) -> None:
        self.folder, self.write = folder, write
        try:
            size = (folder / "data.mdb").stat().st_size if (folder / "data.mdb").exists() else 0
            if not write and size == 0:
                raise UserError(f"{folder} is no store: it has no data.mdb, or an empty one; make it with 'data pack'")
            lock = write or os.access(folder, os.W_OK)
            if lock:  # LMDB maps this file, and writing to a map kills the process where the disk is full: room first
                with (folder / "lock.mdb").open("ab") as stream:
                    stream.write(bytes(max(0, LOCK_BYTES - stream.tell())))
            self.environment = lmdb.open(
                str(folder), map_size=max(FIRST_MAP, size), readonly=not write, create=write, max_readers=READERS,
                lock=lock, readahead=True,
            )  # fmt: skip
        except (lmdb.Error, OSError) as error:
            if write and size == 0:  # half of an empty environment, which LMDB would not take again
                (folder / "data.mdb").unlink(missing_ok=True)
            raise storage_error(folder, error) from error
        if not write:
            check_size(self.environment, folder)

    @classmethod
    def open(cls, folder: Path, write: bool = False) -> _Shard:
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
        except lmdb.MapResizedError:
            try:
                self.environment.set_mapsize(0)
                return self.environment.begin(buffers=True)
            except lmdb.Error as error:
                raise UserError(f"{self.folder} has grown while its rows are in use; let go of them first") from error
        except lmdb.Error as error:
            raise storage_error(self.folder, error) from error


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


class Writer:
    """Adds rows to one environment; the map grows as it must. Close it before the store is read in this process.

    Args:
        folder: made if it isn't there.
        header: ``fields`` and whatever identifies the content; must equal the one that is there.

    Raises:
        UserError: the folder holds a store of another header, or can't be written.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder = folder
        self.header = {"format": FORMAT, "version": VERSION, **header}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error) from error
        self._shard = _Shard.open(folder, write=True)
        self._write(self._add_header)

    def close(self) -> None:
        """Let go of the environment; what was added stays."""
        self._shard.opened.pop((str(self.folder.resolve()), os.getpid()), None)
        self._shard.environment.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _add_header(self, transaction: lmdb.Transaction) -> None:
        there = transaction.get(b"header")
        if there is None and transaction.stat()["entries"]:
            raise OtherLayout(f"{self.folder} is an LMDB of another layout; choose another folder")
        if there is None:
            transaction.put(b"header", canonical(self.header))
        elif bytes(there) != canonical(self.header):
            other = json.loads(bytes(there))
            differs = [name for name in {**other, **self.header} if other.get(name) != self.header.get(name)]
            raise UserError(
                f"{self.folder} holds rows of another kind: its {', '.join(differs)} differ "
                f"({'; '.join(f'{n}: {other.get(n)} there, {self.header.get(n)} here' for n in differs)}); "
                "choose another folder"
            )

    def _write(self, work: Any) -> Any:
        """Run ``work`` in a transaction, again with a larger map for as long as the map is full."""
        environment = self._shard.environment
        while True:
            try:
                with environment.begin(write=True) as transaction:
                    return work(transaction)
            except lmdb.MapFullError:
                environment.set_mapsize(environment.info()["map_size"] * 2)
            except (lmdb.Error, OSError) as error:
                raise storage_error(self.folder, error) from error

    def keys(self) -> set[str]:
        """Keys of the rows that are there."""
        with self._shard.environment.begin() as transaction:
            return {key for key, _ in _index(transaction)}

    def add(self, rows: Sequence[Row]) -> list[str]:
        """Add rows in one transaction: all of them, or on any error none.

        Returns:
            Per row, ``added`` or ``duplicate`` (the same row is there already).

        Raises:
            ValueError: a row that does not fit the header, or whose key is there with other content.
        """
        packed = []
        for row in rows:
            check_fields(row, self.header["fields"])
            packed.append((row.key, *pack_row(row)))

        def work(transaction: lmdb.Transaction) -> list[str]:
            outcomes = []
            for key, index, data in packed:
                there = transaction.get(b"i:" + key.encode())
                if there is not None and bytes(there) != index:
                    raise ValueError(f"row '{key}' is in the store already, with other content")
                if there is None:
                    transaction.put(b"x:" + key.encode(), data)
                    transaction.put(b"i:" + key.encode(), index)
                outcomes.append("added" if there is None else "duplicate")
            return outcomes

        return self._write(work)


def _index(transaction: lmdb.Transaction) -> Iterator[tuple[str, bytes]]:
    cursor, last = transaction.cursor(), b""
    if cursor.set_range(b"i:"):
        for key, value in cursor.iternext():
            if bytes(key[:2]) != b"i:":
                return
            if bytes(key) <= last:  # pages that lead back to themselves would be read for ever
                raise UserError("its index is damaged: keys are out of order; fetch or make it again")
            last = bytes(key)
            yield last[2:].decode("utf-8", "replace"), bytes(value)


class _View:
    """Bytes of a snapshot, which they keep alive: numpy and torch hold on to this object."""

    def __init__(self, data: np.ndarray, owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = data.__array_interface__


class Reader:
    """A snapshot of a store, of one environment or of shards read as one; rows are views of the map, not copies.

    Rows can be read while another process writes; later rows are seen by a later reader. Each row's checksum is
    checked when the row is first read.

    Attributes:
        header: the store's header.
        entries: what the index says of each row, by key, in the order of keys.

    Raises:
        UserError: not a store, of a later version, damaged, or shards that don't belong together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._shards = [_Shard.open(each) for each in shard_folders(self.folder)]
        self._snapshots = [shard.begin() for shard in self._shards]
        headers = [_header(snapshot, self.folder) for snapshot in self._snapshots]
        if any(header != headers[0] for header in headers):
            raise UserError(f"{folder}: its shards have different headers and don't belong together")
        self.header = headers[0]
        found: dict[str, tuple[Entry, int]] = {}
        for number, snapshot in enumerate(self._snapshots):
            for key, value in _index(snapshot):
                if key in found:
                    raise UserError(f"{folder}: row '{key}' is in two shards; pack them again into one store")
                found[key] = (parse_entry(key, value), number)
        self.entries = {key: found[key][0] for key in sorted(found)}
        self._where = {key: number for key, (_, number) in found.items()}
        self._checked: set[str] = set()

    def __len__(self) -> int:
        return len(self.entries)

    def data(self, key: str) -> np.ndarray:
        """All bytes of a row's arrays, as a read-only view."""
        if key not in self.entries:
            raise UserError(f"{self.folder} has no row '{key}'")
        shard, snapshot = self._shards[self._where[key]], self._snapshots[self._where[key]]
        value = snapshot.get(b"x:" + key.encode())
        if value is None:
            raise UserError(f"{self.folder}: the data of row '{key}' is missing; make the row again")
        return np.asarray(_View(np.frombuffer(value, np.uint8), (shard, snapshot)))

    def prefetch(self, keys: Sequence[str]) -> None:
        """Have the system read rows ahead, all of a row at once, while the program does something else."""
        for key in keys:
            data = self.data(key)
            first = data.ctypes.data // PAGE * PAGE
            _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(data.ctypes.data + len(data) - first), MADV_WILLNEED)

    def row(self, key: str) -> Row:
        """A row; its arrays can't be written to.

        Raises:
            UserError: no such row, or its checksum is wrong.
        """
        data, entry = self.data(key), self.entries[key]
        if key not in self._checked:
            if checksum(entry.text, data) != entry.checksum:
                raise UserError(f"{self.folder}: row '{key}' is damaged: its checksum is wrong; make the row again")
            self._checked.add(key)
        arrays = {}
        for name, (dtype, shape, offset) in entry.fields.items():
            count = int(np.prod(shape)) * np.dtype(dtype).itemsize
            arrays[name] = data[offset : offset + count].view(dtype).reshape(shape)
        return Row(key, arrays, entry.facts)

    def damaged(self) -> dict[str, str]:
        """Keys of the rows that don't pass their checksum, each with what is wrong."""
        wrong = {}
        for key in self.entries:
            try:
                self._checked.discard(key)
                self.row(key)
            except (UserError, ValueError, TypeError) as error:
                wrong[key] = str(error)
        return wrong

    def digest(self) -> str:
        """SHA-256 over the header and all rows by key: the same however rows were ordered, sharded or interrupted."""
        digest = hashlib.sha256(canonical(self.header))
        for key, entry in self.entries.items():
            digest.update(canonical(key) + entry.checksum)
        return digest.hexdigest()


def _header(snapshot: lmdb.Transaction, folder: Path) -> dict[str, Any]:
    try:
        content = snapshot.get(b"header")
        header = json.loads(bytes(content)) if content is not None else {}
    except (lmdb.Error, ValueError) as error:
        raise UserError(f"{folder}: its header is damaged; fetch or make it again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise OtherLayout(
            f"{folder} is an LMDB, but no store of this project; 'causvid data pack' converts released ones"
        )
    if header.get("version") != VERSION:
        raise UserError(f"{folder} is a store of version {header.get('version')}; this program reads version {VERSION}")
    return header
