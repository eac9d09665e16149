"""Where the frames of a stream go while it is made: raw to a pipe, or into an mp4 that grows."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import Colorspace
from torch import Tensor

from causvid.data.clips import BT601, LIMITED
from causvid.data.video import to_rgb
from causvid.errors import UserError


class Sink(Protocol):
    """Takes frames ``f 3 h w`` as they are made; False when nobody wants more."""

    def write(self, frames: Tensor) -> bool: ...
    def close(self) -> None: ...


class RawPipe:
    """Raw rgb24 frames on stdout, row by row, as ``ffplay -f rawvideo -pixel_format rgb24 -video_size WxH -`` takes."""

    def __init__(self, scale: int = 1) -> None:
        self.scale = scale

    def write(self, frames: Tensor) -> bool:
        try:
            sys.stdout.buffer.write(to_rgb(frames, self.scale).tobytes())
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            # Python flushes stdout once more at its end; that must not fail too.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return False
        return True

    def close(self) -> None:
        """Nothing is held back."""


class GrowingMp4:
    """A fragmented mp4 that plays as far as it is written, in fragments of half a second.

    Args:
        path: the file; it is there from the first block on.
        fps: frames per second.
        scale: pixels of the mp4 per pixel of the video.
        crf: x264's constant rate factor.

    Raises:
        UserError: the path can't be written.
    """

    def __init__(self, path: Path, fps: float, scale: int = 1, crf: int = 17) -> None:
        self.path, self.scale = path, scale
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror or error}; choose another path") from error
        options = {"movflags": "empty_moov+default_base_moof", "frag_duration": "500000", "flush_packets": "1"}
        self._container = av.open(self._file, "w", format="mp4", options=options)
        stream: Any = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "tune": "zerolatency", "x264-params": "mbtree=0"}
        stream.codec_context.colorspace, stream.codec_context.color_range = BT601, LIMITED
        self._stream, self._begun = stream, False

    def write(self, frames: Tensor) -> bool:
        images = to_rgb(frames, self.scale)
        if not self._begun:
            self._stream.height, self._stream.width = images.shape[1:3]
            self._begun = True
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            self._container.mux(self._stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU601)))
        self._file.flush()
        return True

    def close(self) -> None:
        """End the file."""
        if self._begun:
            self._container.mux(self._stream.encode())
        self._container.close()
        self._file.close()
