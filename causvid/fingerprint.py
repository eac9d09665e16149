"""Which source a result depends on: modules by the digest of their syntax trees, without comments and docstrings.

And what a single component is, by its options, its source and its files.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from causvid import registry, weights
from causvid.errors import UserError
from causvid.validate import Bound

# Plumbing that finds, checks and stores, and moves no number.
PLUMBING = frozenset(
    f"causvid.{name}" for name in ("registry", "spec", "schema", "validate", "fingerprint", "runs", "progress")
)


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


def identity(component: Bound, read: Iterable[Path] = ()) -> dict[str, Any]:
    """What a component is: name and options, digests of its source and of the files that it reads.

    What is in the files counts, and not where they lie: other weights at the same place are another component.

    Args:
        read: its files, beside those that its options name, and those in folders that they name.
    """
    source = inspect.getsource(registry.find(component.group, component["name"]).target)
    named = [Path(value) for key, value in component.items() if key != "name" and isinstance(value, str) and value]
    inside = [sorted(each for each in path.rglob("*") if each.is_file()) for path in named if path.is_dir()]
    files = [*read, *(path for path in named if path.is_file()), *(path for folder in inside for path in folder)]
    code = hashlib.sha256(source.encode()).hexdigest()[:16]
    return {**component, "source": code, "files": [weights.digest(path) for path in files]}


def sources(module: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Digest of each source module that the result of a stage, written in ``module``, depends on."""
    pending = [module]
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
    # Importing a module runs the packages that it lies in.
    parts = module.split(".")
    imports = _parents(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            imports += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    imports = [name for found in imports for name in (found, *_parents(found))]
    folder = Path(spec.origin).resolve().parents[len(parts) - (spec.submodule_search_locations is None)]
    own = sorted({name for name in imports if _is_own(name, parts[0], folder)})
    return hashlib.sha256(ast.dump(without_docstrings(tree)).encode()).hexdigest()[:16], tuple(own)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


@cache
def _is_own(name: str, root: str, folder: Path) -> bool:
    """Whether a module is of causvid, of the package ``root``, or lies beside it in ``folder`` and is not installed."""
    top = name.partition(".")[0]
    try:
        if top not in ("causvid", root):
            beside = importlib.util.find_spec(top)
            origin = beside.origin if beside else None
            path = Path(origin or "").resolve()
            if not path.is_file() or folder not in path.parents or {"site-packages", "dist-packages"} & {*path.parts}:
                return False
        found = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        return False
    return found is not None and found.origin is not None and found.origin.endswith(".py")


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
