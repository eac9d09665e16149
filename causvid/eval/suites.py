"""Suites of prompts, and the files that belong to them.

VBench's own list is ``VBench_full_info.json`` of the installed package: 946 rows, 944 different prompts. A video is
``{prompt}-{index}.mp4`` of the *short* prompt, even where a longer one generated it. Names are compared letter for
letter, whatever the file system does: "A fantasy landscape" and "a fantasy landscape" are two prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from causvid.errors import UserError
from causvid.eval.dimensions import dimensions
from causvid.eval.static_filter import DIMENSION
from causvid.registry import did_you_mean

SUFFIX = ".mp4"
MOST_NAME_BYTES = 255  # of common file systems
VIDEOS_PER_PROMPT = 5
RECORD = "sampling.json"  # beside the videos: how they were sampled


@dataclass(frozen=True)
class Prompt:
    """One row of a suite: the short prompt, its dimensions, what their rules look for, and a text that generates.

    ``auxiliary``: dimension -> what upstream's function of it is given, {``Dimension.looks_for``: what}.
    """

    text: str
    dimensions: tuple[str, ...]
    auxiliary: Mapping[str, Any] = field(default_factory=dict)
    extended: str | None = None


@dataclass(frozen=True)
class Video:
    """A file of the suite: the prompt that names it and its index."""

    path: Path
    prompt: str
    index: int


@dataclass(frozen=True)
class Folder:
    """What a folder holds of a suite. ``problems`` are (file name, what is wrong); none ever becomes a score of 0."""

    videos: tuple[Video, ...]
    absent: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]


def read_suite(path: Path) -> list[Prompt]:
    """Prompts of a ``VBench_full_info.json``, or of a custom file: the same form, or a text file of one prompt a line.

    Prompts of a text file are judged in the dimensions that need no further information.

    Raises:
        UserError: unreadable, empty, an unknown dimension, or a prompt that can't name a file.
    """
    try:
        text = path.read_text("utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give VBench_full_info.json or a list of prompts") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read as a list of prompts: {error}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}; a list of prompts is accepted")
    prompts, problems = [], []
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        try:
            prompts.append(_prompt(row))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    try:
        generating(prompts)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems[:10]))
    if not prompts:
        raise UserError(f"{path} holds no prompts")
    return prompts


# What a custom prompt can be judged in: nothing to look for is needed.
CUSTOM = (
    "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree",
    "aesthetic_quality", "imaging_quality", "temporal_style", "overall_consistency",
)  # fmt: skip


def _prompt(row: Any) -> Prompt:
    if isinstance(row, str):
        row = {"prompt_en": row, "dimension": list(CUSTOM)}
    if not isinstance(row, dict) or not isinstance(row.get("prompt_en"), str) or not row["prompt_en"].strip():
        raise ValueError("a row is {'prompt_en': text, 'dimension': [names]}")
    names = row.get("dimension")
    if not isinstance(names, list) or not names:
        raise ValueError(f"'{row['prompt_en']}' names no dimension")
    known = dimensions()
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"unknown dimension '{name}'{did_you_mean(str(name), known)}")
    file_name(row["prompt_en"], 0)
    extended, told = row.get("extended"), row.get("auxiliary_info") or {}
    if not isinstance(told, dict):
        raise ValueError(f"'{row['prompt_en']}' has auxiliary_info {told!r}; an object by dimension is accepted")
    if extended is not None and not isinstance(extended, str):
        raise ValueError(f"'{row['prompt_en']}' has extended {extended!r}; a text is accepted")
    for name, value in told.items():
        keys = {key: each.looks_for for key, each in known.items() if each.looks_for}
        if name not in keys:
            raise ValueError(f"'{row['prompt_en']}' has auxiliary_info of '{name}'{did_you_mean(name, keys)}; only "
                             f"{', '.join(keys)} look for something")  # fmt: skip
        if not isinstance(value, dict) or set(value) != {keys[name]}:
            raise ValueError(f"'{row['prompt_en']}' has auxiliary_info {json.dumps({name: value})}; "
                             f"{{\"{name}\": {{\"{keys[name]}\": ...}}}} is accepted")  # fmt: skip
    return Prompt(row["prompt_en"], tuple(names), told, extended)


def generating(prompts: Sequence[Prompt]) -> dict[str, str]:
    """By prompt, the text that generates its videos, which any of its rows may give.

    Raises:
        ValueError: two rows of a prompt give two.
    """
    out: dict[str, str] = {}
    for prompt in prompts:
        if prompt.extended and out.setdefault(prompt.text, prompt.extended) != prompt.extended:
            raise ValueError(f"'{prompt.text}' is extended in two ways")
    return {prompt.text: out.get(prompt.text, prompt.text) for prompt in prompts}


def file_name(prompt: str, index: int) -> str:
    """The name of a prompt's video.

    Raises:
        ValueError: the prompt can't be part of a file name.
    """
    if "/" in prompt or "\0" in prompt or "\n" in prompt:
        raise ValueError(f"'{prompt}' can't name a file: it holds a slash, a line break or a null")
    name = f"{prompt}-{index}{SUFFIX}"
    if len(name.encode()) > MOST_NAME_BYTES:
        raise ValueError(f"'{prompt[:40]}...' is too long for a file name ({MOST_NAME_BYTES} bytes); shorten it")
    return name


def parse_name(name: str) -> tuple[str, int] | None:
    """(prompt, index) of a video's name; None where it has no index. Underscores are part of a prompt."""
    found = re.fullmatch(r"(.+)-(\d+)" + re.escape(SUFFIX), name, re.DOTALL)
    return (found[1], int(found[2])) if found else None


def counts(prompts: Sequence[Prompt], per_prompt: int, static_filter: int = 0) -> dict[str, int]:
    """Videos of each prompt, by its text; of those of temporal flickering ``static_filter``, where that is more."""
    out: dict[str, int] = {}
    for prompt in prompts:
        here = max(per_prompt, static_filter) if DIMENSION in prompt.dimensions else per_prompt
        out[prompt.text] = max(out.get(prompt.text, 0), here)
    return out


def scan(
    folder: Path, prompts: Sequence[Prompt], per_prompt: int = VIDEOS_PER_PROMPT, static_filter: int = 0
) -> Folder:
    """The videos of a folder that a suite asks for, in the suite's order, whatever order the folder lists them in.

    A prompt's are in order of their names, 10 before 2, as upstream's static filter takes them.

    Raises:
        UserError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder that holds the videos")
    present = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    texts = counts(prompts, per_prompt, static_filter)
    wanted = {
        file_name(text, index): (text, index)
        for text, count in texts.items()
        for index in sorted(range(count), key=str)
    }
    videos = [Video(present[name], *key) for name, key in wanted.items() if name in present]
    absent = tuple(name for name in wanted if name not in present)
    problems = []
    folded = {name.casefold(): name for name in wanted}
    for name in present:
        if name in wanted or name == RECORD or name.startswith("."):
            continue
        near = folded.get(name.casefold())
        if near:
            problems.append((name, f"differs from '{near}' in case only"))
        elif not name.endswith(SUFFIX):
            problems.append((name, f"is no {SUFFIX} file"))
        elif (parsed := parse_name(name)) is None:
            problems.append((name, "has no index: a video is named 'PROMPT-INDEX.mp4'"))
        elif parsed[0] in texts:
            problems.append((name, f"has index {parsed[1]}; indices 0 to {texts[parsed[0]] - 1} are judged"))
        else:
            problems.append((name, f"is of no prompt of the suite{did_you_mean(parsed[0], texts)}"))
    return Folder(tuple(videos), absent, tuple(problems))


def check_case(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Refuse to write a suite to a file system that folds case, where two of its prompts would share a file.

    Raises:
        UserError: the file system folds case, and prompts differ in case only.
    """
    seen: dict[str, str] = {}
    for text in dict.fromkeys(prompt.text for prompt in prompts):
        other = seen.setdefault(text.casefold(), text)
        if other != text and folds_case(folder):
            raise UserError(
                f"{folder} does not tell upper from lower case, so '{other}' and '{text}' would share a file; "
                "sample to another file system"
            )


def folds_case(folder: Path) -> bool:
    """Whether names that differ in case only are one file there."""
    probe = folder / ".CaseProbe"
    probe.touch()
    try:
        return (folder / ".caseprobe").exists()
    finally:
        probe.unlink()
