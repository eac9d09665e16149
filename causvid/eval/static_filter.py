"""Upstream's filter of static videos before temporal flickering: of many videos of a prompt the first five still ones.

A scene that moves has no flicker that a difference of frames could tell from motion. So VBench samples 25 videos of
each prompt of temporal flickering, asks RAFT of each, in order of the files' names, whether it is static, and judges
the first five that are. What is not static has no score, and is no zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from causvid.eval.clips import Compat

DIMENSION = "temporal_flickering"
KEPT = 5  # of each prompt


class Sieve:
    """Which clips were kept, by prompt.

    Of a long video's clips each is asked, and the static ones are judged. Clean: of five videos at most. Upstream
    counts clips: five of a prompt, which may all be of one video.
    """

    def __init__(self, compat: Compat) -> None:
        self._compat = compat
        self._kept: dict[str, list[str]] = {}  # prompt -> the video of each clip that was kept

    def full(self, prompt: str, video: str) -> bool:
        """Whether nothing more of a video is judged."""
        kept = self._kept.setdefault(prompt, [])
        return len(kept) >= KEPT if self._compat == "upstream" else len({*kept, video}) > KEPT

    def keep(self, prompt: str, video: str) -> None:
        self._kept[prompt].append(video)

    def drop(self, prompt: str, video: str) -> None:
        """Forget a video that could not be judged whole: the next one takes its place."""
        self._kept[prompt] = [other for other in self._kept.get(prompt, ()) if other != video]

    @property
    def asked(self) -> bool:
        """Whether anything was."""
        return bool(self._kept)

    def as_json(self) -> dict[str, Any]:
        """How many videos and clips were kept, and prompts of which fewer than five were."""
        few = {prompt: len(self._count(kept)) for prompt, kept in self._kept.items() if len(self._count(kept)) < KEPT}
        videos = {video for kept in self._kept.values() for video in kept}
        return {"videos": len(videos), "clips": sum(map(len, self._kept.values())), "fewer": few}

    def _count(self, kept: Sequence[str]) -> Sequence[str]:
        return kept if self._compat == "upstream" else list(dict.fromkeys(kept))


def told(found: Mapping[str, Any]) -> str:
    """A line for eyes."""
    few = f"; fewer than {KEPT} of {len(found['fewer'])} prompts" if found["fewer"] else ""
    return f"static filter: {found['videos']} videos kept{few}"
