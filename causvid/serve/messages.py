"""What a page may say, checked: every message is a small JSON object, or bytes of a picture or of frames."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from causvid.errors import UserError
from causvid.registry import did_you_mean
from causvid.streaming.moment import HOWS, POLICIES

MOST_TEXT = 16_384  # bytes of a JSON message
MOST_PROMPT = 2_000  # characters
MOST_FRAMES = 64  # of a binary message
PICTURE, FRAMES = 1, 2  # first byte of a binary message
OWN = "own"  # the cache policy that the checkpoint's spec names
CACHES = (OWN, "trained", "full", "window", "sink_window")
# kind -> (field, whether it may be left out)
FIELDS: dict[str, dict[str, bool]] = {
    "start": {"prompt": False, "checkpoint": True, "cache": True, "steps": True, "seed": True, "how": True},
    "prompt": {"text": False, "policy": True},
    "video": {"on": False, "strength": True},
    "pause": {"on": False},
    "ack": {"number": False},
    "fork": {"block": True, "seed": True},
    "branch": {"branch": False},
}


class Malformed(UserError):
    """A message that is none."""


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """(kind, fields) of a JSON message, every field of the right type and within bounds.

    Raises:
        Malformed: what is wrong with it.
    """
    if len(text) > MOST_TEXT:
        raise Malformed(f"a message has at most {MOST_TEXT} characters")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed("a message must be JSON") from error
    if not isinstance(told, dict) or not isinstance(told.get("type"), str):
        raise Malformed("a message must be an object with a 'type'")
    kind = told.pop("type")
    if kind not in FIELDS:
        raise Malformed(f"no message '{kind[:40]}'{did_you_mean(kind[:40], FIELDS)}; accepted: {', '.join(FIELDS)}")
    known = FIELDS[kind]
    for key in told:
        if key not in known:
            raise Malformed(f"{kind}: unknown field '{key[:40]}'; accepted: {', '.join(known)}")
    told = {key: value for key, value in told.items() if value is not None}
    missing = [key for key, optional in known.items() if not optional and key not in told]
    if missing:
        raise Malformed(f"{kind}: '{missing[0]}' is missing")
    return kind, {key: CHECKS[key](value, f"{kind}.{key}") for key, value in told.items()}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MOST_PROMPT or "\x00" in value:
        raise Malformed(f"{where}: expected text of 1 to {MOST_PROMPT} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a pair
        raise Malformed(f"{where}: it is no Unicode text") from error
    return value.strip()


def _whole(least: int, most: int) -> Any:
    def check(value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise Malformed(f"{where}: expected a whole number from {least} to {most}")
        return value

    return check


def _share(value: Any, where: str) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not 0 < value <= 1:
        raise Malformed(f"{where}: expected a number above 0 and at most 1")
    return float(value)


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise Malformed(f"{where}: expected true or false")
    return value


def _of(accepted: tuple[str, ...]) -> Any:
    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or value not in accepted:
            raise Malformed(f"{where}: accepted: {', '.join(accepted)}")
        return value

    return check


CHECKS: Mapping[str, Any] = {
    "prompt": _text, "text": _text, "checkpoint": _text, "cache": _of(CACHES), "policy": _of(POLICIES),
    "how": _of(HOWS), "steps": _whole(1, 64), "seed": _whole(0, 2**31 - 1), "strength": _share, "on": _flag,
    "number": _whole(0, 2**53), "block": _whole(0, 2**31), "branch": _whole(0, 2**31),
}  # fmt: skip


def frames_of(content: bytes, height: int, width: int) -> np.ndarray:
    """Frames of a binary message (rgb24, row by row), ``1 f 3 h w``.

    Raises:
        Malformed: no whole number of frames, or too many.
    """
    size = height * width * 3
    count, rest = divmod(len(content), size)
    if rest or not 1 <= count <= MOST_FRAMES:
        raise Malformed(f"frames: expected 1 to {MOST_FRAMES} of {size} bytes ({height} x {width}, rgb24)")
    frames = np.frombuffer(content, np.uint8).reshape(1, count, height, width, 3)
    return np.ascontiguousarray(frames.transpose(0, 1, 4, 2, 3))


@dataclass
class Rate:
    """A bucket of messages: it fills by ``per_second`` up to ``burst``.

    Attributes:
        left: messages that may come at once.
    """

    per_second: float = 60.0
    burst: float = 240.0
    left: float = 240.0
    told: float = 0.0

    def take(self) -> bool:
        """Whether a message may come now."""
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self.told) * self.per_second) if self.told else self.burst
        self.told = now
        if self.left < 1:
            return False
        self.left -= 1
        return True
