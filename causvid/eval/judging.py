"""Judging a folder of videos: check every file, cut it, ask every dimension, pool; resumable at every row.

A file that is corrupt, cut short, a copy of another, or of a single frame is listed with what is wrong, and not judged:
it never becomes a zero.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from causvid import weights
from causvid.data.video import write_mp4
from causvid.errors import UserError
from causvid.eval import results
from causvid.eval.aggregate import aggregate
from causvid.eval.clips import Policy, bounds
from causvid.eval.dimensions import dimensions, scales
from causvid.eval.exact import FrameDimension
from causvid.eval.pooling import Judged, per_video, pool
from causvid.eval.proxies import opencv
from causvid.eval.results import Protocol, Question, Row, Store
from causvid.eval.suites import Prompt, Video, scan

LONG_SECONDS = 5.0
UPSTREAM_CRF = 23  # x264's default, with which upstream's long mode writes its clips


@dataclass(frozen=True)
class Decoded:
    """Frames ``f h w 3`` (BGR, uint8) and their rate."""

    frames: np.ndarray
    fps: float


def decoder() -> str:
    """What decodes: part of a result's identity, since decoders differ in the last bit."""
    return f"opencv {opencv().__version__}"


def decode(path: Path) -> Decoded:
    """All frames of a video, as VBench's flickering reads them.

    Raises:
        UserError: unreadable, or cut short: fewer frames than the file says it has.
    """
    cv2 = opencv()
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise UserError("can't be read as a video")
        fps, said = float(capture.get(cv2.CAP_PROP_FPS)), int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        frames = []
        while True:
            more, frame = capture.read()
            if not more:
                break
            frames.append(frame)
    finally:
        capture.release()
    if not frames:
        raise UserError("holds no frames")
    if len(frames) < said:
        raise UserError(f"is cut short: {len(frames)} of {said} frames can be read")
    return Decoded(np.stack(frames), fps)


@dataclass(frozen=True)
class File:
    """A checked video, decoded only when a score of it is not known yet."""

    video: Video
    sha256: str

    @cached_property
    def decoded(self) -> Decoded:
        return decode(self.video.path)


@dataclass(frozen=True)
class Evaluation:
    """What a folder's judgement says: raw scores by dimension, in [0, 1]; proxies apart; what was left out, and why."""

    protocol: Protocol
    scores: Mapping[str, float | None]
    proxies: Mapping[str, float | None]
    rows: Mapping[str, Sequence[Judged]]
    prompts: Mapping[str, str]  # video -> prompt
    problems: Sequence[tuple[str, str]]
    absent: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        known = {name: score for name, score in self.scores.items() if score is not None}
        totals = aggregate(known)
        return {
            "protocol_id": self.protocol.id, "protocol": asdict(self.protocol), "scores": dict(self.scores),
            "proxies": dict(self.proxies), "totals": totals.as_json(), "note": totals.note,
            "videos": {
                name: [{"video": video, "prompt": self.prompts[video], "score": score}
                       for video, score in per_video(rows).items()]
                for name, rows in self.rows.items()
            },
            "problems": [list(problem) for problem in self.problems], "absent": list(self.absent),
        }  # fmt: skip


def checked(videos: Sequence[Video]) -> tuple[list[File], list[tuple[str, str]]]:
    """The videos that can be judged, and what is wrong with the others."""
    files, problems, seen = [], [], {}
    for video in videos:
        digest = weights.digest(video.path)
        if digest in seen:
            problems.append((video.path.name, f"is a copy of '{seen[digest]}'"))
            continue
        seen[digest] = video.path.name
        files.append(File(video, digest))
    return files, problems


def computed(names: Sequence[str] | None = None) -> dict[str, FrameDimension]:
    """The dimensions that are computed here from frames alone, all of them or those named.

    Raises:
        UserError: a name that is unknown, or needs the reference judge.
    """
    known = dimensions()
    ours = {name: target() for name, target in known.items() if issubclass(target, FrameDimension)}
    for name in names or ():
        if name not in known:
            raise UserError(f"unknown dimension '{name}'; accepted: {', '.join(known)}")
        if name not in ours:
            raise UserError(f"'{name}' needs the reference judge and its weights; see 'causvid doctor vbench'")
    return {name: ours[name] for name in names} if names else ours


def clips_of(file: File, name: str, prompt: Prompt, policy: Policy) -> list[tuple[int, int]]:
    """The clips in which a dimension judges a video; the whole of a short one."""
    decoded = file.decoded
    if decoded.fps > 0 and len(decoded.frames) / decoded.fps < LONG_SECONDS:
        return [(0, len(decoded.frames))]
    seconds = policy.seconds(name, prompt.dimensions)
    return bounds(len(decoded.frames), policy.clip_frames(decoded.fps, seconds))


def reencoded(frames: np.ndarray, fps: float) -> np.ndarray:
    """A clip after the lossy encoding that upstream's long mode gives it (x264, crf 23)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(
            path, rearrange(torch.from_numpy(frames[..., ::-1].copy()), "f h w c -> f c h w"), fps, 1, UPSTREAM_CRF
        )
        return decode(path).frames


def questions(
    file: File, prompt: Prompt, asked: Mapping[str, FrameDimension], policy: Policy
) -> Iterator[tuple[Question, FrameDimension, bool]]:
    """Each (question, who answers it, whether it is of a clip that upstream would encode again)."""
    for name, dimension in asked.items():
        if dimension.scale is not None and name not in prompt.dimensions:
            continue
        cuts = clips_of(file, name, prompt, policy)
        for number, cut in enumerate(cuts):
            again = policy.reencode and len(file.decoded.frames) / file.decoded.fps >= LONG_SECONDS
            judge = judge_of(dimension)
            asked_of = (file.sha256, number, cut, name, dimension.version, judge, {}, decoder(), policy.label)
            yield Question(*asked_of), dimension, again


def judge_of(dimension: FrameDimension) -> str:
    return f"{dimension.fidelity}: causvid, version {dimension.version}"


def judge_folder(
    folder: Path,
    prompts: Sequence[Prompt],
    store: Store,
    policy: Policy,
    per_prompt: int,
    names: Sequence[str] | None = None,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Judge a folder's videos in the dimensions that need no weights; rows that the store has are not computed again.

    Raises:
        UserError: no such folder, an unknown dimension, or no video that can be judged.
    """
    asked, found = computed(names), scan(folder, prompts, per_prompt)
    by_text: dict[str, Prompt] = {}
    for prompt in prompts:
        other = by_text.get(prompt.text)
        merged = dict.fromkeys([*(other.dimensions if other else ()), *prompt.dimensions])
        by_text[prompt.text] = Prompt(prompt.text, tuple(merged), prompt.auxiliary, prompt.extended)
    files, copies = checked(found.videos)
    problems = [*found.problems, *copies]
    rows: dict[str, list[Judged]] = {}
    judged: dict[str, str] = {}
    for number, file in enumerate(files):
        name = file.video.path.name
        show(number, len(files))
        try:
            if len(file.decoded.frames) < 2:
                raise UserError("has a single frame, which says nothing over time")
            for question, dimension, again in questions(file, by_text[file.video.prompt], asked, policy):
                if question not in store:
                    frames = file.decoded.frames[slice(*question.frames)]
                    frames = reencoded(frames, file.decoded.fps) if again else frames
                    store.append(Row(question, dimension.score(frames[..., ::-1])))
                count = question.frames[1] - question.frames[0]
                rows.setdefault(question.dimension, []).append(Judged(name, question.clip, store[question], count))
                judged[name] = file.video.prompt
        except UserError as error:
            problems.append((name, str(error)))
        file.__dict__.pop("decoded", None)  # frames of one video at a time
    show(len(files), len(files))
    if not judged:
        raise UserError(f"{folder} holds no video that can be judged: " + "; ".join(": ".join(p) for p in problems[:5]))
    scored = {
        name: pool(rows[name], dimension.pooling, policy.compat) for name, dimension in asked.items() if name in rows
    }
    protocol = Protocol(
        results.prompts_digest(prompt.text for prompt in prompts),
        results.prompts_digest(prompt.generating for prompt in prompts),
        per_prompt, policy.label, decoder(), {name: judge_of(asked[name]) for name in rows}, {},
    )  # fmt: skip
    official = scales()
    return Evaluation(
        protocol,
        {name: score for name, score in scored.items() if name in official},
        {name: score for name, score in scored.items() if name not in official},
        rows, judged, sorted(problems), found.absent,
    )  # fmt: skip
