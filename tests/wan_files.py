"""Small Wan networks with random weights, and files of every layout, for tests."""

from __future__ import annotations

import torch

from causvid.models.dit import VideoDiT
from causvid.models.wan import SIZES, Size
from causvid.randomness import Draw
from causvid.types import Text

SMALL = SIZES["wan_test"]


def random_model(size: Size = SMALL, seed: int = 0, **options: object) -> VideoDiT:
    """A network whose every weight is random, norms and biases too, so that no two of them can be confused."""
    model = size.build(**options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(one + noise * (0.2 if parameter.ndim == 1 or "modulation" in name else 0.15))
    return model.eval()


def random_input(
    size: Size = SMALL, batch: int = 2, frames: int = 3, height: int = 6, width: int = 10, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, Text]:
    """(latents, times, text) for a network of this size."""
    draw = Draw(seed, "input", 0, range(batch))
    x = draw.normal("x", frames, size.channels, height, width)
    t = draw.uniform("t", 1).expand(-1, frames)
    return x, t, Text(draw.normal("text", 7, size.text_dim))
