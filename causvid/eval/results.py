"""Results of an evaluation: one JSONL row per video, clip and dimension, appended as soon as it is known.

A row is found again by content: the video's SHA-256, the clip, the dimension and its version, the judge, the digests
of its weights, the decoder and the clip policy. So a stopped evaluation goes on where it was and loses at most the row
it was writing; and nothing stale is taken for new, whatever files are called.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from causvid import weights
from causvid.errors import UserError
from causvid.eval.aggregate import is_finite
from causvid.eval.dimensions import Dimension, dimensions
from causvid.eval.pooling import Judged
from causvid.eval.static_filter import DIMENSION


@dataclass(frozen=True)
class Question:
    """What is asked of a judge; equal questions have equal answers, so this is the cache's key."""

    video_sha256: str
    clip: int
    frames: tuple[int, int]  # [start, stop) of the video
    dimension: str
    version: int
    judge: str
    weights: Mapping[str, str] = field(default_factory=dict)  # file -> digest
    decoder: str = ""
    clip_policy: str = ""
    prompt: str | None = None  # of dimensions that compare with it; what a rule looks for, too
    branch: str = "slow"  # or fast: the first frames of all clips; or static: whether a clip is (1 or 0)

    @property
    def key(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Row:
    """An answered question. ``score`` None: the judge has nothing to say, which is not 0."""

    question: Question
    score: float | None

    def as_json(self) -> dict[str, Any]:
        return {"key": self.question.key, **asdict(self.question), "score": self.score}


def no_score(dimension: type[Dimension] | None, score: Any) -> str:
    """What is wrong with a judge's answer of a clip; empty where nothing is.

    None is an answer only where a video without the object has no score. The sixteen dimensions lie in [-1, 1].
    """
    if score is None:
        return "" if dimension is None or dimension.pooling == "found_only" else "no score"
    if not is_finite(score):
        return f"the score {json.dumps(score)[:40]}"
    bounded = dimension is not None and dimension.scale is not None
    return f"the score {score:g}, beyond 1" if bounded and abs(score) > 1 else ""


class Store:
    """A JSONL file of rows that one process at a time appends to; opening it drops a line that was cut short.

    Answers that ``others``, files like it, hold are taken over when they are asked for: equal questions, equal answers.
    """

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise UserError(
                f"{path} is in use by another evaluation; wait for it, or write to another folder"
            ) from error
        self._known = dimensions()
        self._scores = self._read()
        self._others = {key: row["score"] for other in others for key, row in _complete_rows(other, self._known)}

    def _read(self) -> dict[str, float | None]:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.ftruncate(self._file, len(whole))
        scores: dict[str, float | None] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                wrong = no_score(self._known.get(row["dimension"]), row["score"])
                scores[row["key"]] = row["score"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                self.close()
                raise UserError(f"{self.path}, line {number}, is no row; repair or remove the file") from error
            if wrong:
                self.close()
                raise UserError(
                    f"{self.path}, line {number}, has {wrong} of {row['dimension']}; remove the line, and it is judged "
                    "again"
                )
        return scores

    def __contains__(self, question: Question) -> bool:
        key = question.key
        if key not in self._scores and key in self._others:
            self.append(Row(question, self._others[key]))
        return key in self._scores

    def __getitem__(self, question: Question) -> float | None:
        return self._scores[question.key]

    def __len__(self) -> int:
        return len(self._scores)

    def append(self, row: Row) -> None:
        """Write a row, to the disk.

        Raises:
            ValueError: what is no score of the dimension.
        """
        if wrong := no_score(self._known.get(row.question.dimension), row.score):
            raise ValueError(f"{row.question.dimension}: the judge gave {wrong}")
        os.write(self._file, (json.dumps(row.as_json(), sort_keys=True) + "\n").encode())
        os.fsync(self._file)
        self._scores[row.question.key] = row.score

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _complete_rows(path: Path, known: Mapping[str, type[Dimension]]) -> Iterable[tuple[str, dict[str, Any]]]:
    """Rows of a file that another process may be writing; what is no row is passed over."""
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            if not no_score(known.get(row["dimension"]), row["score"]):
                yield row["key"], {"score": row["score"]}
        except (ValueError, KeyError, TypeError, RecursionError):
            continue


@dataclass(frozen=True)
class Protocol:
    """All that must be equal for two scores to be comparable. ``id`` is its hash."""

    judged_prompts: str  # digest of the short prompts, in order
    generating_prompts: str  # digest of what the model was asked for
    videos_per_prompt: int
    clip_policy: str
    decoder: str
    judges: Mapping[str, str]  # dimension -> judge and version
    weights: Mapping[str, str]  # file -> digest
    seeds: str | None = None  # how each video's noise is drawn; None: not recorded by who sampled
    codec: str | None = None  # how the videos were encoded; None: not recorded
    length: str | None = None  # frames and rate; None: not recorded
    static_filter: Literal[False] | int = False  # before temporal flickering: of how many videos a prompt

    @property
    def id(self) -> str:
        return identity(asdict(self))


def identity(protocol: Mapping[str, Any]) -> str:
    """Hash of a protocol: equal only where all is equal."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:12]


def prompts_digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def differences(protocols: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each field in which some protocols differ, the value of each by name."""
    fields = dict.fromkeys(key for protocol in protocols.values() for key in protocol)
    out = {}
    for key in fields:
        values = {name: protocol.get(key) for name, protocol in protocols.items()}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            out[key] = values
    return out


def require_comparable(protocols: Mapping[str, Mapping[str, Any]], across: bool = False) -> str:
    """The mark of a table that lays results side by side: empty where their protocols are one.

    Raises:
        UserError: protocols differ and ``across`` was not asked for.
    """
    found = differences(protocols)
    if not found:
        return ""
    detail = "; ".join(
        f"{key}: " + ", ".join(f"{name} {json.dumps(value)[:60]}" for name, value in values.items())
        for key, values in found.items()
    )
    if not across:
        raise UserError(
            f"these results have different protocols and are not comparable ({detail}); "
            "judge them alike, or ask for it with --across-protocols"
        )
    return f"DIFFERENT PROTOCOLS, not comparable: {', '.join(found)} differ"


def lacks(results: Mapping[str, Any]) -> str:
    """How many of its suite's videos a results file is without; empty where none, or where that is not recorded."""
    found = results.get("lacking") or {"videos": 0, "of": 0}
    return f"lacks {found['videos']} of {found['of']} videos" if found["videos"] else ""


def require_same_videos(tables: Mapping[str, Mapping[str, Any]], across: bool = False) -> str:
    """The mark of a table that lays results of other videos side by side: empty where each judged the same ones.

    Asked of every dimension that two results or more have; not of one whose videos a static filter chose.

    Raises:
        UserError: the judged videos differ and ``across`` was not asked for.
    """
    judged: dict[str, dict[str, set[str]]] = {}  # dimension -> result -> its videos
    for name, table in tables.items():
        for dimension, rows in table.get("videos", {}).items():
            if dimension != DIMENSION or not table["protocol"].get("static_filter"):
                judged.setdefault(dimension, {})[name] = {row["video"] for row in rows}
    union = {dimension: set().union(*each.values()) for dimension, each in judged.items()}
    short = {
        name: set().union(*(union[d] - each[name] for d, each in judged.items() if name in each)) for name in tables
    }
    if not any(short.values()):
        return ""
    count = len(set().union(*union.values()))
    detail = "; ".join(f"{name} lacks {len(videos)} of {count}" for name, videos in short.items())
    if not across:
        raise UserError(
            f"these results are of different videos and are not comparable ({detail}); judge the same ones, or ask for "
            "it with --across-protocols"
        )
    return f"DIFFERENT VIDEOS, not comparable: {detail}"


def write_upstream(path: Path, scores: Mapping[str, float], rows: Mapping[str, Iterable[Judged]]) -> None:
    """Write ``*_eval_results.json`` as upstream does, for a leaderboard: {dimension: [score, per clip]}.

    Per clip, imaging quality is in percent and the score is not, as upstream has it.
    """
    table = {}
    for name, score in scores.items():
        factor = 100 if name == "imaging_quality" else 1
        detail = [
            {"video_path": row.video, "video_results": row.score * factor}
            for row in rows.get(name, ())
            if row.score is not None
        ]
        table[name] = [score, detail]
    weights.write_json(path, table)
