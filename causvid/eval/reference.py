"""Upstream VBench as the reference judge: its environment, what it lacks, and asking it.

The environment is made once per user from ``constraints/vbench.txt``, in a folder named by that file's digest, and used
by every checkout. Weights are the user's to supply: nothing is downloaded but packages, and those only by ``setup``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causvid import weights as files
from causvid.errors import UserError
from causvid.eval.clips import TABLES
from causvid.eval.dimensions import RAFT, Dimension, Weights, dimensions
from causvid.eval.exact import FrameDimension

WORKER = Path(__file__).with_name("vbench_worker.py")
PACKAGES = ("torch", "vbench", "setuptools", "pyarrow")
JUDGE = "vbench 0.1.5"
MOST_ENDS = 3
# The code, beside the weights, that subject consistency runs: a clone of facebookresearch/dino.
DINO_CODE = Weights("dino_model/facebookresearch_dino_main/hubconf.py", "a clone of facebookresearch/dino")


# What the fast branch of long videos reads.
FAST_FILES = {
    "subject_consistency": (
        Weights("dino_model/dinov2_vitb14_pretrain.pth", "DINOv2"),
        Weights("dino_model/facebookresearch_dinov2_main/hubconf.py", "a clone of facebookresearch/dinov2"),
    ),
    "background_consistency": (
        Weights("dreamsim_model/code/dreamsim/__init__.py", "a clone of ssundaram21/dreamsim"),
        *(Weights(f"dreamsim_model/{name}", "DreamSim, its pretrained.zip") for name in (
            "dino_vitb16_pretrain.pth", "open_clip_vitb16_pretrain.pth.tar", "clip_vitb16_pretrain.pth.tar",
        )),
    ),
}  # fmt: skip


class Unusable(UserError):
    """A judge can't answer anything: its weights or imports fail, or it ended."""


def constraints() -> Path:
    """The pinned packages, in a checkout or an installed package.

    Raises:
        UserError: neither is there.
    """
    package = Path(__file__).resolve().parent.parent
    for path in (package.parent / "constraints" / "vbench.txt", package / "_constraints" / "vbench.txt"):
        if path.is_file():
            return path
    raise UserError("constraints/vbench.txt is missing from this installation; reinstall causvid")


def environment() -> Path:
    """Where the judge's environment is, or will be: ``CAUSVID_CACHE`` or ~/.cache/causvid, by digest of the pins."""
    root = Path(os.environ.get("CAUSVID_CACHE") or Path.home() / ".cache" / "causvid")
    lines = [line.split("#")[0].strip() for line in constraints().read_text().splitlines()]
    digest = hashlib.sha256("\n".join(sorted(filter(None, lines))).encode()).hexdigest()[:12]
    return root / "vbench" / f"{sys.version_info.major}.{sys.version_info.minor}-{digest}"


def installed() -> str:
    """Digest of every package in the judge's environment with its version: pins leave many to the day of the set-up."""
    found = sorted(path.name for path in environment().glob("lib/python*/site-packages/*.dist-info"))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:12]


def label() -> str:
    """What the reference judge is called in rows and protocols."""
    return f"{JUDGE} ({environment().name}, packages {installed()})"


def weights_folder() -> Path:
    """Where upstream looks for weights: ``VBENCH_CACHE_DIR`` or ~/.cache/vbench."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def ready() -> bool:
    """Whether the environment is set up."""
    return (environment() / "READY").is_file()


def prompts_file() -> Path:
    """VBench's list of prompts, in the judge's environment.

    Raises:
        UserError: it is not set up.
    """
    interpreter()
    for path in environment().glob("lib/python*/site-packages/vbench/VBench_full_info.json"):
        return path
    raise UserError(f"the reference judge's environment is broken; remove {environment()} and set it up again")


def state(names: Sequence[str], folder: Path, sifts: bool = False) -> list[list[Any]]:
    """What a judgement depends on outside the spec, told without reading it: the environment, and the files there."""
    found: list[list[Any]] = [[environment().name, ready(), installed()]]
    files_of = {file.path for name in names for file in needed(name, True)} | ({RAFT.path} if sifts else set())
    for path in sorted(folder / name for name in files_of):
        if path.is_file():
            found.append([str(path), path.stat().st_size, path.stat().st_mtime_ns])
    return found


def interpreter() -> Path:
    """The Python of a finished environment.

    Raises:
        UserError: it is not set up.
    """
    if not ready():
        raise UserError("the reference judge is not set up; run: causvid vbench setup")
    return environment() / "bin" / "python"


def setup(say: Callable[[str], None]) -> Path:
    """Make the environment, or go on making it; returns its folder.

    Raises:
        UserError: Python is too new for the pins, or packages can't be had, as without a network.
    """
    folder = environment()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "READY").is_file():
            return folder
        if sys.version_info >= (3, 12):
            raise UserError("upstream's packages need Python 3.11; run 'causvid vbench setup' with it")
        begin = time.monotonic()
        say(f"making {folder} (about 3 minutes and 2.2 GB, once)")
        _run([sys.executable, "-m", "venv", str(folder)])
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
        _run([*pip, "-c", str(constraints()), *PACKAGES])
        files.write_json(folder / "READY", {"seconds": round(time.monotonic() - begin), "judge": JUDGE})
        say(f"ready after {time.monotonic() - begin:.0f} s")
    return folder


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        tail = " ".join(line for line in done.stdout.splitlines() if "ERROR" in line)[-600:] or done.stdout[-600:]
        raise UserError(
            f"packages of the reference judge can't be installed: {tail.strip()}. Without a network, fetch them "
            f"elsewhere (pip download -d wheels -c {constraints()} {' '.join(PACKAGES)}), then set PIP_NO_INDEX=1 and "
            "PIP_FIND_LINKS=wheels; the same command goes on from here"
        )


@dataclass(frozen=True)
class Need:
    """What a dimension lacks: a file or an import, and what to do."""

    name: str
    what: str

    @property
    def short(self) -> str:
        """In a few words; the doctor has the rest."""
        return f"{self.name} {self.what.split(':')[0]}"


def needed(dimension: str, long: bool = False) -> tuple[Weights, ...]:
    """Every file that the reference judge of a dimension reads; ``long``: also those of the fast branch."""
    files_of = dimensions()[dimension].weights
    files_of = (*files_of, DINO_CODE) if dimension == "subject_consistency" else files_of
    return (*files_of, *FAST_FILES[dimension], TABLES[dimension]) if long and dimension in FAST_FILES else files_of


def missing_files(dimension: str, folder: Path, long: bool = False) -> list[Need]:
    """Files that are absent, or not what they should be, with where they go."""
    out = []
    for file in needed(dimension, long):
        path = folder / file.path
        size = f"about {file.gigabytes} GB" if file.gigabytes else "size not published"
        size = f"{file.bytes:,} bytes" if file.bytes else size
        digest = f"sha256 {file.sha256}" if file.sha256 else "digest not published"
        if not path.is_file():
            out.append(Need(file.path, f"missing: put it at {path} ({size}, {digest}; from {file.source})"))
        elif (file.bytes and path.stat().st_size != file.bytes) or (
            file.gigabytes and abs(path.stat().st_size / 1e9 - file.gigabytes) > 0.1 * file.gigabytes
        ):
            out.append(Need(file.path, f"has {path.stat().st_size:,} bytes, not {size}: fetch it again to {path}"))
        elif file.sha256 and not files.digest(path).startswith(file.sha256):
            out.append(Need(file.path, f"has another content than {digest}: fetch it again to {path}"))
    return out


def doctor(folder: Path, long: bool = False) -> dict[str, list[Need]]:
    """What each of the sixteen dimensions lacks, ``long``: of long videos; an empty list is ready.

    Raises:
        UserError: the environment can't be asked.
    """
    known = {name: target for name, target in dimensions().items() if target.scale is not None}
    modules = sorted({module for target in known.values() for module in target.imports} | {"vbench"})
    there = _find(modules) if ready() else None
    return {name: _lacks(name, target, folder, there, long) for name, target in known.items()}


def _lacks(
    name: str, target: type[Dimension], folder: Path, there: Mapping[str, bool] | None, long: bool
) -> list[Need]:
    if issubclass(target, FrameDimension):
        return []
    out = []
    if there is None:
        out.append(Need("environment", "not set up: run 'causvid vbench setup'"))
    else:
        lacking = [module for module in ("vbench", *target.imports) if not there[module]]
        out += [Need(module, f"import missing from {environment()}") for module in lacking]
    return out + missing_files(name, folder, long)


def _find(modules: list[str]) -> dict[str, bool]:
    line = [str(interpreter()), "-I", str(WORKER), "--weights", ".", "--find", *modules]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the reference judge's environment is broken; remove {environment()} and set it up again")
    return json.loads(done.stdout.splitlines()[-1])


class Judge:
    """A running reference judge; ask it one clip at a time. ``log`` gets what upstream prints."""

    def __init__(self, folder: Path, log: Path, device: str = "cpu") -> None:
        self._line = [str(interpreter()), "-I", str(WORKER), "--weights", str(folder), "--device", device]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._ends = log, 0
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        with self._log.open("ab") as stream:
            return subprocess.Popen(
                self._line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True, bufsize=1
            )

    def ask(self, dimension: str, video: Path, prompt: str = "", auxiliary: Any = None) -> float | None:
        """A raw score in [0, 1]; None where the judge has nothing to say.

        A judge that ends, as without memory, is started again for the next question.

        Raises:
            UserError: the judge fails, or ends, on this video; Unusable: it fails on any, or ended MOST_ENDS times in a
                row.
        """
        question = {"dimension": dimension, "video": str(video), "prompt": prompt, "auxiliary": auxiliary}
        if self._process.poll() is not None:
            self._process = self._start()
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise ValueError("the judge has no pipes")
        try:
            stdin.write(json.dumps(question) + "\n")
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._ends += 1
            kind = Unusable if self._ends >= MOST_ENDS else UserError
            raise kind(f"the reference judge ended ({self._process.wait()}) on {dimension}; see {self._log}")
        self._ends = 0
        answer = json.loads(line)
        if "unusable" in answer:
            raise Unusable(f"{dimension} can't be judged, nothing is loaded: {answer['unusable']}; see {self._log}")
        if "error" in answer:
            raise UserError(f"{dimension} can't be judged: {answer['error']}; see {self._log}")
        return answer["score"]

    def close(self) -> None:
        """End the process; one that is busy is not waited for."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def judge(folder: Path, log: Path, device: str = "cpu") -> Iterator[Judge]:
    """A reference judge that ends with the block."""
    running = Judge(folder, log, device)
    try:
        yield running
    finally:
        running.close()
