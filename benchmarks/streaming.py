"""Streaming in the tiny world by truth metrics: prompt switches, pictures, videos, long rollouts; and its speed.

    python benchmarks/streaming.py switch image video long speed wan --run RUN --prompts 128 --out streaming.json

Without ``--run`` it streams the causal teacher that ships, in few steps. ``--spec`` says of which world truth and the
many-step teacher are. Each part prints its numbers as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from causvid import build, experiment, generation, weights
from causvid.data import shapes
from causvid.data.video import to_bytes
from causvid.eval import shapes_truth
from causvid.models.wan import Size
from causvid.randomness import Draw
from causvid.spec import Spec
from causvid.streaming.engine import Engine
from causvid.streaming.session import Session
from causvid.wan_generation import Request, Studio

SCORES = ("ok", "colour", "shape", "direction", "contrast")


def stream(session: Session, blocks: int) -> torch.Tensor:
    """The next blocks' frames, ``b f 3 h w`` in [-1, 1]."""
    return torch.cat([session.step().frames for _ in range(blocks)], 1).float() / 127.5 - 1


def share(values: torch.Tensor) -> float:
    return round(float(values.float().mean()), 3)


def agreement(before: shapes_truth.Fit, after: shapes_truth.Fit) -> torch.Tensor:
    """Share of texture cells that two videos have in common, ``b``; a half is chance."""
    return (before.state.texture == after.state.texture).float().mean((1, 2))


def frames_of_block(engine: Engine) -> int:
    """Pixel frames of a block in mid-stream."""
    (_, first), (_, second), *_ = engine.mask.blocks(engine.frames)
    return engine.codec.pixel_frames(second) - engine.codec.pixel_frames(first)


def centres(videos: torch.Tensor) -> torch.Tensor:
    """Centre of the shape in every frame, ``b f 2``."""
    return shapes_truth._centres(shapes_truth._firm(shapes_truth._coverage(videos)[1]))


def apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean distance of two trajectories on the torus, pixels, ``b``."""
    return ((a - b + shapes.SIZE / 2) % shapes.SIZE - shapes.SIZE / 2).norm(dim=-1).mean(1)


def changed(states: shapes.State, what: str) -> shapes.State:
    """The same states with the next colour, or the opposite direction."""
    colour, direction = states.colour, states.direction
    if what == "colour":
        colour = (colour + 1) % len(shapes.COLOURS)
    else:
        direction = direction ^ 1
    return shapes.State(colour, states.shape, direction, states.radius, states.speed, states.start, states.ground,
                        states.texture)  # fmt: skip


def matches(fitted: shapes_truth.Fit, states: shapes.State, dataset: shapes.Shapes) -> dict[str, torch.Tensor]:
    state = fitted.state
    return {
        "colour": (state.colour == states.colour) & (fitted.overlap > 0),
        "shape": (state.shape == states.shape) & (fitted.overlap >= shapes_truth.MIN_OVERLAP),
        "direction": (state.direction == states.direction) & (state.speed >= dataset.speed[0] / 2),
    }


def switch(engine: Engine, states: shapes.State, dataset: shapes.Shapes, cache: str | None) -> dict:
    """A prompt is changed after a training length; two blocks later a training length is judged, and the one after it.

    In that one nothing is left of the blocks before the switch but a sink.
    """
    out: dict = {}
    blocks, size = len(engine.mask.blocks(engine.frames)), frames_of_block(engine)
    for policy in ("keep", "recache", "cut"):
        for what in ("colour", "direction"):
            new = changed(states, what)
            session = Session(engine, states.captions, cache=cache)
            before = shapes_truth.fit(stream(session, blocks))
            session.prompt(new.captions, policy)
            after = stream(session, 2 * blocks + 2)
            soon, late = 2 * size, (blocks + 2) * size
            places = {
                "at_once": after[:, :soon],
                "two_blocks_later": after[:, soon:late],
                "a_length_later": after[:, late:],
            }
            rows = {}
            for name, frames in places.items():
                fitted = shapes_truth.fit(frames)
                found = matches(fitted, new, dataset)
                kept = found["shape"] & found["colour" if what == "direction" else "direction"]
                same = agreement(before, fitted)
                rows[name] = {
                    "obeyed": share(found[what]),
                    "rest_kept": share(kept),
                    "both": share(found[what] & kept),
                    "texture_kept": share(same),
                    "ground_moved": share((fitted.state.ground - before.state.ground).abs()),
                }
            out[f"{policy}/{what}"] = rows
    session = Session(engine, states.captions, cache=cache)
    stream(session, blocks)
    stream(session, 2)
    fitted = shapes_truth.fit(stream(session, blocks))
    out["no_switch"] = {name: share(value) for name, value in matches(fitted, states, dataset).items()}
    return out


def image(engine: Engine, states: shapes.State, dataset: shapes.Shapes, cache: str | None) -> dict:
    """A rendered frame starts a stream of a training length, in each way."""
    out, frames = {}, dataset.frames
    given = engine.codec.pixel_frames(engine.mask.blocks(engine.frames)[0][1])
    picture = to_bytes(shapes.render(states, 1)[:, 0])
    first = shapes_truth.fit(shapes.render(states, frames))
    for how in ("still", "first", "alone"):
        session = Session(engine, states.captions, cache=cache)
        session.image(picture, how)
        video = stream(session, len(engine.mask.blocks(engine.frames)) + 1)[:, :frames]
        later = video[:, given:] if how == "still" else video
        fitted = shapes_truth.fit(later)
        found = matches(fitted, states, dataset)
        start = apart(centres(video[:, :1]), centres(shapes.render(states, 1)))
        out[how] = {
            **{name: share(value) for name, value in found.items()},
            "shape_and_colour": share(found["shape"] & found["colour"]),
            "texture_kept": share(agreement(first, fitted)),
            "contrast": share(fitted.contrast),
            "size_px": share((fitted.state.radius - states.radius).abs()),
            "start_px": share(start),
            "speed": share(fitted.state.speed),
        }
    return out


def video(
    engine: Engine, states: shapes.State, dataset: shapes.Shapes, cache: str | None, strengths: list[float]
) -> dict:
    """Rendered videos in another colour are restyled: colour of the prompt, motion of the input."""
    out, frames = {}, dataset.frames
    source = shapes.render(states, frames)
    wanted = changed(states, "colour")
    answer = shapes.render(wanted, frames)
    for strength in strengths:
        session = Session(engine, wanted.captions, cache=cache)
        session.video(to_bytes(source), strength)
        made = stream(session, len(engine.mask.blocks(engine.frames)))[:, :frames]
        fitted = shapes_truth.fit(made)
        found = matches(fitted, wanted, dataset)
        distance = apart(centres(made), centres(source))
        follows = (distance <= 2) & found["direction"]
        out[f"{strength:g}"] = {
            "colour": share(found["colour"]),
            "shape": share(found["shape"]),
            "follows": share(follows),
            "both": share(follows & found["colour"]),
            "distance_px": share(distance),
            "texture_kept": share(agreement(shapes_truth.fit(source), fitted)),
            "to_input_db": share(10 * torch.log10(4 / (made - source).pow(2).mean((1, 2, 3, 4)))),
            "to_answer_db": share(10 * torch.log10(4 / (made - answer).pow(2).mean((1, 2, 3, 4)))),
            "contrast": share(fitted.contrast),
        }
    return out


def long(engine: Engine, states: shapes.State, dataset: shapes.Shapes, cache: str | None, factor: int) -> dict:
    """Many times the training length: a training length judged at 21 places, memory and time per block on the way."""
    session = Session(engine, states.captions, cache=cache)
    length = len(engine.mask.blocks(engine.frames))
    blocks = len(session.moment.cache.rule.blocks(engine.frames * factor))
    begins = sorted({round(i * (blocks - length) / 20) for i in range(21)})
    judge, places = shapes_truth.ShapesTruth(dataset.speed, dataset.radius), {}
    open_parts: dict[int, list[torch.Tensor]] = {}
    rows, process = [], psutil.Process()
    for block in range(blocks):
        begin = time.process_time()  # of the processor: other work on the machine does not count
        made = session.step()
        spent = time.process_time() - begin
        if block % max(1, blocks // 100) == 0 or block == blocks - 1:
            rows.append((block, spent, process.memory_info().rss, session.moment.cache.bytes))
        if block in begins:
            open_parts[block] = []
        for first, part in list(open_parts.items()):
            part.append(made.frames)
            if len(part) == length:  # judged at once, so that no frames are held
                found = judge(torch.cat(open_parts.pop(first), 1).float() / 127.5 - 1, states.captions)
                places[first] = {key: share(found[key]) for key in SCORES}
    settled = rows[len(rows) // 10 :]
    quarter = max(1, len(settled) // 4)
    early, late = (statistics.median(row[1] for row in part) for part in (settled[:quarter], settled[-quarter:]))
    return {
        "blocks": blocks, "first": places[begins[0]], "last": places[begins[-1]],
        "block_cpu_s_ratio_last_to_first_quarter": round(late / early, 3),
        "rss_ratio_last_to_tenth": round(settled[-1][2] / settled[0][2], 3), "cache_bytes": settled[-1][3],
        "places": list(places.items()), "rows": [(b, round(s, 4), r, c) for b, s, r, c in rows],
    }  # fmt: skip


def raced(engine: Engine, prompts: list[str], teacher: Callable[[str], object], frames: int) -> dict:
    """A clip of the training length as a stream and by the many-step teacher, in turns in one process.

    One turn for each prompt; the first warms up and is not counted.
    """
    firsts, streams, teachers, shares = [], [], [], []
    for turn, prompt in enumerate(prompts):
        begin = time.perf_counter()
        session = Session(engine, prompt)
        stream(session, len(session.moment.cache.rule.blocks(engine.frames)))
        streamed = time.perf_counter() - begin
        begin = time.perf_counter()
        teacher(prompt)
        if turn:
            summary = session.ledger.summary()
            firsts.append(summary["first_frame_s"])
            streams.append(streamed)
            teachers.append(time.perf_counter() - begin)
            shares.append({key: value for key, value in summary.items() if key.endswith("_share")})
    first, streamed, many = (statistics.median(values) for values in (firsts, streams, teachers))
    return {
        "first_frame_s": first, "clip_s": streamed, "teacher_s": many, "fps": frames / streamed,
        "teacher_fps": frames / many, "latency_ratio": many / first, "throughput_ratio": many / streamed,
        "shares": {key: round(statistics.median(s[key] for s in shares), 3) for key in shares[0]},
    }  # fmt: skip


def speed(engine: Engine, spec: Spec, world: build.World) -> dict:
    """A tiny world's stream against its teacher in 50 steps."""
    network = build.load_network(spec, world, build.teacher_rule(spec), build.shipped_teacher(spec))
    sampler, draw = build.teacher_sampler(spec), Draw(0, "timing", 0, [0])

    def teacher(prompt: str) -> None:
        text, free = world.text_encoder.encode([prompt]), world.unconditional(1)
        world.codec.decode(sampler(network, draw.normal("noise", *world.latent_shape), text, free).last)

    prompts = [f"a red circle moves {way}" for way in (*shapes.DIRECTIONS, "left", "up")]
    return raced(engine, prompts, teacher, world.dataset.frames)


WAN = """
about: Wan2.1's layout, cut down.
base: {base}
world:
  dataset: {{frames: 33, height: 64, width: 112}}
  codec: {{base_dim: 16}}
  text_encoder: {{dim: 32, layers: 2, heads: 4, ffn_dim: 48, vocabulary_size: 64, length: 12}}
model: {{dim: 256, ffn_dim: 1024, heads: 4, layers: 6, freq_dim: 64}}
"""


def wan_speed() -> dict:
    """Wan2.1's layout cut down, with random weights: the causal student in 3 steps against 50 steps of the teacher."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import wan_files  # type: ignore[import-not-found]

    wan_files.CODEC["base_dim"] = 16
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = wan_files.official_folder(folder, Size(256, 1024, 4, 6, text_dim=32, freq_dim=64))
        studios = {}
        for base in ("wan/causal", "wan/teacher_euler"):
            path = folder / f"{base[4:]}.yaml"
            path.write_text(WAN.format(base=base))
            model = folder / "ours" if base == "wan/causal" else None  # random weights are anybody's
            studios[base] = Studio(Request(str(path), place, (), folder, model=model, store=folder / "text"))
        engine, many = studios["wan/causal"].engine, studios["wan/teacher_euler"]

        def teacher(prompt: str) -> None:
            text, negative = (many.world.text_encoder.encode([each]) for each in (prompt, "bad"))
            many.video(text, negative, 0, lambda done: None)

        return raced(engine, ["a red fox", "the snow", "a fox in the snow", "a red fox runs"], teacher, 33)


def main() -> None:
    """Measure the named parts and write them as one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=["switch", "image", "video", "long", "speed", "wan"])
    parser.add_argument("--student", type=Path, help="weights of a student of the spec, wherever they lie")
    parser.add_argument("--spec", default="tiny/causvid", help="whose world it is")
    parser.add_argument("--run", help="a run's spec or folder; default the causal teacher that ships")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--cache", help="cache policy; default the spec's")
    parser.add_argument("--factor", type=int, default=100)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    spec = experiment.single(told.spec, [])
    world = build.World(spec)
    if told.student:
        engine = generation.engine_with(spec, told.student)
    else:
        engine = generation.engine_of(told.run, told.runs) if told.run else generation.shipped_engine()
    engine = engine.with_steps(told.steps)
    dataset = world.dataset
    states = dataset.states(range(told.prompts), "test")
    out = {
        "prompts": told.prompts,
        "cache": dict(engine.policy(told.cache)),
        "times": list(engine.times),
        "run": told.run or "shipped",
    }
    for part in told.parts:
        made = {
            "switch": lambda: switch(engine, states, dataset, told.cache),
            "image": lambda: image(engine, states, dataset, told.cache),
            "video": lambda: video(engine, states, dataset, told.cache, told.strengths),
            "long": lambda: long(engine, states, dataset, told.cache, told.factor),
            "speed": lambda: speed(engine, spec, world),
            "wan": wan_speed,
        }[part]()  # fmt: skip
        out[part] = made
        print(json.dumps({part: {k: v for k, v in made.items() if k not in ("rows", "places")}}), flush=True)
    if told.out:
        weights.write_json(told.out, out)


if __name__ == "__main__":
    main()
