"""What making a clip costs, and encoding one for training: from formulas, as in ``costs.py`` (docs/wan.md)."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Any

from causvid import build, costs
from causvid.attention.masks import Rule
from causvid.costs import Cost, Network
from causvid.spec import Spec
from causvid.validate import Bound

# Bytes per token and unit of dim that a block of a stream works on while it attends: for its own tokens, and for those
# that it sees; counted tensor by tensor.
ATTENDING = {"fp32": (54, 13), "bf16": (25, 15)}


def only_samples(spec: Spec) -> bool:
    """Whether a spec has no clips to train on or to be judged by: 'causvid generate --spec' is all that it runs."""
    return not getattr(build.World(spec).dataset, "holds_clips", True)


def of(spec: Spec, stages: Sequence[str]) -> list[Cost]:
    """The costs of a prompt's text, of a clip, where the stages lead to a network that makes it, and of encoding one.

    Args:
        stages: those that are planned.
    """
    world = build.World(spec)
    out = [_text(world)] if hasattr(world.text_encoder, "encoding") else []
    if only_samples(spec) or {"ode_init", "distill"} & set(stages):
        out.append(_generate(spec, world))
    if world.holds_latents and hasattr(world.codec, "encoding"):
        out.append(_encode(world))
    return out


def _generate(spec: Spec, world: build.World, given: bool | None = None, cache: Bound | None = None) -> Cost:
    """One clip by the network that the spec samples: the student, or the teacher.

    Args:
        given: whether the weights are given ones, and not those of a run; default what the spec is for.
        cache: what a stream keeps; default the spec's policy.
    """
    given, teacher = only_samples(spec) if given is None else given, spec["sample"] == "teacher"
    # Given weights are put into bf16 on an accelerator; those of a run stay in fp32.
    precision, each = ("bf16", 2) if given or spec["precision"] == "bf16" else ("fp32", costs.FP32)
    rule = build.teacher_rule(spec) if teacher else build.student_rule(spec)
    net, frames = costs.network(spec, world, rule), world.latent_shape[0]
    memory = {"weights": float(net.parameters * each)}
    if rule.causal and not teacher:
        flops = _stream_flops(spec, world, rule, net)
        kept = build.stream_cache(cache or spec["student.cache"], rule, frames).rule
        cached, working = _stream_memory(kept, frames, net, precision, each)
        memory["cache"] = cached
        block = max(stop - start for start, stop in rule.blocks(frames))
    else:
        many = build.teacher_sampler(spec) if teacher else None
        flops = net.forward * (many.evaluations if many else len(build.student_times(spec)))
        rows, block = costs.rows(many) if many else 1, frames
        working = float(rows * net.tokens * each * (15 * net.dim + 2 * net.ffn_dim))
    seconds = flops / costs.RATE[precision]
    coding = _decoding(world, frames)
    if coding is not None:
        flops, seconds = flops + coding.flops, seconds + coding.flops / costs.RATE["fp32"]
        memory |= _codec_memory(world, coding.state)
        # A stream keeps the state before a block until it has the one after it.
        states = coding.state if block < frames else 0.0
        working = max(working, coding.most + states + _pixels(world, block))
    return Cost("generate", net.parameters, flops, seconds / 3600, {**memory, "activations": working})


class _Sized(build.World):
    """A world whose clips have another size."""

    def __init__(self, world: build.World, latent_shape: tuple[int, ...]) -> None:
        self.__dict__.update(world.__dict__)
        self.latent_shape = latent_shape


def remedies(spec: Spec, stage: str, limit: float) -> list[str]:
    """Changes by which making a clip, encoding one, or a prompt would fit into so many bytes.

    Each is enough, the least of its kind, and computed by the formulas; empty where none is.
    """
    world = build.World(spec)
    if stage == "text":
        return ["runtime.device=cpu or --device cpu: embeddings are kept on disk, and need no encoder then"]
    frames, channels, height, width = world.latent_shape
    make = (lambda clip: _generate(spec, clip)) if stage == "generate" else _encode

    def peak(*shape: int) -> float:
        return make(_Sized(world, (shape[0], channels, *shape[1:]))).peak

    rule = build.student_rule(spec)
    streams = stage == "generate" and rule.causal and spec["sample"] != "teacher"
    lengths = [stop for _, stop in rule.blocks(frames)][:-1] if streams else list(range(1, frames))
    down, across = spec["model"].get("patch", (1, 1))
    tokens = (height // down, width // across)
    sizes = [tuple(max(1, n * part // max(tokens)) for n in tokens) for part in range(1, max(tokens))]
    out, canvas = [], only_samples(spec)
    length = _largest(lengths, lambda n: peak(n, height, width), limit)
    if length:
        count = world.codec.pixel_frames(length)
        out.append(f"world.dataset.frames={count}" if canvas else f"clips of {count} frames")
    size = _largest(sizes, lambda n: peak(frames, n[0] * down, n[1] * across), limit)
    if size:
        high, wide = size[0] * down * world.codec.scale, size[1] * across * world.codec.scale
        key = "world.dataset"
        out.append(f"{key}.height={high} {key}.width={wide}" if canvas else f"clips of {high}x{wide} pixels")
    smallest = (lengths or [frames])[0], *((n * p for n, p in zip((sizes or [tokens])[0], (down, across), strict=True)))
    if not out and peak(*smallest) <= limit:
        out.append("clips that are both smaller and shorter")
    if streams:
        block, policy = rule.block_range(0)[1], "cache_policy"
        windows = list(range(block, frames, block))
        cached = [Bound(policy, {"name": "window", "window_frames": n, "position": "absolute"}) for n in windows]
        window = _largest(cached, lambda policy: _generate(spec, world, cache=policy).peak, limit)
        if window:
            out.append(f"student.cache={{name: window, window_frames: {window['window_frames']}}}")
    released = hasattr(world.codec, "decode_block") and hasattr(world.text_encoder, "release")
    if stage == "generate" and released and _generate(spec, world, given=True).peak <= limit:
        out.append("--dtype bf16 of 'causvid generate --spec'")
    return out


def _largest(candidates: Sequence[Any], peak: Callable[[Any], float], limit: float) -> Any:
    """The last of rising candidates that fits; None where none does."""
    if not candidates or peak(candidates[0]) > limit:
        return None
    found = candidates[bisect(candidates, limit, key=peak) - 1]
    return found if peak(found) <= limit else candidates[0]


def _text(world: build.World) -> Cost:
    """One prompt whose embeddings are not kept yet; the encoder is let go before any other network is loaded."""
    encoder, work = world.text_encoder, world.text_encoder.encoding()
    memory = {"weights": float(encoder.parameters * encoder.dtype.itemsize), "activations": work.most}
    return Cost("text", encoder.parameters, work.flops, work.flops / costs.RATE["bf16"] / 3600, memory)


def _encode(world: build.World) -> Cost:
    """One clip of the data's size from pixels to latents."""
    frames, _, height, width = world.latent_shape
    work = world.codec.encoding(frames, height, width)
    memory = {**_codec_memory(world, work.state), "activations": work.most + _pixels(world, frames) / 2}
    return Cost("encode", 0, work.flops, work.flops / costs.RATE["fp32"] / 3600, memory)


def _stream_flops(spec: Spec, world: build.World, rule: Rule, net: Network) -> float:
    """Every block at each step's time, and all but the last once more for its context; the text once."""
    context = rule.blocks(world.latent_shape[0])[-1][0]
    committed = costs.network(spec, world, rule, frames=context) if context else None
    steps = len(build.student_times(spec)) * (net.forward - net.text_forward) + net.text_forward
    return steps + (committed.forward - committed.text_forward if committed else 0.0)


def _stream_memory(rule: Rule, frames: int, net: Network, precision: str, each: int) -> tuple[float, float]:
    """Bytes of the cache at its largest, and of what a block works on."""
    held: list[int] = []
    most, working = 0, 0.0
    per_frame = net.tokens // frames
    own, seen = ATTENDING[precision]
    for number, (start, stop) in enumerate(rule.blocks(frames)):
        held = list(rule.kept(number, [*held, *range(start, stop)]))
        most = max(most, len(held))
        # Attention and the feed-forward; and when a block is committed, its keys and values in all layers, which are
        # views of tensors three times as large until they are copied.
        tokens = (stop - start) * per_frame
        attending = own * tokens + seen * len({*held, *range(start, stop)}) * per_frame
        others = each * tokens * max(6 * net.layers + 6, 15 + 2 * net.ffn_dim / net.dim)
        working = max(working, net.dim * max(attending, others))
    return 2.0 * net.layers * net.dim * per_frame * most * each, working


def _decoding(world: build.World, frames: int) -> Any:
    """What decoding takes, where the codec tells it."""
    _, _, height, width = world.latent_shape
    return world.codec.decoding(frames, height, width) if hasattr(world.codec, "decoding") else None


def _codec_memory(world: build.World, state: float) -> dict[str, float]:
    return {"codec": float(getattr(world.codec, "released_bytes", None) or 0), "codec state": state}


def _pixels(world: build.World, frames: int) -> float:
    """Bytes of decoded frames in fp32, in parts and put together."""
    _, _, height, width = world.latent_shape
    size = 3 * height * width * world.codec.scale**2
    return 2.0 * costs.FP32 * size * world.codec.pixel_frames(frames)
