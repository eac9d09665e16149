"""The tiny world: one coloured shape moves over textured ground, on a torus, for ever.

A caption tells colour, shape and direction. Everything else is free: size, speed, start, the ground's level and its
texture. Motion wraps around, so a caption stays true for any number of frames and rollouts of any length can be judged.
The state of a video is a handful of numbers, and rendering is a function of the state: truth is exact.

The texture is what makes few steps hard: each of its cells is a coin toss that little signal decides, late in
denoising, so a sampler that stops early leaves it blurred.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from causvid.errors import UserError
from causvid.randomness import key
from causvid.registry import did_you_mean, register

COLOURS = {
    "red": (0.9, -0.7, -0.7),
    "green": (-0.7, 0.7, -0.7),
    "blue": (-0.6, -0.4, 0.95),
    "yellow": (0.9, 0.8, -0.75),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WORDS = ("a", *COLOURS, *SHAPES, "moves", *DIRECTIONS)

SIZE = 32  # pixels along each side of the torus
CELL = 4  # pixels along each side of a texture cell
RADIUS = (6.0, 8.0)  # pixels; the radius of the circle of equal area, where a spec says no other
SPEED = (1.5, 2.5)  # pixels per frame, where a spec says no other
MOST_SPEED, MOST_RADIUS = SIZE / 2, 10.0  # above: directions turn round; a triangle meets itself
LEAST_RADIUS = 2.5  # below: a triangle is border alone
START = (12.0, 20.0)  # pixels; the centre starts near the middle, as a cameraman would have it (decision 14)
GROUND = (-0.5, -0.1)  # grey level in [-1, 1]
TEXTURE = 0.1  # a cell is this much above or below the ground's level
EDGE = 3.0  # pixels over which a shape's border fades, as behind a lens (decision 59)


@dataclass(frozen=True)
class State:
    """Everything there is to know about a batch of videos; all tensors have ``b`` rows.

    ``colour``, ``shape`` and ``direction`` index the palettes above; ``start`` is (x, y) in pixels; ``texture`` is
    ``b cells cells`` of -1 and +1.
    """

    colour: Tensor
    shape: Tensor
    direction: Tensor
    radius: Tensor
    speed: Tensor
    start: Tensor
    ground: Tensor
    texture: Tensor

    def __getitem__(self, rows: object) -> State:
        return State(*(getattr(self, f.name)[rows] for f in fields(self)))

    def __len__(self) -> int:
        return self.colour.shape[0]

    @property
    def captions(self) -> list[str]:
        triples = zip(self.colour.tolist(), self.shape.tolist(), self.direction.tolist(), strict=True)
        return [caption(c, s, d) for c, s, d in triples]

    def positions(self, frames: int, first: int = 0) -> Tensor:
        """Centre of the shape at each frame, not wrapped: ``b f 2``, (x, y) in pixels."""
        steps = torch.arange(first, first + frames)
        velocity = _table(list(DIRECTIONS.values()))[self.direction] * self.speed[:, None]
        return self.start[:, None] + steps[None, :, None] * velocity[:, None]


def caption(colour: int, shape: int, direction: int) -> str:
    return f"a {list(COLOURS)[colour]} {SHAPES[shape]} moves {list(DIRECTIONS)[direction]}"


def parse(prompt: str) -> tuple[int, int, int]:
    """(colour, shape, direction) of a caption.

    Raises:
        UserError: a prompt that is not "a COLOUR SHAPE moves DIRECTION".
    """
    words = prompt.lower().split()
    groups = (list(COLOURS), list(SHAPES), list(DIRECTIONS))
    if len(words) == 5 and words[0] == "a" and words[3] == "moves":
        picked = (words[1], words[2], words[4])
        if all(word in group for word, group in zip(picked, groups, strict=True)):
            return groups[0].index(words[1]), groups[1].index(words[2]), groups[2].index(words[4])
    unknown = next((word for word in words if word not in WORDS), "")
    raise UserError(
        f"prompt '{prompt}' is not of this world{did_you_mean(unknown, WORDS) if unknown else ''}: "
        f"write 'a {'|'.join(COLOURS)} {'|'.join(SHAPES)} moves {'|'.join(DIRECTIONS)}'"
    )


def _table(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def sample_states(
    seed: int, indices: Sequence[int], split: str = "train",
    speed: tuple[float, float] = SPEED, radius: tuple[float, float] = RADIUS,
) -> State:  # fmt: skip
    """States of the given sample indices: a function of (seed, split, index) and the two ranges alone."""
    rows: list[tuple] = []
    for index in indices:
        g = torch.Generator().manual_seed(key("shapes", seed, split, index))
        integers = [int(torch.randint(high, (), generator=g)) for high in (len(COLOURS), len(SHAPES), len(DIRECTIONS))]
        uniform = torch.rand(5, generator=g)
        texture = torch.randint(2, (SIZE // CELL, SIZE // CELL), generator=g) * 2.0 - 1
        rows.append((*integers, uniform, texture))
    colour, shape, direction = (torch.tensor([row[i] for row in rows]) for i in range(3))
    uniform = torch.stack([row[3] for row in rows])

    def between(bounds: tuple[float, float], columns: int | slice) -> Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * uniform[:, columns]

    return State(
        colour, shape, direction, between(radius, 0), between(speed, 1), between(START, slice(2, 4)),
        between(GROUND, 4), torch.stack([row[4] for row in rows]),
    )  # fmt: skip


def limits(name: str, bounds: Sequence[float], least: float, most: float) -> tuple[float, float]:
    """The bounds of a free quantity as a pair.

    Raises:
        ValueError: other than (lowest, highest), above ``least`` and below ``most``.
    """
    low, high = bounds if len(bounds) == 2 else (0.0, 0.0)
    if not least < low < high < most:
        raise ValueError(f"{name} is (lowest, highest) between {least:g} and {most:g} px, got {list(bounds)}")
    return float(low), float(high)


def matte(shape: Tensor, radius: Tensor, centres: Tensor) -> Tensor:
    """Coverage of each pixel by the shape, with a border EDGE wide, on the torus: ``b f h w`` in [0, 1].

    A shape's area goes with the square of its inradius, and a border that fades over [-EDGE/2, EDGE/2] covers the mean
    of the areas along it: those of the inradius a + d, in the mean a^2 + EDGE^2/12. So the half-covered line is drawn
    at an inradius that is less by that, and the area is exact from LEAST_RADIUS on.

    Args:
        shape: index into SHAPES, ``b``.
        radius: radius of the circle of equal area in pixels, ``b``.
        centres: (x, y) in pixels, ``b f 2``.
    """
    axis = torch.arange(SIZE) + 0.5
    half = SIZE / 2
    x = (axis - centres[..., 0:1] + half) % SIZE - half
    y = (axis - centres[..., 1:2] + half) % SIZE - half
    x, y = x[..., None, :], y[..., :, None]
    r = radius[:, None, None, None]

    def inradius(share: float) -> Tensor:
        return (share * r**2 - EDGE**2 / 12).clamp(min=0).sqrt()

    circle = (x**2 + y**2).sqrt() - inradius(1)
    square = torch.maximum(x.abs().expand_as(circle), y.abs().expand_as(circle)) - inradius(math.pi / 4)
    slope = x.abs() * (math.sqrt(3) / 2) - y / 2
    triangle = torch.maximum(slope, y.expand_as(slope)) - inradius(math.pi / (3 * math.sqrt(3)))
    distance = torch.stack([circle, square, triangle])
    chosen = distance[shape, torch.arange(len(shape))]
    return (0.5 - chosen / EDGE).clamp(0, 1)


def ground_image(ground: Tensor, texture: Tensor) -> Tensor:
    """The ground without the shape: ``b h w``."""
    cells = F.interpolate(texture[:, None], scale_factor=CELL, mode="nearest")[:, 0]
    return ground[:, None, None] + TEXTURE * cells


def render(state: State, frames: int, first: int = 0) -> Tensor:
    """Pixels of the videos, ``b f 3 h w`` in [-1, 1], frames [first, first + frames)."""
    alpha = matte(state.shape, state.radius, state.positions(frames, first))[:, :, None]
    ground = ground_image(state.ground, state.texture)[:, None, None]
    colour = _table(list(COLOURS.values()))[state.colour][:, None, :, None, None]
    return alpha * colour + (1 - alpha) * ground


@dataclass(frozen=True)
class EditedClips:
    """Videos for which a caption asks that something be changed, and how they are then.

    Attributes:
        source, target: pixels ``b f 3 h w``: as it was, and changed; the same where the change is in mid-stream.
        before, after: captions.
        start: pixel frame from which the later caption holds, ``b``; 0 is a video that is restyled as a whole.
    """

    source: Tensor
    target: Tensor
    before: list[str]
    after: list[str]
    start: Tensor


def turned(state: State, start: Tensor, colour: Tensor, shape: Tensor, direction: Tensor) -> State:
    """The scenes as they go on from frame ``start`` (``b``) under another caption: from the place that was reached."""
    steps = (start - 1)[:, None] * state.speed[:, None]
    axes = _table(list(DIRECTIONS.values()))
    begun = state.start + steps * (axes[state.direction] - axes[direction])
    return replace(state, colour=colour, shape=shape, direction=direction, start=begun)


def sample_edits(
    seed: int, indices: Sequence[int], starts: Sequence[int], split: str,
    speed: tuple[float, float] = SPEED, radius: tuple[float, float] = RADIUS,
) -> tuple[State, State, Tensor]:  # fmt: skip
    """(states, the same changed, first frame of the change ``b``): a function of what is given alone.

    Half of them change at one of the frames ``starts``: colour, shape, direction or several of these. The others are
    restyled, from frame 0: in colour, shape or both, and move as they did.
    """
    state = sample_states(seed, indices, f"{split}/edits", speed, radius)
    rows: list[list[int]] = []
    for index in indices:
        g = torch.Generator().manual_seed(key("edits", seed, split, index))
        restyle, start = int(torch.randint(2, (), generator=g)), int(torch.randint(len(starts), (), generator=g))
        chosen = 1 + int(torch.randint(3 if restyle else 7, (), generator=g))  # what changes, as bits; not nothing
        turns = [1 + int(torch.randint(high - 1, (), generator=g)) for high in map(len, (COLOURS, SHAPES, DIRECTIONS))]
        turns = [turn * (chosen >> bit & 1) for bit, turn in enumerate(turns)]
        rows.append([*turns, 0 if restyle else starts[start]])
    colour, shape, direction, start = torch.tensor(rows).T.contiguous()
    after = turned(
        state, start, (state.colour + colour) % len(COLOURS), (state.shape + shape) % len(SHAPES),
        (state.direction + direction) % len(DIRECTIONS),
    )  # fmt: skip
    return state, after, start


@register("dataset", "shapes")
class Shapes:
    """Videos of the tiny world, rendered on the fly; no two indices are alike.

    Args:
        frames: pixel frames of a video.
        seed: seed of the world.
        speed: the slowest and the fastest motion, pixels per frame.
        radius: the smallest and the largest shape: radius of the circle of equal area, pixels.

    Raises:
        ValueError: a speed outside (0, MOST_SPEED), a radius outside (LEAST_RADIUS, MOST_RADIUS), or no ascending pair.
    """

    vocabulary = WORDS

    def __init__(
        self, frames: int = 12, seed: int = 0, speed: Sequence[float] = SPEED, radius: Sequence[float] = RADIUS
    ) -> None:
        self.frames, self.seed = frames, seed
        self.speed = limits("speed", speed, 0, MOST_SPEED)
        self.radius = limits("radius", radius, LEAST_RADIUS, MOST_RADIUS)

    @property
    def pixel_shape(self) -> tuple[int, int, int, int]:
        """(f, c, h, w) of a video."""
        return self.frames, 3, SIZE, SIZE

    def states(self, indices: Sequence[int], split: str = "train") -> State:
        return sample_states(self.seed, indices, split, self.speed, self.radius)

    def batch(self, indices: Sequence[int], split: str = "train") -> tuple[Tensor, list[str]]:
        """Pixels ``b f 3 h w`` and captions of the given sample indices."""
        states = self.states(indices, split)
        return render(states, self.frames), states.captions

    def edits(self, indices: Sequence[int], starts: Sequence[int], split: str = "train") -> EditedClips:
        """Videos that change at one of the frames ``starts``, and videos that are restyled."""
        before, after, start = sample_edits(self.seed, indices, starts, split, self.speed, self.radius)
        was, changed = render(before, self.frames), render(after, self.frames)
        first, late = start[:, None, None, None, None], torch.arange(self.frames)[None, :, None, None, None]
        target = torch.where(late >= first, changed, was)
        return EditedClips(torch.where(first > 0, target, was), target, before.captions, after.captions, start)
