"""A Wan of cut size with all that training needs, a store and a spec; and a run of it that stops where it is told to.

torchrun tests/wan_training.py SPEC RUNS [STAGE STEP]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

from causvid import experiment, training
from causvid.data.lmdb_store import Writer
from causvid.data.rows import Row

SHAPE = (6, 16, 4, 8)
CUT = """
base: {base}
precision: fp32
world:
  dataset: {{path: {store}, shape: [6, 16, 4, 8]}}
  codec: {{base_dim: 8}}
  text_encoder: {{dim: 32, layers: 2, heads: 4, ffn_dim: 48, vocabulary_size: 64, length: 12}}
  negative_prompt: blurred
model: {{dim: 48, ffn_dim: 80, heads: 4, layers: 2, freq_dim: 32}}
ode_pairs: {{count: 4, batch: 2}}
ode_init: {{iterations: 3, batch: 2, ema: 0.9, optimizer: {{lr: 1.0e-4}}}}
distill:
  {{iterations: 2, batch: 2, critic_updates: 2, ema: 0.9, optimizer: {{lr: 1.0e-4}}, critic_optimizer: {{lr: 1.0e-4}}}}
runtime: {{weights: {weights}, threads: 1, device: cpu, checkpoint_seconds: 0.0}}
"""


def write_store(folder: Path, shape: tuple[int, ...], text_dim: int, length: int, tokens: list[int]) -> None:
    """A store of random clips of latents, ``f c h w``, each with a prompt of so many tokens."""
    fields = {"latents": {"dtype": "float16", "shape": [None, 16, None, None]},
              "text": {"dtype": "float16", "shape": [None, text_dim]}}  # fmt: skip
    generator = np.random.default_rng(0)
    header = {"fields": fields, "text_length": length, "text_dim": text_dim, "unconditional": [[1.0] * text_dim]}
    writer = Writer(folder, header)
    for number, count in enumerate(tokens):
        latents = generator.standard_normal(shape).astype(np.float16)
        text = generator.standard_normal((count, text_dim)).astype(np.float16)
        writer.add([Row(f"{number:04d}", {"latents": latents, "text": text}, {"caption": "a red fox"})])
    (folder / "digest.json").write_text("{}")


def make(folder: Path, weights: Path, base: str = "wan/causal_dmd", extra: str = "") -> str:
    """Write store and spec; returns the spec's path."""
    store = folder / "store"
    if not store.exists():
        write_store(store, SHAPE, 32, 12, [3, 4, 5, 6, 7])
    path = folder / f"{base.replace('/', '_')}{len(extra)}.yaml"
    path.write_text(CUT.format(base=base, store=store, weights=weights) + extra)
    return str(path)


def stop_after(stage: str, step: int) -> None:
    """End all of this process once a step of a stage is done and saved."""
    after = training.Session.after

    def stopping(self: training.Session, number: int, *arguments: object, **numbers: object) -> None:
        after(self, number, *arguments, **numbers)  # type: ignore[arg-type]
        if self._context.folder.parent.name == stage and number == step:
            os._exit(0)

    training.Session.after = stopping  # type: ignore[method-assign]


if __name__ == "__main__":
    spec, runs, *stop = sys.argv[1:]
    if stop:
        stop_after(stop[0], int(stop[1]))
    experiment.run(spec, [], Path(runs))
