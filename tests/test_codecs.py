"""Codecs: round trips without loss, and the frames that fit."""

from __future__ import annotations

import pytest
import torch

from causvid.models.codecs import Identity, TimeFold


def video(frames, rows=2):
    return torch.rand(rows, frames, 3, 4, 6, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 7])
def test_identity(frames):
    codec, pixels = Identity(), video(frames)
    assert torch.equal(codec.decode(codec.encode(pixels)), pixels)
    assert codec.latent_frames(frames) == codec.pixel_frames(frames) == frames
    assert codec.latent_channels(3) == 3


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("latents", [1, 2, 5])
def test_time_fold_loses_nothing(k, latents):
    codec = TimeFold(k)
    frames = 1 + k * (latents - 1)
    pixels = video(frames)
    encoded = codec.encode(pixels)
    assert encoded.shape == (2, latents, 3 * k, 4, 6)
    assert torch.equal(codec.decode(encoded), pixels)
    assert codec.pixel_frames(latents) == frames
    assert codec.latent_frames(frames) == latents
    assert codec.latent_channels(3) == 3 * k


def test_time_fold_of_any_length_rounds_at_most():
    codec = TimeFold(7)
    torch.testing.assert_close(codec.decode(codec.encode(video(15))), video(15))


def test_first_frame_stands_alone():
    codec, pixels = TimeFold(4), video(9)
    latents = codec.encode(pixels)
    assert torch.equal(codec.encode(pixels[:, :1]), latents[:, :1])  # a clip of one frame is an image
    for copy in latents[:, 0].unflatten(1, (4, 3)).unbind(1):
        assert torch.equal(copy, pixels[:, 0])
    for n in range(1, 3):  # later latents hold four frames each, in order
        assert torch.equal(latents[:, n].unflatten(1, (4, 3)), pixels[:, 4 * n - 3 : 4 * n + 1])


def test_a_first_latent_whose_copies_differ_is_averaged():
    latents = torch.tensor([0.1, 0.2, 0.3, 0.6]).reshape(1, 1, 4, 1, 1)
    assert TimeFold(4).decode(latents).item() == pytest.approx(0.3)


@pytest.mark.parametrize("codec", [Identity(), TimeFold(2)])
def test_decoded_pixels_are_clipped(codec):
    assert codec.decode(torch.full((1, 2, 2, 1, 1), 3.0)).unique().tolist() == [1.0]
    assert codec.decode(torch.full((1, 2, 2, 1, 1), -3.0)).unique().tolist() == [-1.0]


@pytest.mark.parametrize(("k", "frames"), [(4, 0), (4, 4), (4, 12), (2, 2)])
def test_lengths_that_do_not_fold_are_refused(k, frames):
    with pytest.raises(ValueError, match=rf"1 \+ {k} n frames, got {frames}"):
        TimeFold(k).latent_frames(frames)
    with pytest.raises(ValueError, match=f"got {frames}"):
        TimeFold(k).encode(video(frames))


def test_refuses_to_fold_nothing():
    with pytest.raises(ValueError, match="at least 1"):
        TimeFold(0)
