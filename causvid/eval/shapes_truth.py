"""Truth metrics of the tiny world: fit the state of a video, then compare it with the caption and with physics.

The fit is closed form where it can be: the shape is what has colour (the ground is grey), its centre is the circular
mean of its coverage, its motion a straight line, its size an area; only the kind of shape is found by trial. Rendered
data scores 1.0; tests hold that every deliberate corruption is seen by the metric that should see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from causvid.data import shapes
from causvid.registry import register

MIN_OVERLAP = 0.7  # soft IoU of coverage and template; rendered data has at least .9
FAINT = 0.2  # coverage up to this counts as none
UNSEEN = shapes.SIZE / 2  # px; the trajectory of what is not there, as far off as the torus allows: the worst, not best
MAX_FIDELITY = 50.0  # dB; a video equal to its fitted rendering is reported as this


@dataclass(frozen=True)
class Fit:
    """The fitted state of each video (``b``), and how well it fits."""

    state: shapes.State
    centres: Tensor  # b f 2, (x, y) on a straight line, pixels
    wobble: Tensor  # b, rms distance of the seen centres from that line, pixels
    overlap: Tensor  # b, soft IoU of the seen coverage with the template
    contrast: Tensor  # b, texture amplitude relative to the truth's: 1 is sharp, 0 is blurred away
    velocity: Tensor  # b 2, pixels per frame


def _coverage(videos: Tensor) -> tuple[Tensor, Tensor]:
    """(colour index ``b``, coverage ``b f h w`` in [0, 1]): how much of the palette's colour each pixel holds."""
    chroma = videos - videos.mean(2, keepdim=True)
    palette = torch.tensor(list(shapes.COLOURS.values()), device=videos.device, dtype=videos.dtype)
    palette = palette - palette.mean(1, keepdim=True)
    alpha = torch.einsum("bfchw,kc->bkfhw", chroma, palette) / palette.pow(2).sum(1)[:, None, None, None]
    error = (chroma[:, None] - alpha[:, :, :, None] * palette[:, None, :, None, None]).pow(2).sum((2, 3, 4, 5))
    colour = (error + 1e9 * (alpha.clamp(min=0).sum((2, 3, 4)) < 1)).argmin(1)
    return colour, alpha[torch.arange(len(videos)), colour].clamp(0, 1)


def _firm(alpha: Tensor) -> Tensor:
    """Coverage above its faint part, which in an imperfect video is the noise of the whole ground; in [0, 1]."""
    return ((alpha - FAINT) / (1 - FAINT)).clamp(0, 1)


def _centres(alpha: Tensor) -> Tensor:
    """Circular mean of the coverage per frame, unwrapped along time: ``b f 2``."""
    size = alpha.shape[-1]
    angle = 2 * math.pi * (torch.arange(size, device=alpha.device) + 0.5) / size
    weights = alpha.to(torch.float64)
    out = []
    for profile in (weights.sum(-2), weights.sum(-1)):
        out.append(torch.atan2((profile * angle.sin()).sum(-1), (profile * angle.cos()).sum(-1)))
    wrapped = torch.stack(out, -1) * size / (2 * math.pi)
    step = (wrapped[:, 1:] - wrapped[:, :-1] + size / 2) % size - size / 2
    return torch.cat([wrapped[:, :1] % size, step], 1).cumsum(1)


def _straight(centres: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares line through the centres: (points on it ``b f 2``, velocity ``b 2``)."""
    frames = centres.shape[1]
    time = torch.arange(frames, device=centres.device, dtype=centres.dtype) - (frames - 1) / 2
    velocity = torch.einsum("f,bfd->bd", time, centres) / time.pow(2).sum().clamp(min=1e-9)
    return centres.mean(1, keepdim=True) + time[:, None] * velocity[:, None], velocity


def _ground(videos: Tensor, alpha: Tensor, colour: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Level ``b``, texture ``b cells cells`` and its contrast ``b``.

    At the shape's border a pixel is a mixture, by its coverage ``alpha``, of the shape's grey and its cell's; elsewhere
    faint coverage is a tint. Least squares for the cells.
    """
    border = F.max_pool2d(F.pad(_firm(alpha), (1, 1, 1, 1), mode="circular"), 3, stride=1) > 0
    alpha = alpha * border
    palette = torch.tensor(list(shapes.COLOURS.values()), device=videos.device, dtype=videos.dtype)
    free = 1 - alpha
    rest = videos.mean(2) - alpha * palette.mean(1)[colour][:, None, None, None]
    cell = shapes.CELL
    weight, total = (
        rearrange(each, "b f (y p) (x q) -> b y x (f p q)", p=cell, q=cell).sum(-1) for each in (free**2, free * rest)
    )
    values = total / weight.clamp(min=1e-6)
    known = (weight > 1).to(values.dtype)  # a cell that was hidden all the time says nothing
    level, half = _mean(values, known), torch.zeros(len(values))
    for _ in range(8):  # two means: their middle parts the cells, the cells of each part give its mean
        above = known * (values > level[:, None, None])
        high, low = _mean(values, above), _mean(values, known - above)
        parted = (above.sum((1, 2)) > 0) & ((known - above).sum((1, 2)) > 0)  # a flat ground has one level, no texture
        level, half = torch.where(parted, (high + low) / 2, level), torch.where(parted, (high - low) / 2, 0.0)
    return level, torch.where(values >= level[:, None, None], 1.0, -1.0), half / shapes.TEXTURE


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of each row's cells, ``b y x`` -> ``b``; 0 where there is no weight."""
    return (values * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Soft intersection over union of two coverages ``b f h w``."""
    return torch.minimum(a, b).sum((1, 2, 3)) / torch.maximum(a, b).sum((1, 2, 3)).clamp(min=1e-9)


def _shape(alpha: Tensor, area: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kind of shape whose template covers most alike: (kind ``b``, radius ``b``, centres ``b f 2``, overlap ``b``).

    Circular means and firm areas are slightly off for shapes with corners. The same measure of a template says by how
    much, and is taken back.
    """
    size = alpha.shape[-1]
    radius = (area / math.pi).sqrt().clamp(1.0, 12.0)
    tried = []
    for index in range(len(shapes.SHAPES)):
        kind = torch.full((len(alpha),), index)
        template = _firm(shapes.matte(kind, radius, centres.float()))
        off = ((_centres(template) - centres + size / 2) % size - size / 2).mean(1, keepdim=True)
        grown = (radius * (area / template.sum((2, 3)).median(1).values).sqrt()).clamp(1.0, 12.0)
        overlap = _overlap(_firm(shapes.matte(kind, grown, (centres - off).float())), alpha)
        tried.append((overlap, grown, centres - off))
    overlap, kind = torch.stack([each[0] for each in tried]).max(0)
    rows = torch.arange(len(alpha))
    radius, centres = (torch.stack([each[i] for each in tried])[kind, rows] for i in (1, 2))
    return kind, radius, centres, overlap


def fit(videos: Tensor) -> Fit:
    """Fit the world's state to videos, ``b f 3 h w`` in [-1, 1]; at least two frames."""
    videos = videos.detach().float().clamp(-1, 1).cpu()
    colour, covered = _coverage(videos)
    alpha = _firm(covered)
    seen = _centres(alpha)
    centres, velocity = _straight(seen)
    wobble = (seen - centres).pow(2).sum(-1).mean(1).sqrt()
    area = alpha.sum((2, 3)).median(1).values
    kind, radius, centres, overlap = _shape(alpha, area, centres)
    wobble = torch.where(overlap > 0, wobble, UNSEEN)
    directions = torch.tensor(list(shapes.DIRECTIONS.values()), dtype=velocity.dtype)
    direction = (velocity @ directions.T).argmax(1)
    level, texture, contrast = _ground(videos, covered, colour)
    state = shapes.State(
        colour, kind, direction, radius, velocity.norm(dim=1).float(), (centres[:, 0] % shapes.SIZE).float(),
        level, texture,
    )  # fmt: skip
    return Fit(state, centres.float(), wobble.float(), overlap, contrast, velocity.float())


def rendering(fitted: Fit) -> Tensor:
    """The clean video of a fitted state, along the fitted line: ``b f 3 h w`` in [-1, 1]."""
    state = fitted.state
    alpha = shapes.matte(state.shape, state.radius, fitted.centres)[:, :, None]
    ground = shapes.ground_image(state.ground, state.texture)[:, None, None]
    palette = torch.tensor(list(shapes.COLOURS.values()))
    return alpha * palette[state.colour][:, None, :, None, None] + (1 - alpha) * ground


def fidelity(videos: Tensor, fitted: Fit) -> Tensor:
    """PSNR in dB (peak to peak 2) of each video against the clean rendering of its fitted state, ground included.

    Read contrast beside it: an empty, flat grey video equals its rendering but for the texture that it lacks.
    """
    error = (videos.detach().float().clamp(-1, 1).cpu() - rendering(fitted)).pow(2).mean((1, 2, 3, 4))
    return (10 * torch.log10(4 / error.clamp(min=1e-12))).clamp(max=MAX_FIDELITY)


def _uniform_gap(values: Tensor, low: float, high: float) -> Tensor:
    """Distance (Wasserstein-1) of a sample from the uniform law on [low, high], in units of its range."""
    quantiles = (torch.arange(len(values)) + 0.5) / len(values)
    return ((values.sort().values - low) / (high - low) - quantiles).abs().mean()


def _texture_gap(textures: Tensor) -> Tensor:
    """Mean squared agreement of two videos' textures (``b cells`` of -1, 1) above that of coin tosses; 1: all alike."""
    count, cells = textures.shape
    agreement = ((textures @ textures.T) / cells).pow(2)
    pairs = (agreement.sum() - agreement.trace()) / (count * (count - 1))
    return ((pairs - 1 / cells) / (1 - 1 / cells)).clamp(min=0)


def _spread(values: Tensor, groups: Tensor) -> Tensor:
    """Mean distance of two values of one group (``b b``, bool); a third of the range for a uniform law."""
    distance = (values[:, None] - values[None]).abs() * groups
    return distance.sum() / (groups.sum() - len(groups))


@register("metric", "shapes_truth")
class ShapesTruth:
    """Exact judgement of tiny-world videos: colour, shape, direction, all three (``ok``), and how well they are drawn.

    Per video: ``colour``, ``shape``, ``direction``, ``ok`` (0 or 1); ``fidelity`` (dB); ``contrast`` (1 is sharp);
    ``overlap`` (IoU); ``trajectory`` (px from uniform straight motion; 16 where nothing is seen); ``speed`` (px per
    frame). Fidelity needs contrast beside it: an empty grey video has 25 dB, and a contrast of 0.
    Over the set (mode loss; 0 is best): ``size_gap``, ``speed_gap``, ``ground_gap`` and ``start_gap``, the distance
    from their true laws; ``texture_gap``, how alike the textures of two videos are; ``caption_gap``, how far the spread
    among videos of one caption is from the true one.

    Args:
        speed: slowest and fastest motion, pixels per frame, of which half of the slowest counts as motion; by default
            the world's.
        radius: of the smallest and the largest shape, pixels; by default the world's.
    """

    def __init__(self, speed: Sequence[float] | None = None, radius: Sequence[float] | None = None) -> None:
        self.speed = shapes.limits("speed", speed or shapes.SPEED, 0, shapes.MOST_SPEED)
        self.radius = shapes.limits("radius", radius or shapes.RADIUS, shapes.LEAST_RADIUS, shapes.MOST_RADIUS)

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Per-video scores, each ``b``."""
        fitted = fit(videos)
        wanted = torch.tensor([shapes.parse(prompt) for prompt in prompts])
        colour = (fitted.state.colour == wanted[:, 0]) & (fitted.overlap > 0)  # where nothing is seen, no colour is
        shape = (fitted.state.shape == wanted[:, 1]) & (fitted.overlap >= MIN_OVERLAP)
        direction = (fitted.state.direction == wanted[:, 2]) & (fitted.state.speed >= self.speed[0] / 2)
        scores = {
            "colour": colour, "shape": shape, "direction": direction, "ok": colour & shape & direction,
            "fidelity": fidelity(videos, fitted), "contrast": fitted.contrast, "overlap": fitted.overlap,
            "trajectory": fitted.wobble, "speed": fitted.state.speed, "size": fitted.state.radius,
            "ground": fitted.state.ground, "start_x": fitted.state.start[:, 0], "start_y": fitted.state.start[:, 1],
            "textures": fitted.state.texture, "captions": wanted,
        }  # fmt: skip
        return {name: value if value.dtype == torch.bool else value.float() for name, value in scores.items()}

    def over_set(self, scores: dict[str, Tensor]) -> dict[str, float]:
        """Distances of the set's free quantities from their true laws."""
        start = torch.stack(
            [_uniform_gap(scores["start_x"], *shapes.START), _uniform_gap(scores["start_y"], *shapes.START)]
        )
        gaps = {
            "texture_gap": _texture_gap(scores["textures"].flatten(1)),
            "size_gap": _uniform_gap(scores["size"], *self.radius),
            "speed_gap": _uniform_gap(scores["speed"], *self.speed),
            "ground_gap": _uniform_gap(scores["ground"], *shapes.GROUND),
            "start_gap": start.mean(),
        }
        groups = (scores["captions"][:, None] == scores["captions"][None]).all(-1)
        if groups.sum() > len(groups):  # a caption comes twice
            laws = {"size": self.radius, "speed": self.speed, "ground": shapes.GROUND}
            laws |= {"start_x": shapes.START, "start_y": shapes.START}
            spreads = [_spread(scores[name], groups) / ((high - low) / 3) for name, (low, high) in laws.items()]
            gaps["caption_gap"] = (torch.stack(spreads).mean() - 1).abs()
        return {name: float(value) for name, value in gaps.items()}
