"""The steps that move clips: ``download`` fetches what a manifest names, ``process`` makes clips of one form from it.

Both leave a folder with ``clips/``, ``manifest.jsonl`` (which the next step reads) and ``quarantine.jsonl``. A clip is
done when its record is written, after its file: whatever stops the command, the same command goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from causvid import progress
from causvid.data import manifest
from causvid.data.clips import Wanted, make_clip
from causvid.data.folders import Folder, apart, told
from causvid.data.manifest import Clip, Given
from causvid.data.pool import Halt, Pool, Refused, Unread
from causvid.data.remote import scratch_folder
from causvid.data.sources import checked, copied, local_copy, origin, settle, sha256
from causvid.data.tally import Tally, write_lines
from causvid.errors import UserError

TRIES = 3


class Output:
    """A folder that a step fills clip by clip, and what is in it from before."""

    def __init__(self, target: str, recipe: dict[str, Any], given: Given) -> None:
        self.folder = Folder(target)
        self.folder.claim(recipe)
        given.tell()
        self._given, self._there = given, self.folder.sizes()
        self.records: dict[str, dict[str, Any]] = {}
        self.tally = Tally(given.count, skipped=given.duplicates)
        for name, reason in given.refused:
            self.tally.put_aside(name, reason)

    def record_of(self, clip: Clip) -> dict[str, Any] | None:
        """The record of a clip that is done already, from the same row and the same file, and whose result is whole.

        A result on this machine is compared with its recorded SHA-256, one elsewhere with its size. A source that is
        gone, or can't be asked, makes no difference.
        """
        name = f"records/{clip.id}.json"
        if name not in self._there:
            return None
        try:
            record = json.loads(self.folder.read(name))
            same = record["source"] == clip.as_json() and self._there.get(record["path"]) == record["bytes"]
            if not same or not isinstance(record["sha256"], str):
                return None
            if origin(self._given, clip) not in (None, record["origin"]):
                return None
            if self.folder.is_local and sha256((self.folder, record["path"])) != record["sha256"]:
                return None
            return record
        except (UserError, OSError, ValueError, KeyError, TypeError):
            return None

    def skip(self, clip: Clip, record: dict[str, Any]) -> None:
        """Count a clip as done already."""
        self.records[clip.id] = record
        self.tally.skipped += 1

    def finished(self, clip: Clip) -> bool:
        """Whether the clip is done already, from the same row; then it is counted as skipped."""
        record = self.record_of(clip)
        if record is not None:
            self.skip(clip, record)
        return record is not None

    def put(self, clip: Clip, name: str, sha256: str, size: int, origin: dict[str, str] | None) -> None:
        """Record a clip whose file is written, and what its source was before it was read."""
        record = {"source": clip.as_json(), "path": name, "sha256": sha256, "bytes": size, "origin": origin}
        self.folder.write_json(f"records/{clip.id}.json", record)
        self.records[clip.id] = record
        self.tally.done += 1

    def finish(self, given: Given, keep_part: bool) -> Tally:
        """Write the manifest of what is there, in the order it was given, and the quarantine list."""
        rows = []
        for clip in given.clips:
            if clip.id in self.records:
                record = self.records[clip.id]
                part = {"start": clip.start, "end": clip.end} if keep_part else {}
                rows.append(Clip(clip.id, record["path"], clip.caption, sha256=record["sha256"], **part).as_json())
        others = {f"records/{clip.id}.json" for clip in given.clips}
        left = [name for name in self._there if name.startswith("records/") and name not in others]
        if left:
            progress.say(
                f"{self.folder}: {len(left)} clips of another INPUT are there; manifest.jsonl lists this INPUT's alone"
            )
        write_lines(self.folder, "manifest.jsonl", rows)
        self.tally.write(self.folder)
        return self.tally


@contextmanager
def alone(target: str) -> Iterator[None]:
    """One command at a time fills a folder of this machine; a lock ends with its process.

    Raises:
        UserError: another one is at work there.
    """
    folder = Folder(target)
    if not folder.is_local:
        yield
        return
    with told(target):
        Path(folder.path).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder.path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(
            f"{target}: another command is at work there; wait for its end, or choose another folder"
        ) from error
    except OSError:  # some network drives know no locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def download(source: str, target: str, workers: int = 8, root: str | None = None, seconds: float = 3600.0) -> Tally:
    """Copy every clip of a manifest into a folder.

    A copy that is there already is not fetched again while its source is the same, and its SHA-256 the recorded one and
    the manifest's, where that gives one; in an object store it is known by its size where the manifest gives none.

    Args:
        source: a manifest or a folder.
        target: folder for the copies.
        workers: transfers at a time.
        root: what the manifest's paths are relative to; by default its own folder.
        seconds: how long one transfer may take.
    """
    _apart_from(source, target)
    given = manifest.read(source, root)
    with alone(target):
        output = Output(target, {"step": "download"}, given)

        def copy(clip: Clip) -> dict[str, Any] | tuple[str, str, int, dict[str, str] | None] | str:
            record = output.record_of(clip)
            if record is not None and _is_sound(output.folder, record, clip):
                return record
            before = origin(given, clip, seconds)
            found = _fetch(given, clip, output, seconds)
            return found if isinstance(found, str) else (*found, before)

        with progress.bar("download", given.count) as show, ThreadPoolExecutor(max(1, workers)) as threads:
            for clip, found in zip(given.clips, threads.map(copy, given.clips), strict=True):
                if isinstance(found, str):
                    output.tally.put_aside(clip.path, found)
                elif isinstance(found, dict):
                    output.skip(clip, found)
                else:
                    output.put(clip, *found)
                show(output.tally.done + output.tally.skipped + len(output.tally.quarantine))
        return output.finish(given, keep_part=True)


def _apart_from(source: str, target: str) -> None:
    """Refuse an output that would be read as input, be it the folder or the clips in it."""
    manifest.apart_from(source, target)
    apart(source, f"{target.rstrip('/')}/clips", inside=True)


def _is_sound(folder: Folder, record: dict[str, Any], clip: Clip) -> bool:
    """Whether a copy that is there already is the file that the manifest means, as far as the manifest tells."""
    if clip.sha256 is None:
        return True
    if folder.is_local:  # its bytes have been compared with the record's already
        return clip.sha256 == record["sha256"]
    try:
        return sha256((folder, record["path"])) == clip.sha256 == record["sha256"]
    except UserError:
        return False


def _fetch(given: Given, clip: Clip, output: Output, seconds: float) -> tuple[str, str, int] | str:
    """(name, SHA-256, bytes) of the copy, or why there is none."""
    suffix = PurePosixPath(clip.path.partition("?")[0]).suffix.lower()
    reason, name = "", f"clips/{clip.id}{suffix if suffix in manifest.VIDEOS else '.mp4'}"
    for attempt in range(TRIES):
        with ExitStack() as stack:
            try:
                copy = checked(stack.enter_context(copied(*given.place(clip), output.folder, name, seconds)), clip)
                found, size = clip.sha256 or sha256(copy), copy.stat().st_size
            except Refused as error:
                return str(error)
            except Halt:
                raise
            except (UserError, ValueError) as error:
                reason = str(error)
                if isinstance(error, Unread) and isinstance(error.__cause__, TimeoutError):
                    return reason  # it had its time
            else:
                settle(copy, output.folder, name)
                return name, found, size
        if attempt + 1 < TRIES:
            time.sleep(2.0**attempt / 4)
    return reason


def process(
    source: str, target: str, wanted: Wanted, workers: int = 0, seconds: float = 300.0, root: str | None = None
) -> Tally:
    """Make clips of one form from every clip of a manifest.

    Args:
        source: a manifest or a folder of clips.
        target: folder for the new clips.
        wanted: their form.
        workers: processes; 0 takes one per core.
        seconds: how long one clip may take.
        root: what the manifest's paths are relative to; by default its own folder.
    """
    _apart_from(source, target)
    given = manifest.read(source, root)
    with alone(target):
        output = Output(target, {"step": "process", **asdict(wanted)}, given)
        todo = [clip for clip in given.clips if not output.finished(clip)]
        before = {clip.id: origin(given, clip, seconds) for clip in todo}
        with progress.bar("process", given.count) as show, Pool(workers, seconds) as pool:
            takes = lambda clip, path: (path, wanted, clip.start, clip.end)  # noqa: E731
            for clip, ok, result in each(given, todo, pool, make_clip, takes):
                if ok:
                    name = f"clips/{clip.id}.mp4"
                    output.folder.write(name, result)
                    output.put(clip, name, hashlib.sha256(result).hexdigest(), len(result), before[clip.id])
                else:
                    output.tally.put_aside(clip.path, str(result))
                show(output.tally.done + output.tally.skipped + len(output.tally.quarantine))
        return output.finish(given, keep_part=False)


def each(
    given: Given,
    todo: list[Clip],
    pool: Pool,
    function: Callable[..., Any],
    takes: Callable[[Clip, str], tuple[Any, ...]],
) -> Iterator[tuple[Clip, bool, Any]]:
    """(clip, True, what a worker made of its file) or (clip, False, why nothing), in order.

    Args:
        function: of a module, so that workers can find it.
        takes: its arguments, of a clip and the path of its file on this machine.

    Raises:
        Halt: there is no room for copies.
    """
    with scratch_folder() as scratch:
        copies: dict[str, Path] = {}

        def arguments(clip: Clip) -> tuple[Any, ...]:
            copies[clip.id] = local_copy(given, clip, scratch, pool.seconds)
            return takes(clip, str(copies[clip.id]))

        for clip, ok, result in pool.map(function, todo, arguments):
            copy = copies.pop(clip.id, None)
            if copy is not None and copy.parent == scratch:
                copy.unlink(missing_ok=True)
            yield clip, ok, result
