"""The store of stage results: runs/<stage>/<identity>/.

When is a result new? When anything that could move a number is new: the values a stage reads from the spec (with their
defaults), the identities of its inputs, the digests of outside files, or the source of the stage, of the components it
binds and of what those import, as syntax trees without comments and docstrings. ``runtime`` is outside: it says how to
run, not what.

A folder is finished when it holds ``DONE``, written last and atomically. A lock that the system releases when a process
dies keeps two processes from working in one folder; the second waits, then finds the work done.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib.util
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from causvid import registry, weights
from causvid.errors import UserError
from causvid.spec import Spec
from causvid.validate import Bound

# Plumbing that finds, checks and stores, and moves no number.
PLUMBING = frozenset(f"causvid.{name}" for name in ("registry", "spec", "schema", "validate", "runs", "progress"))


class Stage(Protocol):
    """One step of an experiment: reads part of the spec and other stages' folders, and fills a folder of its own."""

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
            record = {
                "stage": name,
                "values": values,
                "inputs": inputs,
                "files": {path.name: weights.digest(path) for path in stage.outside(spec)},
                "sources": sources(stage, values),
            }
            identity = hashlib.sha256(canonical(record).encode()).hexdigest()[:16]
            nodes[name] = Node(stage, identity, record)
        return nodes[name]

    visit(target)
    return list(nodes.values())


def bound(value: Any) -> Iterator[Bound]:
    """Every component inside a validated value."""
    if isinstance(value, Bound):
        yield value
    if isinstance(value, Mapping):
        for item in value.values():
            yield from bound(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from bound(item)


def sources(stage: Stage, values: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each source module that a stage's result depends on."""
    pending = [type(stage).__module__]
    pending += [registry.find(item.group, item["name"]).target.__module__ for item in bound(values)]
    found: dict[str, str] = {}
    while pending:
        module = pending.pop()
        if module in found or module in PLUMBING:
            continue
        digest, imports = _module_source(module)
        found[module] = digest
        pending += imports
    return dict(sorted(found.items()))


@cache
def _module_source(module: str) -> tuple[str, tuple[str, ...]]:
    """(digest of the syntax tree without comments and docstrings, modules of causvid and of its package it imports)."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError(f"the source of module {module} can't be found, so its results can't be told apart")
    package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
    tree = ast.parse(Path(spec.origin).read_bytes())
    imports: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            imports += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    roots = ("causvid.", module.partition(".")[0] + ".")
    own = sorted({name for name in imports if name.startswith(roots) and _is_module(name)})
    return hashlib.sha256(ast.dump(without_docstrings(tree)).encode()).hexdigest()[:16], tuple(own)


@cache
def _is_module(name: str) -> bool:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return False
    return found is not None and found.submodule_search_locations is None


def without_docstrings(tree: ast.Module) -> ast.Module:
    """The tree without docstrings; comments are not in it to begin with."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


class Store:
    """The folder of all results."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, node: Node) -> Path:
        return self.root / node.name / node.identity

    def done(self, node: Node) -> bool:
        return (self.folder(node) / "DONE").is_file()

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
            if self.done(node) and not again:
                skipped.append(node.name)
                continue
            with self.locked(node, say) as folder:
                if self.done(node) and not again:
                    skipped.append(node.name)
                    continue
                weights.write_json(folder / "record.json", node.record)
                inputs = {name: self.folder(by_name[name]) for name in node.record["inputs"]}
                begin = time.monotonic()
                node.stage.run(Context(spec, folder, inputs, say))
                done = {"stage": node.name, "identity": node.identity, "seconds": round(time.monotonic() - begin, 3)}
                weights.write_json(folder / "DONE", {**done, "environment": environment()})
            executed.append(node.name)
        return executed, skipped

    def explain(self, node: Node) -> str:
        """Why a node is done or would run: the difference from the nearest finished result of the same stage."""
        if self.done(node):
            return "done"
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
        "threads": torch.get_num_threads(), "commit": _commit(),
    }  # fmt: skip


@cache
def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
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
    for kind, text in (("sources", "source of {} changed"), ("files", "file {} changed"), ("inputs", "{} is new")):
        names = dict.fromkeys([*old[kind], *new[kind]])
        reasons += [text.format(name) for name in names if old[kind].get(name) != new[kind].get(name)]
    return reasons
