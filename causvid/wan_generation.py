"""Videos from given weights by any spec: ``causvid generate --spec``; few-step or many-step, causal or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causvid import build, experiment, generation, progress, weights
from causvid import spec as specs
from causvid.attention.masks import Rule
from causvid.data.video import to_bytes, write_mp4
from causvid.errors import UserError
from causvid.models import wan_files
from causvid.randomness import Draw
from causvid.streaming.engine import Engine
from causvid.streaming.script import Play, Script
from causvid.types import DenoiserOutput, Text, VaeState
from causvid.world import existing

SMALLEST = 16  # pixels: 8 of the VAE times a patch of 2
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Request:
    """What to make, and from what; see ``causvid generate --help``."""

    spec: str
    weights: Path
    prompts: Sequence[str]
    out: Path
    overrides: Sequence[str] = ()
    model: Path | None = None
    part: str | None = None
    seeds: Sequence[int] = (0,)
    frames: int | None = None
    rollouts: int | None = None
    fps: float = 16
    store: Path | None = None
    device: str = "cpu"
    dtype: str | None = None
    negative: str | None = None
    script: Script | None = None
    stream: bool = False


class InPrecision:
    """A denoiser that computes in its own type, for a sampler whose latents are fp32."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self._text: tuple[Text, Text] | None = None

    @property
    def mask(self) -> Rule:
        return self.model.mask

    def new_cache(self) -> Any:
        return self.model.new_cache()

    def __call__(self, x: Tensor, t: Tensor, text: Text, **options: Any) -> DenoiserOutput:
        out = self.model(x.to(self.dtype), t, self._cast(text), **options)
        return replace(out, x=x, prediction=out.prediction.float())

    def _cast(self, text: Text) -> Text:
        """The text in this type; the same object for the same text, which lets the cross memo be used."""
        if text.embeddings.dtype == self.dtype:
            return text
        if self._text is None or self._text[0] is not text:
            self._text = (text, text.to(self.dtype))
        return self._text[1]


class Studio:
    """A spec with weights: everything that is needed to make videos of it."""

    def __init__(self, request: Request) -> None:
        request = replace(request, device=str(existing(request.device, "--device")))
        self.request, self.spec = request, specs.load(request.spec, request.overrides)
        self.dtype = _dtype(request)
        self.world = build.World(self.spec, weights=request.weights, store=request.store, device=request.device)
        height, width = (size * self.world.codec.scale for size in self.world.latent_shape[2:])
        if height % SMALLEST or width % SMALLEST:
            raise UserError(f"height and width must be multiples of {SMALLEST}, got {height}x{width}")
        self.teacher = self.spec["sample"] == "teacher"
        self.causal = not self.teacher and self.spec["student.causal"]
        _check(request, self)
        self._found = wan_files.find(request.model or request.weights, request.part)
        self._size = build.size_of(self.world, self.spec["model"])
        wan_files.agree(self._found, self._size)
        wan_files.checked(self._found, self._size)

    @cached_property
    def model(self) -> InPrecision:
        """The network with its weights."""
        rule = build.teacher_rule(self.spec) if self.teacher else build.student_rule(self.spec)
        with torch.device("meta"):
            empty = build.network(self.spec, self.world, rule)
        progress.console.print(f"weights: {self._found.files.path} ({self._found.layout})", highlight=False)
        return InPrecision(wan_files.load(empty, self._size, self._found, self.dtype, self.request.device), self.dtype)

    @cached_property
    def engine(self) -> Engine:
        """The causal student, ready to stream."""
        frames, channels, height, width = self.world.latent_shape
        sampler = build.session_sampler(self.spec)
        return Engine(
            self.model, self.model.model, self.world.codec, self.world.text_encoder, (channels, height, width), frames,
            tuple(sampler.times), self.spec["student.shift"], sampler.context_t, self.request.device,
        )  # fmt: skip

    def latent_frames(self) -> int:
        """Latent frames of the clip, the last one perhaps wanted in part."""
        if self.request.frames is None:
            return self.world.latent_shape[0]
        return next(n for n in range(1, self.request.frames + 1) if self._pixel_frames(n) >= self.request.frames)

    def _pixel_frames(self, latent_frames: int) -> int:
        return self.world.codec.pixel_frames(latent_frames)

    @property
    def streams(self) -> bool:
        """Whether videos are streams: of a causal student, and not by overlapping rollouts."""
        return self.causal and not self.request.rollouts

    def video(self, text: Text, negative: Text, seed: int, show: progress.Bar) -> Tensor:
        """One video of a model that does not stream, or of overlapping rollouts, ``f 3 h w`` uint8."""
        if self.request.rollouts:
            return torch.cat(list(self._overlapping(text, seed, show)))
        pixels = torch.cat(list(self._decoded(self._blocks(text, negative, seed), show)))
        return pixels if self.request.frames is None else pixels[: self.request.frames]

    def _blocks(self, text: Text, negative: Text, seed: int) -> Iterator[Tensor]:
        """Latents, block by block as they are made."""
        shape = (self.latent_frames(), *self.world.latent_shape[1:])
        draw = Draw(seed, "generate", 0, [0], self.request.device)
        if self.teacher:
            sampler = build.construct(self.spec["teacher_sampling"])
            yield sampler(self.model, draw.normal("noise", *shape), text, negative).last
        else:
            yield self._sampler()(self.model, shape, text, draw)

    def _sampler(self) -> Any:
        return build.construct(self.spec["student.sampler"], times=build.student_times(self.spec))

    def _decoded(self, blocks: Iterator[Tensor], show: progress.Bar) -> Iterator[Tensor]:
        """Pixels of each block as soon as it is made, ``f 3 h w`` uint8."""
        state, done = VaeState(), 0
        for latents in blocks:
            done += latents.shape[1]
            show(done)
            streamed = self.world.codec.decode_block(latents, state)
            state = streamed.state
            yield to_bytes(streamed.value[0]).cpu()

    def _overlapping(self, text: Text, seed: int, show: progress.Bar) -> Iterator[Tensor]:
        """Rollouts of the training length, each begun from the end of the one before, as the release does it.

        The first block of the next rollout shows the last frames again: its first latent is the first of these frames
        encoded anew as an image, the others are taken over. Every rollout, the last too, gives those frames up.
        """
        codec, shape = self.world.codec, self.world.latent_shape
        block = self.model.mask.block_range(0)[1]
        shared = codec.pixel_frames(block)
        start: Tensor | None = None
        for rollout in range(self.request.rollouts or 0):
            draw = Draw(seed, "generate", rollout, [0], self.request.device)
            parts = [] if start is None else [start]
            for made in self._sampler().stream(self.model, shape, text, draw, start=start):
                parts.append(made.latents)
                show(rollout * shape[0] + made.stop)
            latents = torch.cat(parts, dim=1)
            pixels = codec.decode(latents)
            yield to_bytes(pixels[0, :-shared]).cpu()
            image = codec.encode(pixels[:, -shared:][:, :1])
            start = torch.cat([image, latents[:, latents.shape[1] - (block - 1) :]], dim=1)


def generate(request: Request) -> Path:
    """Make every prompt with every seed; returns the mp4, or the folder of several.

    Raises:
        UserError: spec, weights, prompts, sizes or output path are wrong; told before any weights are loaded, where
            that can be known.
    """
    generation.refuse_out(request.out, len(request.prompts) * len(request.seeds))
    studio = Studio(request)
    experiment.set_threads(studio.spec)
    script = request.script
    if script is not None or request.stream:
        if not studio.streams:
            raise UserError(f"'{request.spec}' makes whole clips; what happens in a stream needs a causal student")
        script = script or Script(((0, request.prompts[0]),), request.frames, request.seeds[0])
        return _played(studio, replace(script, fps=request.fps))
    jobs = [(prompt, seed) for prompt in request.prompts for seed in request.seeds]
    alone = len(jobs) == 1
    negative = studio.world.negative_prompt if request.negative is None else request.negative
    texts = studio.world.text_encoder.encode([*request.prompts, negative]).to(studio.request.device)
    studio.world.text_encoder.release()
    written = []
    for number, (prompt, seed) in enumerate(jobs):
        row = number // len(request.seeds)
        total = studio.latent_frames() * (request.rollouts or 1)
        with progress.bar(f"video {number + 1}/{len(jobs)}", total) as show:
            if studio.streams:
                play = Play(studio.engine, Script(((0, prompt),), request.frames, seed))
                video = torch.cat([frames for frames in _shown(play, show)])
            else:
                video = studio.video(texts[row : row + 1], texts[-1:], seed, show)
        path = request.out if alone else request.out / f"{row:04d}_seed{seed}.mp4"
        write_mp4(path, video, fps=request.fps)
        written.append({"file": path.name, "prompt": prompt, "seed": seed, "frames": len(video)})
    if not alone:
        weights.write_json(request.out / "videos.json", {"spec": studio.spec.name, "videos": written})
    return request.out.resolve()


def _played(studio: Studio, script: Script) -> Path:
    """One stream, as the script tells; its prompts are encoded and stored first, so that the encoder can be let go."""
    request = studio.request
    studio.world.text_encoder.encode(list(script.texts))
    studio.world.text_encoder.release()
    return generation.play(studio.engine, script, request.out, request.fps, 1, request.stream)


def _shown(play: Play, show: progress.Bar) -> Iterator[Tensor]:
    for frames in play:
        show(play.session.moment.frames[0])
        yield frames


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are left out, and the byte order mark that some editors write first.

    Raises:
        UserError: unreadable, or without a prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts {path} can't be read: {error}") from error
    if not any(lines):
        raise UserError(f"prompts {path} holds no prompt; write one a line")
    return [line for line in lines if line]


def _dtype(request: Request) -> torch.dtype:
    name = request.dtype or ("fp32" if torch.device(request.device).type == "cpu" else "bf16")
    if name not in DTYPES:
        raise UserError(f"no dtype '{name}'; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


def _check(request: Request, studio: Studio) -> None:
    if not hasattr(studio.world.codec, "decode_block") or not hasattr(studio.world.text_encoder, "release"):
        raise UserError(
            f"spec '{request.spec}' is not of Wan2.1: its codec must be wan_vae and its text encoder umt5; "
            "for a video from a finished run use --run"
        )
    if request.model is None and not studio.teacher:
        raise UserError(
            f"spec '{request.spec}' samples a student, and --weights holds the teacher: give the student's weights "
            "with --model (a model.pt, a folder, or the weights of a run)"
        )
    guided = studio.teacher and studio.spec["teacher_sampling"].get("guidance", 1.0) != 1.0
    if request.negative is not None and not guided:
        why = "teacher_sampling.guidance is 1" if studio.teacher else "a student samples without guidance"
        raise UserError(f"--negative has no effect with spec '{request.spec}': {why}; leave it out")
    if request.rollouts and request.frames:
        raise UserError("--frames and --rollouts exclude each other: a rollout has the length of the spec")
    if request.rollouts and not studio.causal:
        raise UserError(f"--rollouts needs a causal student, and '{request.spec}' samples another network")
    if request.rollouts and studio.world.latent_shape[0] <= build.causal_rule(studio.spec).block_range(0)[1]:
        raise UserError("--rollouts needs clips of more than one block; raise world.dataset.frames")
