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
from causvid.streaming.session import Made, Session
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
            self.blocks, self.frames = self._recorded.blocks, self._recorded.frames
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
        self._switches = self._switched(script.prompts)
        if script.record is not None:
            records.writable(script.record)

    def _switched(self, prompts: tuple[tuple[int, str], ...]) -> dict[int, str]:
        """The prompts after the first, by the block that has their frame."""
        out: dict[int, str] = {}
        first = 0  # frame that the block's prompt was given for
        for frame, prompt in prompts[1:]:
            if frame >= (self.frames or 0):
                raise UserError(f"--prompts-at: frame {frame} is not in a video of {self.frames} frames; its last is "
                                f"{(self.frames or 0) - 1}; add --frames, or leave that prompt out")  # fmt: skip
            block = self._blocks(frame + 1) - 1
            if block in out or block == 0:
                raise UserError(
                    f"--prompts-at: frames {first} and {frame} are both in block {block} (frames {self._end(block)} to "
                    f"{self._end(block + 1) - 1}), and a block has one prompt; give the next one from frame "
                    f"{self._end(block + 1)} on"
                )
            out[block], first = prompt, frame
        return out

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
        done = 0
        for made in self._made():
            frames = made.frames[0]
            yield frames if self.frames is None else frames[: max(self.frames - done, 0)]
            done += len(frames)

    def _made(self) -> Iterator[Made]:
        if self._recorded is not None:
            yield from records.replay(self.engine, self._recorded, self.session)
            return
        for block in range(self.blocks):
            if block in self._switches:
                self.session.prompt(self._switches[block], self.script.policy)
            yield self.session.step()

    def write_record(self) -> None:
        """Write the session file of the blocks that were made, where the script asks for one.

        Raises:
            UserError: the path can't be written, or more came in than is recorded.
        """
        if self.script.record is not None:
            cut = self.frames if self.frames != self._end(self.blocks) else None
            records.write(self.script.record, records.record(self.session, cut))
