"""How evenly shapes are filled: what ``fidelity`` averages over the whole picture, in the middle of the shapes alone.

    python benchmarks/interior.py runs/sample/*/student.safetensors runs/sample_teacher/*/teacher_50.safetensors

Per file the rms difference from the clean rendering of the fitted state, in units of [-1, 1], within half the shape's
radius: of all shapes, of squares, and of green squares, on which ripples are seen first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from causvid import weights
from causvid.data import shapes
from causvid.eval.shapes_truth import fit, rendering
from causvid.stages.sample import from_bytes

WHERE = {
    "all": lambda state: torch.ones_like(state.shape, dtype=torch.bool),
    "squares": lambda state: state.shape == list(shapes.SHAPES).index("square"),
    "green squares": lambda state: WHERE["squares"](state) & (state.colour == list(shapes.COLOURS).index("green")),
}


def interior(videos: Tensor) -> dict[str, float]:
    """The rms within half the radius, per kind of shape, of videos ``b f 3 h w`` in [-1, 1]."""
    fitted = fit(videos)
    inside = shapes.matte(fitted.state.shape, fitted.state.radius / 2, fitted.centres)[:, :, None] >= 0.5
    errors = (videos - rendering(fitted)).pow(2) * inside
    weight = inside.sum((1, 2, 3, 4)) * videos.shape[2]
    chosen = {name: which(fitted.state) for name, which in WHERE.items()}
    return {
        name: float((errors[rows].sum() / weight[rows].sum()).sqrt()) for name, rows in chosen.items() if rows.any()
    }


def main() -> None:
    for path in sys.argv[1:]:
        numbers = interior(from_bytes(weights.read_tensors(Path(path))[0]["videos"]))
        print(path, "  ".join(f"{name} {value:.3f}" for name, value in numbers.items()))


if __name__ == "__main__":
    main()
