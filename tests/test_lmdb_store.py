"""The store: what was written is what is read, damage is told, shards are one, and a reader never sees half a row."""

from __future__ import annotations

import gc
import json
import mmap
import multiprocessing
import os
import shutil

import lmdb
import numpy as np
import pytest
import torch

from causvid.data import lmdb_shard, lmdb_store
from causvid.data.lmdb_store import Reader, Writer
from causvid.data.rows import Row
from causvid.errors import UserError

FIELDS = {"latents": {"dtype": "float16", "shape": [None, 4, 3, 3]}, "text": {"dtype": "float32", "shape": [None, 2]}}
HEADER = {"fields": FIELDS, "codec": {"name": "identity"}}


def row(number, frames=2, **facts):
    generator = np.random.default_rng(number)
    latents = generator.standard_normal((frames, 4, 3, 3)).astype(np.float16)
    text = generator.standard_normal((3, 2)).astype(np.float32)
    return Row(f"clip-{number:03d}", {"latents": latents, "text": text}, {"caption": f"číslo {number}", **facts})


def write(folder, rows, header=HEADER):
    writer = Writer(folder, header)
    try:
        return writer.add(rows)
    finally:
        del writer
        gc.collect()


def same(left, right):
    return (
        left.key == right.key
        and left.facts == right.facts
        and all(np.array_equal(left.arrays[name], right.arrays[name]) for name in right.arrays)
    )


def test_rows_come_back_with_their_shapes_and_facts(tmp_path):
    rows = [row(number, frames=1 + number % 3) for number in range(7)]
    assert write(tmp_path / "s", rows) == ["added"] * 7
    reader = Reader(tmp_path / "s")
    assert list(reader.entries) == [each.key for each in rows]
    assert all(same(reader.row(each.key), each) for each in rows)
    assert [reader.entries[each.key].shape("latents") for each in rows] == [
        each.arrays["latents"].shape for each in rows
    ]
    assert reader.header["codec"] == {"name": "identity"} and reader.header["version"] == 1
    assert reader.damaged() == {}


def test_views_are_read_only_not_copied_and_outlive_their_reader(tmp_path):
    write(tmp_path / "s", [row(1)])
    reader = Reader(tmp_path / "s")
    first, second = (reader.row("clip-001").arrays["latents"] for _ in range(2))
    assert first.ctypes.data == second.ctypes.data and not first.flags.writeable
    tensor = torch.from_numpy(first)
    assert tensor.data_ptr() == first.ctypes.data
    del reader, first, second
    gc.collect()
    assert np.array_equal(tensor.numpy(), row(1).arrays["latents"])


def test_the_same_row_twice_is_a_duplicate_and_another_of_its_key_is_refused(tmp_path):
    write(tmp_path / "s", [row(1)])
    assert write(tmp_path / "s", [row(1), row(2)]) == ["duplicate", "added"]
    with pytest.raises(ValueError, match="other content"):
        write(tmp_path / "s", [row(3), row(1, note="changed")])
    assert list(Reader(tmp_path / "s").entries) == ["clip-001", "clip-002"]  # the transaction was dropped whole


def test_rows_that_are_added_together_are_one_transaction(tmp_path):
    """So no reader can see some of them: LMDB shows what is committed, and numbers its transactions."""
    with Writer(tmp_path / "s", HEADER) as writer:
        number = lambda: writer._shard.environment.info()["last_txnid"]  # noqa: E731
        before = number()
        for first in range(0, 6, 2):
            writer.add([row(first), row(first + 1)])
        assert number() == before + 3


def test_the_map_grows_by_itself(tmp_path):
    big = {"fields": {"latents": {"dtype": "float16", "shape": [None, None]}}}
    rows = [Row(f"r{n}", {"latents": np.full((1024, 1024), n, np.float16)}) for n in range(6)]
    assert write(tmp_path / "s", rows, big) == ["added"] * 6
    size = (tmp_path / "s" / "data.mdb").stat().st_size
    assert 12 << 20 < size < 14 << 20
    assert float(Reader(tmp_path / "s").row("r5").arrays["latents"][7, 7]) == 5.0


def test_the_digest_knows_neither_order_nor_shards(tmp_path):
    rows = [row(number) for number in range(6)]
    write(tmp_path / "a", rows)
    write(tmp_path / "b", rows[3:])
    write(tmp_path / "b", rows[2::-1])
    write(tmp_path / "c" / "shard-00000-of-00002", rows[::2])
    write(tmp_path / "c" / "shard-00001-of-00002", rows[1::2])
    digests = {Reader(tmp_path / name).digest() for name in "abc"}
    assert len(digests) == 1
    sharded = Reader(tmp_path / "c")
    assert list(sharded.entries) == [each.key for each in rows] and same(sharded.row("clip-003"), rows[3])
    write(tmp_path / "d", [*rows[:-1], row(5, note="another")])
    assert Reader(tmp_path / "d").digest() not in digests


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    write(tmp_path / "s" / "shard-00000-of-00002", [row(0)])
    with pytest.raises(UserError, match="1 of 2 shards"):
        Reader(tmp_path / "s")
    write(tmp_path / "s" / "shard-00001-of-00002", [row(1)], {**HEADER, "codec": {"name": "other"}})
    with pytest.raises(UserError, match="different headers"):
        Reader(tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "shard-00001-of-00002")
    write(tmp_path / "s" / "shard-00001-of-00002", [row(0)])
    with pytest.raises(UserError, match="two shards"):
        Reader(tmp_path / "s")


def test_another_codec_never_mixes_in(tmp_path):
    write(tmp_path / "s", [row(1)])
    with pytest.raises(UserError, match="its codec differ.*choose another folder"):
        Writer(tmp_path / "s", {**HEADER, "codec": {"name": "other"}})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Row("a", {"latents": row(1).arrays["latents"]}), "has fields latents"),
        (Row("a", {**row(1).arrays, "latents": np.zeros((2, 5, 3, 3), np.float16)}), "any x 4 x 3 x 3"),
        (Row("a", {**row(1).arrays, "latents": np.zeros((2, 4, 3, 3), np.float32)}), "latents is float32"),
        (Row("", row(1).arrays), "1 to 400 bytes"),
        (Row("x" * 401, row(1).arrays), "1 to 400 bytes"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "s", [row(0), wrong])
    assert len(Reader(tmp_path / "s")) == 0


def test_damage_is_told_by_row(tmp_path):
    write(tmp_path / "s", [row(number) for number in range(4)])
    path = tmp_path / "s" / "data.mdb"
    content = bytearray(path.read_bytes())
    at = content.find(row(2).arrays["latents"].tobytes())
    content[at + 5] ^= 1
    path.write_bytes(content)
    reader = Reader(tmp_path / "s")
    assert list(reader.damaged()) == ["clip-002"]
    with pytest.raises(UserError, match="'clip-002' is damaged"):
        reader.row("clip-002")
    assert same(reader.row("clip-001"), row(1))


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither data.mdb nor shards"):
        Reader(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "data.mdb").write_bytes(b"")
    with pytest.raises(UserError, match="empty one"):
        Reader(tmp_path / "empty")
    (tmp_path / "empty" / "data.mdb").write_bytes(b"not a map" * 1000)
    with pytest.raises(UserError, match="can't be used as a store"):
        Reader(tmp_path / "empty")
    with lmdb.open(str(tmp_path / "foreign")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"latents_shape", b"1 2 3")
    with pytest.raises(UserError, match="no store of this project"):
        Reader(tmp_path / "foreign")
    with lmdb.open(str(tmp_path / "later")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"header", json.dumps({"format": "causvid-store", "version": 2}).encode())
    with pytest.raises(UserError, match="version 2; this program reads version 1"):
        Reader(tmp_path / "later")


def test_a_store_cut_short_is_refused_before_it_is_read(tmp_path):
    write(tmp_path / "s", [row(number, frames=500) for number in range(4)])
    path = tmp_path / "s" / "data.mdb"
    path.write_bytes(path.read_bytes()[:-8192])
    with pytest.raises(UserError, match="cut short"):
        Reader(tmp_path / "s")


def test_rows_that_are_read_ahead_are_asked_for_whole(tmp_path, monkeypatch):
    """The system is told all pages of every row, and takes it."""
    write(tmp_path / "s", [row(number, frames=500) for number in range(3)])
    reader, told, libc = Reader(tmp_path / "s"), [], lmdb_store._LIBC

    class Recording:
        @staticmethod
        def madvise(first, length, advice):
            told.append((first.value, first.value + length.value, advice))
            assert libc.madvise(first, length, advice) == 0

    monkeypatch.setattr(lmdb_store, "_LIBC", Recording)
    keys = ["clip-002", "clip-000"]
    reader.prefetch(keys)
    for key, (first, end, advice) in zip(keys, told, strict=True):
        data = reader.data(key)
        assert first % mmap.PAGESIZE == 0 and first <= data.ctypes.data < first + mmap.PAGESIZE
        assert end == data.ctypes.data + len(data) and advice == mmap.MADV_WILLNEED


def test_a_row_without_its_data_is_told(tmp_path):
    write(tmp_path / "s", [row(1), row(2)])
    with lmdb.open(str(tmp_path / "s")) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"x:clip-001")
    assert list(Reader(tmp_path / "s").damaged()) == ["clip-001"]


def test_one_process_can_not_write_what_it_reads(tmp_path):
    write(tmp_path / "s", [row(1)])
    view = Reader(tmp_path / "s").row("clip-001").arrays["latents"]
    with pytest.raises(UserError, match="in use in this process"):
        Writer(tmp_path / "s", HEADER)
    del view
    gc.collect()
    assert write(tmp_path / "s", [row(2)]) == ["added"]


SHARDED = {"fields": {"latents": {"dtype": "float16", "shape": [None, None]}}}


def square(number):
    size = 256 if number % 2 else 4  # of pages of its own, or within a page of the index
    return Row(f"r{number:03d}", {"latents": np.full((size, size), number, np.float16)})


def _add_singly(folder, numbers):
    with Writer(folder, SHARDED) as writer:
        for number in numbers:
            writer.add([square(number)])


def unlockable(monkeypatch, folder):
    """As on a read-only mount: no lock file can be made there."""
    access = os.access
    monkeypatch.setattr(lmdb_shard.os, "access", lambda path, mode: access(path, mode) and str(path) != str(folder))


@pytest.mark.parametrize("locked", [True, False])
def test_a_store_that_grows_elsewhere_leaves_readers_and_views_whole(locked, tmp_path, monkeypatch):
    """Many commits write index pages anew; a larger map in the place of that of a view would kill the process."""
    _add_singly(tmp_path / "s", range(20))
    if not locked:
        unlockable(monkeypatch, tmp_path / "s")
    reader = Reader(tmp_path / "s")
    view, shard = reader.row("r003").arrays["latents"], lmdb_shard.Shard.open(tmp_path / "s")
    snapshot = shard.begin()
    assert shard.locked is locked and shard.unchanged(snapshot)
    arguments = (tmp_path / "s", range(20, 50))
    writer = multiprocessing.get_context("spawn").Process(target=_add_singly, args=arguments)
    writer.start()
    writer.join(300)
    assert writer.exitcode == 0 and shard.unchanged(snapshot) is locked
    later = Reader(tmp_path / "s")
    for each, count in ((reader, 20), (later, 50)):
        assert len(each) == count and each.damaged() == {}
        assert all(same(each.row(f"r{number:03d}"), square(number)) for number in range(count))
    assert (view == 3).all()


def test_an_index_that_changes_while_it_is_read_is_read_again_where_nothing_can_be_locked(tmp_path, monkeypatch):
    write(tmp_path / "s", [row(1)])
    unlockable(monkeypatch, tmp_path / "s")
    monkeypatch.setattr(lmdb_store.time, "sleep", lambda seconds: None)
    answers = [False, False, True]
    monkeypatch.setattr(lmdb_shard.Shard, "unchanged", lambda *given: answers.pop(0))
    assert same(Reader(tmp_path / "s").row("clip-001"), row(1)) and answers == []
    gc.collect()
    monkeypatch.setattr(lmdb_shard.Shard, "unchanged", lambda *given: False)
    with pytest.raises(UserError, match="is being written, and can't be locked.*wait for the writer's end, or copy"):
        Reader(tmp_path / "s")


def _read_until(folder, total, began, between, out):
    """Read the whole store again and again; say when a first count is known, and when one between first and last is."""
    seen, problems = [], []
    while not seen or seen[-1] < total:
        reader = Reader(folder)
        problems += reader.damaged().values()
        seen.append(len(reader))
        del reader
        gc.collect()
        began.set()
        if seen[0] < seen[-1] < total:
            between.set()
    out.put((seen, problems))


def test_two_processes_read_while_one_writes(tmp_path):
    """Rows of a quarter MiB in pairs per transaction: every snapshot holds whole pairs, and ever more of them.

    The first pair is written when both readers read, and the last when both have seen some of those between.
    """
    header = {"fields": {"latents": {"dtype": "float16", "shape": [None, None]}}}
    rows = [Row(f"r{n:03d}", {"latents": np.full((256, 512), n, np.float16)}) for n in range(20)]
    write(tmp_path / "s", rows[:2], header)
    context = multiprocessing.get_context("spawn")
    out, began, between = context.Queue(), [context.Event(), context.Event()], [context.Event(), context.Event()]
    readers = [
        context.Process(target=_read_until, args=(tmp_path / "s", 20, *events, out), daemon=True)
        for events in zip(began, between, strict=True)
    ]
    for reader in readers:
        reader.start()
    assert all(event.wait(300) for event in began)
    writer = Writer(tmp_path / "s", header)
    for first in range(2, 18, 2):
        writer.add(rows[first : first + 2])
    assert all(event.wait(300) for event in between)
    writer.add(rows[18:])
    for seen, problems in (out.get(timeout=300) for _ in readers):
        assert problems == [] and seen == sorted(seen) and all(count % 2 == 0 for count in seen)
        assert seen[0] == 2 and seen[-1] == 20 and any(2 < count < 20 for count in seen)
    for reader in readers:
        reader.join(300)
