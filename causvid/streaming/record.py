"""Session files: what was done to a stream, and the digest of what came out, so that a replay can be checked.

A session file is safetensors: the frames that came in as tensors, all else as JSON in its metadata, under a digest.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causvid import weights
from causvid.errors import UserError
from causvid.streaming.engine import Engine
from causvid.streaming.moment import HOWS, POLICIES
from causvid.streaming.session import MARK, Event, Made, Session

FORMAT = "causvid-session-1"
MOST_BYTES = 4 << 30  # of a session file
OPTIONS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "prompt": {"prompts": lambda v: all(isinstance(p, str) for p in v), "policy": lambda v: v in POLICIES},
    "image": {"how": lambda v: v in HOWS},
    "video": {"strength": lambda v: isinstance(v, float)},
    "seed": {"seed": lambda v: isinstance(v, int)},
}


@dataclass(frozen=True)
class Record:
    """A whole stream.

    Attributes:
        identity: of the engine: weights and settings.
        start: prompts, seed, cache policy and steps that it began with.
        events: what was done, in order.
        blocks: how many were made.
        marks: the first 8 bytes of the running digest after each block.
        digest: SHA-256 over all latents and frames.
        environment: where it was made; bytes are the same under equal versions and threads alone.
        frames: pixel frames that the video was cut to, within its last block; None where it was not cut.
    """

    identity: Mapping[str, str]
    start: Mapping[str, Any]
    events: tuple[Event, ...]
    blocks: int
    marks: bytes
    digest: str
    environment: Mapping[str, str]
    frames: int | None = None


def environment(engine: Engine) -> dict[str, str]:
    """What the last bit of a sum depends on."""
    dtype = str(next(engine.network.parameters()).dtype).removeprefix("torch.")
    kind = torch.device(engine.device).type
    return {"torch": torch.__version__, "threads": str(torch.get_num_threads()), "device": kind, "dtype": dtype}


def record(session: Session, frames: int | None = None) -> Record:
    """What was done to a session so far; ``frames`` where its video is cut to so many pixel frames.

    Raises:
        UserError: the session holds no record.
    """
    return Record(
        session.engine.identity, session.start, session.recorded, session.block, session.marks, session.digest,
        environment(session.engine), frames,
    )  # fmt: skip


def writable(path: Path, what: str = "session file") -> None:
    """Find out before the first block whether a file can be written; one that is there is left as it is.

    Raises:
        UserError: the path can't be written.
    """
    place = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        reason = f"{error.strerror or error}: {place}"
        raise UserError(f"{what} {path} can't be written ({reason}); choose another path") from error


def write(path: Path, made: Record) -> None:
    """Write a session file, whole or not at all.

    Raises:
        UserError: the path can't be written.
    """
    tensors = {f"event{i}": event.frames for i, event in enumerate(made.events) if event.frames is not None}
    body = json.dumps(
        {
            "identity": dict(made.identity), "start": dict(made.start), "blocks": made.blocks,
            "events": [[event.kind, event.block, event.options] for event in made.events],
            "marks": made.marks.hex(), "digest": made.digest, "environment": dict(made.environment),
            "frames": made.frames,
        },
        sort_keys=True,
    )  # fmt: skip
    seal = {"format": FORMAT, "body": body, "seal": _seal(body, tensors)}
    try:
        weights.write_tensors(path, tensors, seal)
    except OSError as error:
        raise UserError(f"session file {path} can't be written: {error.strerror or error}") from error


def _seal(body: str, tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256(body.encode())
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.contiguous().numpy().data)
    return state.hexdigest()


def read(path: Path) -> Record:
    """Read a session file.

    Raises:
        UserError: missing, damaged, changed since it was written, or of another format.
    """
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise UserError(f"session file {path} is larger than {MOST_BYTES} bytes")
    tensors, metadata = weights.read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no session file of this version; make one with causvid generate --record")
    body = metadata.get("body", "")
    if any(tensor.dtype != torch.uint8 for tensor in tensors.values()) or metadata.get("seal") != _seal(body, tensors):
        raise UserError(f"session file {path} was changed or damaged since it was written; record it again")
    try:
        return _record(json.loads(body), tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"session file {path} does not hold a session: {error}; record it again") from error


def _record(told: Any, tensors: Mapping[str, Tensor]) -> Record:
    start, events = told["start"], []
    if set(start) != {"prompts", "seed", "cache", "steps"} or not all(isinstance(p, str) for p in start["prompts"]):
        raise ValueError("its start is not one of a stream")
    if not isinstance(start["seed"], int) or not all(isinstance(t, float) for t in start["steps"]):
        raise ValueError("its seed or its steps are not those of a stream")
    for number, (kind, block, options) in enumerate(told["events"]):
        known = set(options) == set(OPTIONS[kind]) and isinstance(block, int)
        if not known or not all(check(options[name]) for name, check in OPTIONS[kind].items()):
            raise ValueError(f"event {number} is not one of a stream")
        frames = tensors.get(f"event{number}")
        if (frames is not None) != (kind in ("image", "video")):
            raise ValueError(f"event {number} lacks its frames, or has some")
        events.append(Event(kind, block, options, frames))
    marks, blocks = bytes.fromhex(told["marks"]), int(told["blocks"])
    if len(marks) != MARK * blocks or sorted(e.block for e in events) != [e.block for e in events]:
        raise ValueError("its events are not in order, or its marks are not those of its blocks")
    frames = told.get("frames")  # files of before do not tell it
    if frames is not None and (type(frames) is not int or frames < 1):
        raise ValueError("its frames are no number of them")
    return Record(
        dict(told["identity"]), dict(start), tuple(events), blocks, marks, str(told["digest"]),
        dict(told["environment"]), frames,
    )  # fmt: skip


def open_session(engine: Engine, made: Record) -> Session:
    """A session that stands where the recorded one began.

    Raises:
        UserError: the engine is not the recorded one.
    """
    differing = [
        f"{key} is {engine.identity.get(key, 'none')[:16]}, the file's {made.identity.get(key, 'none')[:16]}"
        for key in sorted({*engine.identity, *made.identity})
        if engine.identity.get(key) != made.identity.get(key)
    ]
    if differing:
        raise UserError(f"the session was made with another model: {'; '.join(differing)}. Replay it with its own")
    return Session(engine, made.start["prompts"], made.start["seed"], made.start["cache"], made.start["steps"])


def replay(engine: Engine, made: Record, session: Session | None = None) -> Iterator[Made]:
    """Make the recorded blocks again, and hold each against the record.

    Args:
        session: one that :func:`open_session` gave; default a new one.

    Raises:
        UserError: another engine, or the first block whose bytes differ.
    """
    session, waiting = session or open_session(engine, made), list(made.events)
    while session.block < made.blocks:
        while waiting and waiting[0].block == session.block:
            session.apply(waiting.pop(0))
        block = session.step()
        if session.marks != made.marks[: MARK * session.block]:
            raise UserError(f"block {block.block} is not the recorded one{_why(engine, made)}")
        yield block
    if session.digest != made.digest:
        raise UserError("the replay's digest is not the recorded one")


def _why(engine: Engine, made: Record) -> str:
    here = environment(engine)
    differing = [f"{key} {here[key]} (was {made.environment.get(key)})" for key in here
                 if here[key] != made.environment.get(key)]  # fmt: skip
    reason = ", ".join(differing) if differing else "versions and threads are equal, so the file tells something else"
    return f": {reason}"
