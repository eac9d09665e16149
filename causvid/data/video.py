"""Reading and writing videos: h264 in mp4, through PyAV.

Videos are ``f c h w``, either float in [-1, 1] or uint8 in 0..255; files hold yuv420p, which every player shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError
from einops import rearrange, repeat
from torch import Tensor

from causvid import weights
from causvid.data.clips import encode_rgb, upright
from causvid.errors import UserError

MOST_PIXELS = 4096  # along a side; what common players and h264 levels take


@dataclass(frozen=True)
class Clip:
    """A video that was read: ``pixels`` is ``f 3 h w`` in [-1, 1]."""

    pixels: Tensor
    fps: float


def to_bytes(pixels: Tensor) -> Tensor:
    """[-1, 1] to uint8; uint8 stays as it is."""
    if pixels.dtype == torch.uint8:
        return pixels
    return ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_rgb(video: Tensor, scale: int) -> np.ndarray:
    """``f h w 3`` uint8, enlarged ``scale`` times (nearest neighbour), the last row and column doubled to even sizes.

    Raises:
        ValueError: not ``f c h w`` with 1 or 3 channels and at least one frame.
        UserError: a picture too large.
    """
    if video.ndim != 4 or video.shape[1] not in (1, 3) or 0 in video.shape:
        raise ValueError(f"a video is 'f c h w' with 1 or 3 channels and at least one frame, got {tuple(video.shape)}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    if max(video.shape[2:]) * scale > MOST_PIXELS:
        raise UserError(
            f"scale {scale} makes {video.shape[3] * scale} x {video.shape[2] * scale} pixels; at most {MOST_PIXELS} "
            f"along a side: scale {max(1, MOST_PIXELS // max(video.shape[2:]))} or less"
        )
    frames = repeat(to_bytes(video).cpu(), "f c h w -> f (h a) (w b) c", a=scale, b=scale)
    frames = frames.expand(-1, -1, -1, 3).numpy()
    odd_rows, odd_columns = frames.shape[1] % 2, frames.shape[2] % 2
    return np.pad(frames, ((0, 0), (0, odd_rows), (0, odd_columns), (0, 0)), mode="edge")


def encode_mp4(video: Tensor, fps: float = 8, scale: int = 1, crf: int = 17) -> bytes:
    """The bytes of an mp4.

    Args:
        video: ``f c h w``, 1 or 3 channels, float in [-1, 1] or uint8.
        fps: frames per second.
        scale: pixels of the mp4 per pixel of the video, along each side.
        crf: x264's constant rate factor: 0 loses nothing, 17 nothing that shows, 23 is its default.

    Raises:
        ValueError: wrong shape, or fps or scale that is not positive.
    """
    if fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    frames = to_rgb(video, scale)
    return encode_rgb(frames, fps, crf)


def write_mp4(path: Path, video: Tensor, fps: float = 8, scale: int = 1, crf: int = 17) -> None:
    """Write an mp4, whole or not at all; for the arguments see :func:`encode_mp4`.

    Raises:
        UserError: the path can't be written.
        ValueError: as for :func:`encode_mp4`.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the path of an mp4 file to write")
    content = encode_mp4(video, fps, scale, crf)
    try:
        weights.write_bytes(path, content)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}; choose another path") from error


def read_mp4(path: Path) -> Clip:
    """Every frame of a file's first video stream, upright.

    Raises:
        UserError: missing, unreadable, or without a video.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate
            frames = [torch.from_numpy(upright(frame).copy()) for frame in container.decode(stream)]
    except (FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} can't be read as a video: {reason}") from error
    if not frames:
        raise UserError(f"{path} holds no frames")
    pixels = rearrange(torch.stack(frames), "f h w c -> f c h w").float() / 127.5 - 1
    return Clip(pixels, float(rate or 0))
