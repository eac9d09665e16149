"""One stream that a person steers: step by step, with prompts, pictures and videos, forks, and an exact record.

Everything that is done to a session is an event at a block. The noise is a function of seed, block and step, so the
events make the stream: replaying them gives the same bytes, and a fork is a fresh run with the same events.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from causvid.data.video import to_bytes
from causvid.errors import UserError
from causvid.streaming import moment as moments
from causvid.streaming.engine import Engine
from causvid.streaming.ledger import Ledger, Row
from causvid.streaming.moment import Moment, Result

MARK = 8  # bytes of the running digest that are kept of every block


@dataclass(frozen=True)
class Event:
    """Something done to a stream before its block ``block``; ``frames`` is uint8 ``b f 3 h w``."""

    kind: str
    block: int
    options: dict[str, Any]
    frames: Tensor | None = None

    @property
    def bytes(self) -> int:
        return 0 if self.frames is None else self.frames.nbytes


@dataclass(frozen=True)
class Made(Result):
    """A finished block, and where its time went."""

    row: Row


class Session:
    """A stream. Steps and changes take effect in the order in which they are called.

    Args:
        engine: network, codec and text encoder; shared by any number of sessions.
        prompts: a prompt, or one for each row of a batch.
        seed: of the noise.
        cache: a cache policy by name, or with its options; default that of the engine.
        steps: denoising steps of a block, or their times; default those of the engine.
        keep: how many moments behind are held, so that going back to them costs nothing and needs no record; going back
            further replays.
        record_bytes: bytes of pictures and videos that are held for the record; beyond them there is none.

    Raises:
        UserError: wrong prompts or options.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: str | Sequence[str],
        seed: int = 0,
        cache: Any = None,
        steps: int | Sequence[float] | None = None,
        keep: int = 0,
        record_bytes: int = 1 << 30,
        _fork: tuple[Moment, Moment, tuple[Event, ...], bytes] | None = None,
    ) -> None:
        self.engine = engine.with_steps(steps)
        self.ledger = Ledger(engine.device)
        self._keep, self._record_bytes, self._steps = keep, record_bytes, steps
        self._behind: deque[Moment] = deque(maxlen=keep)
        if _fork is None:
            texts = _texts(prompts, 1)
            if not texts:
                raise UserError("a stream needs a prompt")
            self._first = self._moment = moments.begin(self.engine, texts, seed, engine.policy(cache), self.ledger)
            self._events: tuple[Event, ...] | None = ()
            self._marks = bytearray()
        else:
            self._first, self._moment, self._events = _fork[:3]
            self._marks = bytearray(_fork[3])
        self._bare = self._moment  # before anything was done at its block

    @property
    def block(self) -> int:
        """Number of the next block."""
        return self._moment.block

    @property
    def moment(self) -> Moment:
        """Where the stream stands."""
        return self._moment

    @property
    def waiting(self) -> int:
        """Frames that wait to be restyled."""
        return self._moment.waiting

    @property
    def wanted(self) -> int:
        """Pixel frames that the next block makes, and takes where it restyles."""
        return moments.wanted_frames(self.engine, self._moment)

    @property
    def recorded(self) -> tuple[Event, ...]:
        """All that was done.

        Raises:
            UserError: more pictures and videos came in than were to be held.
        """
        if self._events is None:
            raise UserError(f"more than {self._record_bytes} bytes of video came in, so this stream has no record")
        return self._events

    @property
    def held_events(self) -> tuple[Event, ...] | None:
        """All that was done, or None where more came in than was to be held."""
        return self._events

    @property
    def start(self) -> dict[str, Any]:
        """Prompts, seed, cache policy and times of the steps that the stream began with."""
        first = self._first
        return {
            "prompts": list(first.prompts), "seed": first.seed, "cache": dict(first.policy),
            "steps": list(self.engine.times),
        }  # fmt: skip

    @property
    def marks(self) -> bytes:
        """The first 8 bytes of the running digest after each block."""
        return bytes(self._marks)

    @property
    def digest(self) -> str:
        """SHA-256 over the latents and frames of every block so far."""
        return self._moment.digest.hex()

    def step(self) -> Made:
        """Make the next block."""
        begin = time.perf_counter()
        self._behind.append(self._bare)
        self._moment, made = moments.advance(self.engine, self._moment, self.ledger)
        self._bare = self._moment
        self._marks += self._moment.digest[:MARK]
        row = self.ledger.close(made.block, made.frames.shape[1], begin)
        return Made(made.block, made.start, made.stop, made.latents, made.frames, row)

    def prompt(self, prompts: str | Sequence[str], policy: moments.Policy = "keep") -> None:
        """Change the text from the next block on; see :func:`causvid.streaming.moment.prompted` for the policies.

        Raises:
            UserError: prompts that the text encoder refuses, another number of them, or no such policy.
        """
        texts = _texts(prompts, self._moment.batch)
        self.apply(Event("prompt", self.block, {"prompts": texts, "policy": policy}))

    def image(self, first: Tensor, how: moments.How = "alone") -> None:
        """Start from a picture; see :func:`causvid.streaming.moment.from_image` for the ways.

        Args:
            first: ``3 h w`` or ``b 3 h w``, uint8 or float in [-1, 1], at the stream's size.

        Raises:
            UserError: the stream has begun, or the picture does not fit.
        """
        self.apply(Event("image", self.block, {"how": how}, self._frames(first.unsqueeze(-4))))

    def video(self, frames: Tensor, strength: float = moments.STRENGTH) -> None:
        """Restyle these frames, block by block, behind those that already wait; what is left of them when they no
        longer fill a block is let go, and the stream goes on from its text.

        Args:
            frames: ``f 3 h w`` or ``b f 3 h w``, uint8 or float in [-1, 1], at the stream's size.
            strength: time that they are noised to, in (0, 1]: 1 keeps nothing of them.

        Raises:
            UserError: frames or strength that do not fit.
        """
        self.apply(Event("video", self.block, {"strength": float(strength)}, self._frames(frames)))

    def reseed(self, seed: int) -> None:
        """Draw the noise of the following blocks from another seed."""
        self.apply(Event("seed", self.block, {"seed": int(seed)}))

    def apply(self, event: Event) -> None:
        """Do what an event says, now.

        Raises:
            UserError: an event of another block, or one that can't be done.
        """
        if event.block != self.block:
            raise UserError(f"the stream stands before block {self.block}, the event belongs before {event.block}")
        self._moment = self._applied(event)
        if self._events is None:
            return
        events = (*self._events, event)
        self._events = events if sum(e.bytes for e in events) <= self._record_bytes else None

    def _applied(self, event: Event) -> Moment:
        options = event.options
        if event.kind == "seed":
            return replace(self._moment, seed=options["seed"])
        if event.kind == "prompt":
            return moments.prompted(self.engine, self._moment, options["prompts"], options["policy"], self.ledger)
        if event.frames is None or event.kind not in ("image", "video"):
            raise UserError(f"no event '{event.kind}' of a stream; accepted: prompt, image, video, seed")
        if event.kind == "image":
            return moments.from_image(self.engine, self._moment, event.frames, options["how"], self.ledger)
        return moments.from_video(self._moment, event.frames, options["strength"])

    def _frames(self, frames: Tensor) -> Tensor:
        """Checked, uint8 ``b f 3 h w`` on the CPU, one for each row of the batch."""
        frames = to_bytes(frames).cpu()
        frames = frames.unsqueeze(0) if frames.ndim == 4 else frames
        height, width = self.engine.pixel_size
        if frames.ndim != 5 or frames.shape[2:] != (3, height, width) or not frames.shape[1]:
            raise UserError(
                f"frames must be 'f 3 {height} {width}', with a batch before them or not; got {tuple(frames.shape)}"
            )
        if frames.shape[0] not in (1, self._moment.batch):
            raise UserError(f"the stream has {self._moment.batch} rows, and {frames.shape[0]} videos were given")
        return frames.expand(self._moment.batch, -1, -1, -1, -1).contiguous()

    def fork(self, block: int | None = None, seed: int | None = None) -> Session:
        """Another session with the same past: all up to now, or the blocks before ``block`` and what was done before
        the last of them was made.

        Args:
            seed: of its noise from there on; default the same, so that it goes on alike until something differs.

        Raises:
            UserError: a block that is not made yet, or one that needs a replay where there is no record.
        """
        if block is None:
            out = self._copy(self._moment, self._events)
            out._bare = self._bare
        else:
            out = self._before(block)
        if seed is not None:
            out.reseed(seed)
        return out

    def seek(self, block: int) -> None:
        """Go back: forget the blocks from ``block`` on, and what was done since.

        Raises:
            UserError: as for :meth:`fork`.
        """
        back = self._before(block)
        self._moment = self._bare = back._moment
        self._events, self._marks = back._events, back._marks
        self._behind = deque((m for m in self._behind if m.block < block), self._keep)

    def replayed(self, block: int) -> int:
        """How many blocks going back to ``block`` makes again: none where its moment is held."""
        return 0 if self._held(block) is not None else block

    def _held(self, block: int) -> Moment | None:
        """The moment before ``block`` and before anything was done there, where it is held."""
        return next((m for m in (self._first, *self._behind, self._bare) if m.block == block), None)

    def _copy(self, at: Moment, events: tuple[Event, ...] | None) -> Session:
        """A session that goes on from a moment."""
        at = replace(at, cache=at.cache.forked())
        past = (self._first, at, events, bytes(self._marks[: MARK * at.block]))
        return Session(self.engine, (), steps=self._steps, keep=self._keep, record_bytes=self._record_bytes, _fork=past)  # type: ignore[arg-type]

    def _before(self, block: int) -> Session:
        """A session that stands before ``block``: its moment where that is held, which needs no record, or a replay."""
        if not 0 <= block <= self.block:
            raise UserError(f"blocks 0 to {self.block} can be gone back to, not {block}")
        held = self._held(block)
        done = self._events if held is not None else self.recorded
        events = None if done is None else tuple(event for event in done if event.block < block)
        out = self._copy(held or self._first, events)
        while out.block < block:
            for event in events or ():
                if event.block == out.block:
                    out._moment = out._applied(event)
            out.step()
        return out


def _texts(prompts: str | Sequence[str], rows: int) -> list[str]:
    """A prompt for each row."""
    if isinstance(prompts, str):
        return [prompts] * rows
    if not isinstance(prompts, Sequence):
        raise UserError(f"prompts must be text, or a list of texts; got {type(prompts).__name__}")
    return list(prompts)
