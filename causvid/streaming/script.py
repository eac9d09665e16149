"""A stream that is planned beforehand: its prompts, picture or video, length and record, as the command line tells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from causvid.errors import UserError
from causvid.streaming import record as records
from causvid.streaming.engine import Engine
from causvid.streaming.moment import STRENGTH, How, Policy
from causvid.streaming.record import Record
from causvid.streaming.session import Session
from causvid.streaming.sources import read_image, read_video


@dataclass(frozen=True)
class Script:
    """What happens in a stream.

    Attributes:
        prompts: (frame, prompt): from the block that holds the frame, the prompt holds; the first frame is 0.
        frames: pixel frames; default those of the video to restyle, or of a training clip.
        image, how: path of a picture to start from, and in which way.
        video, strength: path or URI of a video to restyle, and how much; ``fps`` is the rate that it is read at.
        policy: what a new prompt does to the context.
        cache, steps: the session's.
        record: where to write the session file.
        replay: a session file whose stream is made again; then nothing else counts.
    """

    prompts: tuple[tuple[int, str], ...] = ()
    frames: int | None = None
    seed: int = 0
    image: Path | None = None
    how: How = "alone"
    video: str | None = None
    strength: float = STRENGTH
    fps: float = 8
    policy: Policy = "keep"
    cache: Any = None
    steps: int | None = None
    record: Path | None = None
    replay: Path | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """Every prompt of the stream."""
        if self.replay is None:
            return tuple(prompt for _, prompt in self.prompts)
        made = records.read(self.replay)
        later = [p for event in made.events if event.kind == "prompt" for p in event.options["prompts"]]
        return (*made.start["prompts"], *later)


class Play:
    """A script on an engine: iterate over its frames, ``f 3 h w`` uint8, block by block.

    Everything that can be wrong is told before the first block.

    Raises:
        UserError: prompt, files or options are wrong.
    """

    def __init__(self, engine: Engine, script: Script) -> None:
        self.engine, self.script = engine, script
        self._recorded: Record | None = None
        if script.replay is not None:
            self._recorded = records.read(script.replay)
            self.session = records.open_session(engine, self._recorded)
            if self.session.moment.batch != 1:
                raise UserError(f"session {script.replay} has {self.session.moment.batch} rows; a video is of one")
            self.blocks, self.frames = self._recorded.blocks, None
            return
        self.session = Session(engine, script.prompts[0][1], script.seed, script.cache, script.steps)
        engine.encode_text([prompt for _, prompt in script.prompts])
        height, width = engine.pixel_size
        if script.image is not None:
            self.session.image(read_image(script.image, height, width), script.how)
        frames = script.frames
        if script.video is not None:
            given = read_video(script.video, height, width, script.fps, frames)
            self.session.video(given, script.strength)
            frames = frames or max(self._whole_blocks(len(given)), 1)
        self.frames = frames or engine.codec.pixel_frames(engine.frames)
        self.blocks = self._blocks(self.frames)

    def _end(self, block: int) -> int:
        """Pixel frames of the stream when ``block`` blocks are made."""
        return self.engine.codec.pixel_frames(self.session.moment.cache.rule.block_range(block - 1)[1]) if block else 0

    def _blocks(self, frames: int) -> int:
        """Blocks that hold so many pixel frames."""
        low, high = 1, frames + 1
        while low < high:  # ends ascend with the block
            middle = (low + high) // 2
            low, high = (low, middle) if self._end(middle) >= frames else (middle + 1, high)
        return low

    def _whole_blocks(self, frames: int) -> int:
        """Pixel frames of the blocks that so many frames fill."""
        blocks = self._blocks(frames)
        whole = self._end(blocks) if self._end(blocks) <= frames else self._end(blocks - 1)
        if not whole:
            raise UserError(f"video {self.script.video}: {frames} frames do not fill a block of {self._end(1)}")
        return whole

    def __iter__(self) -> Iterator[Tensor]:
        if self._recorded is not None:
            for made in records.replay(self.engine, self._recorded, self.session):
                yield made.frames[0]
            return
        switches = {self._blocks(frame + 1) - 1: prompt for frame, prompt in self.script.prompts[1:]}
        done = 0
        for block in range(self.blocks):
            if block in switches:
                self.session.prompt(switches[block], self.script.policy)
            frames = self.session.step().frames[0]
            yield frames[: (self.frames or 0) - done]
            done += len(frames)
        if self.script.record is not None:
            records.write(self.script.record, records.record(self.session))
