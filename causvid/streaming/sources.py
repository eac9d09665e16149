"""What comes into a stream from files: pictures, videos by path or URI, and prompts with the frames they start at."""

from __future__ import annotations

import io
import re
from pathlib import Path

import av
import fsspec
import numpy as np
import torch
from av.error import FFmpegError
from PIL import Image, ImageOps
from torch import Tensor

from causvid.data import clips
from causvid.data.pool import Refused
from causvid.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MOST_PIXELS = 1 << 24  # of a picture; a header that tells more is refused before anything is decoded
MOST_FRAMES = 100_000  # of a video that is read


def read_image(source: Path | bytes, height: int, width: int) -> Tensor:
    """A picture that covers the wanted size, cropped at its middle: uint8 ``3 h w``.

    Raises:
        UserError: unreadable, of no accepted format, or too large.
    """
    name = str(source) if isinstance(source, Path) else "the picture"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UserError(f"{name} has {image.width} x {image.height} pixels; at most {MOST_PIXELS} are read")
            upright = ImageOps.exif_transpose(image).convert("RGB")
            fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes a decoder raise anything
        formats = ", ".join(FORMATS)
        raise UserError(f"{name} can't be read as a picture ({type(error).__name__}); accepted: {formats}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def read_video(uri: str, height: int, width: int, fps: float, frames: int | None = None) -> Tensor:
    """The frames of a video at the wanted rate and size, uint8 ``f 3 h w``.

    Args:
        uri: a path, or anything that fsspec opens, such as ``s3://bucket/clip.mp4``.
        frames: at most so many; default all.

    Raises:
        UserError: unreadable, or not a video.
    """
    wanted = clips.Wanted(height, width, frames or MOST_FRAMES, fps)
    try:
        with fsspec.open(uri, "rb") as file, av.open(file, "r") as container:  # type: ignore[arg-type]
            stream = clips._video(container)
            aspect = stream.sample_aspect_ratio or 1
            images = [
                clips.fitted(frame, aspect, height, width)  # type: ignore[arg-type]
                for frame in clips.resampled(container, stream, wanted, 0.0, None)
            ]
    except (Refused, FFmpegError, OSError, ValueError, ImportError) as error:
        raise UserError(f"video {uri} can't be read: {getattr(error, 'strerror', None) or error}") from error
    if not images:
        raise UserError(f"video {uri} holds no frames")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def read_prompts_at(text: str) -> tuple[tuple[int, str], ...]:
    """``"0:a fox;48:a wolf"`` as ((0, "a fox"), (48, "a wolf")): prompts and the frames from which they hold.

    Raises:
        UserError: not of this form, or frames that do not ascend from 0.
    """
    out = []
    for part in re.split(r";(?=\s*\d+\s*:)", text):
        found = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(.+?)\s*", part, re.DOTALL)
        if not found:
            raise UserError(f"--prompts-at: '{part.strip()}' is not FRAME:PROMPT, as in \"0:a red fox;48:a wolf\"")
        out.append((int(found[1]), found[2]))
    frames = [frame for frame, _ in out]
    if frames[0] != 0 or any(a >= b for a, b in zip(frames, frames[1:], strict=False)):
        raise UserError(f"--prompts-at: the frames must ascend from 0, got {', '.join(map(str, frames))}")
    return tuple(out)
