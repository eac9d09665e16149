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
import hashlib
import json
import mmap
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from causvid.data.lmdb_shard import OtherLayout, Shard, shard_folders, storage_error
from causvid.data.rows import Entry, Row, canonical, check_fields, check_header, checksum, pack_row, parse_entry
from causvid.errors import UserError

FORMAT, VERSION = "causvid-store", 1
PAGE = mmap.PAGESIZE
INLINE = 1 << 16  # bytes; smaller values may lie in pages of the index (of 64 KiB at most), which others write anew
SCANS = 20
MADV_WILLNEED = 3  # the same on Linux and macOS
_LIBC = ctypes.CDLL(None)


class Writer:
    """Adds rows to one environment; the map grows as it must. Close it before the store is read in this process.

    Args:
        folder: made if it isn't there.
        header: ``fields`` and whatever identifies the content; must equal the one that is there.

    Raises:
        ValueError: the header is none.
        UserError: the folder holds a store of another header, or can't be written.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder = folder
        self.header = {"format": FORMAT, "version": VERSION, **header}
        check_header(self.header)  # before anything is written
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error) from error
        self._shard = Shard.open(folder, write=True)
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

    Args:
        folder: the store.
        whole: whether to refuse a store of which an index entry is damaged; else such rows are in ``broken`` alone.

    Attributes:
        header: the store's header.
        entries: what the index says of each row, by key, in the order of keys.
        broken: keys of rows whose index entry is damaged, each with what is wrong.

    Raises:
        UserError: not a store, of a later version, damaged, or shards that don't belong together.
    """

    def __init__(self, folder: Path, whole: bool = True) -> None:
        self.folder = Path(folder)
        self.broken: dict[str, str] = {}
        self._shards = [Shard.open(each) for each in shard_folders(self.folder)]
        self._snapshots, headers = [], []
        self._apart: dict[str, Any] = {}  # data of shards without a lock, found once: see _scan
        found: dict[str, tuple[Entry, int]] = {}
        for number, shard in enumerate(self._shards):
            snapshot, header, index = self._scan(shard)
            self._snapshots.append(snapshot)
            headers.append(header)
            for key, value in index:
                if key in found or key in self.broken:
                    raise UserError(f"{folder}: row '{key}' is in two shards; pack them again into one store")
                try:
                    found[key] = (parse_entry(key, value), number)
                except UserError as error:
                    if whole:
                        raise UserError(f"{folder}: {error}") from error
                    self.broken[key] = str(error)
        if any(header != headers[0] for header in headers):
            raise UserError(f"{folder}: its shards have different headers and don't belong together")
        self.header = headers[0]
        self.entries = {key: found[key][0] for key in sorted(found)}
        self._where = {key: number for key, (_, number) in found.items()}
        self._checked: set[str] = set()

    def _scan(self, shard: Shard) -> tuple[lmdb.Transaction, dict[str, Any], list[tuple[str, bytes]]]:
        """(snapshot, header, index) of a shard.

        Where it can't be locked, a writer does not know of the snapshot, and after a commit may overwrite its index.
        Data of rows stay where they are, as rows are never changed. So all are found here, while nothing is committed.
        """
        for attempt in range(SCANS):
            snapshot = shard.begin()
            try:
                header, index = _header(snapshot, self.folder), list(_index(snapshot))
                data = {} if shard.locked else {key: snapshot.get(b"x:" + key.encode()) for key, _ in index}
                kept = {key: bytes(v) if v is not None and len(v) < INLINE else v for key, v in data.items()}
            except (lmdb.Error, UserError) as error:
                if shard.unchanged(snapshot):
                    raise error if isinstance(error, UserError) else storage_error(self.folder, error) from error
            else:
                if shard.unchanged(snapshot):
                    self._apart |= kept
                    return snapshot, header, index
            time.sleep(0.01 * attempt)
        raise UserError(
            f"{self.folder} is being written, and can't be locked from here, as its folder is read-only: wait for the "
            "writer's end, or copy the store"
        )

    def __len__(self) -> int:
        return len(self.entries)

    def data(self, key: str) -> np.ndarray:
        """All bytes of a row's arrays, as a read-only view."""
        if key not in self.entries:
            raise UserError(f"{self.folder} has no row '{key}'")
        shard, snapshot = self._shards[self._where[key]], self._snapshots[self._where[key]]
        try:
            value = snapshot.get(b"x:" + key.encode()) if shard.locked else self._apart[key]
        except lmdb.Error as error:
            raise storage_error(self.folder, error) from error
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
    try:
        check_header(header)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: its header is damaged ({error}); fetch or make it again") from error
    return header
