"""The sections of an experiment spec, as dataclasses: every key, its type and its default.

A field marked ``component("group")`` holds a registered name, or ``{name: ..., option: ...}`` whose options are
checked against the component's signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal


def component(group: str, default: Any = MISSING) -> Any:
    """A field that holds a component of the group (or a list of them, where the field is a list)."""
    return field(default=default, metadata={"group": group})


def bounds(least: float, most: float = float("inf"), count: int | None = None) -> dict[str, Any]:
    """What a number must lie within, or every number of a list, which has ``count`` of them."""
    return {"least": least, "most": most, "count": count}


def number(default: Any = MISSING, *, least: float, most: float = float("inf")) -> Any:
    """A field that holds a number, or numbers, within bounds."""
    return field(default=default, metadata=bounds(least, most))


SIZE, SHARE, POSITIVE, NOT_NEGATIVE = bounds(1, 65536), bounds(0, 1), bounds(1e-9), bounds(0)
MOST_STEPS = 10_000
# Bounds on the options of registered components, by name: a name means the same in all of them.
OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("dim", "ffn_dim", "freq_dim", "heads", "layers", "hidden", "taps", "length"), SIZE),
    **dict.fromkeys(("height", "width", "base_dim"), SIZE),
    **dict.fromkeys(("frames", "block_frames", "first_block_frames", "window_frames"), SIZE),
    **dict.fromkeys(("t_min", "t_max", "t_floor", "context_t", "anchor", "drop_text", "momentum"), SHARE),
    **dict.fromkeys(("shift", "theta", "time_scale"), POSITIVE),
    **dict.fromkeys(("eps", "r1", "lr", "rest_lr", "weight_decay", "sink_frames", "huber"), NOT_NEGATIVE),
    **dict.fromkeys(("betas", "rest_betas"), bounds(0, 1, count=2)),
    "patch": bounds(1, 65536, count=2),
    "steps": bounds(0, MOST_STEPS),  # a count from 1, or times from 0: the grid tells which
}


@dataclass(frozen=True)
class World:
    """What is generated: data, latents and text. ``negative_prompt``: what guidance leads away from."""

    dataset: Any = component("dataset")
    codec: Any = component("codec", "identity")
    text_encoder: Any = component("text_encoder", "words")
    negative_prompt: str = ""


@dataclass(frozen=True)
class Causal:
    """How a causal network sees, in training and in its stream."""

    mask: Any = component("mask", "block_causal")
    position: Any = component("position", "absolute")
    kernel: Any = component("kernel", "blockwise")


@dataclass(frozen=True)
class Training:
    """A training run. ``decay`` ends at 0; ``ema`` 0 keeps no average; ``gradient_clip`` 0 does not clip."""

    iterations: int = number(least=1)
    batch: int = number(32, least=1)
    optimizer: Any = component("optimizer", "adamw")
    warmup: int = number(0, least=0)
    decay: Literal["constant", "cosine"] = "constant"
    ema: float = number(0.0, least=0, most=1)
    gradient_clip: float = number(10.0, least=0)
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class TeacherTraining(Training):
    """``weights``: ``shipped`` takes the trained teacher of this world and kind, ``train`` trains one, ``given`` takes
    those of a folder or file outside: ``runtime.weights``, or ``causvid generate --weights``.

    ``start``: kind of shipped teacher whose weights the training starts from; default fresh ones.
    """

    iterations: int = number(0, least=0)
    weights: Literal["shipped", "train", "given"] = "shipped"
    start: str | None = None
    loss: Any = component("loss", "flow_matching")


@dataclass(frozen=True)
class OdePairs:
    """``steps`` Euler steps of the teacher, of whose states some are stored.

    ``keep``: counts (whole numbers), for the states that students of so many steps start from; or times below 1.
    """

    count: int = number(least=1)
    steps: int = number(48, least=1, most=MOST_STEPS)
    keep: Sequence[int | float] = number((1, 2, 3, 4), least=1e-6)
    batch: int = number(32, least=1)


@dataclass(frozen=True)
class OdeInit(Training):
    """Regression on the stored trajectories. ``pairs``: a store of them, in place of what ``ode_pairs`` makes."""

    pairs: str | None = None
    loss: Any = component("loss", "ode_regression")


@dataclass(frozen=True)
class Student:
    """The few-step student: ``steps`` is a count (a uniform grid, shifted) or a list of times.

    ``cache``: what streams of a causal one keep; other than in training it is a ``train_stream_mismatch``
    (docs/pitfalls.md).
    """

    steps: int | Sequence[float] = number(4, least=0, most=MOST_STEPS)
    shift: float = number(1.0, least=1e-3)
    input: Any = component("student_input", "data")
    sampler: Any = component("sampler", "rollout")
    cache: Any = component("cache_policy", "trained")
    causal: bool = True


@dataclass(frozen=True)
class Distill(Training):
    """``critic_updates`` of every other player before each update of the student."""

    critic_updates: int = number(5, least=0)
    critic_optimizer: Any = component("optimizer", "adamw")
    discriminator: Any = component("discriminator", "feature_head")


@dataclass(frozen=True)
class Evaluation:
    """``samples`` held-out pairs; long rollouts are ``rollout_factor`` times the training length."""

    metrics: Sequence[Any] = component("metric", ("shapes_truth",))
    samples: int = number(256, least=1)
    teacher_steps: Sequence[int] = number((4, 8, 16), least=1, most=MOST_STEPS)
    rollout_factor: int = number(10, least=1)
    rollout_samples: int = number(64, least=1)
    batch: int = number(64, least=1)


@dataclass(frozen=True)
class Runtime:
    """How to run, not what: outside every hash. ``threads`` 0 takes every core; ``loggers`` beside ``jsonl``.

    ``gpus``, ``memory`` of each ("24GB"): what 'causvid plan' plans for; ``gpus`` null are as many as processes run
    (one without torchrun), and a run of other than ``gpus`` processes is refused. ``weights``: the folder of Wan2.1;
    ``teacher``: its transformer, where that lies elsewhere; ``real_score``: another network for the real score. The
    digests of what is read are in the hash. ``monitor``: what judges a network while it trains.
    """

    threads: int = number(0, least=0, most=1024)
    device: str = "cpu"  # a device of torch's, or auto: an accelerator if there is one
    gpus: int | None = number(None, least=1, most=100_000)
    memory: str | None = None
    weights: str | None = None
    teacher: str | None = None
    real_score: str | None = None
    loggers: Sequence[Any] = component("logger", ("jsonl",))
    monitor: Any = component("monitor", None)
    checkpoint_seconds: float = number(30.0, least=0)


@dataclass(frozen=True)
class Schema:
    """A whole experiment.

    ``real_score``: geometry of another, larger network for the real score of distillation; null: the teacher itself.
    ``fake_score``: which of the two the fake score starts as. ``precision``: type in which networks compute; weights,
    averages and optimizers stay in fp32.
    """

    world: World
    model: Any = component("model")
    causal: Causal = field(default_factory=Causal)
    teacher: Any = component("teacher", "bidirectional")
    teacher_training: TeacherTraining = field(default_factory=TeacherTraining)
    teacher_sampling: Any = component("sampler", "euler")
    real_score: Any = component("model", None)
    fake_score: Literal["teacher", "real_score"] = "teacher"
    ode_pairs: OdePairs = field(default_factory=lambda: OdePairs(count=384))
    init: Any = component("init", "ode")
    ode_init: OdeInit = field(default_factory=lambda: OdeInit(iterations=1000))
    loss: Any = component("loss", "dmd")
    student: Student = field(default_factory=Student)
    distill: Distill = field(default_factory=lambda: Distill(iterations=1000))
    evaluation: Evaluation = field(default_factory=Evaluation)
    # Suites that are sampled and judged beside the held-out clips, and more metrics of those.
    eval: Sequence[Any] = component("suite|metric", ())
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    until: Literal["teacher", "ode_pairs", "ode_init", "distill", "report"] = "report"
    sample: Literal["student", "teacher"] = "student"  # which of the two `causvid generate --spec` runs
    runtime: Runtime = field(default_factory=Runtime)
    about: str = ""
    sweep: dict = field(default_factory=dict)
