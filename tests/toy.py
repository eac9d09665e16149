"""A spec so small that the whole recipe runs in seconds; what it makes is noise."""

from __future__ import annotations

from pathlib import Path

TOY = """
base: tiny/from_scratch
model: {dim: 24, ffn_dim: 32, heads: 2, layers: 1, patch: [16, 16]}
world: {dataset: {frames: 11}, codec: {name: time_fold, frames: 2}}
teacher_training: {iterations: 4, batch: 2, optimizer: adamw, decay: constant}
teacher_sampling: {steps: 6}
ode_pairs: {count: 4, steps: 12, keep: [1, 2, 3, 4], batch: 2}
student: {steps: 4}
ode_init: {iterations: 4, batch: 2, optimizer: adamw, decay: constant, loss: {context: noisy}}
distill:
  {iterations: 3, batch: 2, warmup: 0, critic_updates: 2, optimizer: adamw, critic_optimizer: adamw, decay: constant}
evaluation: {samples: 3, teacher_steps: [2], rollout_samples: 2, rollout_factor: 10, batch: 2}
runtime: {threads: 1, checkpoint_seconds: 0.0, monitor: null}
"""


def toy_spec(folder: Path, extra: str = "") -> str:
    """Write the toy spec, with more YAML on top as a spec based on it; returns its path."""
    base = folder / "toy.yaml"
    base.write_text(TOY)
    if not extra:
        return str(base)
    path = folder / "variant.yaml"
    path.write_text(f"base: {base}\n{extra}")
    return str(path)
