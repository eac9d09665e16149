"""Which frames come out of every kind of container, by arithmetic on the times at which they were put in."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from videos import arranged, turned, video

from causvid.data import clips
from causvid.data.clips import Wanted, all_frames, clip_frames

COUNT, SIDE = 240, 32
KINDS = {  # name: codec, rate
    "a.mp4": ("libx264", 25), "a.mov": ("libx264", 16), "a.mkv": ("libx264", 16), "b.mkv": ("libx264", 24),
    "c.mkv": ("libx264", 30), "d.mkv": ("libx264", Fraction(30000, 1001)), "a.webm": ("libvpx", 25),
    "a.flv": ("libx264", 16), "a.avi": ("libx264", 16), "b.avi": ("mpeg4", 16), "a.ts": ("libx264", 25),
    "b.ts": ("mpeg2video", 25), "a.mpg": ("mpeg2video", 25), "a.m2v": ("mpeg2video", 25),
}  # fmt: skip


def written(path, codec, rate):
    """Frames whose eight patches, light or dark, are the bits of their number; key frames are far apart."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height = stream.width = SIDE
        stream.pix_fmt, stream.gop_size = "yuv420p", 60
        if codec == "libx264":
            stream.options = {"crf": "8", "bf": "2", "preset": "veryfast"}
        elif codec == "libvpx":
            stream.options = {"deadline": "realtime", "cpu-used": "8", "b": "2M"}
        else:
            stream.max_b_frames, stream.bit_rate = 2, 2_000_000
        for number in range(COUNT):
            bits = np.array([number >> place & 1 for place in range(8)], np.uint8).reshape(2, 4) * 235 + 10
            image = bits.repeat(SIDE // 2, 0).repeat(SIDE // 4, 1)[..., None].repeat(3, 2)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def number(image):
    patches = image[..., 0].reshape(2, SIDE // 2, 4, SIDE // 4).mean((1, 3)) > 128
    return sum(int(bit) << place for place, bit in enumerate(patches.ravel()))


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    codec, rate = KINDS[request.param]
    return written(tmp_path_factory.mktemp("kinds") / request.param, codec, rate), Fraction(rate)


@pytest.mark.parametrize("start", ["0", "0.5", "1.5", "2.4", "5", "7.3"])
def test_the_frames_of_a_time_at_their_own_rate_and_at_another(kind, start):
    """The frame shown at t is the last one whose time is not after t."""
    path, rate = kind
    for fps in (rate, Fraction(10)):
        found = [number(image) for image in clip_frames(path, Wanted(SIDE, SIDE, 6, float(fps)), float(start))]
        times = [Fraction(start) + k / fps for k in range(6)]
        assert found == [int(time * rate) for time in times]


def test_every_frame_comes_once_and_in_order(kind):
    assert [number(image) for image in all_frames(kind[0])] == list(range(COUNT))


def test_a_late_seek_in_a_stream_whose_first_key_frames_are_far_apart(tmp_path, monkeypatch):
    """Nothing of the clip is replaced by a frame that is shown later, even where no seek helps but the beginning."""
    monkeypatch.setattr("causvid.data.clips.BACK", (0.1,))
    path = written(tmp_path / "a.ts", "libx264", 25)
    found = [number(image) for image in clip_frames(path, Wanted(SIDE, SIDE, 3, 25), 2.2)]
    assert found == [55, 56, 57]


@pytest.mark.parametrize(
    "matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0), (0, 1, -1, 0), (1, 0, 0, 1)]
)
def test_a_display_matrix_says_where_each_corner_goes(tmp_path, matrix):
    """x' = a x + c y and y' = b x + d y, about the middle: mirrored pictures, too."""
    stored = np.zeros((2, 48, 64, 3), np.uint8)
    stored[:, :24, :32] = 240  # the light corner is at (-1, -1)
    path = tmp_path / "clip.mp4"
    path.write_bytes(arranged(video(stored), matrix))
    a, b, c, d = matrix
    x, y = -a - c, -b - d
    shape = (64, 48) if a == 0 else (48, 64)
    for frames in (all_frames(str(path)), clip_frames(str(path), Wanted(*shape, 2, 25))):
        assert frames.shape[1:3] == shape
        light = frames[0].mean(2) > 120
        rows, columns = np.nonzero(light)
        assert light.mean() == pytest.approx(0.25, abs=0.05)
        assert (np.sign(columns.mean() - shape[1] / 2), np.sign(rows.mean() - shape[0] / 2)) == (x, y)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_side_data_without_a_name_hides_no_turn(tmp_path, degrees):
    """PyAV refuses to list the side data of a frame that has some of a kind that it doesn't know."""
    (tmp_path / "clip.mp4").write_bytes(turned(video(np.zeros((2, 48, 64, 3), np.uint8)), degrees))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frame = next(container.decode(video=0))
    listed = clips._orientation(frame)
    assert listed != (False, False, False) and clips._orientation(Unlisted(frame.rotation)) == listed  # type: ignore[arg-type]


class Unlisted:
    def __init__(self, rotation):
        self.rotation = rotation

    @property
    def side_data(self):
        raise ValueError("31 is not a valid Type")


@pytest.mark.parametrize(("height", "width", "law"), [(720, 1280, Colorspace.ITU709), (480, 640, Colorspace.ITU601)])
def test_untagged_video_is_read_by_its_size(tmp_path, height, width, law):
    """Large video is BT.709 where nothing is said, as players have it, and small video BT.601."""
    colour = (200, 60, 30)
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "1"}
        image = np.full((height, width, 3), colour, np.uint8)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=law)))
        container.mux(stream.encode())
    for frames in (
        all_frames(str(tmp_path / "clip.mp4")),
        clip_frames(str(tmp_path / "clip.mp4"), Wanted(72, 128, 1, 25)),
    ):
        assert frames[0].reshape(-1, 3).mean(0) == pytest.approx(colour, abs=4)
