"""The tiny preview decoder: names, counts and shapes of its file; streams; an independent walk, frame by frame."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from wan_files import randomise

from causvid.errors import UserError
from causvid.models.tiny_vae import TinyWanVae
from causvid.types import VaeState

CUT = (8, 6, 4, 4)


def written(folder, seed=0, extra=None):
    """A file with random weights, and a bit of an encoder."""
    state = {name: value.detach() for name, value in randomise(TinyWanVae(CUT).empty(), seed).named_parameters()}
    torch.save({**state, "encoder.0.weight": torch.zeros(2), **(extra or {})}, folder / "taew2_1.pth")
    return state


def by_hand(state, latents):
    """One frame after the other, from the weights alone: ``f c h w`` -> frames in [0, 1], the first three with them."""
    memory = {}

    def conv(x, name, padding=1):
        return F.conv2d(x, state[f"decoder.{name}.weight"], state.get(f"decoder.{name}.bias"), padding=padding)

    def walk(x, layer):
        if layer == 23:
            return [x.clamp(0, 1)]
        if layer == 0:
            return walk(torch.tanh(x / 3) * 3, 1)
        if layer in (2, 21):
            return walk(x.clamp(min=0), layer + 1)
        if layer in (6, 12, 18):
            return walk(x.repeat_interleave(2, 2).repeat_interleave(2, 3), layer + 1)
        if layer in (7, 13, 19):
            grown = conv(x, f"{layer}.conv", 0)
            return [frame for part in grown.split(x.shape[1], 1) for frame in walk(part, layer + 1)]
        if layer in (1, 8, 14, 20, 22):
            return walk(conv(x, layer), layer + 1)
        inner = torch.cat([x, memory.get(layer, torch.zeros_like(x))], 1)
        memory[layer] = x
        for number in (0, 2, 4):
            inner = conv(inner if number == 0 else inner.clamp(min=0), f"{layer}.conv.{number}")
        return walk((inner + x).clamp(min=0), layer + 1)

    return torch.cat([frame for latent in latents for frame in walk(latent[None], 0)])


def test_names_and_counts_are_those_of_the_released_file():
    state = dict(TinyWanVae().empty().named_parameters())
    assert sum(value.numel() for value in state.values()) == 9_844_611
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3) and shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.7.conv.weight"] == (256, 256, 1, 1) and shapes["decoder.19.conv.weight"] == (128, 64, 1, 1)
    assert shapes["decoder.22.weight"] == (3, 64, 3, 3) and "decoder.8.bias" not in shapes
    numbers = {int(name.split(".")[1]) for name in shapes}
    assert numbers == {1, 3, 4, 5, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 19, 20, 22}


def test_it_decodes_as_a_walk_by_hand_does(tmp_path):
    state = written(tmp_path)
    latents = torch.randn(2, 4, 16, 3, 5)
    pixels = TinyWanVae(CUT, tmp_path).decode(latents)
    assert pixels.shape == (2, 13, 3, 24, 40)
    for clip, wanted in zip(pixels, latents, strict=True):
        assert torch.allclose(clip, by_hand(state, wanted)[3:] * 2 - 1, atol=1e-5)


@pytest.mark.parametrize("cuts", [(1, 3), (2, 2), (1, 1, 1, 1)])
def test_a_stream_is_the_whole_clip(cuts, tmp_path):
    written(tmp_path)
    codec, latents = TinyWanVae(CUT, tmp_path), torch.randn(1, 4, 16, 2, 2)
    state, parts = VaeState(), []
    for part in latents.split(cuts, dim=1):
        streamed = codec.decode_block(part, state)
        state = streamed.state
        parts.append(streamed.value)
    assert torch.allclose(torch.cat(parts, 1), codec.decode(latents), atol=1e-6)
    assert [part.shape[1] for part in parts] == [4 * n - (3 if i == 0 else 0) for i, n in enumerate(cuts)]


def test_what_it_can_t_do_and_what_does_not_fit_is_told(tmp_path):
    written(tmp_path, extra={"decoder.99.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="unknown decoder.99.weight"):
        TinyWanVae(CUT, tmp_path).decode(torch.zeros(1, 1, 16, 2, 2))
    with pytest.raises(UserError, match="decodes alone"):
        TinyWanVae(CUT, tmp_path).encode(torch.zeros(1, 1, 3, 16, 16))
    with pytest.raises(UserError, match="needs taew2_1.pth"):
        TinyWanVae(CUT).decode(torch.zeros(1, 1, 16, 2, 2))
    with pytest.raises(ValueError, match="four whole numbers"):
        TinyWanVae((1, 2))
