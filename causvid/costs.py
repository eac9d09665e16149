"""What a run costs before it runs: parameters, FLOPs, memory and GPU time of each stage, from formulas (docs/wan.md).

What making clips costs stands in ``sampling_costs.py``.

No number is measured and no tensor made: the formulas read the spec alone. Tests compare them with PyTorch's counter of
FLOPs and with the memory that a step really takes. A multiplication and an addition are two FLOPs; sizes are bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from causvid import build, ranks
from causvid.attention.masks import Pattern, Rule
from causvid.errors import UserError
from causvid.fingerprint import bound
from causvid.spec import Spec
from causvid.validate import Bound

FP32 = 4  # bytes; weights, gradients, averages and optimizer are kept in it
# Bytes per token that one block keeps for its backward pass, per unit of dim and of ffn_dim: counted tensor by tensor.
KEPT = {"fp32": (96, 8), "bf16": (76, 4)}
# The same of a pass without a backward pass, at its peak: of one block, whatever the number of blocks.
PASSING = {"fp32": (60, 8), "bf16": (46, 3)}
# What no stage of a run does, and one GPU does for one clip; and how its line begins.
ALONE = {"generate": "one clip: ", "encode": "one clip: "}
# FLOP/s of one GPU that estimates of time are made with: two fifths of what an H100 can do in either type.
RATE = {"fp32": 27e12, "bf16": 400e12}


@dataclass(frozen=True)
class Network:
    """One transformer on one clip.

    Attributes:
        parameters, block_parameters: of the whole, and of one block.
        tokens: of a clip, and of its clean context where it has one.
        forward, block_forward: FLOPs of a pass, and of one of its blocks.
        text_forward: those of a pass that depend on the text alone, which a stream computes once.
        dim, ffn_dim, layers: geometry.
    """

    parameters: int
    block_parameters: int
    tokens: int
    forward: float
    block_forward: float
    text_forward: float
    dim: int
    ffn_dim: int
    layers: int

    def kept(self, precision: str, checkpointing: bool) -> tuple[float, float]:
        """Bytes per clip: what a pass keeps until its backward pass comes, and what one block keeps."""
        per_dim, per_ffn = KEPT[precision]
        block = self.tokens * (per_dim * self.dim + per_ffn * self.ffn_dim)
        # Checkpointing keeps the input of every block, in fp32.
        return self.layers * (self.tokens * self.dim * FP32 if checkpointing else block), block

    def passing(self, precision: str) -> float:
        """Bytes per clip that a pass without a backward pass works on."""
        per_dim, per_ffn = PASSING[precision]
        return self.tokens * (per_dim * self.dim + per_ffn * self.ffn_dim)

    def casts(self, precision: str, checkpointing: bool) -> float:
        """Bytes of the weights in bf16 that a backward pass waits for: of all blocks, or of the one at work."""
        return 2.0 * self.block_parameters * (1 if checkpointing else self.layers) if precision == "bf16" else 0.0


def network(
    spec: Spec,
    world: build.World,
    rule: Rule,
    model: Bound | None = None,
    frames: int | None = None,
    learns_by: str | None = None,
    edits: bool = False,
) -> Network:
    """Count a network; the formulas are those of docs/wan.md.

    Args:
        frames: how many latent frames it is given; default a clip's.
        learns_by: path of the component that feeds it in training; with a clean context it is given every frame twice.
        edits: clips that a prompt changes, which have a clean context, and a text for every frame.
    """
    options = model or spec["model"]
    with torch.device("meta"):  # of one block: they are all alike
        net = build.network(spec, world, rule, model=Bound("model", {**options, "layers": 1}))
    own = sum(p.numel() for p in net.blocks[0].parameters())
    length, channels, height, width = world.latent_shape
    length = length if frames is None else frames
    per_frame = (height // net.patch[0]) * (width // net.patch[1])
    twice = edits or (learns_by is not None and any(part.get("context") == "clean" for part in bound(spec[learns_by])))
    own_tokens, dim, ffn = length * per_frame, options["dim"], options["ffn_dim"]
    tokens = own_tokens * (1 + twice)
    text = getattr(world.text_encoder, "length", 1)
    seen = sum((g.queries[1] - g.queries[0]) * len(g.keys) for g in Pattern(rule, length, twice).groups) * per_frame**2
    block = 2 * tokens * (6 * dim * dim + 2 * dim * ffn) + 4 * dim * seen  # q k v out, cross q out; ffn; attention
    words = text * (length if edits else 1)
    block += 4 * words * (1 + edits) * dim * dim + 4 * dim * tokens * text  # keys and values of the text; attention
    embedding = 2 * words * (world.text_encoder.dim * dim + dim * dim)
    values = channels * net.patch[0] * net.patch[1]
    outer = 2 * (tokens + own_tokens) * values * dim + embedding
    outer += 2 * length * (1 + twice) * (options["freq_dim"] * dim + 7 * dim * dim)
    return Network(
        sum(p.numel() for p in net.parameters()) + (options["layers"] - 1) * own, own, tokens,
        float(block * options["layers"] + outer), float(block),
        float(4 * text * dim * dim * options["layers"] + embedding), dim, ffn, options["layers"],
    )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What memory depends on beside the networks."""

    gpus: int
    batch: int
    precision: str
    checkpointing: bool
    ema: bool

    @property
    def clips(self) -> int:
        """Of one GPU."""
        return -(-self.batch // self.gpus)


@dataclass(frozen=True)
class Cost:
    """Of one stage: FLOPs in all, hours of one GPU, and bytes on each GPU by what they are for."""

    stage: str
    parameters: int
    flops: float
    gpu_hours: float
    memory: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}


def train_memory(trained: list[Network], frozen: list[Network], setting: Setting) -> dict[str, float]:
    """Bytes per GPU of a stage that trains networks in turns, the first of which may keep an average."""
    n, everything = setting.gpus, [*trained, *frozen]
    whole = [net.parameters * FP32 for net in trained]
    memory = {
        "weights": sum(net.parameters for net in everything) * FP32 / n,
        "optimizer": 2 * sum(whole) / n,
        "average": whole[0] / n if setting.ema else 0.0,
        # A block's weights are put together while it works, the next one's already; the outer ones stay so.
        "gathered": 0.0 if n == 1 else max(
            (2 * net.block_parameters + net.parameters - net.layers * net.block_parameters) * FP32 for net in everything
        ),
    }  # fmt: skip
    turns = []
    for net, own in zip(trained, whole, strict=True):
        kept, block = (setting.clips * each for each in net.kept(setting.precision, setting.checkpointing))
        # Activations go while gradients come; the other players' gradients are still there.
        others = (sum(whole) - own) / n
        kept += net.casts(setting.precision, setting.checkpointing)
        turns.append((max(kept, own / n) + (block if setting.checkpointing else 0.0) + others, own / n + others))
    peak, gradients = max(turns)
    return {**memory, "gradients": gradients, "activations": peak - gradients}


def _training(spec: Spec, section: str, gpus: int) -> Setting:
    options = spec[section]
    return Setting(gpus, options["batch"], spec["precision"], options["activation_checkpointing"], options["ema"] > 0)


def of(spec: Spec, stages: list[str], gpus: int) -> list[Cost]:
    """The costs of the stages that compute much, in the order given."""
    world = build.World(spec)
    teacher = network(spec, world, build.teacher_rule(spec))
    student = network(spec, world, build.student_rule(spec), learns_by="student.input")
    real = network(spec, world, build.teacher_rule(spec), spec["real_score"]) if spec["real_score"] else teacher
    fake = real if spec["fake_score"] == "real_score" else teacher

    def cost(stage: str, parameters: int, flops: float, memory: dict[str, float]) -> Cost:
        return Cost(stage, parameters, flops, flops / RATE[spec["precision"]] / 3600, memory)

    def learning(net: Network, setting: Setting) -> float:
        """FLOPs of a pass with its backward pass, which is twice the forward one."""
        return 3 * net.forward + (net.layers * net.block_forward if setting.checkpointing else 0)

    out = []
    for stage in stages:
        if stage == "teacher" and spec["teacher_training.weights"] == "train":
            setting = _training(spec, "teacher_training", gpus)
            samples = setting.batch * spec["teacher_training.iterations"]
            net = network(spec, world, build.teacher_rule(spec), learns_by="teacher_training.loss")
            memory = train_memory([net], [], setting)
            out.append(cost(stage, net.parameters, samples * learning(net, setting), memory))
        elif stage == "ode_pairs":
            twice = 1 if spec["teacher_sampling"].get("guidance", 1.0) == 1.0 else 2
            options = spec["ode_pairs"]
            memory = {"weights": float(teacher.parameters * FP32)}
            # With guidance the two passes are one after the other.
            memory["activations"] = options["batch"] * teacher.passing(spec["precision"])
            memory["activations"] += teacher.casts(spec["precision"], False)
            out.append(cost(stage, teacher.parameters, options["count"] * options["steps"] * twice * teacher.forward,
                            memory))  # fmt: skip
        elif stage == "ode_init":
            setting = _training(spec, stage, gpus)
            samples = setting.batch * spec["ode_init.iterations"]
            nets = [
                network(spec, world, build.student_rule(spec), learns_by="ode_init.loss"),
                *_edits(spec, world, "ode_init.loss"),
            ]
            memory = train_memory([_together(nets)], [], setting)
            flops = samples * sum(learning(net, setting) for net in nets)
            out.append(cost(stage, nets[0].parameters, flops, memory))
        elif stage == "distill":
            setting = _training(spec, stage, gpus)
            out.append(_distill(spec, [student, *_edits(spec, world, "loss")], fake, real, setting, cost, learning))
    return out


def _edits(spec: Spec, world: build.World, path: str) -> list[Network]:
    """The student once more, where a loss has it learn from clips that a prompt changes."""
    learns = any(part["name"] == "edits" for part in bound(spec[path]))
    return [network(spec, world, build.student_rule(spec), edits=True)] if learns else []


def _together(nets: list[Network]) -> Network:
    """One network that passes several times before its backward pass, and keeps all of it."""
    return replace(nets[0], tokens=sum(net.tokens for net in nets))


def _distill(
    spec: Spec, students: list[Network], fake: Network, real: Network, setting: Setting, cost: Any, learning: Any
) -> Cost:
    student = students[0]
    passes = 1 if spec["student.input"]["name"] == "data" else len(build.student_times(spec))
    streams = getattr(build.student_input(spec), "streams", False)
    made = student.forward * (passes + streams)  # at most; a rollout commits every block, too
    twice = 1 if all(part.get("guidance", 1.0) == 1.0 for part in bound(spec["loss"])) else 2
    update = made - student.forward + sum(learning(net, setting) for net in students)
    update += fake.forward + twice * real.forward
    update += spec["distill.critic_updates"] * (made + learning(fake, setting))
    flops = spec["distill.iterations"] * setting.batch * update
    parameters = student.parameters + fake.parameters + real.parameters
    return cost("distill", parameters, flops, train_memory([_together(students), fake], [real], setting))


def memory_of(text: str) -> float:
    """Bytes of ``24GB``, ``80 GiB`` or a number of bytes.

    Raises:
        UserError: it is none.
    """
    units = {"": 1.0, "MB": 1e6, "GB": 1e9, "MIB": 2.0**20, "GIB": 2.0**30}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].upper() not in units:
        raise UserError(f"runtime.memory: '{text}' is no size; write it as 24GB or 80GiB")
    return float(found[1]) * units[found[2].upper()]


def lines(spec: Spec, costs: list[Cost]) -> list[str]:
    """The costs for a person, whether they fit into ``runtime.memory``, and what would make them."""
    gpus = planned(spec)
    limit = memory_of(spec["runtime.memory"]) if spec["runtime.memory"] else None
    chosen = "" if spec["runtime.gpus"] else " (as many as processes run here; runtime.gpus=N plans for N)"
    training = any(cost.stage not in ALONE for cost in costs)
    where = f"on {gpus} GPU(s){chosen}" if training else "on one GPU"
    rates = ", ".join(f"{rate / 1e12:g} in {name}" for name, rate in RATE.items())
    out = [f"{where}, estimated, at so many TFLOP/s each: {rates}"] if costs else []
    for cost in costs:
        parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in cost.memory.items() if size)
        clip = ALONE.get(cost.stage, "")
        size = f"{cost.parameters / 1e9:.3g} G parameters, " if cost.parameters else ""
        out.append(
            f"{cost.stage:<10} {clip}{size}{cost.flops / 1e15:.4g} PFLOP, "
            f"{_time(cost.gpu_hours)}, {cost.peak / 1e9:.3g} GB per GPU ({parts})"
        )
        if limit is not None and cost.peak > limit:
            ways = remedies(spec, cost.stage, gpus, limit)
            advice = f"it would with {' | or '.join(ways)}" if ways else "no option here makes it fit"
            if any(".batch=" in way for way in ways):
                advice += "; another batch is another recipe, and gradients can't be accumulated over several batches"
            if clip:
                advice = "make the clips smaller or shorter"
                if "cache" in cost.memory:
                    advice += ", or stream with a smaller window (causal.mask)"
            out.append(f"{cost.stage:<10} does not fit into {spec['runtime.memory']}; {advice}")
    return out


def planned(spec: Spec) -> int:
    """How many GPUs are planned for: ``runtime.gpus``, or where it is 0 as many as processes run here."""
    return spec["runtime.gpus"] or ranks.count()


def _time(gpu_hours: float) -> str:
    return f"{gpu_hours:.3g} GPU-hours" if gpu_hours >= 0.1 else f"{gpu_hours * 3600:.3g} GPU-seconds"


def remedies(spec: Spec, stage: str, gpus: int, limit: float) -> list[str]:
    """Changes by which a stage that does not fit would; each is enough, and none is listed that was not computed."""
    section = {"teacher": "teacher_training"}.get(stage, stage)
    world = build.World(spec)
    rules = {"student": build.student_rule(spec), "teacher": build.teacher_rule(spec)}
    feeds = {"student": "ode_init.loss" if stage == "ode_init" else "student.input",
             "teacher": "teacher_training.loss" if stage == "teacher" else None}  # fmt: skip
    nets = {name: network(spec, world, rule, learns_by=feeds[name]) for name, rule in rules.items()}
    nets["real_score"] = network(spec, world, rules["teacher"], spec["real_score"] or spec["model"])
    frozen = [nets["real_score"]] if stage == "distill" else []
    path = "ode_init.loss" if stage == "ode_init" else "loss"
    nets["student"] = _together([nets["student"], *_edits(spec, world, path)])
    trained = {"teacher": [nets["teacher"]], "ode_init": [nets["student"]],
               "distill": [nets["student"], nets[spec["fake_score"]]]}.get(stage)  # fmt: skip
    if trained is None:
        return []
    out = []
    for words, setting in _changes(section, _training(spec, section, gpus)):
        if sum(train_memory(trained, frozen, setting).values()) <= limit:
            out.append(words)
            if "gpus" in words:  # more of them fit as well
                break
    return out


def _changes(section: str, now: Setting) -> Iterator[tuple[str, Setting]]:
    lean = now
    if not now.checkpointing:
        lean = replace(lean, checkpointing=True)
        yield f"{section}.activation_checkpointing=true", lean
    if now.clips > 1:
        lean = replace(lean, batch=now.gpus)
        yield f"{section}.batch={now.gpus}" + ("" if now.checkpointing else " with activation checkpointing"), lean
    if now.ema:
        yield f"{section}.ema=0 with these", replace(lean, ema=False)
    for doubled in range(1, 11):
        count = now.gpus * 2**doubled
        batch = max(lean.batch, count)
        words = f"runtime.gpus={count}" + (f" {section}.batch={batch}" if batch != now.batch else "")
        extra = "" if now.checkpointing else f" {section}.activation_checkpointing=true"
        yield words + extra, replace(lean, gpus=count, batch=batch)
