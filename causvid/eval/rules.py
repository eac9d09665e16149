"""How VBench turns what a judge saw into a verdict: rules on recorded detections, captions, classes and flow.

The networks stay upstream's; their output can be recorded, and judged here without them. Boxes are (x0, y0, x1, y1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]

COLOURS = (
    "white", "red", "pink", "blue", "silver", "purple", "orange", "green", "gray", "yellow", "black", "grey",
)  # fmt: skip
DETECTION_SCORE = 0.5  # least score of a GRiT detection; applied where detections are recorded
OVERLAP = 0.1  # intersection over union from which a spatial score falls
ACTION_SCORE, ACTION_CLASSES = 0.85, 5


@dataclass(frozen=True)
class Detection:
    """One region of a frame: its class or caption, for colours both, and where it is."""

    label: str
    caption: str = ""
    box: Box = (0.0, 0.0, 0.0, 0.0)


Frames = Sequence[Sequence[Detection]]


def _share(right: int, frames: Frames | Sequence[str]) -> float:
    if not frames:
        raise ValueError("a video without frames can't be judged")
    return right / len(frames)


def object_class(name: str, frames: Frames) -> float:
    """Share of frames in which the object is detected (GRiT)."""
    return _share(sum(any(d.label == name for d in frame) for frame in frames), frames)


def multiple_objects(names: str, frames: Frames) -> float:
    """Share of frames in which both objects of "a dog and a cat"-like ``names``, as in "dog and cat", are detected.

    Raises:
        ValueError: not two names joined by "and".
    """
    wanted = [name.strip() for name in names.split(" and ")]
    if len(wanted) != 2:
        raise ValueError(f"two objects are joined by ' and ', got '{names}'")
    return _share(sum(set(wanted) <= {d.label for d in frame} for frame in frames), frames)


def colour_object(prompt: str, colour: str) -> str:
    """The object of a colour prompt, as upstream finds it: the prompt without its articles and colour."""
    return prompt.replace("a ", "").replace("an ", "").replace(colour, "").strip()


def color(colour: str, name: str, frames: Frames) -> float | None:
    """Frames with the object in the wanted colour over frames with it in any; None where it is in none.

    Only captions that name a colour count, and an object without one is not seen.
    """
    seen = right = 0
    for frame in frames:
        captions = [d.caption for d in frame if d.label == name]
        seen += any(word in caption for caption in captions for word in COLOURS)
        right += any(colour in caption for caption in captions)
    return right / seen if seen else None


def position(relation: str, first: Box, second: Box) -> float:
    """How far two boxes stand side by side, or one above the other: 1, less where they overlap, 0 where they don't.

    As upstream has it, the order of the two does not matter: "left of" and "right of" are one relation.
    """
    centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (first, second)]
    across, down = abs(centres[1][0] - centres[0][0]), abs(centres[1][1] - centres[0][1])
    sideways = relation in "on the right of" or relation in "on the left of"
    upright = relation in "on the bottom of" or relation in "on the top of"
    if not ((sideways and across > down) or (not sideways and upright and down > across)):
        return 0.0
    width = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    both = width * height
    union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (first, second)) - both
    overlap = both / union if union > 0 else 0.0
    return 1.0 if overlap < OVERLAP else OVERLAP / overlap


def spatial_relationship(first: str, second: str, relation: str, frames: Frames) -> float:
    """Mean over frames of the best pair among all boxes of the two objects (also of two boxes of one, as upstream)."""
    total = 0.0
    for frame in frames:
        boxes = [d.box for d in frame if d.label in (first, second)]
        pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]]
        total += max((position(relation, a, b) for a, b in pairs), default=0.0)
    if not frames:
        raise ValueError("a video without frames can't be judged")
    return total / len(frames)


def scene(words: str, captions: Sequence[str]) -> float:
    """Share of captions that hold every word of the scene, as part of a word too (Tag2Text)."""
    return _share(sum(all(word in caption for word in words.split(" ")) for caption in captions), captions)


def action_of(prompt: str) -> str:
    """The class that a prompt "A person is ..." asks for, in lower case."""
    return prompt.lower().rpartition("person is ")[2]


def human_action(action: str, classes: Sequence[tuple[str, float]]) -> bool:
    """Whether the action is among the five most likely classes with a sigmoid of .85 or more, to four digits (UMT)."""
    likely = sorted(classes, key=lambda each: -each[1])[:ACTION_CLASSES]
    return any(name == action and round(score, 4) >= ACTION_SCORE for name, score in likely)


def moves(speeds: Sequence[float], side: int, frames: int) -> bool:
    """Dynamic degree: whether enough pairs of frames move.

    Args:
        speeds: of each pair, the mean flow of its fastest 5% of pixels, in pixels.
        side: pixels of the shorter side.
        frames: frames at about 8 per second, one more than pairs.
    """
    needed = round(4 * frames / 16)
    fast = sum(speed > 6.0 * side / 256 for speed in speeds)
    return bool(speeds) and fast >= needed


def static(speeds: Sequence[float], side: int, frames: int) -> bool:
    """Whether the filter before temporal flickering keeps a video.

    Args:
        speeds: of each pair of successive frames the mean flow of its fastest 2% of pixels, in pixels; then that from
            the first frame to the last, and from the last to the first.
        side: pixels of the shorter side.
        frames: all of the video's.

    Raises:
        ValueError: not one speed for each pair and two more.
    """
    if len(speeds) != frames + 1:
        raise ValueError(f"{frames} frames have {frames - 1} pairs and two more speeds, got {len(speeds)}")
    limit, allowed = 3.0 * side / 256, round(2 * frames / 16)
    if sum(speed > limit for speed in speeds[:-2]) > allowed:
        return False
    return all(speed <= limit * allowed * 2 for speed in speeds[-2:])
