"""Sampling a suite into files named as upstream wants them: resumable, and shared among as many processes as you like.

A video's noise depends on its prompt and index alone, so every arm of an ablation starts from the same noise, and no
number depends on how the work is split. A file is written whole or not at all; what is there is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from causvid import weights
from causvid.data.video import write_mp4
from causvid.errors import UserError
from causvid.eval.judging import Sampling
from causvid.eval.suites import RECORD, Prompt, check_case, counts, file_name, generating
from causvid.randomness import key

SEEDS = "of prompt and index, version 1"


@dataclass(frozen=True)
class Job:
    """One video to make: the text that generates it, its seed, and its file's name."""

    text: str
    seed: int
    name: str


def seed_of(prompt: str, index: int) -> int:
    """Seed of a video's noise, below 2^31."""
    return key("suite", prompt, index) % 2**31


def jobs(prompts: Sequence[Prompt], per_prompt: int, static_filter: int = 0) -> list[Job]:
    """Every video of a suite, each once, whole sets of one index first: a stopped run has the same count of each."""
    asked, texts = generating(prompts), counts(prompts, per_prompt, static_filter)
    return [
        Job(asked[text], seed_of(text, index), file_name(text, index))
        for index in range(max(texts.values(), default=0))
        for text, count in texts.items()
        if index < count
    ]


def shard_of(text: str) -> tuple[int, int]:
    """(k, n) of ``k/n``: part k of n, counted from 0.

    Raises:
        UserError: not of that form.
    """
    first, _, count = text.partition("/")
    if not (first.isdigit() and count.isdigit() and 0 <= int(first) < int(count)):
        raise UserError(f"a shard is K/N with K from 0 to N - 1, as 0/4; got '{text}'")
    return int(first), int(count)


def sample(
    folder: Path,
    prompts: Sequence[Prompt],
    per_prompt: int,
    make: Callable[[Sequence[Job]], Sequence[Tensor]],
    record: Mapping[str, Any],
    fps: float,
    scale: int,
    crf: int,
    batch: int = 1,
    shard: tuple[int, int] = (0, 1),
    show: Callable[[int, int], None] = lambda done, total: None,
    static_filter: int = 0,
) -> int:
    """Make what is absent of a shard of a suite; returns how many videos were made.

    Args:
        make: videos ``f c h w`` of a batch of jobs.
        record: what the videos depend on, written beside them; a folder with another record is refused.
        static_filter: videos of each prompt of temporal flickering, where that is more; see :mod:`.static_filter`.

    Raises:
        UserError: the folder holds videos of another model, protocol or generating text, or can't tell two prompts
            apart.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_case(folder, prompts)
    asked = generating(prompts)  # by the short prompt, which names the file
    whole = {
        **record, "seeds": SEEDS, "fps": fps, "scale": scale, "crf": crf, "per_prompt": per_prompt, "prompts": asked,
    }  # fmt: skip
    path = folder / RECORD
    if path.is_file():
        theirs, grows = _read(path), ("per_prompt", "prompts")
        differing = [name for name in whole if name not in grows and theirs.get(name) != whole[name]]
        known = theirs.get("prompts")
        if not _texts(known):
            differing.append("prompts")
        else:
            differing += [f"what generates '{text}'" for text in asked if known.get(text, asked[text]) != asked[text]]
            whole["prompts"] = {**known, **asked}
        if differing:
            told = ", ".join(differing[:5])
            raise UserError(f"{folder} holds videos that were sampled otherwise ({told} differ); take another one")
    elif any(folder.glob("*.mp4")):
        raise UserError(f"{folder} holds videos and no {RECORD} that says how they were sampled; take another one")
    weights.write_json(path, whole)
    every = jobs(prompts, per_prompt, static_filter)
    # Batches are cut from all jobs, and made whole or not at all: so neither shards nor a resume move a number.
    batches = [every[start : start + batch] for start in range(0, len(every), batch)][shard[0] :: shard[1]]
    total, done, made = sum(map(len, batches)), 0, 0
    for part in batches:
        absent = [not (folder / job.name).is_file() for job in part]
        if any(absent):
            for job, missing, video in zip(part, absent, make(part), strict=True):
                if missing:
                    write_mp4(folder / job.name, video, fps, scale, crf)
            made += sum(absent)
        done += len(part)
        show(done, total)
    return made


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}; mend it, or take another folder") from error
    return found if isinstance(found, dict) else {}


def _texts(found: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(found, dict) and all(isinstance(text, str) for text in found.values())


def recorded(folder: Path) -> Sampling:
    """How the videos of a folder were sampled, where it is recorded."""
    path = folder / RECORD
    if not path.is_file():
        return Sampling()
    found = _read(path)
    texts = found.get("prompts")
    return Sampling(
        found.get("seeds"), f"h264 crf {found.get('crf')}, scale {found.get('scale')}",
        f"{found.get('frames')} frames at {found.get('fps')} fps", texts if _texts(texts) else {},
    )  # fmt: skip
