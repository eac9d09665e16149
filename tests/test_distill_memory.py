"""``causvid plan`` of a whole stage of distillation: student, both scores, their optimizers and turns, as it runs."""

from __future__ import annotations

import pytest
import wan_training
from live_memory import Live
from wan_files import in_folder, official_folder

from causvid import costs, experiment, spec
from causvid.models.wan import Size

WIDE = Size(dim=192, ffn_dim=768, heads=4, layers=4, text_dim=32, freq_dim=32)
DEEP = Size(dim=96, ffn_dim=640, heads=3, layers=8, text_dim=32, freq_dim=32)
THIN = Size(dim=96, ffn_dim=96, heads=3, layers=6, text_dim=32, freq_dim=32)
SIZES = {"wide": WIDE, "deep": DEEP, "thin": THIN}
MANY, FEW, LONG = (6, 16, 16, 16), (6, 16, 4, 8), (21, 16, 8, 8)  # latents: many tokens, few, and seven blocks
PLAIN, LEAN, HALF = "runtime.threads=1", "distill.activation_checkpointing=true", "precision=bf16"
ROLLOUT = "student.input={name: self_rollout, exit_step: last}"
CASES = [
    ("wide", MANY, PLAIN, PLAIN),
    ("wide", MANY, HALF, PLAIN),
    ("wide", MANY, LEAN, PLAIN),
    ("wide", FEW, HALF, LEAN),
    ("deep", MANY, PLAIN, PLAIN),
    ("deep", MANY, HALF, LEAN),
    ("deep", FEW, PLAIN, "distill.ema=0.9"),
    ("wide", MANY, PLAIN, "student.input={name: data, context: clean}"),
    ("wide", MANY, PLAIN, "student.input={name: backward_simulation, exit_step: last}"),
    ("wide", LONG, PLAIN, ROLLOUT),
    ("thin", LONG, LEAN, ROLLOUT),
    ("wide", LONG, HALF, ROLLOUT),
    ("wide", MANY, PLAIN, "loss={name: sum, of: [{name: dmd, guidance: 2.0}, {name: dmd, guidance: 1.0}]}"),
    ("wide", FEW, PLAIN, "distill.critic_optimizer=muon"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Weights of all sizes."""
    folder = tmp_path_factory.mktemp("distill_memory")
    for name, size in SIZES.items():
        official_folder(folder / name, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAUSVID_CACHE", str(folder / "cache"))
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_memory_of_distillation_is_what_a_run_of_it_takes(case, place, tmp_path, monkeypatch):
    """Within 5%: two iterations, in the second of which all optimizers have their states, and gradients are there."""
    name, shape, *changes = case
    size = SIZES[name]
    monkeypatch.setattr(wan_training, "SHAPE", shape)
    geometry = {"dim": size.dim, "ffn_dim": size.ffn_dim, "heads": size.heads, "layers": size.layers}
    arm = [*(f"model.{key}={value}" for key, value in geometry.items()), f"world.dataset.shape={list(shape)}",
           "init=teacher", "distill.critic_updates=1", "distill.ema=0", "runtime.checkpoint_seconds=10000",
           "distill.activation_checkpointing=false", *changes]  # fmt: skip
    made = wan_training.make(tmp_path, in_folder(place / name))
    experiment.run(made, [*arm, "until=teacher"], tmp_path / "runs")
    live = Live()
    with live:
        outcome = experiment.run(made, [*arm, "until=distill"], tmp_path / "runs")
    assert outcome.executed == ["distill"]
    (cost,) = costs.of(spec.load(made, arm), ["distill"], 1)
    print(f"{case}: measured {live.peak / 1e6:.1f} MB, told {cost.peak / 1e6:.1f} MB, {cost.peak / live.peak:.3f}")
    assert cost.peak == pytest.approx(live.peak, rel=0.05), cost.memory
