"""What a run costs before it runs: parameters, FLOPs, memory and GPU time of each stage, from formulas (docs/wan.md).

What making clips costs stands in ``sampling_costs.py``; what would make a stage fit, in ``cost_lines.py``.

No number is measured and no tensor made: the formulas read the spec alone. Tests compare them with PyTorch's counter of
FLOPs and with the memory that a step really takes. A multiplication and an addition are two FLOPs; sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from causvid import build
from causvid.attention.masks import Pattern, Rule
from causvid.fingerprint import bound
from causvid.samplers.ode import OdeSampler
from causvid.spec import Spec
from causvid.validate import Bound

FP32 = 4  # bytes; weights, gradients, averages and optimizer are kept in it
# Bytes per token that one block keeps for its backward pass, per unit of dim and of ffn_dim: counted tensor by tensor.
KEPT = {"fp32": (96, 8), "bf16": (76, 4)}
# The same for each token of the cache that a block of a rollout sees.
SEEN = {"fp32": 12, "bf16": 6}
# The same of a pass without a backward pass, at its peak: of one block, whatever the number of blocks.
PASSING = {"fp32": (60, 8), "bf16": (46, 3)}
# FLOP/s of one GPU that estimates of time are made with: two fifths of what an H100 can do in either type.
RATE = {"fp32": 27e12, "bf16": 400e12}


@dataclass(frozen=True)
class Network:
    """One transformer on one clip.

    Attributes:
        parameters, block_parameters: of the whole, and of one block.
        matrices: weights that are matrices of blocks, of which Muon keeps one state and AdamW two.
        tokens: of a clip, and of its clean context where it has one.
        forward, block_forward: FLOPs of a pass, and of one of its blocks.
        text_forward: those of a pass that depend on the text alone, which a stream computes once.
        dim, ffn_dim, layers: geometry.
        rollout: where its samples are one, tokens in the cache, those that all blocks together see of it, and passes.
    """

    parameters: int
    block_parameters: int
    matrices: int
    tokens: int
    forward: float
    block_forward: float
    text_forward: float
    dim: int
    ffn_dim: int
    layers: int
    rollout: tuple[int, int, int] = (0, 0, 1)

    def kept(self, precision: str, checkpointing: bool) -> tuple[float, float]:
        """Bytes per clip: what a pass keeps until its backward pass comes, and what one block keeps."""
        per_dim, per_ffn = KEPT[precision]
        cached, seen, _ = self.rollout
        # Every block of a rollout has the keys, rotated too, and the values that it sees as tensors of its own.
        block = self.tokens * (per_dim * self.dim + per_ffn * self.ffn_dim) + SEEN[precision] * seen * self.dim
        # Checkpointing keeps the input of every block, in fp32, and the cache for when the block is computed again.
        inputs = (self.tokens + 2 * cached) * self.dim * FP32
        return self.layers * (inputs if checkpointing else block), block

    def passing(self, precision: str) -> float:
        """Bytes per clip that a pass without a backward pass works on."""
        per_dim, per_ffn = PASSING[precision]
        return self.tokens * (per_dim * self.dim + per_ffn * self.ffn_dim)

    def casts(self, precision: str, checkpointing: bool) -> float:
        """Bytes of the weights in bf16 that wait for the end of a pass: of all blocks, or of the one at work."""
        return 2.0 * self.block_parameters * (1 if checkpointing else self.layers) if precision == "bf16" else 0.0

    def states(self, optimizer: str) -> float:
        """Bytes of an optimizer's state."""
        return float(FP32 * (2 * self.parameters - (self.matrices if optimizer == "muon" else 0)))


def network(
    spec: Spec,
    world: build.World,
    rule: Rule,
    model: Bound | None = None,
    frames: int | None = None,
    learns_by: Bound | None = None,
) -> Network:
    """Count a network; the formulas are those of docs/wan.md.

    Args:
        frames: how many latent frames it is given; default a clip's.
        learns_by: the component that feeds it in training; with a clean context it is given every frame twice.
    """
    options = model or spec["model"]
    with torch.device("meta"):  # of one block: they are all alike
        net = build.network(spec, world, rule, model=Bound("model", {**options, "layers": 1}))
    own = sum(p.numel() for p in net.blocks[0].parameters())
    matrices = sum(m.weight.numel() for m in net.blocks[0].modules() if isinstance(m, nn.Linear))
    length, channels, height, width = world.latent_shape
    length = length if frames is None else frames
    per_frame = (height // net.patch[0]) * (width // net.patch[1])
    twice = learns_by is not None and any(part.get("context") == "clean" for part in bound(learns_by))
    own_tokens, dim, ffn = length * per_frame, options["dim"], options["ffn_dim"]
    tokens = own_tokens * (1 + twice)
    text = getattr(world.text_encoder, "length", 1)
    groups = Pattern(rule, length, twice).groups
    seen = sum((g.queries[1] - g.queries[0]) * len(g.keys) for g in groups) * per_frame**2
    rollout = (0, 0, 1)
    if learns_by is not None and _streams(learns_by):
        blocks, earlier = rule.blocks(length), sum(len(g.keys) for g in groups) - length
        rollout = (blocks[-1][0] * per_frame, earlier * per_frame, len(blocks))
    block = 2 * tokens * (6 * dim * dim + 2 * dim * ffn) + 4 * dim * seen  # q k v out, cross q out; ffn; attention
    block += 4 * text * dim * dim + 4 * dim * tokens * text  # keys and values of the text; attention to it
    embedding = 2 * text * (world.text_encoder.dim * dim + dim * dim)
    values = channels * net.patch[0] * net.patch[1]
    outer = 2 * (tokens + own_tokens) * values * dim + embedding
    outer += 2 * length * (1 + twice) * (options["freq_dim"] * dim + 7 * dim * dim)
    return Network(
        sum(p.numel() for p in net.parameters()) + (options["layers"] - 1) * own, own,
        matrices * options["layers"], tokens, float(block * options["layers"] + outer), float(block),
        float(4 * text * dim * dim * options["layers"] + embedding), dim, ffn, options["layers"], rollout,
    )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What memory depends on beside the networks: ``optimizers`` are the players', ``losses`` how many each has."""

    gpus: int
    batch: int
    precision: str
    checkpointing: bool
    ema: bool
    optimizers: tuple[str, ...]
    losses: int

    @property
    def clips(self) -> int:
        """Of one GPU."""
        return -(-self.batch // self.gpus)


@dataclass(frozen=True)
class Cost:
    """Of one stage: FLOPs in all, hours of one GPU, bytes on each GPU by what they are for, and what is left out."""

    stage: str
    parameters: int
    flops: float
    gpu_hours: float
    memory: dict[str, float]
    not_counted: tuple[str, ...] = ()

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}


def train_memory(trained: Sequence[Network], frozen: Sequence[Network], setting: Setting) -> dict[str, float]:
    """Bytes per GPU of a stage that trains networks in turns, the first of which may keep an average.

    The first one is scored by all others; its samples are made anew, without a backward pass, for the others' turns.
    """
    n, everything, clips = setting.gpus, [*trained, *frozen], setting.clips
    precision, lean = setting.precision, setting.checkpointing
    gradients = sum(net.parameters for net in trained) * FP32 / n
    states = sum(net.states(name) for net, name in zip(trained, setting.optimizers, strict=True))

    def passing(net: Network) -> float:  # of one that is trained; of frozen weights autocast keeps no copies
        return clips * net.passing(precision) + net.casts(precision, False)

    peaks = []
    for number, net in enumerate(trained):
        kept, block = (clips * each for each in net.kept(precision, lean))
        kept *= 1 if net is trained[0] and len(trained) > 1 else setting.losses  # a student's samples are made once
        # Before the backward pass: the last update's gradients are still there, those of all players.
        forward = kept + (passing(net) if lean else 0.0)
        # Each pass has copies of its own.
        waiting = kept + (0.0 if lean else net.rollout[2] * net.casts(precision, False))
        asked = [passing(other) for other in trained[1:]] + [clips * other.passing(precision) for other in frozen]
        peaks += [forward, waiting + max(asked, default=0.0) if number == 0 else max(waiting, passing(trained[0]))]
        # In it the player's own are new: they come while activations go.
        peaks.append(
            max(waiting - net.parameters * FP32 / n, 0.0) + (block + net.casts(precision, True) if lean else 0.0)
        )
    return {
        "weights": sum(net.parameters for net in everything) * FP32 / n,
        "optimizer": states / n,
        "average": trained[0].parameters * FP32 / n if setting.ema else 0.0,
        # A block's weights are put together while it works, the next one's already; the outer ones stay so.
        "gathered": 0.0 if n == 1 else max(
            (2 * net.block_parameters + net.parameters - net.layers * net.block_parameters) * FP32 for net in everything
        ),
        "gradients": gradients,
        "activations": max(peaks),
    }  # fmt: skip


# The loss of each stage that the formulas count; a sum of it with others is counted without them.
LOSSES = {"teacher": "flow_matching", "ode_init": "ode_regression", "distill": "dmd"}
SECTIONS = {"teacher": "teacher_training", "ode_init": "ode_init", "distill": "distill"}
INPUTS = ("data", "backward_simulation", "self_rollout")


def losses(spec: Spec, stage: str) -> list[Bound]:
    """A stage's losses, those of a sum one by one."""
    found = spec["loss"] if stage == "distill" else spec[f"{SECTIONS[stage]}.loss"]
    return [part for part in bound(found) if part.group == "loss" and part["name"] != "sum"]


def _counted(spec: Spec, stage: str) -> list[Bound]:
    return [part for part in losses(spec, stage) if part["name"] == LOSSES[stage]]


def not_counted(spec: Spec, world: build.World, stage: str) -> tuple[str, ...]:
    """What a training stage of this spec needs beyond the formulas, in words."""
    out = [f"loss '{part['name']}'" for part in losses(spec, stage) if part["name"] != LOSSES[stage]]
    out += [f"optimizer '{name}' (taken for adamw)" for name in _optimizers(spec, stage) if name not in OPTIMIZERS]
    if stage == "distill":
        others = [part["name"] for part in student_inputs(spec) if part["name"] not in INPUTS]
        out += [f"student input '{name}' (taken for data)" for name in others]
        if spec["student.input"]["name"] == "mixed" and spec["precision"] == "bf16":
            out.append("bf16 weights that wait for the passes of all student inputs but the largest")
    if not world.holds_latents and hasattr(world.codec, "encoding"):
        out.append(f"codec '{spec['world.codec']['name']}', which encodes every batch")
    return tuple(dict.fromkeys(out))


OPTIMIZERS = ("adamw", "muon")


def _optimizers(spec: Spec, stage: str) -> tuple[str, ...]:
    options = spec[SECTIONS[stage]]
    keys = ("optimizer", "critic_optimizer") if stage == "distill" else ("optimizer",)
    return tuple(options[key]["name"] for key in keys)


def training(spec: Spec, stage: str, gpus: int) -> Setting:
    """What the memory of a training stage depends on."""
    options = spec[SECTIONS[stage]]
    return Setting(
        gpus, options["batch"], spec["precision"], options["activation_checkpointing"], options["ema"] > 0,
        _optimizers(spec, stage), max(1, len(_counted(spec, stage))),
    )  # fmt: skip


def student_inputs(spec: Spec) -> list[Bound]:
    """The student inputs of distillation, those of a mixture one by one."""
    return [part for part in bound(spec["student.input"]) if part.group == "student_input" and part["name"] != "mixed"]


def _streams(component: Bound) -> bool:
    return component.group == "student_input" and getattr(build.construct(component, context_t=0.0), "streams", False)


def players(spec: Spec, world: build.World, stage: str) -> tuple[list[Network], list[Network]]:
    """(networks that a stage trains, the student first, networks that it only asks).

    With a mixture of student inputs the student is as if all rows were from the one that takes most memory.
    """
    seen = build.teacher_rule(spec)
    if stage == "teacher":
        return [network(spec, world, seen, learns_by=spec["teacher_training.loss"])], []
    if stage == "ode_init":
        return [network(spec, world, build.student_rule(spec), learns_by=spec["ode_init.loss"])], []
    real = network(spec, world, seen, spec["real_score"] or spec["model"])
    fake = network(spec, world, seen, spec[spec["fake_score"]] if spec["fake_score"] == "real_score" else None)
    fed = [network(spec, world, build.student_rule(spec), learns_by=part) for part in student_inputs(spec)]
    setting = training(spec, stage, 1)
    return [max(fed, key=lambda net: sum(train_memory([net, fake], [real], setting).values())), fake], [real]


def of(spec: Spec, stages: list[str], gpus: int) -> list[Cost]:
    """The costs of the stages that compute much, in the order given."""
    world = build.World(spec)
    out = []
    for stage in stages:
        trains = stage in SECTIONS and (stage != "teacher" or spec["teacher_training.weights"] == "train")
        if stage == "ode_pairs":
            out.append(pairs(spec, world, spec["ode_pairs.batch"]))
        elif trains:
            trained, frozen = players(spec, world, stage)
            setting = training(spec, stage, gpus)
            if stage == "distill":
                inputs = student_inputs(spec)
                update = sum(_distilling(spec, world, part, trained, frozen, setting) for part in inputs) / len(inputs)
            else:
                update = setting.losses * _learning(trained[0], setting)
            flops = spec[f"{SECTIONS[stage]}.iterations"] * setting.batch * update
            parameters = sum(net.parameters for net in (*trained, *frozen))
            memory = train_memory(trained, frozen, setting)
            hours = flops / RATE[spec["precision"]] / 3600
            out.append(Cost(stage, parameters, flops, hours, memory, not_counted(spec, world, stage)))
    return out


def rows(sampler: OdeSampler) -> int:
    """Rows of a batch that a clip takes in its fullest step: a guided one computes both halves at once."""
    return 2 if any(map(sampler.guided, sampler.times[:-1].tolist())) else 1


def pairs(spec: Spec, world: build.World, batch: int) -> Cost:
    """One process's part of the teacher's trajectories; with guidance a pass is of twice the batch."""
    teacher, options = network(spec, world, build.teacher_rule(spec)), spec["ode_pairs"]
    sampler = build.teacher_sampler(spec, options["steps"])
    memory = {"weights": float(teacher.parameters * FP32)}
    memory["activations"] = batch * rows(sampler) * teacher.passing(spec["precision"])
    memory["activations"] += teacher.casts(spec["precision"], False)
    flops = options["count"] * sampler.evaluations * teacher.forward
    return Cost("ode_pairs", teacher.parameters, flops, flops / RATE[spec["precision"]] / 3600, memory)


def _learning(net: Network, setting: Setting) -> float:
    """FLOPs of a pass with its backward pass, which is twice the forward one."""
    return 3 * net.forward + (net.layers * net.block_forward if setting.checkpointing else 0)


def _distilling(
    spec: Spec, world: build.World, fed: Bound, trained: list[Network], frozen: list[Network], setting: Setting
) -> float:
    """FLOPs of an iteration, per clip of one student input: the critic's turns, and the student's."""
    (_, fake), (real,) = trained, frozen
    student = network(spec, world, build.student_rule(spec), learns_by=fed)
    passes = len(build.student_times(spec)) if fed["name"] in INPUTS[1:] else 1
    made = student.forward * (passes + _streams(fed))  # at most; a rollout commits every block, too
    update = made - student.forward + _learning(student, setting)
    for part in _counted(spec, "distill"):
        update += fake.forward + (1 if part["guidance"] == 1.0 else 2) * real.forward
        update += spec["distill.critic_updates"] * _learning(fake, setting)
    return update + (spec["distill.critic_updates"] * made if _counted(spec, "distill") else 0)
