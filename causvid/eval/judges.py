"""Who answers: this package from frames, or upstream's code in its own environment from files. One interface for both.

A dimension that can't be judged is told with its reason before anything is asked, and never becomes a zero.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import av
import numpy as np

from causvid import weights
from causvid.data.clips import encode_rgb
from causvid.errors import UserError
from causvid.eval import reference, static_filter
from causvid.eval.clips import TABLES, Mapping101, read_mapping
from causvid.eval.dimensions import RAFT, Dimension, dimensions, scales
from causvid.eval.exact import FrameDimension
from causvid.eval.footage import decode

UPSTREAM_CRF = 23  # x264's default, with which upstream's long mode writes its clips
Branch = Literal["slow", "fast", "static"]


@dataclass(frozen=True)
class Clip:
    """What is judged: frames ``f h w 3`` (BGR, uint8), and a file of them where a judge wants one.

    ``whole`` is the video's own file where the clip is all of it. ``reencode``: judged as encoded again, lossily.
    """

    raw: np.ndarray
    fps: float
    name: str
    prompt: str
    auxiliary: Mapping[str, Any]
    scratch: Path
    whole: Path | None = None
    reencode: bool = False

    @cached_property
    def path(self) -> Path:
        """A file of the clip: its own, one encoded as upstream does, or one that loses nothing."""
        if self.whole is not None and not self.reencode:
            return self.whole
        path = self.scratch / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.reencode:
            frames = self.raw[..., ::-1]
            height, width = (side + side % 2 for side in frames.shape[1:3])
            edges = ((0, 0), (0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0))
            path.write_bytes(encode_rgb(np.pad(frames, edges, mode="edge"), self.fps, UPSTREAM_CRF))
        else:
            write_lossless(path, self.raw, self.fps)
        return path

    @cached_property
    def frames(self) -> np.ndarray:
        """What a judge of frames sees, BGR."""
        return decode(self.path).frames if self.reencode else self.raw

    def forget(self) -> None:
        """Remove the file, where one was written."""
        if self.__dict__.get("path") not in (None, self.whole):
            self.path.unlink()


def write_lossless(path: Path, frames: np.ndarray, fps: float) -> None:
    """An mp4 that decodes to the same BGR bytes (h264 in RGB, lossless)."""
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264rgb", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr24"
        stream.options = {"crf": "0", "preset": "veryfast"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="bgr24")))
        container.mux(stream.encode())


class Judge(Protocol):
    """Answers for one dimension. ``label`` and ``weights`` (file -> digest) are part of every row's identity.

    ``mapping`` joins both branches of a long video, ``fast_weights`` are those of the fast one; where ``lacks`` says
    what that branch is without, long videos can't be judged. With ``static_weights`` a clip is judged only where the
    branch "static" says that it is.
    """

    dimension: type[Dimension]
    label: str
    weights: Mapping[str, str]
    fast_weights: Mapping[str, str]
    static_weights: Mapping[str, str]
    mapping: Mapping101 | None
    lacks: str

    def score(self, clip: Clip, branch: Branch) -> float | None: ...


class Ours:
    """A dimension computed here from frames alone."""

    mapping: Mapping101 | None = None
    lacks: str = ""

    def __init__(self, target: type[FrameDimension]) -> None:
        self.dimension: type[Dimension] = target
        self._judge = target()
        self.label = f"{target.fidelity}: causvid, version {target.version}"
        self.weights: Mapping[str, str] = {}
        self.fast_weights: Mapping[str, str] = {}
        self.static_weights: Mapping[str, str] = {}

    def score(self, clip: Clip, branch: Branch) -> float | None:
        return self._judge.score(clip.frames[..., ::-1])


class Sifted(Ours):
    """Temporal flickering of static clips alone; whether one is, upstream's filter says, with RAFT."""

    def __init__(self, target: type[FrameDimension], process: reference.Judge, folder: Path) -> None:
        super().__init__(target)
        self._process = process
        self.label += f"; static filter: {reference.label()}"
        self.static_weights: Mapping[str, str] = {RAFT.path: weights.digest(folder / RAFT.path)}

    def score(self, clip: Clip, branch: Branch) -> float | None:
        if branch == "static":
            return self._process.ask(f"{static_filter.DIMENSION}.static", clip.path)
        return super().score(clip, branch)


class Theirs:
    """A dimension asked of upstream's code, in a subprocess that all dimensions share."""

    def __init__(self, name: str, process: reference.Judge, folder: Path) -> None:
        self.dimension: type[Dimension] = dimensions()[name]
        self._name, self._process = name, process
        self.label = f"reference: {reference.label()}, version {self.dimension.version}"
        self.weights: Mapping[str, str] = {f.path: weights.digest(folder / f.path) for f in reference.needed(name)}
        self.fast_weights: Mapping[str, str] = {}
        self.static_weights: Mapping[str, str] = {}
        self.mapping: Mapping101 | None = None
        self.lacks = fast_lacks(name, folder)
        if self.dimension.fast_branch and not self.lacks:
            more = [file for file in reference.needed(name, True) if file.path not in self.weights]
            self.fast_weights = {file.path: weights.digest(folder / file.path) for file in more}
            self.mapping = read_mapping(folder / TABLES[name].path)

    def score(self, clip: Clip, branch: Branch) -> float | None:
        asked = self._name if branch == "slow" else f"{self._name}.fast"
        sought = clip.auxiliary.get(self._name)
        if sought is None and self.dimension.looks_for:
            raise UserError(f"the prompt's auxiliary_info does not say what {self._name} looks for")
        return self._process.ask(asked, clip.path, clip.prompt, sought)


def check_names(names: Sequence[str]) -> None:
    """Refuse dimensions that do not exist.

    Raises:
        UserError: an unknown name.
    """
    known = dimensions()
    for name in names:
        if name not in known:
            raise UserError(f"unknown dimension '{name}'; accepted: {', '.join(known)}")


def wanted(names: Sequence[str] | None) -> list[str]:
    """The dimensions asked for, all of them by default."""
    check_names(names or ())
    return list(names or dimensions())


def readiness(names: Sequence[str] | None, folder: Path | None, sifts: bool = False) -> dict[str, str]:
    """Of the dimensions asked for, those that can't be judged, and why; ``folder`` holds the weights, None: no judge.

    Args:
        sifts: the static filter goes before temporal flickering.

    Raises:
        UserError: an unknown name, or an environment that is broken.
    """
    theirs = asked_of_them(names, sifts)
    if folder is None:
        return dict.fromkeys(theirs, "needs the reference judge: give the folder of its weights, --weights")
    found = reference.doctor(folder) if theirs else {}
    if static_filter.DIMENSION in theirs:  # asks what dynamic degree asks: optical flow of RAFT
        found[static_filter.DIMENSION] = found["dynamic_degree"]
    return {name: "; ".join(need.short for need in found[name]) for name in theirs if found[name]}


def asked_of_them(names: Sequence[str] | None, sifts: bool) -> list[str]:
    """The dimensions for which upstream's code is needed."""
    known = dimensions()
    sifted = static_filter.DIMENSION if sifts else None
    return [name for name in wanted(names) if name == sifted or not issubclass(known[name], FrameDimension)]


def fast_lacks(name: str, folder: Path) -> str:
    """Which files the fast branch of long videos is without; empty where it lacks none, or there is no such branch."""
    short = reference.missing_files(name, folder)
    return "; ".join(need.short for need in reference.missing_files(name, folder, True) if need not in short)


def require(names: Sequence[str] | None, folder: Path | None, long: bool, sifts: bool = False) -> dict[str, str]:
    """As :func:`readiness`, but what is asked for by name must be ready, for ``long`` videos too.

    Raises:
        UserError: an unknown name; one that was asked for by name and can't be judged.
    """
    missing = readiness(names, folder, sifts)
    for name in names or ():
        reason = missing.get(name) or (fast_lacks(name, folder) if long and folder else "")
        if reason:
            raise UserError(f"'{name}' can't be judged: {reason}; see 'causvid doctor vbench --long'")
    return missing


@contextmanager
def judges(
    names: Sequence[str] | None, folder: Path | None, log: Path, device: str = "cpu", sifts: bool = False
) -> Iterator[tuple[dict[str, Judge], dict[str, str]]]:
    """(a judge by dimension, the others with the reason why not); the reference judge runs only if it is needed.

    Raises:
        UserError: an unknown name; one that was asked for by name and can't be judged.
    """
    known, missing = dimensions(), require(names, folder, False, sifts)
    able = [name for name in wanted(names) if name not in missing]
    theirs = [name for name in asked_of_them(names, sifts) if name not in missing]
    found: dict[str, Judge] = {n: Ours(t) for n in able if issubclass(t := known[n], FrameDimension)}
    if not theirs or folder is None:
        yield found, missing
        return
    with reference.judge(folder, log, device) as process:
        for name in theirs:
            own = known[name]
            sifted = issubclass(own, FrameDimension)
            found[name] = Sifted(own, process, folder) if sifted else Theirs(name, process, folder)
        yield {name: found[name] for name in able}, missing


def official(judged: Mapping[str, Any]) -> dict[str, Any]:
    """What enters a total, of anything by dimension."""
    return {name: value for name, value in judged.items() if name in scales()}


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the clips of one video, which goes with the block."""
    with tempfile.TemporaryDirectory(prefix="causvid-clips-") as folder:
        yield Path(folder)
