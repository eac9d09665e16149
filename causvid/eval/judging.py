"""Judging a folder of videos: check every file, cut it, ask every dimension, pool; resumable at every row.

A file that is corrupt, cut short, a copy of another, or of a single frame is listed with what is wrong, and not judged:
it never becomes a zero. Nor does a dimension that can't be judged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from causvid import weights
from causvid.errors import UserError
from causvid.eval import drift, results
from causvid.eval.aggregate import aggregate
from causvid.eval.clips import LONG_SECONDS, Policy, bounds, first_frames, fuse
from causvid.eval.footage import Footage, decoder
from causvid.eval.judges import Branch, Clip, Judge, official, scratch
from causvid.eval.pooling import Judged, per_video, pool
from causvid.eval.reference import Unusable
from causvid.eval.results import Protocol, Question, Row, Store
from causvid.eval.scenes import scenes
from causvid.eval.static_filter import DIMENSION, Sieve
from causvid.eval.suites import Prompt, Video, generating, scan


@dataclass(frozen=True)
class Sampling:
    """How videos were made, as far as it is recorded: part of the protocol."""

    seeds: str | None = None
    codec: str | None = None
    length: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)  # short prompt -> the text that generated its videos

    def generating(self, prompts: Sequence[Prompt]) -> list[str]:
        """What the model was asked for, row by row: as was recorded, and where nothing was, as the list says.

        Raises:
            UserError: the list extends a prompt otherwise than its videos' record.
        """
        for prompt in prompts:
            made = self.prompts.get(prompt.text)
            if made is not None and prompt.extended and prompt.extended != made:
                raise UserError(
                    f"the videos of '{prompt.text}' were generated from '{made[:60]}', and the list of prompts has "
                    f"'{prompt.extended[:60]}'; judge them by the list that they were sampled from, or sample anew"
                )
        texts = {**generating(prompts), **self.prompts}
        return [texts[prompt.text] for prompt in prompts]


@dataclass(frozen=True)
class Evaluation:
    """What a folder's judgement says: raw scores by dimension, in [0, 1]; proxies apart; what was left out, and why."""

    protocol: Protocol
    scores: Mapping[str, float | None]
    proxies: Mapping[str, float | None]
    rows: Mapping[str, Sequence[Judged]]  # of the slow branch, by clip
    videos: Mapping[str, Mapping[str, float | None]]  # dimension -> video -> score, branches fused
    prompts: Mapping[str, str]  # video -> prompt
    problems: Sequence[tuple[str, str]]
    absent: Sequence[str]
    lacking: tuple[int, int] = (0, 0)  # videos of the suite of which some score, or all, is missing; and all of them
    unjudged: Mapping[str, str] = field(default_factory=dict)  # dimension -> why
    sifted: Mapping[str, Any] | None = None  # what the static filter kept, where there was one

    def as_json(self) -> dict[str, Any]:
        known = {name: score for name, score in self.scores.items() if score is not None}
        totals = aggregate(known)
        return {
            "protocol_id": self.protocol.id, "protocol": asdict(self.protocol),
            "scores": {**dict.fromkeys(official(self.unjudged)), **self.scores},
            "proxies": dict(self.proxies), "totals": totals.as_json(), "note": totals.note,
            "videos": {
                name: [{"video": video, "prompt": self.prompts[video], "score": score}
                       for video, score in scores.items()]
                for name, scores in self.videos.items()
            },
            "over_time": drift.curves(self.rows), "drift": drift.summary(self.rows),
            "problems": [list(problem) for problem in self.problems], "absent": list(self.absent),
            "lacking": {"videos": self.lacking[0], "of": self.lacking[1]},
            "unjudged": dict(self.unjudged), "static_filter": self.sifted,
        }  # fmt: skip


def checked(videos: Sequence[Video]) -> tuple[list[tuple[Video, str]], list[tuple[str, str]]]:
    """The videos that can be judged with their digests, and what is wrong with the others."""
    files, problems, seen = [], [], {}
    for video in videos:
        digest = weights.digest(video.path)
        if digest in seen:
            problems.append((video.path.name, f"is a copy of '{seen[digest]}'"))
            continue
        seen[digest] = video.path.name
        files.append((video, digest))
    return files, problems


def merged(prompts: Sequence[Prompt]) -> dict[str, Prompt]:
    """Prompts by text; one that several suites share has the dimensions of all, and what their rules look for."""
    out: dict[str, Prompt] = {}
    for prompt in prompts:
        other = out.get(prompt.text, Prompt(prompt.text, ()))
        names = dict.fromkeys([*other.dimensions, *prompt.dimensions])
        out[prompt.text] = Prompt(
            prompt.text, tuple(names), {**other.auxiliary, **prompt.auxiliary}, prompt.extended or other.extended
        )
    return out


@dataclass(frozen=True)
class Asked:
    """A question, where its frames are, and what it is of."""

    question: Question
    dimension: str
    branch: Branch
    cuts: tuple[tuple[int, int], ...]  # frames that are judged
    name: str  # of the clip's file


def questions(
    video: Video, digest: str, footage: Footage, prompt: Prompt, asked: Mapping[str, Judge], policy: Policy
) -> Iterator[Asked]:
    """Everything to ask of a video, by where its frames begin, so that the file is read once."""
    long, stem, out = footage.seconds >= LONG_SECONDS, video.path.stem, []
    parts = scenes(video.path, footage.count) if policy.semantic and long else [(0, footage.count)]
    for name, judge in asked.items():
        dimension, scale = judge.dimension, judge.dimension.scale
        if scale is not None and name not in prompt.dimensions:
            continue
        compared = json.dumps([prompt.text, prompt.auxiliary.get(name)]) if scale and scale.half == "semantic" else None
        known = (name, dimension.version, judge.label)
        rest = (decoder(), policy.label, compared)
        by_scene = [clips_of(footage, name, prompt, policy, part) for part in parts]
        for number, cut in enumerate(cut for cuts in by_scene for cut in cuts):
            named = f"{stem}_{number:03d}.mp4" if long else video.path.name
            if judge.static_weights:
                question = Question(digest, number, cut, *known, judge.static_weights, *rest, "static")
                out.append(Asked(question, name, "static", (cut,), named))
            out.append(Asked(Question(digest, number, cut, *known, judge.weights, *rest), name, "slow", (cut,), named))
        for number, cuts in enumerate(by_scene):
            if judge.mapping is not None and (firsts := first_frames(cuts)):
                span = (cuts[0][0], cuts[-1][1])
                question = Question(digest, number, span, *known, judge.fast_weights, *rest, "fast")
                out.append(Asked(question, name, "fast", firsts, f"{stem}.mp4"))
    yield from sorted(out, key=lambda each: (each.branch == "fast", each.cuts[0], each.cuts[-1]))


def clips_of(
    footage: Footage, name: str, prompt: Prompt, policy: Policy, part: tuple[int, int] | None = None
) -> list[tuple[int, int]]:
    """The clips in which a dimension judges a video, or a scene of it; the whole of a short one."""
    start, stop = part or (0, footage.count)
    if footage.fps > 0 and footage.seconds < LONG_SECONDS:
        return [(start, stop)]
    seconds = policy.seconds(name, prompt.dimensions)
    cuts = bounds(stop - start, policy.clip_frames(footage.fps, seconds))
    return [(start + first, start + last) for first, last in cuts]


class _Video:
    """One video under judgement: its footage, and the clip that was read last."""

    def __init__(self, video: Video, footage: Footage, prompt: Prompt, policy: Policy, folder: Path) -> None:
        self.video, self.footage, self.prompt, self.policy, self.folder = video, footage, prompt, policy, folder
        self._last: tuple[Any, Clip] | None = None

    def clip(self, asked: Asked) -> Clip:
        """The clip of a question; one that several dimensions judge is read, and written, once."""
        key = (asked.cuts, asked.branch == "fast")
        if self._last is None or self._last[0] != key:
            if self._last is not None:
                self._last[1].forget()
            self._last = (key, self._read(asked))
        return self._last[1]

    def _read(self, asked: Asked) -> Clip:
        footage = self.footage
        whole = self.video.path if asked.cuts == ((0, footage.count),) else None
        long = footage.seconds >= LONG_SECONDS
        return Clip(
            np.concatenate([footage.frames(*cut) for cut in asked.cuts]), footage.fps, asked.name, self.prompt.text,
            self.prompt.auxiliary, self.folder, whole, self.policy.reencode and long,
        )  # fmt: skip


def judge_folder(
    folder: Path,
    prompts: Sequence[Prompt],
    store: Store,
    policy: Policy,
    per_prompt: int,
    asked: Mapping[str, Judge],
    unjudged: Mapping[str, str] | None = None,
    sampling: Sampling = Sampling(),
    show: Callable[[int, int], None] = lambda done, total: None,
    static_filter: int = 0,
) -> Evaluation:
    """Judge a folder's videos; rows that the store has are not computed again.

    Args:
        asked: who answers, by dimension; see :func:`causvid.eval.judges.judges`.
        unjudged: dimensions that nobody can answer, and why.
        static_filter: of how many videos a prompt the static ones are judged in temporal flickering; 0: no filter.
            Videos beyond ``per_prompt`` are judged in nothing else.

    Raises:
        UserError: no such folder, no video that can be judged, or videos that the list's texts did not generate.
    """
    found, able, lost = scan(folder, prompts, per_prompt, static_filter), dict(asked), dict(unjudged or {})
    asked_for = sampling.generating(prompts)
    sieve = Sieve(policy.compat)
    by_text = merged(prompts)
    files, copies = checked(found.videos)
    problems = [*found.problems, *copies]
    slow: dict[str, list[Judged]] = {}
    fast: dict[str, list[Judged]] = {}
    judged: dict[str, str] = {}
    broken: set[str] = set()
    for number, (video, digest) in enumerate(files):
        show(number, len(files))
        name, prompt = video.path.name, by_text[video.prompt]
        try:
            footage = Footage(video.path)
            if footage.count < 2:
                raise UserError("has a single frame, which says nothing over time")
            beyond = {n: j for n, j in able.items() if n == DIMENSION} if video.index >= per_prompt else able
            each = list(questions(video, digest, footage, prompt, beyond, policy))
        except UserError as error:
            problems.append((name, str(error)))
            continue
        judged[name] = video.prompt
        with scratch() as clips:
            reader, failed = _Video(video, footage, prompt, policy, clips), {}
            answers: list[tuple[Asked, float | None]] = []
            still: set[Any] = set()  # clips that are, where that is asked
            for item in each:
                if item.dimension in failed or item.dimension in lost:
                    continue
                if item.branch == "static" and sieve.full(video.prompt, name):
                    continue
                if item.branch == "slow" and able[item.dimension].static_weights and item.cuts not in still:
                    continue
                if able[item.dimension].lacks and footage.seconds >= LONG_SECONDS:
                    lost[item.dimension] = f"of long videos: {able[item.dimension].lacks}"
                    continue
                try:
                    if item.question not in store:
                        score = able[item.dimension].score(reader.clip(item), item.branch)
                        store.append(Row(item.question, score))
                    if item.branch != "static":
                        answers.append((item, store[item.question]))
                    elif store[item.question]:
                        still.add(item.cuts)
                        sieve.keep(video.prompt, name)
                except Unusable as error:
                    lost[item.dimension] = str(error)
                except (UserError, ValueError) as error:  # a score that is no number, frames that are none
                    failed[item.dimension] = str(error)
        footage.close()
        problems += [(name, f"{dimension}: {reason}") for dimension, reason in failed.items()]
        broken |= set(failed)
        if DIMENSION in failed:
            sieve.drop(video.prompt, name)
        for item, score in answers:
            if item.dimension in failed:  # a part of a video's clips is no score of it
                continue
            start, stop = item.question.frames
            seconds = start / footage.fps if footage.fps > 0 else 0.0
            row = Judged(name, item.question.clip, score, stop - start, seconds)
            (fast if item.branch == "fast" else slow).setdefault(item.dimension, []).append(row)
    show(len(files), len(files))
    if sieve.asked and DIMENSION not in slow:
        lost.setdefault(DIMENSION, "the static filter keeps no video")
    for name in broken - set(slow):  # null and named, as what nobody can judge
        lost.setdefault(name, "no video of it could be judged; see the problems")
    for name in lost:
        slow.pop(name, None)
    if not slow:
        told = [": ".join(p) for p in [*problems, *lost.items()][:5]]
        raise UserError(f"{folder} holds no video that can be judged: " + "; ".join(told))
    ordered = [name for name in asked if name in slow]
    videos = {name: fused(slow[name], fast.get(name, ()), asked[name], policy) for name in ordered}
    scored = {
        name: pooled(slow[name], videos[name], bool(fast.get(name)), asked[name], policy) for name in ordered
    }  # fmt: skip
    protocol = Protocol(
        results.prompts_digest(prompt.text for prompt in prompts),
        results.prompts_digest(asked_for),
        per_prompt, policy.label, decoder(), {name: asked[name].label for name in ordered},
        {
            file: digest
            for name in ordered
            for used in read_by(asked[name], name in fast)
            for file, digest in used.items()
        },
        sampling.seeds, sampling.codec, sampling.length, (static_filter if DIMENSION in ordered else 0) or False,
    )  # fmt: skip
    scores = official(scored)
    in_part = {video.path.name for video in found.videos} & {name for name, _ in problems}
    lacking = (len(found.absent) + len(in_part), len(found.absent) + len(found.videos))
    return Evaluation(
        protocol, scores, {name: score for name, score in scored.items() if name not in scores},
        {name: slow[name] for name in ordered}, videos, judged, sorted(problems), found.absent, lacking, lost,
        sieve.as_json() if sieve.asked else None,
    )  # fmt: skip


def read_by(judge: Judge, fast: bool) -> tuple[Mapping[str, str], ...]:
    """The files that a judge read, with their digests."""
    return judge.weights, judge.static_weights, judge.fast_weights if fast else {}


def fused(rows: Sequence[Judged], fast: Sequence[Judged], judge: Judge, policy: Policy) -> dict[str, float | None]:
    """Score of each video, both branches joined where there are two; scenes weigh the same in the fast one."""
    out, firsts = per_video(rows), per_video(fast)
    if judge.mapping is None:
        return out
    return {
        video: score if score is None else fuse(score, firsts.get(video), judge.mapping, policy)
        for video, score in out.items()
    }


def pooled(
    rows: Sequence[Judged], videos: Mapping[str, float | None], two: bool, judge: Judge, policy: Policy
) -> float | None:
    """Raw score of a dimension: by its rule over clips, or over the videos' fused scores."""
    if not two:
        return pool(rows, judge.dimension.pooling, policy.compat)
    known = [score for score in videos.values() if score is not None]
    return sum(known) / len(known) if known else None
