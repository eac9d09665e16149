"""The store of stage results: runs/<stage>/<identity>/.

When is a result new? When anything that could move a number is new: the values a stage reads from the spec (with their
defaults), the identities of its inputs, the digests of outside files, or the source of the stage, of the components it
binds and of what those import, as syntax trees without comments and docstrings. ``runtime`` is outside: it says how to
run, not what.

A folder is finished when it holds ``DONE``, written last and atomically. A lock that the system releases when a process
dies keeps two processes from working in one folder; the second waits, then finds the work done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from causvid import ranks, weights
from causvid.errors import UserError
from causvid.fingerprint import sources
from causvid.spec import Spec

# Modules that come with an extra of the installation.
EXTRAS = {"torchtune": "train", "torchao": "train", "wandb": "wandb"}


class Stage(Protocol):
    """One step of an experiment: reads part of the spec and other stages' folders, and fills a folder of its own.

    A stage whose result shows the spec's name or its base has a ``title(spec)`` beside, which counts as a value; one
    that depends on more than values and files, as on which judges are there, has ``facts(spec)``. One that several
    processes work on together says so by ``shared(spec)``; others are done by the first process alone.
    """

    name: str

    def reads(self, spec: Spec) -> tuple[str, ...]:
        """Dotted spec paths whose values the result depends on."""
        ...

    def inputs(self, spec: Spec) -> tuple[str, ...]:
        """Names of the stages whose folders it reads."""
        ...

    def outside(self, spec: Spec) -> tuple[Path, ...]:
        """Files from outside the store that it reads."""
        ...

    def run(self, context: Context) -> None:
        """Do the work, or continue it, in ``context.folder``."""
        ...


@dataclass(frozen=True)
class Context:
    """What a stage works with."""

    spec: Spec
    folder: Path
    inputs: Mapping[str, Path]
    say: Callable[[str], None]

    @property
    def checkpoint(self) -> Path:
        """From where the stage goes on; removed when it is done, not before."""
        return self.folder / "checkpoint.safetensors"


@dataclass(frozen=True)
class Node:
    """A stage of one experiment, with its identity."""

    stage: Stage
    identity: str
    record: dict[str, Any]

    @property
    def name(self) -> str:
        return self.stage.name


def canonical(value: Any) -> str:
    """JSON with sorted keys: equal values, equal text."""
    return json.dumps(value, sort_keys=True, default=str)


def graph(spec: Spec, stages: Mapping[str, Stage], target: str) -> list[Node]:
    """The stages that ``target`` needs, inputs first, each with its identity."""
    nodes: dict[str, Node] = {}

    def visit(name: str) -> Node:
        if name not in nodes:
            stage = stages[name]
            inputs = {other: visit(other).identity for other in stage.inputs(spec)}
            values = {path: spec[path] for path in stage.reads(spec)}
            record: dict[str, Any] = {
                "stage": name,
                "values": values,
                "inputs": inputs,
                "files": {path.name: weights.digest(path) for path in stage.outside(spec)},
                "sources": sources(type(stage).__module__, values),
            }
            for fact in ("title", "facts"):
                if hasattr(stage, fact):
                    record[fact] = getattr(stage, fact)(spec)
            identity = hashlib.sha256(canonical(record).encode()).hexdigest()[:16]
            nodes[name] = Node(stage, identity, record)
        return nodes[name]

    visit(target)
    return list(nodes.values())


def finished(folder: Path) -> bool:
    """Whether a stage's folder is finished, and all that the stage made is still there."""
    return (folder / "DONE").is_file() and not gone(folder)


def gone(folder: Path) -> list[str]:
    """Names of the files that a finished stage made and that somebody deleted."""
    try:
        made = json.loads((folder / "DONE").read_text()).get("files", [])
    except (OSError, ValueError):
        made = []
    return [name for name in made if not (folder / name).exists()]


class Store:
    """The folder of all results."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, node: Node) -> Path:
        return self.root / node.name / node.identity

    def done(self, node: Node) -> bool:
        return finished(self.folder(node))

    @contextmanager
    def locked(self, node: Node, say: Callable[[str], None]) -> Iterator[Path]:
        """Hold a node's folder alone; waits while another process holds it."""
        folder = self.folder(node)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{node.name}: another process is at work in {folder}; waiting for it")
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield folder

    def execute(
        self,
        nodes: Sequence[Node],
        spec: Spec,
        say: Callable[[str], None],
        others: Sequence[Node] = (),
        again: bool = False,
    ) -> tuple[list[str], list[str]]:
        """Run what is not done, in order.

        Args:
            others: nodes that are not run, but may be inputs.
            again: run what is done, too.

        Returns:
            (stages executed, stages skipped).
        """
        executed: list[str] = []
        skipped: list[str] = []
        by_name = {node.name: node for node in [*others, *nodes]}
        for node in nodes:
            if ranks.agreed(partial(self.done, node)) and not again:
                skipped.append(node.name)
                continue
            with self.locked(node, say) if ranks.first() else nullcontext(self.folder(node)) as folder:
                if ranks.agreed(partial(self.done, node)) and not again:
                    skipped.append(node.name)
                    continue
                if ranks.first():
                    if gone(folder):
                        (folder / "DONE").unlink()
                    weights.write_json(folder / "record.json", node.record)
                inputs = {name: self.folder(by_name[name]) for name in node.record["inputs"]}
                begin = time.monotonic()
                context = Context(spec, folder, inputs, say)
                say(f"{node.name}: {'goes on' if context.checkpoint.is_file() else 'begins'} in {folder}")
                if ranks.first() or (hasattr(node.stage, "shared") and node.stage.shared(spec)):  # type: ignore[attr-defined]
                    _run(node, context)
                ranks.wait()
                done = {"stage": node.name, "identity": node.identity, "seconds": round(time.monotonic() - begin, 3)}
                if ranks.first():
                    aside = {"lock", "record.json", "DONE", context.checkpoint.name}
                    files = sorted(each.name for each in folder.iterdir() if each.is_file() and each.name not in aside)
                    weights.write_json(folder / "DONE", {**done, "files": files, "environment": environment()})
                    context.checkpoint.unlink(missing_ok=True)
                say(f"{node.name}: done in {done['seconds']:.1f} s")
            executed.append(node.name)
        return executed, skipped

    def explain(self, node: Node) -> str:
        """Why a node is done or would run: the difference from the nearest finished result of the same stage."""
        if self.done(node):
            return "done"
        if missing := gone(self.folder(node)):
            return f"would run: of what it made, {', '.join(map(repr, missing))} is gone"
        if (self.folder(node) / "record.json").is_file():
            return "started, not finished: would continue"
        nearest: list[str] | None = None
        for path in sorted((self.root / node.name).glob("*/DONE")):
            try:
                other = json.loads((path.parent / "record.json").read_text())
                reasons = _differences(other, json.loads(canonical(node.record)))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue  # a damaged record of another result
            if nearest is None or len(reasons) < len(nearest):
                nearest = reasons
        return "never run" if nearest is None else "would run: " + "; ".join(nearest)


def _run(node: Node, context: Context) -> None:
    """Run a stage; what it refuses is one message, and the traceback is kept beside its work.

    Raises:
        UserError: the stage could not do its work, or lacks an extra of the installation.
    """
    kept = context.folder / "error.txt"
    try:
        node.stage.run(context)
    except UserError:
        raise
    except ImportError as error:
        module = next((name for name in EXTRAS if name in f"{error.name} {error}"), None)
        if module is None:
            raise
        raise UserError(
            f"{node.name} needs {module}, which is not installed: pip install 'causvid[{EXTRAS[module]}]'"
        ) from error
    except (ValueError, RuntimeError) as error:
        weights.write_bytes(kept, traceback.format_exc().encode())
        raise UserError(f"{node.name} could not go on: {error} (traceback: {kept})") from error
    kept.unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """What results may depend on beside the spec and the source: recorded, not hashed."""
    import torch

    packages = {}
    for name in ("causvid", "torch", "torchtune", "numpy", "einops", "av", "jinja2"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "packages": packages, "python": platform.python_version(), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "processes": ranks.count(), "commit": _commit(),
    }  # fmt: skip


@cache
def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    # An installed package may lie in a repository of its user's, whose commit says nothing of ours.
    if not (root / "pyproject.toml").is_file() or 'name = "causvid"' not in (root / "pyproject.toml").read_text():
        return None
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    from causvid.spec import flat

    before, after = flat(old["values"]), flat(new["values"])
    reasons = [
        f"{path}: {json.dumps(before.get(path))} -> {json.dumps(after.get(path))}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]
    if old.get("title") != new.get("title"):
        reasons.append("the spec's name or its differences from its base changed")
    if old.get("facts") != new.get("facts"):
        reasons.append("what is sampled or who can judge changed")
    for kind, what in (("sources", "source of "), ("files", "file ")):
        then, now = old[kind], new[kind]
        reasons += [f"{what}{name} changed" for name in then if name in now and then[name] != now[name]]
        reasons += [f"{what}{name} is read now" for name in now if name not in then]
        reasons += [f"{what}{name} is no longer read" for name in then if name not in now]
    names = dict.fromkeys([*old["inputs"], *new["inputs"]])
    return reasons + [f"{name} is new" for name in names if old["inputs"].get(name) != new["inputs"].get(name)]
