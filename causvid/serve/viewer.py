"""One page that is connected: what it says becomes commands to the worker, and blocks go back as it takes them.

Blocks are made only AHEAD of what the page says it has shown. So a page that does not look, or whose line is slow,
stops its own stream and no other, and nothing piles up. Frames to restyle are taken for AHEAD_FED blocks, on their way
to the worker and in it; what comes beyond is left out here, before the worker sees it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from causvid.errors import UserError
from causvid.serve.checkpoints import Checkpoint
from causvid.serve.messages import FRAMES, MOST_FRAMES, OWN, PICTURE, Malformed, Rate, frames_of, parse
from causvid.serve.worker import MOST_REPLAYED
from causvid.streaming.moment import STRENGTH
from causvid.streaming.sources import read_image

AHEAD = 3  # blocks
OUTBOX = 64  # messages that wait to be sent
AHEAD_FED = 4  # blocks whose frames may wait to be restyled
KEPT_BYTES = 32 << 20  # of frames, for the download


class Viewer:
    """A connected page.

    Args:
        say: to the worker; ``say(command, viewer, ...)``.
        checkpoints: by name; the first is the default.
    """

    def __init__(self, say: Callable[..., bool], checkpoints: Mapping[str, Checkpoint]) -> None:
        self.name = secrets.token_urlsafe(16)  # whoever knows it may download
        self.outbox: asyncio.Queue[str | bytes] = asyncio.Queue(OUTBOX)
        self.frames: deque[np.ndarray] = deque()
        self.kept = 0
        self.recorded: asyncio.Future[str | None] | None = None
        self.dropped = 0
        self._say, self._checkpoints = say, checkpoints
        self._rate = Rate()
        self._warned = 0.0
        self._options: dict[str, Any] | None = None
        self._facts: dict[str, Any] | None = None
        self._events: list[tuple[str, int, dict, Any]] | None = []  # None where they are not known
        self._prompt = ""
        self._made = self._acked = self._block = self._stage = 0
        self._sent = self._waiting = self._wanted = 0
        self._paused = self._live = False
        self._strength = STRENGTH
        self._branches = 1
        self._picture: bytes | None = None

    @property
    def fps(self) -> int:
        """Frames per second of the stream's videos."""
        return self._checkpoints[(self._options or {"checkpoint": next(iter(self._checkpoints))})["checkpoint"]].fps

    # What the page says.

    async def heard(self, content: str | bytes) -> None:
        """One message; whatever is wrong with it is told to the page, and the stream lives on."""
        if not self._rate.take():
            self._refuse("messages come too fast; some were left out", every=1.0)
            return
        try:
            if isinstance(content, str):
                kind, told = parse(content)
                getattr(self, f"_on_{kind}")(**told)
            elif content[:1] == bytes([PICTURE]):
                await self._on_picture(content[1:])
            elif content[:1] == bytes([FRAMES]):
                self._on_frames(content[1:])
            else:
                raise Malformed(f"bytes begin with {PICTURE} (a picture) or {FRAMES} (frames)")
        except UserError as error:
            self._refuse(str(error))

    def _refuse(self, message: str, every: float = 0.0) -> None:
        if every and time.monotonic() - self._warned < every:
            return
        self._warned = time.monotonic()
        self.send({"type": "error", "message": message[:500]})

    def _on_start(
        self, prompt: str, checkpoint: str | None = None, cache: str = OWN, steps: int | None = None,
        seed: int = 0, how: str = "alone",
    ) -> None:  # fmt: skip
        name = checkpoint or next(iter(self._checkpoints))
        if name not in self._checkpoints:
            raise Malformed(f"no checkpoint '{name[:80]}'; accepted: {', '.join(self._checkpoints)}")
        self._options = {
            "checkpoint": name, "prompt": prompt, "cache": None if cache == OWN else cache, "steps": steps,
            "seed": seed, "how": how,
        }  # fmt: skip
        self._live = self._paused = False
        self._prompt = prompt
        self._open((), 0)

    def _open(self, events: tuple, block: int) -> None:
        """Begin the stream in the worker."""
        self._events, self._made, self._acked, self._block = list(events), block, block, block
        self._facts, self._branches = None, 1
        self._sent = self._waiting = 0  # frames to restyle: on their way to the worker, and in it
        self._stage += 1
        self._tell("open", self._options, events, block)

    def _on_prompt(self, text: str, policy: str = "keep") -> None:
        self._event("prompt", {"prompts": [text], "policy": policy})

    def _on_video(self, on: bool, strength: float = STRENGTH) -> None:
        self._running()
        self._live, self._strength = on, strength
        self._tell("live", on)

    def _on_pause(self, on: bool) -> None:
        self._running()
        self._paused = on
        self._limit()

    def _on_ack(self, number: int) -> None:
        self._running()
        if number > self._made:
            raise Malformed(f"ack.number: {self._made} blocks were sent")
        self._acked = max(self._acked, number)
        self._limit()

    def _on_fork(self, block: int | None = None, seed: int | None = None) -> None:
        self._running()
        self._tell("fork", block, seed)

    def _on_branch(self, branch: int) -> None:
        self._running()
        self._tell("branch", branch)

    async def _on_picture(self, content: bytes) -> None:
        facts = self._running()
        # Decoded beside the event loop; the stream begins anew from it.
        image = await asyncio.to_thread(read_image, content, facts["height"], facts["width"])
        if self._options is not None:
            self._open((("image", 0, {"how": self._options["how"]}, image[None, None].numpy()),), 0)

    def _on_frames(self, content: bytes) -> None:
        facts = self._running()
        if not self._live:
            raise Malformed("frames come after a message 'video' that is on")
        frames = frames_of(content, facts["height"], facts["width"])
        most = max(MOST_FRAMES, AHEAD_FED * self._wanted)
        if self._sent + self._waiting + frames.shape[1] > most:
            self._refuse(
                f"frames come faster than they are restyled: at most {most} wait, others are left out", every=1.0
            )
            return
        self._event("video", {"strength": self._strength}, frames)
        self._sent += frames.shape[1]

    def _running(self) -> dict[str, Any]:
        if self._facts is None:
            raise Malformed("no stream is running; begin with a message 'start'")
        return self._facts

    def _event(self, kind: str, options: dict, frames: Any = None) -> None:
        self._running()
        self._tell("event", kind, options, frames)

    def _tell(self, command: str, *rest: Any) -> None:
        if not self._say(command, self.name, *rest):
            raise Malformed("the worker is busy; try again")

    def _limit(self) -> None:
        self._say("limit", self.name, 0 if self._paused else self._acked + AHEAD)

    # What the worker says.

    def opened(self, facts: dict[str, Any]) -> None:
        """The stream stands ready."""
        name = str((self._options or {}).get("checkpoint"))
        self._facts, self._wanted = facts, facts["wanted"]
        self._tell("live", self._live)
        self._limit()
        self.send({"type": "started", **facts, "checkpoint": name, "fps": self._checkpoints[name].fps,
                   "stage": self._stage})  # fmt: skip

    def block(self, facts: dict[str, Any], frames: np.ndarray) -> None:
        """A block is made: ``frames`` is ``f h w 3``."""
        if self._facts is None:
            return  # of a stream that has been started anew
        self._made, self._block = facts["number"], facts["block"] + 1
        self._wanted, self._waiting, self._prompt = facts["wanted"], facts["waiting"], facts["prompt"]
        self.frames.append(frames)
        self.kept += frames.nbytes
        while self.kept > KEPT_BYTES:
            self.kept -= self.frames.popleft().nbytes
        header = json.dumps({"type": "block", **facts, "frames": len(frames), "stage": self._stage}).encode()
        self.send(struct.pack("<I", len(header)) + header + frames.tobytes())

    def done(self, kind: str, block: int, options: dict) -> None:
        """Something took effect before this block."""
        if self._facts is None:
            return  # as above
        if self._events is not None:
            self._events.append((kind, block, options, None))
        if kind == "prompt":
            self._prompt = options["prompts"][0]
        self.send({"type": "event", "kind": kind, "block": block})

    def fed(self, frames: int, waiting: int) -> None:
        """The worker has taken so many frames to restyle, and so many wait there."""
        if self._facts is None:
            return  # as above
        self._sent, self._waiting = self._sent - frames, waiting
        self._events = None  # a feed is too long to be held twice: after a crash the stream begins anew

    def branched(self, facts: dict[str, Any], waiting: int, prompt: str, events: list | None) -> None:
        """Another branch moves: what was done to it takes the place of what was done to the one before."""
        if self._facts is None:
            return  # as above
        self._block, self._branches = facts["block"], len(facts["branches"])
        self._waiting, self._prompt, self._events = waiting, prompt, events
        self.send({"type": "branch", **facts})

    def failed(self, message: str, fatal: bool) -> None:
        """Something could not be done; where it is fatal the stream has ended."""
        if fatal:
            self._facts = None
        self.send({"type": "error", "message": message[:500], "fatal": fatal})

    def worker_died(self) -> None:
        """Go on in the next worker: at the same block where the way there is short and known, else from the start."""
        if self.recorded is not None and not self.recorded.done():
            self.recorded.set_result("the worker died")
        known = self._events is not None and self._block <= MOST_REPLAYED
        how = "where this stream was" if known else "with a new stream of the last prompt"
        lost = "; the other branches are lost" if self._branches > 1 else ""
        message = f"the worker died in the middle of a block; another one goes on {how}{lost}"
        self.send({"type": "worker", "message": message})
        if self._options is None:
            return
        if self._events is not None and known:
            self._open(tuple(self._events), self._block)
            return
        self._options = {**self._options, "prompt": self._prompt or self._options["prompt"]}
        self._open((), 0)

    def send(self, content: dict[str, Any] | bytes) -> None:
        """Queue a message for the page; one too many is left out, which blocks never are: they have credit."""
        try:
            self.outbox.put_nowait(content if isinstance(content, bytes) else json.dumps(content))
        except asyncio.QueueFull:
            self.dropped += 1
