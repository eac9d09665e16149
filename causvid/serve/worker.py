"""The process that computes: it holds the engines and every viewer's streams, and makes one block at a time in turn.

It is told what to do by tuples over a pipe, and answers with tuples; see ``Worker`` for both. A viewer's stream moves
only as far as its limit, so one that does not look costs nothing.
"""

from __future__ import annotations

import ctypes
import gc
import signal
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from causvid.errors import UserError
from causvid.serve.checkpoints import Checkpoint
from causvid.streaming import record as records
from causvid.streaming.engine import Engine
from causvid.streaming.session import Event, Session

KEPT_MOMENTS = 8
RECORD_BYTES = 32 << 20
MOST_BRANCHES = 4
MOST_ENGINES = 2
MOST_REPLAYED = 64  # blocks that are made again at once, while the other viewers wait


@dataclass
class Seat:
    """A viewer's streams: branches of one, of which one moves.

    Attributes:
        made, limit: blocks that were made, and that may be.
        live: whether it waits for frames rather than go on without.
        names: branches that there ever were.
    """

    branches: dict[int, Session]
    active: int = 0
    limit: int = 0
    live: bool = False
    made: int = 0
    names: int = 1

    @property
    def session(self) -> Session:
        return self.branches[self.active]

    @property
    def ready(self) -> bool:
        return self.made < self.limit and not (self.live and self.session.waiting < self.session.wanted)


class Worker:
    """Takes ``(command, viewer, ...)``; every command is a method ``on_...``. Answers:

    ``("opened", viewer, facts)``, ``("block", viewer, facts, frames)``, ``("branch", viewer, facts, events or None)``,
    ``("event", viewer, kind, block, options)``, ``("fed", viewer, frames taken, frames that wait)``,
    ``("record", viewer, path or None)``, ``("error", viewer, message, fatal)``.
    """

    def __init__(self, pipe: Connection, checkpoints: Mapping[str, Checkpoint]) -> None:
        self.pipe, self.checkpoints = pipe, checkpoints
        self.engines: OrderedDict[str, Engine] = OrderedDict()
        self.seats: OrderedDict[str, Seat] = OrderedDict()

    def run(self) -> None:
        """Serve until the pipe is closed."""
        try:
            while True:
                while self.pipe.poll(0 if any(seat.ready for seat in self.seats.values()) else None):
                    self._do(self.pipe.recv())
                    if any(seat.ready for seat in self.seats.values()):
                        break
                self._turn()
        except (EOFError, OSError):
            return

    def _do(self, told: tuple) -> None:
        command, viewer, *rest = told
        try:
            getattr(self, f"on_{command}")(viewer, *rest)
        except UserError as error:
            self.pipe.send(("error", viewer, str(error), False))
        except Exception as error:  # one viewer's trouble is not another's
            self.pipe.send(("error", viewer, f"{type(error).__name__}: {error}", True))
            self.on_close(viewer)

    def _turn(self) -> None:
        """One block of the next stream that may move."""
        name = next((name for name, seat in self.seats.items() if seat.ready), None)
        if name is None:
            return
        self.seats.move_to_end(name)
        seat = self.seats[name]
        try:
            made = seat.session.step()
        except Exception as error:  # as above
            self.pipe.send(("error", name, f"{type(error).__name__}: {error}", True))
            self.on_close(name)
            return
        seat.made += 1
        session = seat.session
        facts = {
            "block": made.block, "number": seat.made, "branch": seat.active, "row": asdict(made.row),
            "summary": session.ledger.summary(), "cache_bytes": session.moment.cache.bytes,
            "wanted": session.wanted, "waiting": session.waiting, "prompt": session.moment.prompts[0],
        }  # fmt: skip
        self.pipe.send(("block", name, facts, made.frames[0].permute(0, 2, 3, 1).contiguous().numpy()))

    def _engine(self, name: str) -> Engine:
        if name not in self.engines:
            self.engines[name] = self.checkpoints[name].load()
            in_use = {id(seat.session.engine.network) for seat in self.seats.values()}
            for other in list(self.engines):
                spare = other != name and id(self.engines[other].network) not in in_use
                if len(self.engines) > MOST_ENGINES and spare:
                    del self.engines[other]
        self.engines.move_to_end(name)
        return self.engines[name]

    def on_open(self, viewer: str, options: Mapping[str, Any], events: tuple = (), block: int = 0) -> None:
        """Begin a stream in place of the viewer's others; with events, go on where it stood before ``block``."""
        self.seats.pop(viewer, None)
        engine = self._engine(options["checkpoint"])
        session = Session(
            engine, options["prompt"], options["seed"], options["cache"], options["steps"], KEPT_MOMENTS, RECORD_BYTES
        )
        waiting = list(events)
        while True:
            while waiting and waiting[0][1] == session.block:
                kind, at, told, frames = waiting.pop(0)
                session.apply(Event(kind, at, told, None if frames is None else torch.from_numpy(frames)))
            if session.block >= block:
                break
            session.step()
        self.seats[viewer] = Seat({0: session}, made=block)
        height, width = engine.pixel_size
        facts = {
            "height": height, "width": width, "wanted": session.wanted, "steps": len(session.engine.times),
            "times": list(session.engine.times), "training_frames": engine.codec.pixel_frames(engine.frames),
            "frame_bytes": engine.footprint().frame, "block": session.block,
        }  # fmt: skip
        self.pipe.send(("opened", viewer, facts))

    def on_event(self, viewer: str, kind: str, options: dict, frames: Any) -> None:
        """Do something to the stream."""
        seat = self.seats.get(viewer)
        if seat is None:
            return
        session = seat.session
        session.apply(Event(kind, session.block, options, None if frames is None else torch.from_numpy(frames)))
        if kind == "video" and frames is not None:
            self.pipe.send(("fed", viewer, frames.shape[1], session.waiting))
        else:
            self.pipe.send(("event", viewer, kind, session.block, options))

    def on_live(self, viewer: str, live: bool) -> None:
        """Wait for frames to restyle, or go on without them."""
        if viewer in self.seats:
            self.seats[viewer].live = live

    def on_limit(self, viewer: str, limit: int) -> None:
        """How many blocks may be made in all: a few more than were seen."""
        if viewer in self.seats:
            self.seats[viewer].limit = limit

    def on_fork(self, viewer: str, block: int | None, seed: int | None) -> None:
        """A branch from a block, or from now; it moves from here on, and the others wait."""
        seat = self.seats.get(viewer)
        if seat is None:
            return
        if len(seat.branches) >= MOST_BRANCHES:
            raise UserError(f"a stream has at most {MOST_BRANCHES} branches; start it anew to have more")
        if block is not None and block <= seat.session.block and seat.session.replayed(block) > MOST_REPLAYED:
            raise UserError(
                f"going back to block {block} would make {block} blocks again; accepted: blocks up to {MOST_REPLAYED}, "
                f"and from {max(seat.session.block - KEPT_MOMENTS, 0)} on, which are still held"
            )
        forked = seat.session.fork(block, seed)
        seat.active, seat.names = seat.names, seat.names + 1
        seat.branches[seat.active] = forked
        self._branched(viewer, seat)

    def on_branch(self, viewer: str, branch: int) -> None:
        """Let another branch move."""
        seat = self.seats.get(viewer)
        if seat is not None and branch in seat.branches:
            seat.active = branch
            self._branched(viewer, seat)

    def _branched(self, viewer: str, seat: Seat) -> None:
        """Tell which branch moves, and the events that it can be made again from: none where a video came in."""
        session = seat.session
        facts = {"branch": seat.active, "block": session.block, "branches": sorted(seat.branches)}
        done = session.held_events
        known = done is not None and all(event.kind != "video" for event in done)
        events = [
            (event.kind, event.block, event.options, None if event.frames is None else event.frames.numpy())
            for event in done or ()
        ]
        self.pipe.send(("branch", viewer, facts, session.waiting, session.moment.prompts[0], events if known else None))

    def on_record(self, viewer: str, path: Any) -> None:
        """Write the session file of the branch that moves."""
        seat = self.seats.get(viewer)
        try:
            if seat is None:
                raise UserError("this stream has ended")
            records.write(path, records.record(seat.session))
        except UserError as error:
            self.pipe.send(("record", viewer, str(error)))
        else:
            self.pipe.send(("record", viewer, None))

    def on_close(self, viewer: str) -> None:
        """Forget a viewer, and give its memory back to the system."""
        if self.seats.pop(viewer, None) is not None:
            gc.collect()
            _trim()


def _trim() -> None:
    """What the allocator keeps goes back to the system, where its library knows how (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def main(pipe: Connection, checkpoints: Mapping[str, Checkpoint], threads: int) -> None:
    """Entry point of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends it
    torch.set_num_threads(threads)
    Worker(pipe, checkpoints).run()
