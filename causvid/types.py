"""The few protocols and named results that every part of causvid speaks.

Shape legend, used in every docstring of this project:

    b  batch             f  latent frames      c  channels
    h  w  latent height, width                 n  tokens of one frame
    s  tokens of a pass  l  text tokens        d  width of a model or head

Latents are ``b f c h w``; pixels are ``b f c h w`` in [-1, 1]; a time ``t`` is ``b f`` in [0, 1], 1 = pure noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from causvid import schedule
from causvid.randomness import Draw


@dataclass(frozen=True, eq=False)
class Text:
    """Text conditioning: ``b l d``, one prompt for a whole clip, or ``b f l d``, one per latent frame."""

    embeddings: Tensor

    def __post_init__(self) -> None:
        if self.embeddings.ndim not in (3, 4):
            raise ValueError(f"text embeddings must be 'b l d' or 'b f l d', got shape {tuple(self.embeddings.shape)}")

    def frames(self, start: int, stop: int) -> Text:
        """The text of frames [start, stop): itself when one prompt holds for the clip."""
        return self if self.embeddings.ndim == 3 else Text(self.embeddings[:, start:stop])

    def spread(self, like: Text) -> Text:
        """The same for every frame where ``like`` has one prompt per frame; else itself."""
        if self.embeddings.ndim == like.embeddings.ndim:
            return self
        return Text(self.embeddings[:, None].expand(-1, like.embeddings.shape[1], -1, -1))

    def to(self, *args: Any, **kwargs: Any) -> Text:
        return Text(self.embeddings.to(*args, **kwargs))

    def __getitem__(self, rows: Any) -> Text:
        return Text(self.embeddings[rows])

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        return Text(torch.cat([part.embeddings for part in parts]))


@dataclass(frozen=True)
class DenoiserOutput:
    """What a denoiser says about ``x`` at time ``t``, in whichever form it predicts; the other form is derived.

    ``cache`` is the cache after a committed streaming pass, ``features`` the hidden states that were asked for.
    """

    x: Tensor
    t: Tensor
    prediction: Tensor
    kind: Literal["velocity", "x0"]
    cache: Any = None
    features: tuple[Tensor, ...] = ()

    @property
    def x0(self) -> Tensor:
        """Estimated clean latents ``b f c h w``."""
        return self.prediction if self.kind == "x0" else schedule.to_x0(self.x, self.prediction, self.t)

    @property
    def velocity(self) -> Tensor:
        """Estimated velocity, noise - data, ``b f c h w``."""
        return self.prediction if self.kind == "velocity" else schedule.to_velocity(self.x, self.prediction, self.t)


@runtime_checkable
class Denoiser(Protocol):
    """One entry for everything, because sharding and checkpointing hooks see nothing but ``forward``."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        *,
        context: Tensor | None = None,
        cache: Any = None,
        commit: bool = False,
        positions: Tensor | None = None,
        return_features: Sequence[int] = (),
    ) -> DenoiserOutput: ...


@dataclass(frozen=True)
class LossOutput:
    """A scalar to minimise, and detached numbers to log beside it."""

    value: Tensor
    logs: dict[str, float | Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StudentSample:
    """Latents that a student made, with gradient, and which frames a loss may count.

    ``x0`` is ``b f c h w``; ``t`` (``b f``) is the time each frame was denoised from; ``counts`` (``b f``, bool)
    is False where a frame is passed-through data rather than the student's work.
    """

    x0: Tensor
    t: Tensor
    counts: Tensor


class StudentInput(Protocol):
    """What the student is trained on: ``(scene, times, grad) -> StudentSample``.

    One that makes a stream, through a cache, has ``streams`` = True; the student must then be causal.
    """

    def __call__(self, scene: Scene, times: Sequence[float], grad: bool) -> StudentSample: ...


@dataclass(frozen=True)
class Edits:
    """Clips for which a prompt asks that something be changed, and how they are then: the right answer is known.

    Attributes:
        source: clean latents that noise is put over, ``b f c h w``: where ``start`` is 0 the clip as it was.
        target: the changed clip, ``b f c h w``; what is before ``start`` is not changed. Elsewhere the source is it.
        before, after: the prompts.
        start: latent frame from which the later prompt holds, ``b``; 0 is a clip that is restyled as a whole.
    """

    source: Tensor
    target: Tensor
    before: Text
    after: Text
    start: Tensor


@dataclass(frozen=True)
class Scene:
    """Everything that one training step may use; built by a stage, read by losses and student inputs.

    Attributes:
        draw: the step's random numbers.
        text, unconditional: prompts of the batch, and the empty prompt as often.
        nets: networks by role: ``student``, ``fake_score``, ``teacher``, ``discriminator``.
        blocks: blocks [start, stop) of the trained network's mask.
        data: clean latents ``b f c h w``, where the stage has data.
        trajectory: sampling trajectories, where the stage has them.
        generate: the student's own samples, with or without gradient, where the stage has a student input.
        edit: as many clips that a prompt changes, where the stage's dataset makes such.
    """

    draw: Draw
    text: Text
    unconditional: Text
    nets: Mapping[str, Any]
    blocks: tuple[tuple[int, int], ...]
    data: Tensor | None = None
    trajectory: Trajectory | None = None
    generate: Callable[[bool], StudentSample] | None = None
    edit: Callable[[], Edits] | None = None

    def per_block(self, values: Tensor) -> Tensor:
        """Spread one value per block, ``b blocks``, over the blocks' frames: ``b f``."""
        lengths = torch.tensor([stop - start for start, stop in self.blocks], device=values.device)
        return values.repeat_interleave(lengths, dim=1, output_size=self.blocks[-1][1] - self.blocks[0][0])

    def rows(self, rows: Sequence[int]) -> Scene:
        """The scene of some of its rows, which keep their random numbers: what a student input reads.

        Clips to edit and trajectories are not among it.
        """
        return Scene(
            self.draw.rows(rows), self.text[rows], self.unconditional[rows], self.nets, self.blocks,
            None if self.data is None else self.data[rows],
        )  # fmt: skip

    def samples(self, grad: bool) -> StudentSample:
        """The student's samples.

        Raises:
            ValueError: the stage has no student input.
        """
        if self.generate is None:
            raise ValueError("this loss needs a student input, and the stage has none")
        return self.generate(grad)


class Loss(Protocol):
    """A loss per player; a training stage updates each player with its own.

    Attributes:
        players: networks that it trains.
        needs: what it takes from the scene, of ``data``, ``trajectory``, ``samples`` and ``edits``; told before
            anything runs where a stage does not have it.
    """

    players: tuple[str, ...]
    needs: tuple[str, ...]

    def __call__(self, player: str, scene: Scene) -> LossOutput: ...


@dataclass(frozen=True)
class Trajectory:
    """States of one sampling run: ``states`` is ``k b f c h w`` at ``times`` (``k``), from noise to data."""

    states: Tensor
    times: Tensor

    @property
    def last(self) -> Tensor:
        return self.states[-1]


class Codec(Protocol):
    """Pixels to latents and back; ``pixel_frames(n)`` says how many frames ``n`` latents decode to.

    ``scale`` is the number of pixels per latent along height and width.
    """

    scale: int

    def encode(self, pixels: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def pixel_frames(self, latent_frames: int) -> int: ...
    def latent_frames(self, pixel_frames: int) -> int: ...


@dataclass(frozen=True)
class VaeState:
    """What a codec keeps of a stream: the last features of its convolutions along time; none before the first block."""

    features: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Streamed:
    """A block's pixels or latents, and the state from which the next block goes on."""

    value: Tensor
    state: VaeState


class TextEncoder(Protocol):
    """Prompts to ``Text``; the empty prompt is the unconditional one."""

    def encode(self, prompts: Sequence[str]) -> Text: ...


class Metric(Protocol):
    """Judges decoded videos, ``b f c h w`` in [-1, 1], against their prompts.

    Scores are one number per video, ``b``: bool where the answer is yes or no, of which the mean is a share. What has
    more axes is for ``over_set`` alone.
    """

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]: ...


@runtime_checkable
class SetMetric(Metric, Protocol):
    """A metric that also judges all videos together, as a set, from their scores."""

    def over_set(self, scores: dict[str, Tensor]) -> dict[str, float]: ...
