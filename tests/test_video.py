"""Videos through an mp4 and back: what must survive, and what is said when a path is wrong."""

from __future__ import annotations

import os

import pytest
import torch

from causvid.data import shapes
from causvid.data.video import encode_mp4, read_mp4, to_bytes, to_rgb, write_mp4
from causvid.errors import UserError


@pytest.fixture(scope="module")
def video():
    return shapes.render(shapes.sample_states(0, [3]), 12)[0]


def enlarged(video, scale):
    return video.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def test_round_trip_keeps_frames_size_rate_and_colours(tmp_path, video):
    path = tmp_path / "new" / "clip.mp4"
    write_mp4(path, video, fps=12, scale=4, crf=16)
    clip = read_mp4(path)
    assert clip.pixels.shape == (12, 3, 128, 128)
    assert clip.fps == 12
    error = clip.pixels - enlarged(video, 4)
    assert error.abs().mean() < 0.03
    for frame, wanted in zip(clip.pixels, enlarged(video, 4), strict=True):  # frame by frame: none shifted or repeated
        assert (frame - wanted).pow(2).mean().sqrt() < 0.08
    assert [entry.name for entry in path.parent.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("colour", [*shapes.COLOURS.values(), (1, 1, 1), (-1, -1, -1)])
def test_flat_colours_survive(tmp_path, colour):
    flat = torch.tensor(colour, dtype=torch.float32)[None, :, None, None].expand(2, 3, 16, 16)
    write_mp4(tmp_path / "flat.mp4", flat)
    assert (read_mp4(tmp_path / "flat.mp4").pixels - flat).abs().max() < 0.04


def test_pixels_stay_sharp_when_enlarged(tmp_path):
    """Nearest neighbour: a checkerboard of single pixels keeps two levels."""
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1).expand(4, 3, 8, 8)
    write_mp4(tmp_path / "board.mp4", board, scale=8)
    read = read_mp4(tmp_path / "board.mp4").pixels
    assert torch.equal(read.sign(), enlarged(board, 8))
    assert read.abs().min() > 0.9


def test_odd_sizes_become_even_by_doubling_the_last_row_and_column(tmp_path):
    odd = torch.linspace(-1, 1, 7 * 9).reshape(1, 1, 7, 9).expand(3, 1, 7, 9)
    frames = to_rgb(odd, 1)
    assert frames.shape == (3, 8, 10, 3)
    assert (frames[:, 7] == frames[:, 6]).all()
    assert (frames[:, :, 9] == frames[:, :, 8]).all()
    write_mp4(tmp_path / "odd.mp4", odd)
    assert read_mp4(tmp_path / "odd.mp4").pixels.shape == (3, 3, 8, 10)


def test_equal_videos_give_equal_bytes(video, tmp_path):
    """Also after other videos have left their traces in memory (x264's mbtree reads some)."""
    wanted = encode_mp4(video)
    for scale in (2, 8, 3):
        write_mp4(tmp_path / "other.mp4", video.flip(0), scale=scale)
        read_mp4(tmp_path / "other.mp4")
        assert encode_mp4(to_bytes(video)) == wanted
    assert torch.equal(
        to_bytes(torch.tensor([-9.0, -1, 0, 1, 9])), torch.tensor([0, 0, 128, 255, 255], dtype=torch.uint8)
    )


@pytest.mark.parametrize("shape", [(3, 32, 32), (0, 3, 8, 8), (4, 2, 8, 8), (4, 3, 0, 8)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="f c h w"):
        encode_mp4(torch.zeros(shape))


@pytest.mark.parametrize("options", [{"fps": 0}, {"scale": 0}])
def test_wrong_options_are_refused(options, video):
    with pytest.raises(ValueError, match=next(iter(options))):
        encode_mp4(video, **options)


def test_a_path_that_cannot_be_written(tmp_path, video):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(UserError, match="can't be written"):
        write_mp4(tmp_path / "file" / "clip.mp4", video)
    with pytest.raises(UserError, match="is a folder"):
        write_mp4(tmp_path, video)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path, video, monkeypatch):
    path = tmp_path / "clip.mp4"
    write_mp4(path, video)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_mp4(path, video, scale=2)
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_read(tmp_path, video):
    with pytest.raises(UserError, match=r"absent\.mp4 can't be read"):
        read_mp4(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(UserError, match=r"text\.mp4 can't be read"):
        read_mp4(tmp_path / "text.mp4")
    (tmp_path / "cut.mp4").write_bytes(encode_mp4(video)[:600])
    with pytest.raises(UserError, match=r"cut\.mp4"):
        read_mp4(tmp_path / "cut.mp4")
