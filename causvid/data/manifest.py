"""Manifests: which clips there are, with captions, from CSV, JSON or JSONL, a caption file, or a folder of clips.

A row has ``path`` (or ``url``), ``caption``, and optionally ``start`` and ``end`` in seconds, ``id`` and ``sha256``.
Paths are relative to the manifest. A JSON mapping ``{file: caption}`` is read as well, as in the Mixkit set, whose
captions name files without their subfolders. A row that can't be used, or has an unknown key, is refused with its
reason, and the others go on; a CSV with an unknown column is refused as a whole.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from causvid import progress
from causvid.data.folders import Folder, apart, unlisted
from causvid.data.remote import exists
from causvid.errors import UserError
from causvid.registry import did_you_mean

VIDEOS = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".flv",
    ".f4v", ".wmv", ".asf", ".ogv", ".3gp", ".3g2", ".gif", ".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff",
)  # fmt: skip
ALIASES = {"url": "path", "file": "path", "video": "path", "text": "caption", "cap": "caption"}
KNOWN = ("path", "caption", "start", "end", "id", "sha256")
LONGEST_CAPTION = 10_000  # characters
csv.field_size_limit(1 << 30)  # a caption that is too long is told by its row
IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Clip:
    """One row: where its file lies (in the manifest's folder, or at an address of its own), and what is known of it."""

    id: str
    path: str
    caption: str = ""
    start: float | None = None
    end: float | None = None
    sha256: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Repeated:
    """A JSON object that has a key more than once, of which a mapping would keep the last value alone."""

    pairs: list[tuple[str, Any]]

    @classmethod
    def or_mapping(cls, pairs: list[tuple[str, Any]]) -> Any:
        """What ``json`` is to make of an object."""
        mapping = dict(pairs)
        return mapping if len(mapping) == len(pairs) else cls(pairs)


@dataclass
class Given:
    """What a manifest gives: clips to work on, rows that are refused (name, reason), and rows that repeat another.

    Attributes:
        passed_over: files of a folder that are, by their names, neither clips nor captions; they are not counted.
    """

    folder: Folder
    clips: list[Clip] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    duplicates: int = 0
    passed_over: tuple[str, ...] = ()

    def tell(self) -> None:
        """Say on stderr which files were passed over, if any."""
        if self.passed_over:
            names, more = ", ".join(self.passed_over[:5]), ", ..." if len(self.passed_over) > 5 else ""
            few = f"{len(self.passed_over)} files are" if len(self.passed_over) > 1 else "1 file is"
            progress.say(
                f"{self.folder}: {few} passed over, by name no clips: {names}{more}. Clips: {', '.join(VIDEOS)}"
            )

    @property
    def count(self) -> int:
        return len(self.clips) + len(self.refused) + self.duplicates

    def place(self, clip: Clip) -> tuple[Folder, str]:
        """The folder and name to read a clip's file from."""
        if "://" in clip.path or clip.path.startswith("/"):
            parent, _, name = clip.path.rpartition("/")
            return Folder(parent or "/"), name
        return self.folder, clip.path


def read(source: str, root: str | None = None) -> Given:
    """The clips of a manifest or of a folder.

    Args:
        source: a manifest, or a folder of clips.
        root: what paths are relative to; by default the manifest's own folder.

    Raises:
        UserError: there is no such file or folder, it holds nothing, or it can't be read as a whole.
    """
    whole = Folder(source)
    if not whole.exists():
        raise UserError(f"{source} does not exist; give a manifest (CSV, JSON, JSONL) or a folder of clips")
    if not whole.fs.isdir(whole.path):
        parent, _, name = whole.uri.rpartition("/")
        folder = Folder(parent or ("/" if whole.uri.startswith("/") else "."))
        return _some(source, _checked(Folder(root) if root else folder, parse(name, folder.read(name)), whole.is_local))
    if whole.exists("manifest.jsonl"):
        rows = parse("manifest.jsonl", whole.read("manifest.jsonl"))
        return _some(source, _checked(Folder(root) if root else whole, rows, whole.is_local))
    names = whole.sizes()
    clips = [name for name in names if PurePosixPath(name).suffix.lower() in VIDEOS]
    closed = [(name, reason) for name, reason in unlisted(whole) if name not in clips]
    if not clips:
        raise UserError(
            f"nothing given: {source} holds no clips ({', '.join(VIDEOS)}) and no manifest.jsonl"
            + "".join(f"; {name} {reason}" for name, reason in closed[:3])
        )
    rows = [{"path": name, "caption": _beside(whole, name, names)} for name in clips]
    given = _checked(whole, rows, whole.is_local, clips)
    known = {*clips, *dict(closed), *(str(PurePosixPath(name).with_suffix(".txt")) for name in clips)}
    given.refused += closed
    given.passed_over = tuple(name for name in names if name not in known)
    return given


def _some(source: str, given: Given) -> Given:
    if not given.count:
        raise UserError(f"nothing given: the manifest {source} has no rows; see what the step before it put aside")
    return given


def apart_from(source: str, target: str) -> None:
    """Refuse to write a step's output over, or into, the folder that it is made from, or over its ``manifest.jsonl``.

    Raises:
        UserError: both are the same place, or the output lies in a folder that is read as a whole.
    """
    parent, _, name = source.rpartition("/")
    if name == "manifest.jsonl":  # what it names is read, and not what lies beside it
        apart(parent or ("/" if source.startswith("/") else "."), target, inside=True)
    else:
        apart(source, target)


def _beside(folder: Folder, name: str, names: Mapping[str, int]) -> str:
    """The caption in the text file of the clip's name, where there is one."""
    text = str(PurePosixPath(name).with_suffix(".txt"))
    return folder.read(text).decode("utf-8", "surrogateescape").strip() if text in names else ""


def parse(name: str, content: bytes) -> list[Any]:
    """The rows of a manifest as plain data; a row that can't be read is an exception in its place.

    Raises:
        UserError: the file as a whole can't be read.
    """
    # Bytes that are not UTF-8 spoil their own row and no other.
    text = content.decode("utf-8-sig", "surrogateescape")
    suffix = PurePosixPath(name).suffix.lower()
    try:
        if suffix == ".jsonl":
            return [_line(line) for line in text.split("\n") if line.strip()]
        if suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            columns = list(reader.fieldnames or ())
            if not {"path", *(old for old, new in ALIASES.items() if new == "path")} & set(columns):
                raise UserError(f"{name}: its first line must name the columns, among them 'path', and 'caption'")
            if unknown := _unknown(columns):  # of every row, so it is said once
                raise UserError(f"{name}: {unknown}; rename the column, or leave it out")
            if len(set(columns)) < len(columns):  # a row would keep the last of them alone
                twice = next(column for column in columns if columns.count(column) > 1)
                raise UserError(f"{name}: has the column '{twice}' more than once; rename one, or leave it out")
            short = ValueError("has fewer values than there are columns")
            return [short if None in row.values() else row for row in reader]
        if suffix == ".json":
            data = json.loads(text, object_pairs_hook=Repeated.or_mapping)
            if isinstance(data, (dict, Repeated)):
                pairs = data.items() if isinstance(data, dict) else data.pairs
                return [{"path": path, "caption": caption} for path, caption in pairs]
            if isinstance(data, list):
                return data
            raise UserError(f"{name}: a JSON manifest is a list of rows, or a mapping of files to captions")
    except (ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} can't be read: {str(error)[:200]}; mend it, or make it again") from error
    raise UserError(f"{name} is no manifest: its name must end in .csv, .json or .jsonl")


def _line(line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=Repeated.or_mapping)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {str(error)[:200]}")


def _checked(folder: Folder, rows: Iterable[Any], local: bool, names: Sequence[str] = ()) -> Given:
    given = Given(folder)
    seen: dict[str, Clip] = {}
    by_name: dict[str, list[str]] | None = None
    for number, row in enumerate(rows, 1):
        name = names[number - 1] if names else f"row {number}"
        try:
            clip = clip_of(row, local)
            name = clip.path
            if seen.setdefault(clip.id, clip) is not clip:
                differs = [key for key, value in vars(clip).items() if value != getattr(seen[clip.id], key)]
                if differs:
                    raise ValueError(f"another row has its id, {clip.id}, and a different {', '.join(differs)}")
                given.duplicates += 1
                continue
            if "/" not in clip.path and not exists(folder, clip.path):
                by_name = by_name if by_name is not None else _by_name(folder)
                found = by_name.get(clip.path, [])
                if len(found) == 1:
                    clip = Clip(**{**vars(clip), "path": found[0]})
            given.clips.append(clip)
        except ValueError as error:
            given.refused.append((name, str(error)))
    return given


def _by_name(folder: Folder) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name in folder.sizes():
        out.setdefault(PurePosixPath(name).name, []).append(name)
    return out


def clip_of(row: Any, local: bool) -> Clip:
    """A row of plain data as a clip.

    Args:
        row: what the manifest says.
        local: whether the manifest lies on this machine, so that it may name any path here.

    Raises:
        ValueError: what is wrong with the row.
    """
    if isinstance(row, Exception):
        raise row
    if isinstance(row, Repeated):
        keys = [key for key, _ in row.pairs]
        raise ValueError(f"has the key '{next(key for key in keys if keys.count(key) > 1)[:80]}' more than once")
    if not isinstance(row, Mapping) or None in row:
        raise ValueError("a row is a mapping with 'path' and 'caption', with no more values than columns")
    if unknown := _unknown(row):
        raise ValueError(unknown)
    facts: dict[str, Any] = {}
    for key, value in row.items():
        known = ALIASES.get(str(key), str(key))
        if value not in (None, ""):
            if known in facts:
                both = [each for each in row if ALIASES.get(str(each), str(each)) == known and row[each]]
                raise ValueError(f"has {' and '.join(map(repr, both))}, which mean the same; give one of them")
            facts[known] = value
    caption = facts.get("caption", "")
    if isinstance(caption, list) and len(caption) == 1:
        caption = caption[0]
    path = facts.get("path")
    for name, value in (("path", path), ("caption", caption)):
        if not isinstance(value, str):
            raise ValueError(f"{name}: expected text, got {str(value)[:80]!r}" if value is not None else f"no {name}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{name}: is not UTF-8")
    path, caption = str(path), " ".join(str(caption).split())
    if path and "://" not in path and not path.endswith("/"):
        path = PurePosixPath(path).as_posix()  # './a.mp4' is 'a.mp4'
    if len(caption) > LONGEST_CAPTION:
        raise ValueError(f"caption: {len(caption)} characters; at most {LONGEST_CAPTION} are taken")
    _check_path(path, local)
    start, end = (_seconds(name, facts.get(name)) for name in ("start", "end"))
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"end: {end} s is not after start, {start or 0.0} s")
    identifier = facts.get("id", identify(path, start, end))
    if not isinstance(identifier, str) or not IDENTIFIER.fullmatch(identifier):
        raise ValueError("id: expected up to 128 letters, digits, '.', '_' and '-', the first a letter or digit")
    sha256 = facts.get("sha256")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{64}", sha256)):
        raise ValueError(f"sha256: expected 64 hexadecimal digits, got {str(sha256)[:80]!r}")
    return Clip(identifier, path, caption, start, end, None if sha256 is None else sha256.lower())


def _unknown(keys: Iterable[Any]) -> str:
    """What is wrong with the first key that no row has, or nothing."""
    accepted = (*KNOWN, *ALIASES)
    for key in map(str, keys):
        if key not in accepted:
            return f"unknown key '{key[:80]}'{did_you_mean(key[:80], accepted)}; accepted: {', '.join(accepted)}"
    return ""


def identify(path: str, start: float | None, end: float | None) -> str:
    """A name for files made from the clip: readable, and different for every path and part."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(path).stem).strip("-")[:60] or "clip"
    return f"{stem}-{hashlib.blake2b(json.dumps([path, start, end]).encode(), digest_size=5).hexdigest()}"


def _check_path(path: str, local: bool) -> None:
    if any(ord(character) < 32 for character in path):
        raise ValueError("path: holds control characters")
    parts = re.split(r"[/\\]", path)
    if ".." in parts or parts[0].startswith("~"):
        raise ValueError("path: must not lead out of the manifest's folder ('..', '~')")
    if path.endswith(("/", "\\")):
        raise ValueError("path: names a folder, not a file")
    if "::" in path:
        raise ValueError("path: chains of addresses ('::') are not taken")
    outside = path.startswith(("/", "file:", "local:"))
    if outside and not local:
        raise ValueError("path: a manifest from elsewhere must not name files of this machine")


def _seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # the last for whole numbers beyond any float
        number = math.nan
    if isinstance(value, bool) or not (0 <= number < 1e7):
        raise ValueError(f"{name}: expected seconds, 0 or more, got {str(value)[:80]!r}")
    return number
