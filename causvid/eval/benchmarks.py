"""Suites as a spec names them, ``eval: [vbench_long]``: which prompts are sampled, how long, and how they are judged.

A suite samples files of its own, named as upstream wants them. Beside suites, ``eval`` takes metrics, as
``shapes_truth``: these judge the held-out clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from causvid.errors import UserError
from causvid.eval import reference
from causvid.eval.clips import Policy
from causvid.eval.suites import CUSTOM, VIDEOS_PER_PROMPT, Prompt, counts, file_name, read_suite
from causvid.registry import register

LEAST_SIDE = 128  # pixels; smaller pictures are enlarged by a whole number, since h264 halves the colours' resolution
CRF = 10  # of x264: near lossless, so that the judges see the model and not the codec


@dataclass(frozen=True)
class Suite:
    """What a suite samples and asks.

    Attributes:
        name: its folder and its name in results.
        file: the list of prompts; None is VBench's own, or the world's captions where its words are few.
        seconds: least length of a video; None is the length of training clips.
        limit: at most so many prompts, the first ones; None is all.
        dimensions: None is all that can be judged.
        weights: folder of the judges' files; None: ``VBENCH_CACHE_DIR`` or ~/.cache/vbench.
        static_filter: videos of each prompt of temporal flickering, of which the first five static ones are judged;
            0 is no filter.
    """

    name: str
    file: str | None
    per_prompt: int
    seconds: float | None
    fps: float
    limit: int | None
    dimensions: tuple[str, ...] | None
    weights: str | None
    policy: Policy
    static_filter: int = 0

    def __post_init__(self) -> None:
        if self.per_prompt < 1 or self.fps <= 0 or (self.limit or 1) < 1 or (self.seconds or 1) <= 0:
            raise ValueError("per_prompt, fps, limit and seconds must be positive")
        if self.static_filter < 0:
            raise ValueError(f"static_filter is a number of videos, 25 as upstream, or 0; got {self.static_filter}")

    @property
    def folder(self) -> Path:
        """Where the judges' files are."""
        return Path(self.weights) if self.weights else reference.weights_folder()

    def source(self, closed: bool) -> Path | None:
        """The file of prompts; None where they are the world's captions: ``closed``, its words are few.

        Raises:
            UserError: VBench's list is wanted, and the judge's environment, which has it, is not set up.
        """
        if self.file is not None:
            return Path(self.file)
        return None if closed else reference.prompts_file()

    def prompts(self, captions: Sequence[str], closed: bool) -> list[Prompt]:
        """The prompts, in order, of the suite's file or of captions, each once.

        Raises:
            UserError: an unreadable list, or a caption that can't name a file.
        """
        path = self.source(closed)
        found = read_suite(path) if path else [Prompt(text, CUSTOM) for text in dict.fromkeys(captions)]
        try:
            for prompt in found:
                file_name(prompt.text, 0)
        except ValueError as error:
            raise UserError(f"eval.{self.name}: {error}") from error
        if self.limit is None:
            return found
        kept = list(dict.fromkeys(prompt.text for prompt in found))[: self.limit]
        return [prompt for prompt in found if prompt.text in kept]

    @property
    def sampling(self) -> list[object]:
        """The options that decide what is sampled, and not how it is judged."""
        return [self.name, self.file, self.per_prompt, self.seconds, self.fps, self.limit, self.static_filter]

    def videos(self, prompts: Sequence[Prompt]) -> int:
        """How many videos of these prompts there are."""
        return sum(counts(prompts, self.per_prompt, self.static_filter).values())


@register("suite", "vbench")
def vbench(
    prompts: str | None = None, per_prompt: int = VIDEOS_PER_PROMPT, fps: float = 16.0, limit: int | None = None,
    dimensions: Sequence[str] | None = None, weights: str | None = None, static_filter: int = 0,
) -> Suite:  # fmt: skip
    """VBench: clips of the training length, judged whole.

    Args:
        prompts: a list of prompts (VBench_full_info.json, the same form, or one a line). By default VBench's own, from
            the judge's environment; in a world of few words, the world's held-out captions.
        per_prompt: videos of each prompt.
        fps: rate at which videos are written.
        limit: at most so many prompts.
        dimensions: what is judged; by default all that can be.
        weights: folder of the judges' files; by default VBENCH_CACHE_DIR or ~/.cache/vbench.
        static_filter: 25, as upstream: so many videos of each prompt of temporal flickering, and the first five that
            RAFT finds static are judged. 0: no filter, and flickering is not comparable with published numbers.
    """
    names = tuple(dimensions) if dimensions else None
    return Suite("vbench", prompts, per_prompt, None, fps, limit, names, weights, Policy(), static_filter)


@register("suite", "vbench_long")
def vbench_long(
    prompts: str | None = None, per_prompt: int = VIDEOS_PER_PROMPT, seconds: float = 5.0, fps: float = 16.0,
    limit: int | None = None, dimensions: Sequence[str] | None = None, weights: str | None = None,
    long_compat: Literal["clean", "upstream"] = "clean", semantic: bool = False, static_filter: int = 0,
) -> Suite:  # fmt: skip
    """VBench-Long: videos of 5 s to minutes, judged clip by clip, and as curves over time.

    Args:
        prompts, per_prompt, fps, limit, dimensions, weights, static_filter: as for vbench.
        seconds: least length of a video.
        long_compat: how clips are cut and judged, clean, or as upstream does it for comparable numbers.
        semantic: cut at scene changes first.
    """
    names = tuple(dimensions) if dimensions else None
    policy = Policy(long_compat, semantic)
    return Suite("vbench_long", prompts, per_prompt, seconds, fps, limit, names, weights, policy, static_filter)


@register("suite", "prompts")
def custom(
    file: str, per_prompt: int = 1, seconds: float | None = None, fps: float = 16.0,
    limit: int | None = None, dimensions: Sequence[str] | None = None, weights: str | None = None,
) -> Suite:  # fmt: skip
    """Prompts of your own, from a file with one a line; judged in the nine dimensions that look for nothing named.

    Args:
        file: the list of prompts.
        per_prompt, seconds, fps, limit, dimensions, weights: as for vbench_long; ``seconds`` null: training length.
    """
    names = tuple(dimensions) if dimensions else None
    return Suite("prompts", file, per_prompt, seconds, fps, limit, names, weights, Policy())


def named_once(suites: Sequence[Suite]) -> list[Suite]:
    """Suites under different names: a second one of a kind is ``prompts_2``."""
    out: list[Suite] = []
    for suite in suites:
        taken = sum(other.name.split("#")[0] == suite.name for other in out)
        out.append(replace(suite, name=f"{suite.name}#{taken + 1}") if taken else suite)
    return out
