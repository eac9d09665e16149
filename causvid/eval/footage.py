"""Reading videos for the judges: counted once, then decoded in parts, so that minutes of video never lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from causvid.data.clips import FORMATS, moments
from causvid.data.pool import Refused
from causvid.errors import UserError
from causvid.eval.proxies import opencv


@dataclass(frozen=True)
class Decoded:
    """Frames ``f h w 3`` (BGR, uint8) and their rate."""

    frames: np.ndarray
    fps: float


def decoder() -> str:
    """What decodes: part of a result's identity, since decoders differ in the last bit."""
    return f"opencv {opencv().__version__}"


class Footage:
    """A video file whose frames are read in parts, best in order: going back opens the file again.

    Attributes:
        count: frames that can be read.
        fps: frames per second, as the file has it; 0 where it says nothing.

    Raises:
        UserError: unreadable, cut short (fewer frames than the file says it has), or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self._capture = self._open()
        cv2 = opencv()
        self.fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        said = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = 0
        while self._capture.grab():
            self.count += 1
        self._at = self.count
        if self.count == 0:
            raise UserError("holds no frames")
        if self.count < said:
            raise UserError(f"is cut short: {self.count} of {said} frames can be read")
        undamaged(path)

    def _open(self) -> Any:
        capture = opencv().VideoCapture(str(self._path))
        if not capture.isOpened():
            capture.release()
            raise UserError("can't be read as a video")
        return capture

    @property
    def seconds(self) -> float:
        """Length; 0 where the rate is not known."""
        return self.count / self.fps if self.fps > 0 else 0.0

    def frames(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop), ``f h w 3`` BGR uint8.

        Raises:
            UserError: a frame that was counted can't be decoded.
        """
        if start < self._at:
            self._capture.release()
            self._capture, self._at = self._open(), 0
        while self._at < start and self._capture.grab():
            self._at += 1
        out = []
        while self._at < stop:
            more, frame = self._capture.read()
            if not more:
                raise UserError(f"frame {self._at} of {self.count} can't be decoded")
            out.append(frame)
            self._at += 1
        return np.stack(out)

    def close(self) -> None:
        self._capture.release()


def undamaged(path: Path) -> None:
    """Decode every frame and keep none. OpenCV does not tell frames that its decoder made up where data is damaged.

    Damage that decodes without an error can't be seen: h264 has no checksum.

    Raises:
        UserError: the decoder reports an error in a frame.
    """
    try:
        with av.open(str(path), options={"format_whitelist": FORMATS, "protocol_whitelist": "file"}) as container:
            for stream in container.streams.video[:1]:
                for _ in moments(container, stream, 0.0):
                    pass
    except Refused as error:
        raise UserError(str(error)) from error
    except (FFmpegError, OSError, ValueError) as error:
        raise UserError(f"can't be read as a video: {error}") from error


def decode(path: Path) -> Decoded:
    """All frames of a video, as VBench's flickering reads them.

    Raises:
        UserError: as for :class:`Footage`.
    """
    footage = Footage(path)
    try:
        return Decoded(footage.frames(0, footage.count), footage.fps)
    finally:
        footage.close()
