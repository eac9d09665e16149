"""Clips of one form: which frame is shown when, which way is up, what shrinks without aliasing, what is refused."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from videos import arranged, levels, numbers, sound, turned, video

from causvid.data.clips import Wanted, all_frames, clip_frames, make_clip, moments, png
from causvid.data.pool import Refused
from causvid.data.video import read_mp4, to_bytes

SMALL = {"height": 48, "width": 64}


B_FRAMES = {"bf": "2", "b_strategy": "0"}
FILMS = {
    "mp4": {"form": "mp4", **B_FRAMES},
    "mkv": {"form": "matroska", **B_FRAMES},
    "flv": {"form": "flv", **B_FRAMES},
    "ts": {"form": "mpegts"},
    "mpeg2.ts": {"form": "mpegts", "codec": "mpeg2video", **B_FRAMES},
    "mpg": {"form": "mpeg", "codec": "mpeg2video", **B_FRAMES},
    "avi": {"form": "avi"},
    "mpeg4.avi": {"form": "avi", "codec": "mpeg4"},
    "reordered.avi": {"form": "avi", **B_FRAMES},
    "open.avi": {"form": "avi", "x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=20:scenecut=0"},
    "open.ts": {"form": "mpegts", "x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=20:scenecut=0"},
}


def put(tmp_path, content, name="clip.mp4"):
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


@pytest.mark.parametrize(("fps", "frames"), [(25, 20), (10, 8), (50, 30), (7.5, 6)])
def test_each_moment_shows_the_frame_of_that_time(tmp_path, fps, frames):
    path = put(tmp_path, video(levels(30)))
    found = numbers(clip_frames(path, Wanted(**SMALL, frames=frames, fps=fps)))
    assert found == [int(k * 25 / fps + 1e-9) for k in range(frames)]


def test_uneven_times_are_respected(tmp_path):
    times = [0, 40, 400, 440, 900, 1000]
    path = put(tmp_path, video(levels(6), times))
    found = numbers(clip_frames(path, Wanted(**SMALL, frames=10, fps=10)))
    assert found == [max(n for n, time in enumerate(times) if time <= 100 * k) for k in range(10)]


def test_start_and_end(tmp_path):
    path = put(tmp_path, video(levels(60), fps=20))
    wanted = Wanted(**SMALL, frames=5, fps=10)
    assert numbers(clip_frames(path, wanted, start=1.5)) == [30, 32, 34, 36, 38]
    assert numbers(clip_frames(path, wanted, start=2.0, end=2.5)) == [40, 42, 44, 46, 48]
    with pytest.raises(Refused, match="has 4 frames at 10 fps; 5 are wanted"):
        clip_frames(path, wanted, start=2.0, end=2.4)
    with pytest.raises(Refused, match="has 0 frames"):
        clip_frames(path, wanted, start=9.0)


def ideal(fps, rate, frames, start=0):
    """Which frames a film of ``fps`` frames a second shows at ``start + k / rate``."""
    return [int((Fraction(str(start)) + Fraction(k) / Fraction(rate)) * Fraction(fps)) for k in range(frames)]


@pytest.mark.parametrize("name", FILMS)
def test_parts_begin_at_their_start_in_every_container(name, tmp_path):
    path = put(tmp_path, video(levels(60), fps=16, gap=20, **FILMS[name]), f"clip.{name}")
    for start, rate in product([0, 0.3, 1.2, 1.25, 1.3, 2.0, 2.49, 2.5, 2.7, 3.3], [16, 12, 32]):
        found = numbers(clip_frames(path, Wanted(**SMALL, frames=5, fps=rate), start=start))
        assert found == ideal(16, rate, 5, start), (start, rate)
    assert numbers(clip_frames(path, Wanted(**SMALL, frames=4, fps=16), start=2.7, end=2.93)) == [43, 44, 45, 46]
    with pytest.raises(Refused, match="has 3 frames"):
        clip_frames(path, Wanted(**SMALL, frames=4, fps=16), start=2.75, end=2.9375)


@pytest.mark.parametrize("name", ["mp4", "mkv", "flv", "ts", "mpg", "avi"])
@pytest.mark.parametrize("fps", [16, 24, 30, Fraction(24000, 1001), 60])
def test_times_that_a_container_rounds_lose_no_frame(name, fps, tmp_path):
    if name == "mpg" and fps == 16:
        pytest.skip("mpeg2 knows no such rate")
    path = put(tmp_path, video(levels(30), fps=fps, **FILMS[name]), f"clip.{name}")
    for rate, frames in [(fps, 30), (2 * fps, 60), (fps / 2, 15), (Fraction(fps) * 4 / 3, 40)]:
        wanted = Wanted(**SMALL, frames=frames, fps=float(rate))
        assert numbers(clip_frames(path, wanted)) == ideal(3, 3 * rate / fps, frames), rate
        with pytest.raises(Refused, match=f"has {frames} frames"):
            clip_frames(path, Wanted(**SMALL, frames=frames + 1, fps=float(rate)))


def test_a_start_is_the_decimal_number_that_is_written(tmp_path):
    path = put(tmp_path, video(levels(40), form="avi"))
    for number in range(40):
        found = numbers(clip_frames(path, Wanted(**SMALL, frames=1, fps=25), start=round(number * 0.04, 2)))
        assert found == [number]


@pytest.mark.parametrize("name", ["mp4", "mkv", "ts", "open.ts", "avi", "mpeg4.avi"])
def test_what_lies_long_before_the_start_is_not_decoded(name, tmp_path):
    path = put(tmp_path, video(levels(60), fps=10, gap=10, **FILMS[name]), f"clip.{name}")
    with av.open(path) as container:
        times = [time for time, _ in moments(container, container.streams.video[0], 5.5)]
    assert 3 <= times[0] <= 5.5 and times[-1] == pytest.approx(5.9, abs=0.01)


def test_the_last_frame_lasts_until_its_end(tmp_path):
    path = put(tmp_path, video(levels(10), fps=10))
    assert len(clip_frames(path, Wanted(**SMALL, frames=20, fps=20))) == 20
    with pytest.raises(Refused, match="has 20 frames"):
        clip_frames(path, Wanted(**SMALL, frames=21, fps=20))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_clips_come_out_upright(tmp_path, degrees):
    upright = np.zeros((3, 64, 48, 3), np.uint8)
    upright[:, :32, :24] = 200  # a light corner, top left
    stored = np.rot90(upright, degrees // 90, axes=(1, 2))  # a player turns it back, clockwise
    path = put(tmp_path, turned(video(stored), degrees))
    found = clip_frames(path, Wanted(64, 48, 2, 10))
    assert found.shape == (2, 64, 48, 3)
    assert found[0, 4:28, 4:20].mean() > 180 and found[0, 36:].mean() < 20 and found[0, :28, 28:].mean() < 20


@pytest.mark.parametrize(
    "matrix", [m for m in product((-1, 0, 1), repeat=4) if m.count(0) == 2 and m[0] * m[3] != m[1] * m[2]]
)
def test_turned_and_mirrored_clips_are_shown_as_asked(matrix, tmp_path):
    """In 'process', in 'encode' and where a video is read: each pixel lies where the display matrix says."""
    stored = np.zeros((3, 48, 64, 3), np.uint8)
    stored[:, :24, :32], stored[:, 24:, :32] = 200, 100  # left: light above, grey below
    y, x = np.indices((48, 64))
    a, b, c, d = matrix
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    shown = np.zeros((down.max() + 1, across.max() + 1))
    shown[down, across] = stored[0, ..., 0]
    path = put(tmp_path, arranged(video(stored), matrix))
    read = to_bytes(read_mp4(tmp_path / "clip.mp4").pixels).permute(0, 2, 3, 1).numpy()
    for found in (clip_frames(path, Wanted(*shown.shape, 3, 25)), all_frames(path), read):
        assert found.shape == (3, *shown.shape, 3)
        assert np.abs(found[1] - shown[..., None]).mean() < 4


@pytest.mark.parametrize(
    ("lines", "tag", "matrix"),
    [
        (576, None, Colorspace.ITU601),
        (720, None, Colorspace.ITU709),
        (720, 6, Colorspace.ITU601),
        (718, 1, Colorspace.ITU709),
    ],
)
def test_colours_of_large_untagged_films_are_bt709(lines, tag, matrix, tmp_path):
    colour = (200, 60, 30)
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = lines, 64, "yuv420p"
        stream.codec_context.colorspace = tag or 2
        frame = av.VideoFrame.from_ndarray(np.full((lines, 64, 3), colour, np.uint8), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=matrix)
        frame.colorspace = tag or 2
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path = str(tmp_path / "clip.mp4")
    read = to_bytes(read_mp4(tmp_path / "clip.mp4").pixels).permute(0, 2, 3, 1).numpy()
    for found in (clip_frames(path, Wanted(320, 32, 1, 25)), all_frames(path), read):
        assert np.abs(found.astype(float) - colour).max() <= 3


def test_shrinking_does_not_alias(tmp_path):
    board = np.indices((384, 512)).sum(0) % 2 * 255  # one-pixel checks must become grey, not moire
    path = put(tmp_path, video(np.repeat(board[None, ..., None], 3, 3).repeat(2, 0).astype(np.uint8)))
    small = clip_frames(path, Wanted(48, 64, 1, 10)).astype(float)
    assert abs(small[:, 4:-4, 4:-4].mean() - 127) < 6 and small[:, 4:-4, 4:-4].std() < 4


def test_the_middle_is_kept_and_odd_sizes_are_taken(tmp_path):
    frames = np.zeros((2, 51, 123, 3), np.uint8)
    frames[:, :, 41:82] = 200
    small = clip_frames(put(tmp_path, video(frames)), Wanted(48, 48, 1, 10, aspect=3))
    assert small[0, :, 10:38].mean() > 180 and small.shape == (1, 48, 48, 3)


def test_pixels_that_are_not_square(tmp_path):
    path = put(tmp_path, video(levels(2, 48, 48), aspect=Fraction(2, 1)))
    with pytest.raises(Refused, match="aspect ratio 2.00 is more than 1.5 times off 1.00"):
        clip_frames(path, Wanted(48, 48, 1, 10, aspect=1.5))
    assert clip_frames(path, Wanted(48, 96, 1, 10, aspect=1.1)).shape == (1, 48, 96, 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "can't be read"),
        (b"\0" * 999, "can't be read"),
        (sound(), "no video stream"),
        (b"<html>", "can't be read"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path, content, reason):
    with pytest.raises(Refused, match=reason):
        clip_frames(put(tmp_path, content), Wanted(**SMALL, frames=2, fps=10))


def test_a_clip_cut_short_is_refused(tmp_path):
    content = video(levels(30, 96, 128) + np.random.default_rng(0).integers(0, 9, (30, 96, 128, 3), np.uint8))
    with pytest.raises(Refused):
        clip_frames(put(tmp_path, content[: len(content) // 2]), Wanted(**SMALL, frames=20, fps=25))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_clip_whose_damage_the_decoder_hides_is_refused(share, tmp_path):
    """It shows something in the place of what it can't read, raises nothing, and marks the frame."""
    content = bytearray(
        video(levels(30, 96, 128) + np.random.default_rng(0).integers(0, 9, (30, 96, 128, 3), np.uint8))
    )
    at = content.find(b"mdat") + int(share * (content.find(b"moov") - content.find(b"mdat")))
    content[at : at + 64] = bytes(64)
    path = put(tmp_path, bytes(content))
    with av.open(path) as container:
        assert len(list(container.decode(video=0))) == 30
    with pytest.raises(Refused, match="is damaged near"):
        all_frames(path)


def test_a_made_clip_has_the_wanted_form_and_the_same_bytes_each_time(tmp_path):
    path, wanted = put(tmp_path, video(levels(30))), Wanted(32, 48, 9, 8)
    content = make_clip(path, wanted, None, None)
    assert content == make_clip(path, wanted, None, None)
    again = put(tmp_path, content, "again.mp4")
    with av.open(again) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.height, stream.width, stream.average_rate) == ("h264", 32, 48, 8)
    shown = [25 * k // 8 for k in range(9)]
    assert all(abs(a - b) <= 1 for a, b in zip(numbers(all_frames(again)), shown, strict=True))


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 33},
        {"width": 0},
        {"frames": 0},
        {"fps": 0.0},
        {"fps": 0.0001},
        {"fps": float("nan")},
        {"aspect": 0.5},
    ],
)
def test_impossible_forms_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        Wanted(**wrong)


def test_png(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    assert np.array_equal(all_frames(put(tmp_path, png(image), "a.png"))[0], image)
