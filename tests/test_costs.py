"""``causvid plan``: FLOPs against PyTorch's counter, memory against what a step takes, and what would make it fit."""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causvid import build, cli, cost_lines, costs, experiment, spec, training
from causvid.errors import UserError
from causvid.types import Text

CUT = """
base: wan/causal_dmd
world:
  dataset: {path: nowhere, shape: [6, 16, 8, 16]}
  codec: {base_dim: 8}
  text_encoder: {dim: 32, layers: 2, heads: 4, ffn_dim: 48, vocabulary_size: 64, length: 12}
model: {dim: 192, ffn_dim: 768, heads: 4, layers: 4, freq_dim: 32}
ode_pairs: {count: 4, batch: 2}
ode_init: {iterations: 3, batch: 2}
distill: {iterations: 2, batch: 2, critic_updates: 1}
"""


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    path = tmp_path_factory.mktemp("costs") / "cut.yaml"
    path.write_text(CUT)
    return str(path)


def inputs(world, batch=1, device="cpu"):
    x = torch.zeros(batch, *world.latent_shape, device=device)
    return x, torch.full(x.shape[:2], 0.5, device=device), Text(torch.zeros(batch, 12, 32, device=device))


@pytest.mark.parametrize(
    "mask", ["block_causal", "bidirectional", "{name: sliding_window, block_frames: 2, window_frames: 4}"]
)
def test_flops_of_a_pass_are_those_that_the_counter_counts(cut, mask):
    arm = spec.load(cut, [f"causal.mask={mask}"] if mask != "bidirectional" else ["student.causal=false",
                    "student.sampler=few_step"])  # fmt: skip
    world, rule = build.World(arm), build.student_rule(arm)
    with torch.device("meta"):
        model = build.network(arm, world, rule)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        out = model(*inputs(world, device="meta"))
    assert counter.get_total_flops() == costs.network(arm, world, rule).forward
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs(world, device="meta")).prediction.sum().backward()
    assert counter.get_total_flops() == pytest.approx(3 * costs.network(arm, world, rule).forward, rel=0.02)
    assert out.prediction.shape == (1, *world.latent_shape)


# A real iteration of the tiny world's distillation: the student and two turns of the critic before it.
TURNS = [
    "init=teacher",
    "distill.optimizer={name: adamw, lr: 0.001}",
    "distill.critic_optimizer={name: adamw, lr: 0.001}",
    "distill.batch=2",
    "distill.critic_updates=2",
    "distill.iterations=2",
    "runtime.threads=1",
]
CHANGES = {
    "as in the paper": ["loss.guidance=2.0", "student.input=data"],
    "behind clean context": ["loss.guidance=2.0", "student.input={name: data, context: clean}"],
    "without guidance": ["loss.guidance=1.0"],
    "guidance in a part of a sum": ["loss={name: sum, of: [{name: dmd, guidance: 2.0}]}"],
    "checkpointed": ["loss.guidance=2.0", "distill.activation_checkpointing=true"],
    "half from data behind clean context": [
        "loss.guidance=2.0",
        "student.input={name: mixed, of: [{name: data, context: clean}, {name: backward_simulation, exit_step: last}]}",
    ],
    "from its own samples": ["loss.guidance=2.0", "student.input={name: backward_simulation, exit_step: last}"],
}


def counted(arm, store):
    """FLOPs of the stage as it runs, of which nothing is known to the formulas."""
    arm = [*arm, "runtime.monitor=null"]
    experiment.run("tiny/causvid", [*arm, "until=teacher"], store)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        outcome = experiment.run("tiny/causvid", [*arm, "until=distill"], store)
    assert outcome.executed == ["distill"]
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CHANGES)
def test_flops_of_distillation_are_those_of_a_run(case, tmp_path):
    """Generation, the teacher with guidance and the fake score, forward and backward: within 2%, as the docs say."""
    arm = [*TURNS, *CHANGES[case]]
    (cost,) = costs.of(spec.load("tiny/causvid", arm), ["distill"], 1)
    assert counted(arm, tmp_path) == pytest.approx(cost.flops, rel=0.02)


def test_flops_of_a_rollout_in_training_are_told_at_most(tmp_path):
    """The last block is never committed, and the formula counts it; nothing else is over."""
    arm = [*TURNS, "loss.guidance=2.0", "student.input={name: self_rollout, exit_step: last}"]
    (cost,) = costs.of(spec.load("tiny/causvid", arm), ["distill"], 1)
    assert 0.9 * cost.flops < counted(arm, tmp_path) <= cost.flops


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [2, 8])
def test_memory_of_a_mixture_is_that_of_its_largest_input(precision, batch):
    def peak(given):
        changes = [f"precision={precision}", f"distill.batch={batch}", f"student.input={given}"]
        (cost,) = costs.of(spec.load("tiny/causvid", changes), ["distill"], 1)
        return cost.peak, cost.not_counted

    clean, rollout = "{name: data, context: clean}", "{name: self_rollout, given_blocks: 3}"
    alone = [peak(given)[0] for given in (clean, rollout)]
    mixed, left_out = peak(f"{{name: mixed, of: [{clean}, {rollout}]}}")
    assert mixed == max(alone) != min(alone)
    assert any("bf16 weights" in words for words in left_out) == (precision == "bf16")


@pytest.mark.parametrize(
    ("precision", "checkpointing"),
    [("fp32", False), pytest.param("fp32", True, marks=pytest.mark.slow),
     pytest.param("bf16", False, marks=pytest.mark.slow), pytest.param("bf16", True, marks=pytest.mark.slow)],
)  # fmt: skip
def test_memory_of_a_step_is_what_it_takes(cut, precision, checkpointing):
    """Within 15%, on the CPU at reduced depth: weights, gradients, optimizer, average and activations together."""
    arm = spec.load(cut, [f"precision={precision}", f"ode_init.activation_checkpointing={checkpointing}".lower(),
                          "ode_init.ema=0.9"])  # fmt: skip
    world, rule = build.World(arm), build.student_rule(arm)
    model = build.network(arm, world, rule)
    training.prepare(model, arm["ode_init"], world.device)
    player = training.Player(model, arm["ode_init.optimizer"], arm["ode_init"], 3)

    def step():
        player.step(model(*inputs(world, 2)).x0.pow(2).mean())

    step()  # after which the optimizer has its state
    tracker = MemTracker()
    tracker.track_external(model, *player.optimizers, *player.average.values())
    with tracker:
        step()
    measured = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    (cost,) = costs.of(arm, ["ode_init"], 1)
    assert cost.peak == pytest.approx(measured, rel=0.15), cost.memory


def test_what_the_formulas_do_not_count_is_named_at_its_stage(cut, capsys, tmp_path):
    """And a sum is counted without it: one of DMD alone costs what DMD does, one of two DMDs more."""
    plain, sums = costs.of(spec.load(cut), ["distill"], 1)[0], {}
    assert plain.not_counted == ()
    for name, parts in {"one": "dmd", "with": "dmd, gan", "two": "dmd, dmd"}.items():
        arm = [f"loss={{name: sum, of: [{parts}]}}"]
        (sums[name],) = costs.of(spec.load(cut, arm), ["distill"], 1)
    assert sums["one"].flops == sums["with"].flops < sums["two"].flops < 2 * sums["one"].flops
    assert sums["with"].not_counted == ("loss 'gan'",) and sums["two"].not_counted == ()
    status, _, err = call(capsys, "tiny/causvid", "loss={name: sum, of: [dmd, gan]}", "distill.critic_optimizer=adamw",
                          "--runs", str(tmp_path))  # fmt: skip
    assert status == 0 and "distill not counted here: loss 'gan' generate" in err
    status, _, err = call(capsys, "tiny/causvid", "--runs", str(tmp_path))
    assert status == 0 and "not counted here" not in err and "not counted: latents and text of a batch" in err


def test_memory_is_shared_by_processes_and_the_whole_is_told_by_hand(cut):
    arm = spec.load(cut)
    one, two = (costs.of(arm, ["distill"], n)[0] for n in (1, 2))
    world = build.World(arm)
    parameters = sum(p.numel() for p in build.network(arm, world, build.student_rule(arm)).parameters())
    assert one.parameters == 3 * parameters and one.memory["weights"] == 12 * parameters
    assert one.memory["optimizer"] == 16 * parameters and two.memory["optimizer"] == 8 * parameters
    assert (
        two.memory["activations"] < one.memory["activations"] and one.memory["gathered"] == 0 < two.memory["gathered"]
    )
    assert one.flops == two.flops > costs.of(arm, ["ode_init"], 1)[0].flops


def test_a_guided_step_of_the_teachers_trajectory_costs_twice(cut):
    """Five steps of shift 1 start at 1, .8, .6, .4 and .2."""
    guided = [
        f"teacher_sampling={{name: euler, shift: 1.0, guidance: 2.0, guidance_interval: {each}}}"
        for each in ([0.5, 1], [0, 1])
    ]
    plain, part, all_ = (
        costs.of(spec.load(cut, ["ode_pairs.steps=5", way]), ["ode_pairs"], 1)[0].flops
        for way in ("teacher_sampling.guidance=1.0", *guided)
    )
    assert part == pytest.approx(8 / 5 * plain) and all_ == pytest.approx(2 * plain)


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *arguments])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, " ".join(err.split())


def test_the_plan_of_the_released_recipe_on_its_64_gpus_and_on_a_small_one(capsys, tmp_path):
    status, out, _ = call(capsys, "wan/causal_dmd", "runtime.gpus=64", "--json", "--runs", str(tmp_path))
    rows = {row["stage"]: row for row in json.loads(out)}
    assert status == 0 and list(rows) == ["teacher", "ode_pairs", "ode_init", "distill"]
    cost = rows["distill"]["cost"]
    assert cost["parameters"] == 3 * 1_418_996_800 and cost["peak"] < 80e9 and cost["gpu_hours"] > 10
    small = spec.load("wan/causal_dmd", ["runtime.gpus=1", "runtime.memory=24GB"])
    told = "\n".join(cost_lines.lines(small, costs.of(small, ["distill"], 1)))
    assert "distill    does not fit into 24GB; it would with" in told and "runtime.gpus=" in told
    assert "distill.batch=8" in told and "another batch is another recipe" in told


def test_how_many_gpus_are_planned_for_is_said_where_nobody_chose_them(capsys, tmp_path):
    """The default means as many as processes run: one here; and none is no number of GPUs."""
    for override, told in (([], True), (["runtime.gpus=null"], True), (["runtime.gpus=1"], False)):
        status, _, err = call(capsys, "tiny/causvid", *override, "--runs", str(tmp_path))
        assert status == 0 and "on 1 GPU(s)" in err
        assert ("as many as processes run here; runtime.gpus=N plans for N" in err) == told
    status, _, err = call(capsys, "tiny/causvid", "runtime.gpus=0", "--runs", str(tmp_path))
    assert status == 2 and "runtime.gpus: must be at least 1 " in err


def test_what_would_make_it_fit_does(cut):
    arm = spec.load(cut, ["distill.activation_checkpointing=false", "distill.batch=8"])
    limit = 0.7 * costs.of(arm, ["distill"], 1)[0].peak
    (pairs,) = costs.of(arm, ["ode_pairs"], 1)
    assert cost_lines.remedies(arm, "ode_pairs", 1, 0.99 * pairs.peak) == ["ode_pairs.batch=1"]
    assert cost_lines.remedies(arm, "ode_pairs", 1, pairs.memory["weights"]) == []
    ways = cost_lines.remedies(arm, "distill", 1, limit)
    assert ways
    for way in ways:
        changes = [word for word in way.split() if "=" in word]
        changed = spec.load(cut, ["distill.activation_checkpointing=false", "distill.batch=8", *changes])
        if len(changes) == len(way.split()):
            assert costs.of(changed, ["distill"], changed["runtime.gpus"] or 1)[0].peak <= limit


@pytest.mark.parametrize("size", ["24", "24TB", "much", "1.2.3GB"])
def test_sizes_are_read_with_their_unit(size):
    if size == "24":
        assert (
            cost_lines.memory_of(size) == 24
            and cost_lines.memory_of("24GB") == 24e9
            and cost_lines.memory_of("2 GiB") == 2**31
        )
    else:
        with pytest.raises(UserError, match="is no size"):
            cost_lines.memory_of(size)
