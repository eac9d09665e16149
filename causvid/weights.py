"""Reading and writing tensor files safely: safetensors only, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from causvid.errors import UserError

LARGE = 256 << 20  # bytes: from here on a digest is worth keeping


def partial_of(path: Path) -> Path:
    """Where this process writes a file before it takes its name: the name tells machine and process."""
    return path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is either absent, as before, or complete, even if the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, atomically; equal values give equal bytes. What is not finite is written as null."""
    write_bytes(path, (json.dumps(_finite(value), indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically and without a second copy of them."""
    plain: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if memory in held else tensor  # safetensors refuses tensors that share memory
        held.add(memory)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(plain, partial, dict(metadata or {}))
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file.

    Raises:
        UserError: missing, truncated, or not safetensors.
    """
    try:
        with safe_open(str(path), framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}, stream.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"weights file {path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}; fetch or make it again") from error


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; that of a large file is kept in the cache until its size or time changes.

    Raises:
        UserError: the file can't be read.
    """
    try:
        state = path.stat()
        place = None
        if state.st_size >= LARGE:
            known = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
            place = cache_folder() / "digests" / hashlib.sha256(known.encode()).hexdigest()
            if place.is_file():
                return place.read_text()
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if place is not None:
            write_bytes(place, found.encode())
        return found
    except OSError as error:
        raise UserError(f"{path} can't be read: {error}") from error


def cache_folder() -> Path:
    """What can be made again and is shared by all runs of a user: ``CAUSVID_CACHE``, or ``~/.cache/causvid``."""
    return Path(os.environ.get("CAUSVID_CACHE") or Path.home() / ".cache" / "causvid")
