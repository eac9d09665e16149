"""A stream between two blocks, as a value; what happens to a stream is a function from one moment to another.

Caches and codec states are values too, so a fork is a reference and going back is forgetting. A finished block is
committed when the next one is begun: nobody reads the context of the last block, so it is never computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from causvid.attention.cache import KVCache
from causvid.attention.since import Since
from causvid.data.video import to_bytes
from causvid.errors import UserError
from causvid.randomness import Draw
from causvid.samplers.rollout import Step, evaluate
from causvid.streaming.engine import Engine
from causvid.streaming.ledger import Ledger
from causvid.types import Text, VaeState
from causvid.validate import Bound

Policy = Literal["keep", "recache", "cut"]
How = Literal["alone", "first", "still"]
STRENGTH = 0.5  # of restyling, where nobody says: the motion of the input is still seen (docs/streaming.md)
POLICIES: tuple[Policy, ...] = get_args(Policy)
HOWS: tuple[How, ...] = get_args(How)


@dataclass(frozen=True)
class Kept:
    """A finished block: its frames [start, stop), its clean latents, the text it was made with, its steps."""

    block: int
    start: int
    stop: int
    latents: Tensor
    text: Text
    steps: int


@dataclass(frozen=True)
class Moment:
    """Where a stream stands.

    Attributes:
        policy: the cache policy.
        cache: keys and values of all blocks but the last.
        text, prompts, seed: of the next block.
        block: number of the next block.
        context: finished blocks of which the cache holds a frame.
        pending: the last block, not committed yet.
        given: clean latents of the next block's first frames.
        incoming: pieces of the video that is to be restyled, each uint8 ``b f 3 h w``.
        strength: the time that they are noised to.
        encoder, decoder: states of the codec; no encoder where nothing is being encoded.
        last: the last frame, ``b 1 3 h w`` in [-1, 1], from which an encoder goes on.
        digest: SHA-256 over the latents and frames of every block so far.
    """

    policy: Bound
    cache: KVCache
    text: Text
    prompts: tuple[str, ...]
    seed: int
    block: int = 0
    context: tuple[Kept, ...] = ()
    pending: Kept | None = None
    given: Tensor | None = None
    incoming: tuple[Tensor, ...] = ()
    strength: float = 1.0
    encoder: VaeState | None = None
    decoder: VaeState = VaeState()
    last: Tensor | None = None
    digest: bytes = b""

    @property
    def batch(self) -> int:
        return len(self.prompts)

    @property
    def waiting(self) -> int:
        """Frames that wait to be restyled."""
        return sum(piece.shape[1] for piece in self.incoming)

    @property
    def frames(self) -> tuple[int, int]:
        """Latent frames [start, stop) of the next block."""
        return self.cache.rule.block_range(self.block)


@dataclass(frozen=True)
class Result:
    """A finished block: latents ``b f c h w``, and frames, uint8 ``b f 3 h w`` on the CPU."""

    block: int
    start: int
    stop: int
    latents: Tensor
    frames: Tensor


def begin(engine: Engine, prompts: Sequence[str], seed: int, policy: Bound, ledger: Ledger) -> Moment:
    """A stream before its first block; one prompt for each row of the batch."""
    with ledger.part("text"):
        text = engine.encode_text(prompts)
    return Moment(policy, engine.new_cache(policy), text, tuple(prompts), seed)


@torch.no_grad()
def advance(engine: Engine, moment: Moment, ledger: Ledger) -> tuple[Moment, Result]:
    """Make the next block."""
    moment = _committed(engine, moment, ledger)
    start, stop = moment.frames
    moment, seen = _taken(engine, moment, ledger)
    times = engine.times if seen is None else entered(engine.times, moment.strength)
    shape = (moment.batch, stop - start, *engine.frame_shape)
    estimate = torch.zeros(shape, device=engine.device) if seen is None else seen
    given = moment.given
    if given is not None:
        estimate = torch.cat([given, estimate[:, given.shape[1] :]], 1)
    draw = Draw(moment.seed, "generate", 0, range(moment.batch), engine.device)
    steps = 0 if given is not None and given.shape[1] == stop - start else len(times)
    with ledger.part("transformer"):
        for index, t in enumerate(times[:steps]):
            out = evaluate(engine.model, Step(moment.block, t, False), index, estimate, moment.text, draw, moment.cache,
                           given)  # fmt: skip
            estimate = out.x0 if given is None else torch.cat([given, out.x0[:, given.shape[1] :]], 1)
    with ledger.part("codec"):
        decoded = engine.codec.decode_block(estimate, moment.decoder)
        frames = to_bytes(decoded.value).cpu()
    state = hashlib.sha256(moment.digest)
    for part in (estimate.cpu(), frames):
        state.update(part.contiguous().numpy().tobytes())
    made = Kept(moment.block, start, stop, estimate, moment.text, steps)
    after = replace(
        moment, block=moment.block + 1, pending=made, given=None, decoder=decoded.state, last=decoded.value[:, -1:],
        digest=state.digest(),
    )  # fmt: skip
    return after, Result(moment.block, start, stop, estimate, frames)


def entered(times: Sequence[float], strength: float) -> tuple[float, ...]:
    """Times of a block that restyles what is there: from the strength, the time that it is noised to, downwards."""
    return tuple(times) if strength == 1 else (strength, *(t for t in times if t < strength))


def _commit(engine: Engine, cache: KVCache, kept: Kept, text: Text, seed: int) -> KVCache:
    draw = Draw(seed, "generate", 0, range(len(text)), engine.device)
    return evaluate(
        engine.model, Step(kept.block, engine.context_t, True), kept.steps, kept.latents, text, draw, cache
    ).cache


def _committed(engine: Engine, moment: Moment, ledger: Ledger) -> Moment:
    """With the last block in the cache."""
    made = moment.pending
    if made is None:
        return moment
    with ledger.part("cache"):
        cache = _commit(engine, moment.cache, made, made.text, moment.seed)
    held = set(cache.frames)
    context = tuple(kept for kept in (*moment.context, made) if held & set(range(kept.start, kept.stop)))
    return replace(moment, cache=cache, context=context, pending=None)


def _taken(engine: Engine, moment: Moment, ledger: Ledger) -> tuple[Moment, Tensor | None]:
    """The latents of the frames that the next block restyles; none where too few are left, which are let go."""
    count = wanted_frames(engine, moment)
    if not moment.incoming:
        return moment, None
    if moment.waiting < count:
        return replace(moment, incoming=(), encoder=None), None
    parts, rest, missing = [], list(moment.incoming), count
    while missing:
        piece = rest.pop(0)
        parts.append(piece[:, :missing])
        if piece.shape[1] > missing:
            rest.insert(0, _freed(piece[:, missing:]))
        missing -= parts[-1].shape[1]
    with ledger.part("codec"):
        state = moment.encoder
        if state is None:
            state = VaeState() if moment.last is None else engine.codec.encode_block(moment.last, VaeState()).state
        pixels = torch.cat(parts, 1).to(engine.device).float() / 127.5 - 1
        encoded = engine.codec.encode_block(pixels, state)
    return replace(moment, incoming=tuple(rest), encoder=encoded.state), encoded.value


def _freed(rest: Tensor) -> Tensor:
    """What is left of a piece, copied when it is the smaller half of what it holds in memory, so that this is freed."""
    return rest.clone() if 2 * rest.nbytes <= rest.untyped_storage().nbytes() else rest


def wanted_frames(engine: Engine, moment: Moment) -> int:
    """Pixel frames that the next block makes, and takes where it restyles."""
    start, stop = moment.frames
    return engine.codec.pixel_frames(stop) - (engine.codec.pixel_frames(start) if start else 0)


@torch.no_grad()
def prompted(engine: Engine, moment: Moment, prompts: Sequence[str], policy: Policy, ledger: Ledger) -> Moment:
    """With another text from the next block on.

    Args:
        policy: ``keep``: the context stays as it was made; ``recache``: keys and values of the blocks that the cache
            holds are computed again with the new text, from their clean latents; ``cut``: the context is forgotten, so
            that nothing but the text tells what follows; a sink is then the first block of what follows.

    Raises:
        UserError: another number of prompts than the stream has, or no such policy.
    """
    if len(prompts) != moment.batch:
        raise UserError(f"the stream has {moment.batch} prompts, and {len(prompts)} were given")
    if policy not in POLICIES:
        raise UserError(f"no prompt policy '{policy}'; accepted: {', '.join(POLICIES)}")
    with ledger.part("text"):
        text = engine.encode_text(prompts)
    moment = replace(moment, text=text, prompts=tuple(prompts))
    if policy == "keep" or moment.pending is None:
        return moment
    if policy == "cut":
        rule = moment.cache.rule
        rule = Since(rule.rule if isinstance(rule, Since) else rule, moment.frames[0])
        empty = KVCache(rule, position=moment.cache.position).at(moment.block)
        return replace(moment, cache=empty, context=(), pending=None)
    with ledger.part("cache"):
        cache = KVCache(moment.cache.rule, position=moment.cache.position)
        for kept in moment.context:
            cache = _commit(engine, cache.at(kept.block), kept, text, moment.seed)
        cache = cache.at(moment.cache.next_block)
    return replace(moment, cache=cache, pending=replace(moment.pending, text=text))


@torch.no_grad()
def from_image(engine: Engine, moment: Moment, image: Tensor, how: How, ledger: Ledger) -> Moment:
    """Begin from a picture, without any training for it.

    Args:
        image: uint8 ``b 1 3 h w``, at the stream's size.
        how: ``still``: the first block is the picture, standing still (the paper's way); ``first``: the picture is the
            first latent of the first block, whose other frames are denoised beside it; ``alone``: it is a block of one
            latent by itself, so every later block is as in training.

    Raises:
        UserError: the stream has begun, or no such way.
    """
    if moment.block:
        raise UserError("a picture starts a stream: this one has begun; start another one")
    if how not in HOWS:
        raise UserError(f"no way '{how}' to start from a picture; accepted: {', '.join(HOWS)}")
    cache = engine.new_cache(moment.policy, 1) if how == "alone" else moment.cache
    frames = engine.codec.pixel_frames(cache.rule.block_range(0)[1]) if how == "still" else 1
    with ledger.part("codec"):
        pixels = image.to(engine.device).float() / 127.5 - 1
        given = engine.codec.encode_block(pixels.expand(-1, frames, -1, -1, -1), VaeState()).value
    return replace(moment, cache=cache, given=given)


def from_video(moment: Moment, frames: Tensor, strength: float) -> Moment:
    """With frames to restyle, behind those that are waiting.

    Args:
        frames: uint8 ``b f 3 h w``, at the stream's size.
        strength: time that they are noised to, in (0, 1]: 1 keeps nothing of them.

    Raises:
        UserError: a strength outside of it.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength must be above 0 and at most 1, got {strength}")
    return replace(moment, incoming=(*moment.incoming, frames), strength=strength)
