"""Engines with random weights, small enough to stream in milliseconds: the tiny world's layout, and Wan's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from causvid.attention.masks import SlidingWindow
from causvid.data.shapes import WORDS
from causvid.models.codecs import Identity, TimeFold
from causvid.models.dit import VideoDiT
from causvid.models.text import Words
from causvid.serve.checkpoints import Checkpoint
from causvid.streaming.engine import Engine

RED, BLUE = "a red circle moves left", "a blue square moves up"


def toy_engine(rule=None, codec=None, position=None, context_t=0.0, size=4):
    """An engine whose frames are ``size`` pixels wide."""
    torch.manual_seed(0)
    codec = codec or TimeFold(2)
    rule = rule or SlidingWindow(3, None, 6)
    channels = codec.latent_channels(3)
    model = VideoDiT(
        channels, 24, 32, 2, 2, 8, patch=(2, 2), freq_dim=16, theta=20.0, prediction="x0", mask=rule, position=position
    )
    torch.nn.init.normal_(model.head.weight, std=0.2)
    model.eval()
    times = (1.0, 0.9, 0.7)
    encoder = Words(WORDS, dim=8, length=5)
    return Engine(model, model, codec, encoder, (channels, size, size), 12, times, 5.0, context_t)


def wan_engine():
    """A cut-down Wan2.1 with its own kinds of codec and text; needs diffusers."""
    from wan_files import CODEC, SMALL, random_model, randomise

    from causvid.models.wan_vae import WanVae

    class Codec(WanVae):
        @property
        def network(self):
            return self._network

        _network = randomise(WanVae(**CODEC).empty(), 1).requires_grad_(False)

    model = random_model(SMALL, mask=SlidingWindow(3, None, 6))
    encoder = Words(WORDS, dim=SMALL.text_dim, length=12)
    return Engine(model, model, Codec(**CODEC), encoder, (16, 2, 4), 6, (1.0, 0.7), 8.0)


CODECS = {"identity": lambda: toy_engine(codec=Identity()), "time_fold": toy_engine, "wan_vae": wan_engine}


def pixels(engine, frames, batch=1, seed=0):
    """Random frames of an engine's size, uint8 ``b f 3 h w``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, frames, 3, *engine.pixel_size)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


@dataclass(frozen=True)
class Toy(Checkpoint):
    """A checkpoint that a server's worker can load without any file."""

    size: int = 4

    def load(self):
        return toy_engine(size=self.size)
