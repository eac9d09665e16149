"""What the tests of losses and samplers share: networks whose right answers are known, and draws that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from causvid import schedule
from causvid.attention.masks import BlockCausal, Rule
from causvid.models.dit import VideoDiT
from causvid.types import DenoiserOutput, Scene, Text

F64 = torch.float64


class FixedDraw:
    """A step's random numbers, given by purpose; asking for any other purpose fails."""

    def __init__(self, **numbers: Tensor) -> None:
        self.numbers = numbers
        self.highs: dict[str, int] = {}

    def normal(self, purpose: str, *shape: int, dtype: torch.dtype = F64) -> Tensor:
        found = self.numbers[purpose]
        assert found.shape[1:] == shape
        return found

    def uniform(self, purpose: str, *shape: int, dtype: torch.dtype = F64) -> Tensor:
        return self.normal(purpose, *shape)

    def integer(self, purpose: str, high: int, *shape: int) -> Tensor:
        self.highs[purpose] = high
        return self.normal(purpose, *shape)

    def shared_integer(self, purpose: str, high: int) -> int:
        self.highs[purpose] = high
        return int(self.numbers[purpose])


class Call(NamedTuple):
    x: Tensor
    t: Tensor
    text: Text
    context: Tensor | None


class GaussianDenoiser(nn.Module):
    """The best denoiser of data N(mean, std^2), element by element; the mean is the prompt's number plus ``offset``.

    E[x0 | x_t] = mean + (1-t) std^2 / ((1-t)^2 std^2 + t^2) (x_t - (1-t) mean).
    """

    def __init__(self, std: float = 1.0, offset: float = 0.0, kind: str = "x0") -> None:
        super().__init__()
        self.std = nn.Parameter(torch.tensor(std, dtype=F64))
        self.offset = nn.Parameter(torch.tensor(offset, dtype=F64))
        self.kind = kind
        self.calls: list[Call] = []

    def forward(self, x: Tensor, t: Tensor, text: Text, *, context: Tensor | None = None, **_: Any) -> DenoiserOutput:
        self.calls.append(Call(x, t, text, context))
        number = text.embeddings[..., 0, 0]
        mean = (number if number.ndim == 2 else number[:, None])[..., None, None, None] + self.offset
        s = t[..., None, None, None].to(x.dtype)
        gain = (1 - s) * self.std**2 / ((1 - s) ** 2 * self.std**2 + s**2)
        x0 = mean + gain * (x - (1 - s) * mean)
        return DenoiserOutput(x, t, x0 if self.kind == "x0" else schedule.to_velocity(x, x0, t), self.kind)  # type: ignore[arg-type]


def score(x_t: Tensor, t: Tensor, mean: float | Tensor, std: float) -> Tensor:
    """Gradient of log p_t for data N(mean, std^2), ``t`` of ``b f``."""
    s = t[..., None, None, None]
    return -(x_t - (1 - s) * mean) / ((1 - s) ** 2 * std**2 + s**2)


def numbers(*values: float) -> Text:
    """Prompts that are one number each."""
    return Text(torch.tensor(values, dtype=F64)[:, None, None])


def scene(draw: Any, nets: dict[str, Any], blocks: Sequence[tuple[int, int]], rows: int = 1, **parts: Any) -> Scene:
    """A scene whose prompts are all 0 unless given."""
    parts.setdefault("text", numbers(*[0.0] * rows))
    parts.setdefault("unconditional", numbers(*[0.0] * rows))
    return Scene(draw=draw, nets=nets, blocks=tuple(blocks), **parts)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


TEXT_DIM, LATENT = 5, (2, 2, 2)  # width of a prompt's token; (c, h, w)


def tiny_dit(rule: Rule | None = None, dtype: torch.dtype = F64, kind: str = "velocity") -> VideoDiT:
    """A transformer of two layers with random weights everywhere, blocks of two frames by default."""
    model = VideoDiT(
        LATENT[0], 12, 16, 2, 2, TEXT_DIM, patch=(1, 1), freq_dim=8, prediction=kind,  # type: ignore[arg-type]
        mask=rule or BlockCausal(2),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype)


def tiny_text(rows: int = 2, frames: int | None = None, dtype: torch.dtype = F64, seed: int = 1) -> Text:
    """Random prompts of three tokens, for the clip or for each frame."""
    shape = (rows, 3, TEXT_DIM) if frames is None else (rows, frames, 3, TEXT_DIM)
    return Text(normal(*shape, seed=seed).to(dtype))
