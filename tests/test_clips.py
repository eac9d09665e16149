"""Clips of one form: which frame is shown when, which way is up, what shrinks without aliasing, what is refused."""

from __future__ import annotations

import av
import numpy as np
import pytest
from videos import levels, numbers, sound, turned, video

from causvid.data.clips import Wanted, all_frames, clip_frames, make_clip, png
from causvid.data.pool import Refused

SMALL = {"height": 48, "width": 64}


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
    from fractions import Fraction

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
