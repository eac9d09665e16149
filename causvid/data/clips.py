"""Clips as they come, made even: decoded, resampled in time, turned upright, resized, cropped. PyAV, no torch.

Frames are ``f h w 3`` uint8. The frame of a moment is the one that a player shows then.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation
from av.video.stream import VideoStream

from causvid.data.pool import Refused

# H.273 codes. BT.601 is what players assume of a small untagged video; it is written into the file all the same.
BT601, UNTAGGED, LIMITED = 6, 2, 1
MAX_PIXELS = 1 << 26  # of one frame
# Containers in which a seek lands anywhere, or whose times are wrong after one: these are decoded from their beginning.
UNSEEKABLE = {"mpeg", "mpegvideo"}
BACK = (2.0, 10.0, 60.0)  # seconds; where a seek landed late, how far before it to try again
QUARTER_TURNS = ((False, False, False), (True, True, False), (False, True, True), (True, False, True))
TINY = Fraction(1, 1_000_000)  # seconds; starts and ends are binary fractions of what was written
LEAST_FPS = 0.001  # rates are fractions with denominators of at most 1001
# What a file may be, whatever its name says: no playlists and scripts, which name other files and addresses.
FORMATS = "mov,matroska,avi,mpeg,mpegvideo,mpegts,flv,asf,ogg,gif,"
FORMATS += "image2,png_pipe,jpeg_pipe,bmp_pipe,webp_pipe,tiff_pipe"


@dataclass(frozen=True)
class Wanted:
    """The form of the clips that are made.

    Attributes:
        aspect: a clip whose width to height differs from the wanted one by more than this factor is refused.
        also: further sizes, (height, width); a clip takes the size whose aspect ratio is nearest to its own.
        pictures: whether still pictures are taken, as clips of one frame.
    """

    height: int = 480
    width: int = 832
    frames: int = 81
    fps: float = 16.0
    aspect: float = 2.0
    crf: int = 17
    also: tuple[tuple[int, int], ...] = ()
    pictures: bool = False

    def __post_init__(self) -> None:
        for height, width in self.sizes:
            if min(height, width) < 2 or height % 2 or width % 2 or max(height, width) > 8192:
                raise ValueError(f"height and width: even, from 2 to 8192, got {height} x {width}")
        if not 1 <= self.frames <= 100_000:
            raise ValueError(f"frames: from 1 to 100000, got {self.frames}")
        if not (LEAST_FPS <= self.fps <= 1000 and self.aspect >= 1 and 0 <= self.crf <= 51):
            raise ValueError(
                f"fps from {LEAST_FPS} to 1000, aspect at least 1, crf 0 to 51; "
                f"got {self.fps}, {self.aspect}, {self.crf}"
            )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return ((self.height, self.width), *self.also)

    def nearest(self, ratio: Fraction) -> tuple[int, int]:
        """The size for a clip of that width to height.

        Raises:
            Refused: it is too far from all of them.
        """
        off = {size: ratio / Fraction(size[1], size[0]) for size in self.sizes}
        best = min(off, key=lambda size: max(off[size], 1 / off[size]))
        if max(off[best], 1 / off[best]) > self.aspect:
            raise Refused(
                f"its aspect ratio {float(ratio):.2f} is more than {self.aspect:g} times off {best[1] / best[0]:.2f}"
            )
        return best


def encode_rgb(frames: np.ndarray, fps: float, crf: int, threads: int = 0) -> bytes:
    """An mp4 (h264, yuv420p) of even-sized frames ``f h w 3``; equal frames give equal bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_type = "AUTO"
        stream.thread_count = threads
        # Without mbtree, which reads memory it has not set at such sizes, equal videos give equal bytes.
        stream.options = {"crf": str(crf), "x264-params": "mbtree=0"}
        stream.codec_context.colorspace, stream.codec_context.color_range = BT601, LIMITED
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU601)))
        container.mux(stream.encode())
    return buffer.getvalue()


def png(image: np.ndarray) -> bytes:
    """A PNG of ``h w 3`` uint8."""
    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt = image.shape[1], image.shape[0], "rgb24"  # type: ignore[attr-defined]
    context.time_base = Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])  # type: ignore[attr-defined]


def _opened(path: str) -> InputContainer:
    try:
        return av.open(path, options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})
    except FFmpegError as error:
        raise Refused(f"can't be read as a video: {error.strerror or error}") from error
    except (OSError, ValueError) as error:
        raise Refused(f"can't be read: {error}") from error


def _is_picture(container: InputContainer) -> bool:
    """Whether the file is a still picture; a GIF may move, and is a video."""
    return container.format.name == "image2" or container.format.name.endswith("_pipe")


def _video(container: InputContainer) -> VideoStream:
    # A cover picture in a sound file is no video.
    streams = [s for s in container.streams.video if not (s.disposition and "attached_pic" in str(s.disposition))]
    if not streams:
        raise Refused("holds no video stream")
    stream = streams[0]
    if not (0 < stream.width * stream.height <= MAX_PIXELS):
        raise Refused(f"has frames of {stream.width} x {stream.height} pixels")
    stream.thread_type = "AUTO"
    stream.thread_count = 1
    return stream


def moments(container: InputContainer, stream: VideoStream, start: float) -> Iterator[tuple[Fraction, VideoFrame]]:
    """(seconds from the clip's beginning, frame), in the order they are shown, the first no later than ``start``."""
    names = set(container.format.name.split(","))
    # Where frames are not decoded in their order, AVI's times can only be counted from the first.
    whole = names & UNSEEKABLE or ("avi" in names and stream.codec_context.has_b_frames)
    ways = [0.0] if start <= 1 or whole else [start, *(start - back for back in BACK if back < start), 0.0]
    for way in ways:
        if way or way is not ways[0]:
            _seek(container, stream, way)
        shown = _increasing(_timed(container, stream, "avi" in names), stream, guess=bool(names & UNSEEKABLE))
        if not way:
            yield from shown
            return
        # A seek in a stream without an index may land late, on the key frame after what was asked for; what decoders
        # show before a key frame is made up.
        try:
            first = next((each for each in shown if each[1].key_frame or each[0] > start), None)
        except Refused:
            continue
        if first is not None and first[0] <= start:
            yield first
            yield from shown
            return


def _seek(container: InputContainer, stream: VideoStream, start: float) -> None:
    base = stream.time_base or Fraction(1, 90_000)
    # The beginning is asked for by a time before it, or a seek that lands late would miss that, too.
    place = Fraction(start or -BACK[-1])
    try:
        container.seek(int((stream.start_time or 0) + place / base), stream=stream)
    except FFmpegError:
        container.seek(0)


def _period(stream: VideoStream) -> Fraction:
    rate = stream.guessed_rate or stream.average_rate
    return 1 / rate if rate else Fraction(1, 25)


def _meant(time: Fraction, period: Fraction, tick: Fraction) -> Fraction:
    """A time as it was before a container of coarse ticks rounded it: the frame's number times the period, if near."""
    even = round(time / period) * period
    return even if abs(even - time) <= tick < period / 4 else time


def _timed(
    container: InputContainer, stream: VideoStream, in_packets: bool
) -> Iterator[tuple[Fraction | None, VideoFrame]]:
    """(seconds, where they are known, frame). ``in_packets``: the file has no times of display, only of its packets."""
    base, period = stream.time_base or Fraction(1, 90_000), _period(stream)
    zero = (stream.start_time or 0) * base
    packets: deque[Fraction] = deque()  # frames are shown in another order than they are stored, at the same times
    for packet in container.demux(stream):
        if in_packets and packet.size and packet.dts is not None:
            packets.append(packet.dts * base)
        for frame in packet.decode():
            if in_packets:
                yield (packets.popleft() - zero if packets else None), frame
            else:
                time = None if frame.pts is None else frame.pts * (frame.time_base or base) - zero
                yield (None if time is None else _meant(time, period, base)), frame


def _increasing(
    timed: Iterator[tuple[Fraction | None, VideoFrame]], stream: VideoStream, guess: bool
) -> Iterator[tuple[Fraction, VideoFrame]]:
    """The same without what is shown at no time of its own; with a guess where none is known, or a demuxer guessed."""
    last: Fraction | None = None
    late: Fraction | None = None  # by how much all made up times are: the first frame is shown at once
    try:
        for time, frame in timed:
            if frame.is_corrupt:
                raise Refused(f"is damaged near {float(last or 0):.2f} s")
            if guess and time is not None:
                late = time if late is None else late
                time -= late
            if time is None or (guess and last is not None and time <= last):
                time = Fraction(0) if last is None else last + _period(stream)
            if last is None or time > last:
                yield time, frame
                last = time
    except FFmpegError as error:
        raise Refused(f"is damaged near {float(last or 0):.2f} s: {error.strerror or error}") from error


def resampled(
    container: InputContainer, stream: VideoStream, wanted: Wanted, start: float, end: float | None
) -> Iterator[VideoFrame]:
    """The frames shown at ``start + k / fps``; fewer than wanted where the clip ends.

    A frame is shown until the next one, the last for as long as it says, or as the mean rate says.
    """
    rate = Fraction(wanted.fps).limit_denominator(1001)
    targets = [Fraction(start) + k / rate for k in range(wanted.frames)]
    if end is not None:
        targets = [time for time in targets if time + TINY < Fraction(end)]
    shown: VideoFrame | None = None
    place, last = 0, Fraction(0)
    for time, frame in moments(container, stream, start):
        while place < len(targets) and targets[place] + TINY < time:
            yield shown or frame
            place += 1
        if place == len(targets):
            return
        shown, last = frame, time
    if shown is None:
        return
    length = shown.duration * shown.time_base if shown.duration and shown.time_base else None
    until = last + (length or _period(stream))
    while place < len(targets) and targets[place] + TINY < until:
        yield shown
        place += 1


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """(transposed, then upside down, then mirrored): how the file's display matrix asks for the frame to be shown."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # other side data, of a kind that PyAV has no name for
        return QUARTER_TURNS[round(frame.rotation / 90) % 4]  # counterclockwise
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()  # x' = a x + c y, y' = b x + d y
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


def _turned(image: np.ndarray, orientation: tuple[bool, bool, bool]) -> np.ndarray:
    transposed, upside_down, mirrored = orientation
    image = image.swapaxes(0, 1) if transposed else image
    return image[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def upright(frame: VideoFrame) -> np.ndarray:
    """A frame as a player shows it, ``h w 3``: turned or mirrored as its display matrix asks, in its colours."""
    return _turned(_rgb(frame), _orientation(frame))


def _rgb(frame: VideoFrame, height: int | None = None, width: int | None = None) -> np.ndarray:
    """``h w 3``; swscale widens its filter when it shrinks: nothing aliases. Untagged, large video is BT.709."""
    large = frame.width >= 1280 or frame.height > 576
    assumed = Colorspace.ITU709 if frame.colorspace == UNTAGGED and large else None
    return frame.reformat(
        width, height, "rgb24", src_colorspace=assumed, interpolation=Interpolation.BICUBIC if height else None
    ).to_ndarray()


def fitted(frame: VideoFrame, pixel_aspect: Fraction, height: int, width: int) -> np.ndarray:
    """A frame upright, resized with antialiasing so that it covers the wanted size, and cropped at its middle."""
    orientation = _orientation(frame)
    rows, columns = (width, height) if orientation[0] else (height, width)
    shown_width = frame.width * pixel_aspect
    scale = max(Fraction(rows, frame.height), Fraction(columns) / shown_width)
    size = max(rows, round(frame.height * scale)), max(columns, round(shown_width * scale))
    small = _rgb(frame, *size)
    top, left = (size[0] - rows) // 2, (size[1] - columns) // 2
    return _turned(small[top : top + rows, left : left + columns], orientation)


def clip_frames(path: str, wanted: Wanted, start: float | None = None, end: float | None = None) -> np.ndarray:
    """The clip in the wanted form, ``f h w 3``.

    Raises:
        Refused: unreadable, damaged, too short, or of quite another aspect ratio.
    """
    with _opened(path) as container:
        stream = _video(container)
        pixel_aspect = stream.sample_aspect_ratio or Fraction(1)
        if wanted.pictures and _is_picture(container):
            wanted = replace(wanted, frames=1)
        images: list[np.ndarray] = []
        size = wanted.sizes[0]
        for frame in resampled(container, stream, wanted, start or 0.0, end):
            if not images:
                shown = Fraction(frame.width) * pixel_aspect / frame.height
                size = wanted.nearest(1 / shown if _orientation(frame)[0] else shown)
            images.append(fitted(frame, pixel_aspect, *size))
    if len(images) < wanted.frames:
        raise Refused(f"has {len(images)} frames at {wanted.fps:g} fps; {wanted.frames} are wanted")
    return np.stack(images)


def make_clip(path: str, wanted: Wanted, start: float | None, end: float | None) -> bytes:
    """The clip in the wanted form as an mp4; see :func:`clip_frames` for what is refused."""
    return encode_rgb(clip_frames(path, wanted, start, end), wanted.fps, wanted.crf, threads=1)


def all_frames(path: str) -> np.ndarray:
    """Every frame of a clip as it is shown, upright, ``f h w 3``.

    Raises:
        Refused: unreadable, damaged, or empty.
    """
    with _opened(path) as container:
        stream = _video(container)
        shown = moments(container, stream, 0.0)
        images, orientation = [], None
        for _, frame in shown:
            orientation = orientation or _orientation(frame)  # the stream's
            images.append(_turned(_rgb(frame), orientation))
    if not images:
        raise Refused("holds no frames")
    return np.stack(images)
