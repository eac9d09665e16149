"""Numbers of Wan2.1 and CausVid that must never move, derived by hand or published."""

from __future__ import annotations

import pytest
import torch

from causvid import build, checks, costs, schedule, spec
from causvid.attention import rope
from causvid.attention.masks import BlockCausal
from causvid.errors import UserError
from causvid.models import wan_vae
from causvid.models.dit import sinusoid
from causvid.models.wan import SIZES, Size, links
from causvid.streaming.engine import Engine

GIB = 2**30


@pytest.mark.parametrize(
    ("height", "width", "latent", "frame", "clip"),
    [(480, 832, (60, 104), 1560, 32760), (720, 1280, (90, 160), 3600, 75600), (352, 640, (44, 80), 880, 18480),
     (240, 416, (30, 52), 390, 8190)],
)  # fmt: skip
def test_token_counts(height, width, latent, frame, clip):
    arm = spec.load("wan/causal", [f"world.dataset.height={height}", f"world.dataset.width={width}"])
    world, rule = build.World(arm), build.student_rule(arm)
    assert world.latent_shape == (21, 16, *latent)
    assert costs.network(arm, world, rule, frames=1).tokens == frame
    assert costs.network(arm, world, rule).tokens == clip


def test_the_specs_are_of_the_published_sizes():
    for name, size in (("wan/causal", "wan_1_3b"), ("wan/teacher_14b", "wan_14b")):
        arm = spec.load(name)
        world = build.World(arm)
        assert world.latent_shape == (21, 16, 60, 104) and build.size_of(world, arm["model"]) == SIZES[size]


@pytest.mark.parametrize(("size", "millions"), [("wan_1_3b", 1418.996800), ("wan_14b", 14288.491584)])
def test_parameter_counts(size, millions):
    shapes = [link.our_shape for link in links(SIZES[size], "ours")]
    assert sum(torch.Size(shape).numel() for shape in shapes) == round(millions * 1e6)


@pytest.mark.parametrize(("head", "pairs"), [(128, (22, 21, 21)), (64, (12, 10, 10)), (48, (8, 8, 8)), (12, (2, 2, 2))])
def test_rope_splits(head, pairs):
    assert rope.split_pairs(head) == pairs
    d = head
    assert pairs == ((d - 4 * (d // 6)) // 2, d // 6, d // 6) and sum(pairs) == head // 2


TIMES = [
    ("wan/causal", [1000, 757, 522]),
    ("wan/bidirectional", [1000, 757, 522]),
    ("wan/causal_4step", [1000, 960, 888.9, 727.3]),
]


@pytest.mark.parametrize(("name", "times"), TIMES, ids=[name for name, _ in TIMES])
def test_student_times_of_the_specs(name, times):
    assert [round(1000 * t, 1) for t in build.student_times(spec.load(name))] == times


def test_times_of_the_schedules():
    fifty = schedule.grid(50, 8.0) * 1000
    assert [round(float(fifty[i]), 1) for i in (0, 36, 44, 50)] == [1000, 756.8, 521.7, 0]
    assert [round(t, 1) for t in (schedule.grid(4, 8.0) * 1000).tolist()] == [1000, 960, 888.9, 727.3, 0]
    assert [round(t, 1) for t in (schedule.grid(4, 5.0) * 1000).tolist()] == [1000, 937.5, 833.3, 625, 0]


def test_guidance_of_the_release_is_converted():
    assert spec.load("wan/causal")["loss.guidance"] == 3.5 + 1


# The released values, and where the release says none PyTorch's default, of each spec that trains; 64 GPUs together.
SCORES = {"name": "dmd", "guidance": 4.5, "shift": 8.0, "t_min": 0.02, "t_max": 0.98, "score_times": "shared",
          "count_clean": True, "guidance_interval": [0.0, 1.0], "t_floor": 0.0}  # fmt: skip
ADAMW = {"name": "adamw", "lr": 2e-6, "betas": [0.9, 0.999], "weight_decay": 0.01}
STEPPING = {"optimizer": ADAMW, "warmup": 0, "decay": "constant", "ema": 0.0, "gradient_clip": 10.0}
RELEASED = {
    "model": {"dim": 1536, "ffn_dim": 8960, "heads": 12, "layers": 30, "prediction": "velocity"},
    "teacher": {"name": "bidirectional"}, "teacher_training": {"weights": "given"},
    "teacher_sampling": {"name": "euler", "steps": 50, "shift": 8.0, "guidance": 6.0},  # 6 in the standard form
    "ode_pairs": {"count": 1500, "steps": 50, "keep": [1.0, 0.756757, 0.521739]},
    "ode_init": {"iterations": 3000, "batch": 2 * 64, **STEPPING},
    "loss": SCORES,  # 3.5 in the release's form
    # One update of the student for five of the critic: 1,000 of the release's iterations.
    "distill": {"iterations": 1000 // 5, "batch": 64, "critic_updates": 5, "critic_optimizer": ADAMW, **STEPPING},
    "student": {"steps": [1.0, 0.756757, 0.521739]},
    "causal": {"mask": {"name": "block_causal", "block_frames": 3, "first_block_frames": None}},
    "precision": "bf16", "real_score": None, "fake_score": "teacher",
}  # fmt: skip
CAUSAL = {"init": {"name": "ode"}, "student": {"causal": True, "input": {"name": "data", "include_clean": True,
          "context": "noisy"}}, "ode_init": {"loss": {"name": "ode_regression", "include_clean": True,
          "context": "noisy"}}}  # fmt: skip
TRAINING = {
    "bidirectional_dmd": {"init": {"name": "teacher"}, "until": "distill",
                          "student": {"causal": False, "input": {"name": "data", "include_clean": False}}},
    "ode_pairs": {**CAUSAL, "until": "ode_pairs"},
    "causal_ode": {**CAUSAL, "until": "ode_init"},
    "causal_dmd": {**CAUSAL, "until": "distill"},
}  # fmt: skip


def differing(name, *overrides):
    """Paths at which a spec is not as RELEASED says for all of them, and TRAINING for this one."""
    loaded = spec.load(f"wan/{name}", overrides)
    wanted = {**spec.flat(RELEASED), **spec.flat(TRAINING[name])}
    return [path for path, value in wanted.items() if loaded[path] != value]


@pytest.mark.parametrize("name", TRAINING)
def test_training_specs_have_the_released_hyperparameters(name):
    assert differing(name) == []


@pytest.mark.parametrize("change", ["loss.guidance=3.5", "loss.shift=5", "loss.t_min=0.2", "distill.critic_updates=4"])
def test_another_hyperparameter_is_seen(change):
    assert differing("causal_dmd", change) == [change.partition("=")[0]]


@pytest.mark.parametrize(
    ("size", "frame", "clip", "gib"),
    [("wan_1_3b", 287_539_200, 6_038_323_200, 5.6), ("wan_14b", 1_277_952_000, 26_836_992_000, 25.0)],
)
def test_bytes_of_a_full_cache(size, frame, clip, gib):
    """Keys and values of one latent frame, and of the 21 of a clip of 480 x 832, in bf16."""
    world = build.World(spec.load("wan/causal"))
    with torch.device("meta"):
        model = SIZES[size].build(mask=BlockCausal(block_frames=3)).bfloat16()
    engine = Engine(model, model, world.codec, world.text_encoder, world.latent_shape[1:], 21, (1.0,))
    footprint = engine.footprint()
    assert footprint.frame == frame and footprint.after(engine.mask, 7) == clip and abs(clip / GIB - gib) < 0.05


def test_the_cache_holds_what_the_formula_says():
    size = Size(dim=48, ffn_dim=80, heads=4, layers=3, text_dim=8, freq_dim=16)
    model = size.build(mask=BlockCausal(block_frames=3))
    from causvid.types import Text

    cache = model.new_cache()
    text = Text(torch.zeros(2, 4, 8))
    with torch.no_grad():
        for _ in range(2):
            cache = model(torch.zeros(2, 3, 16, 4, 6), torch.zeros(2, 3), text, cache=cache, commit=True).cache
    assert cache.bytes == 2 * 4 * 2 * size.layers * size.dim * 6 * 6  # k and v, fp32, batch 2, 6 frames of 2 x 3


def test_latent_statistics_are_those_of_diffusers():
    pytest.importorskip("diffusers")
    config = wan_vae.WanVae(base_dim=4).empty().config
    assert tuple(config.latents_mean) == wan_vae.MEAN and tuple(config.latents_std) == wan_vae.STD


def test_time_features_at_757():
    """cos and sin of 757 x 10000^(-2i / 256), for the first and the last rate."""
    features = sinusoid(torch.tensor([0.757]) * 1000, 256)[0]
    angle = float(torch.tensor([0.757]) * 1000)
    assert abs(float(features[0]) - torch.tensor(angle, dtype=torch.float64).cos()) < 1e-9
    last = torch.tensor(angle * 10000 ** (-127 / 128), dtype=torch.float64)
    assert abs(float(features[127]) - last.cos()) < 1e-9 and abs(float(features[255]) - last.sin()) < 1e-9


def test_pairs_are_not_taken_at_times_that_a_sampler_does_not_visit():
    changes = ["teacher_sampling={name: unipc, steps: 8}", "ode_pairs.keep=[1, 2, 3, 4]", "student.steps=4"]
    with pytest.raises(UserError, match="no state at t = 1"):
        checks.check(spec.load("tiny/causvid", changes))


def test_a_run_must_be_told_where_given_weights_are(tmp_path):
    from causvid import experiment

    with pytest.raises(UserError, match="say where with runtime.weights=FOLDER"):
        experiment.run("wan/causal", ["model.layers=1"], tmp_path)


# What arXiv 2412.07772, section 5, says otherwise than the release: file, how its line begins, the paper's number.
PAPER = [
    ("base", "dataset:", "120 of 352 x 640 at 12 fps"), ("base", "codec:", "5 latents for 16 frames"),
    ("base", "mask:", "5 latents a block"), ("base", "model:", "its own"), ("base", "student:", "999/748/502/247"),
    ("causal_4step", "student:", "999/748/502/247"), ("causal_dmd", "dataset:", "400,000"),
    ("causal_dmd", "student:", "999/748/502/247"), ("causal_dmd", "ode_pairs:", "1,000 pairs"),
    ("causal_dmd", "optimizer:", "lr 5e-6"), ("causal_dmd", "iterations: 200", "6,000 iterations"),
    ("causal_window", "mask:", "10-second"), ("bidirectional_dmd", "student:", "causal"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "start", "number"), PAPER, ids=[f"{n} {s}" for n, s, _ in PAPER])
def test_lines_that_differ_from_the_paper_say_its_number(name, start, number):
    """On the line itself, or in the comment that stands right above it."""
    lines = [line.strip() for line in (spec.experiments_folder() / "wan" / f"{name}.yaml").read_text().splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith(start))
    first = at
    while first and lines[first - 1].startswith("#"):
        first -= 1
    told = " ".join(line.removeprefix("# ") for line in lines[first : at + 1])
    assert number in told.lower().partition("paper: ")[2].replace("\n", " ")
