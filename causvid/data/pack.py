"""Latents into a store, and whether a store is sound.

``pack`` takes a folder of encoded latents, another store (shards are merged), or an LMDB of the released layout. At the
end it writes ``digest.json``: the digest over all rows, by which experiments know their data.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from causvid import progress
from causvid.data import digest
from causvid.data.copies import cached
from causvid.data.encode import DATA, TEXT, from_file
from causvid.data.folders import Folder, apart, told
from causvid.data.lmdb_store import Reader, Writer
from causvid.data.pool import Pool
from causvid.data.released_lmdb import Released
from causvid.data.rows import Row, check_header
from causvid.data.steps import alone
from causvid.data.survey import survey
from causvid.data.tally import Tally, write_lines
from causvid.errors import UserError

BATCH_ROWS, BATCH_BYTES = 64, 64 << 20  # of one transaction
TOLD_ALREADY = "--shape and --times are for the released layout alone; INPUT says its own: leave them out"
Rows = Iterator[tuple[str, Row | str]]


def pack(source: str, target: str, shards: int = 1, shape: Sequence[int] = (), times: Sequence[float] = ()) -> Tally:
    """Put rows into a store; rows that are there already are skipped.

    Args:
        source: encoded latents, a store, or an LMDB of the released layout.
        target: the store's folder.
        shards: environments of the store; a row's key decides in which it goes.
        shape, times: for the released layout: shape of a row, times of the states.

    Raises:
        UserError: what is given can't be read, or the target holds, or is, something else; a whole store stays whole.
    """
    apart(source, target)
    header, count, rows = _source(source, shape, times)
    if not count:
        raise UserError(f"nothing given: {source} holds no rows")
    output = Folder(target)
    if output.is_local:
        with alone(target):
            return _pack(header, count, rows, Path(output.path), shards)
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        with told(target):
            for name in output.sizes():
                (store / name).parent.mkdir(parents=True, exist_ok=True)
                output.fs.get_file(output.join(name), str(store / name))
        tally = _pack(header, count, rows, store, shards)
        # The digest goes last: a store is whole when it is there.
        files = sorted((p for p in store.rglob("*") if p.is_file()), key=lambda path: path.name == digest.NAME)
        with told(target):
            for path in (path for path in files if path.name != "lock.mdb"):
                name = output.join(str(path.relative_to(store)))
                output.fs.makedirs(name.rpartition("/")[0], exist_ok=True)
                output.fs.put_file(str(path), name)
    return tally


def _source(source: str, shape: Sequence[int], times: Sequence[float]) -> tuple[dict[str, Any], int, Rows]:
    """(header of the store, how many rows are given, the rows)."""
    folder = Folder(source)
    sizes = folder.sizes()
    if any(name.rpartition("/")[2] == "data.mdb" for name in sizes):
        path = cached(source)
        found = sound(path)
        if found["kind"] == "released":
            released = Released(path, shape, times)
            if len(released.numbers) < released.promised:
                progress.say(
                    f"{source}: latents_shape says {released.promised} rows, and {len(released.numbers)} are there; "
                    "its writer counted again what it met twice, so none need be missing: compare with where it is from"
                )
            return released.header(), len(released.numbers), released.rows()
        if shape or times:
            raise UserError(TOLD_ALREADY)
        if found["rows"]:
            _finished(source, path, found)
        reader = Reader(path, whole=False)
        header = {name: value for name, value in reader.header.items() if name not in ("format", "version")}
        return header, found["rows"], _stored(reader)
    names = [name for name in sizes if name.startswith("latents/") and name.endswith(".safetensors")]
    if names and (shape or times):
        raise UserError(TOLD_ALREADY)
    if "recipe.json" not in sizes or not names:
        raise UserError(f"nothing given: {source} holds no recipe.json and latents/, as 'causvid data encode' writes")
    try:
        recipe = json.loads(folder.read("recipe.json"))
        channels = None
        fields = {
            DATA: {"dtype": "float16", "shape": [None, channels, None, None]},
            TEXT: {"dtype": "float32", "shape": [None, int(recipe["text_dim"])]},
        }
        keep = ("codec", "text_encoder", "text_length", "text_dim", "unconditional")
        header = {"fields": fields, **{name: recipe[name] for name in keep}, "provenance": {"from": "data encode"}}
        check_header(header)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{source}/recipe.json is damaged ({error}); encode again into a new folder") from error
    first = next((row for _, row in _files(folder, names) if isinstance(row, Row)), None)
    if first is not None and set(first.arrays) == set(fields):
        fields[DATA]["shape"][1] = int(first.arrays[DATA].shape[1]) if first.arrays[DATA].ndim == 4 else None
        fields[TEXT]["dtype"] = first.arrays[TEXT].dtype.name
    return header, len(names), _files(folder, names)


def _files(folder: Folder, names: Sequence[str]) -> Rows:
    for name in names:
        try:
            row = from_file(folder.read(name))
            if f"latents/{row.key}.safetensors" != name:
                raise ValueError(f"says that it is row '{row.key}'")
            yield name, row
        except ValueError as error:
            yield name, str(error)


def _stored(reader: Reader) -> Rows:
    yield from reader.broken.items()
    for key in reader.entries:
        try:
            yield key, reader.row(key)
        except ValueError as error:
            yield key, str(error)


def _pack(header: dict[str, Any], count: int, rows: Rows, store: Path, shards: int) -> Tally:
    tally = Tally(count)
    names = _environments(store, shards)
    Folder(str(store)).clear_partials()
    waiting: list[list[Row]] = [[] for _ in names]
    with progress.bar("pack", count) as show, ExitStack() as stack:
        writers = [stack.enter_context(Writer(store / name, header)) for name in names]
        with told(str(store)):  # not before all is checked: a pack that is refused leaves a whole store whole
            (store / digest.NAME).unlink(missing_ok=True)
        for name, row in rows:
            if isinstance(row, str):
                tally.put_aside(name, row)
                continue
            number = int.from_bytes(hashlib.blake2b(row.key.encode(), digest_size=4).digest(), "big") % shards
            waiting[number].append(row)
            heavy = sum(array.nbytes for each in waiting[number] for array in each.arrays.values()) > BATCH_BYTES
            if heavy or len(waiting[number]) >= BATCH_ROWS:
                _add(writers[number], waiting[number], tally)
                waiting[number] = []
                show(tally.done + tally.skipped + len(tally.quarantine))
        for writer, batch in zip(writers, waiting, strict=True):
            _add(writer, batch, tally)
    digest.finish(store)
    tally.write(Folder(str(store)))
    return tally


def _environments(store: Path, shards: int) -> list[str]:
    """Folders of the environments; those that are not there yet, as after a full disk, are empty.

    Raises:
        UserError: the store is of another number of shards.
    """
    names = [f"shard-{n:05d}-of-{shards:05d}" for n in range(shards)] if shards > 1 else ["."]
    there = {path.name for path in store.glob("shard-*")} | ({"."} if (store / "data.mdb").exists() else set())
    if there - set(names):
        counts = {"1" if name == "." else name.rpartition("-of-")[2].lstrip("0") for name in there}
        say = f"say --shards {min(counts)}, or " if len(counts) == 1 and min(counts).isdigit() else ""
        told_by = " and of ".join(sorted(counts))
        raise UserError(f"{store} is a store of {told_by} shards, not {shards}; {say}choose another folder")
    return names


def _add(writer: Writer, rows: list[Row], tally: Tally) -> None:
    """Add rows in one transaction; where one does not fit, each in its own, so that the others go in."""
    if not rows:
        return
    try:
        outcomes = writer.add(rows)
        tally.done += outcomes.count("added")
        tally.skipped += outcomes.count("duplicate")
    except UserError:
        raise
    except ValueError as error:
        if len(rows) == 1:
            tally.put_aside(rows[0].key, str(error))
            return
        for row in rows:
            _add(writer, [row], tally)


def sound(path: Path) -> dict[str, Any]:
    """The survey of a store, made in another process.

    Raises:
        UserError: it can't be read, or reading it crashes.
    """
    with Pool(1, 24 * 3600.0) as pool:
        _, ok, found = next(iter(pool.map(survey, [path], lambda each: (str(each),))))
    if not ok:
        raise UserError(found if str(path) in str(found) else f"{path} can't be read: {found}; fetch or make it again")
    return found


def _finished(source: str, path: Path, found: dict[str, Any]) -> digest.Finished:
    """What a store was finished with; it holds these rows, though some of them may be damaged.

    Raises:
        UserError: it is not finished, or holds other rows.
    """
    wanted = digest.read(path, source)
    whole = found["digest"] == wanted.digest or found["damaged"]  # a row's own damage is that of one row
    if not whole or found["rows"] != wanted.rows:
        raise UserError(f"{source} holds {found['rows']} rows that are not the {wanted.rows} it was finished with")
    return wanted


def verify(source: str, target: str | None = None) -> tuple[Tally, dict[str, Any]]:
    """Check every row of a store against its checksum, and the whole against its digest.

    A store that lies elsewhere is fetched anew, whatever copy there is: what is there is checked.

    Args:
        source: the store.
        target: folder for the list of damaged rows; none is written by default.

    Returns:
        Counts, and the survey.

    Raises:
        UserError: no store, one whose damage is not that of single rows, or the target is, or lies in, the store.
    """
    if target is not None:
        apart(source, target)
    output = Folder(target) if target is not None else None
    path = cached(source, anew=True)
    found = sound(path)
    if found["kind"] != "store":
        raise UserError(
            f"{source} is an LMDB, but no store of this project; 'causvid data pack' converts released ones"
        )
    if not found["rows"]:
        raise UserError(f"nothing given: {source} holds no rows")
    tally = Tally(found["rows"], done=found["rows"] - len(found["damaged"]))
    for key, reason in found["damaged"].items():
        tally.put_aside(key, reason)
    wanted = _finished(source, path, found)
    changed = [name for name, value in wanted.files.items() if digest.file_sum(path / name) != value]
    if changed and not tally.quarantine:
        raise UserError(f"{source}: {', '.join(changed)} changed since it was finished, outside of any row; pack again")
    if output is not None:
        output.clear_partials()
        write_lines(output, "quarantine.jsonl", tally.quarantine)
    return tally, found
