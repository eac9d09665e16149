"""Small videos with known content, for tests."""

from __future__ import annotations

import io
import struct
from fractions import Fraction

import av
import numpy as np


def levels(count, height=48, width=64):
    """Frames whose grey level tells their number: frame n is 10 + 4 n everywhere."""
    return np.stack([np.full((height, width, 3), 10 + 4 * n, np.uint8) for n in range(count)])


def numbers(frames):
    """Which of the ``levels`` each frame shows."""
    return [round((float(np.asarray(frame, np.float64).mean()) - 10) / 4) for frame in frames]


def video(frames, times=None, fps=25, aspect=None, form="mp4", codec="libx264", gap=250, **options):
    """A video of frames ``f h w 3``, shown at ``times`` (milliseconds) where they are not even.

    Args:
        form: the container.
        gap: frames from one key frame to the next.
        options: the encoder's.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p" if frames.shape[1] % 2 or frames.shape[2] % 2 else "yuv420p"
        stream.gop_size = gap
        good = {"crf": "4", "preset": "ultrafast"} if codec == "libx264" else {"qmin": "1", "qmax": "2"}
        stream.options = {**good, **options}
        stream.codec_context.time_base = Fraction(1, 1000) if times else 1 / Fraction(fps)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = (times or range(len(frames)))[number], stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def turned(content, degrees):
    """The same mp4 with a display matrix that asks a player to turn it clockwise."""
    return arranged(content, {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees])


def arranged(content, matrix):
    """The same mp4 with a display matrix (a, b, c, d): a pixel (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, c, d = (value << 16 for value in matrix)
    at = content.find(b"tkhd") + 4 + 40
    return content[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + content[at + 36 :]


def sound():
    """An mp4 with sound and no picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
