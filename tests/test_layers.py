"""Imports run downwards only: a module knows nothing of what is built on top of it.

Names that the registry holds as strings are not imports: it loads components on demand and knows none of them.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

PACKAGE = "causvid"
ROOT = Path(__file__).resolve().parent.parent / PACKAGE

# Bottom up. A room is a module of the package's top folder, or a folder with all that is in it. A room may import from
# lower levels and from itself, never from a room of its own level.
LEVELS = (
    ("errors",),
    ("ranks",),
    ("schedule", "randomness", "progress"),
    ("types",),
    ("registry", "weights"),
    ("tensor_files",),
    ("attention",),
    ("models",),
    ("data",),
    ("losses", "samplers", "eval"),
    ("schema",),
    ("validate",),
    ("spec",),
    ("fingerprint", "arm_labels"),
    ("runs", "checkpoint"),
    ("world",),
    ("build",),
    ("checks",),
    ("optimizers",),
    ("training", "tracking"),
    ("stages",),
    ("costs",),
    ("sampling_costs",),
    ("cost_lines",),
    ("experiment",),
    ("streaming",),
    ("generation",),
    ("wan_generation", "wan_weights", "convert", "launch", "comparison"),
    ("serve", "suite_generation"),
    ("cli_data", "cli_eval", "cli_vbench", "cli_wan", "cli_generate", "cli_serve", "cli_sweep"),
    ("cli",),
    ("__main__",),
)

# Downward, and still not allowed: denoisers, codecs, encoders and data are handed to these, so that a loss or a sampler
# works with any of them. A metric of the tiny world may read its palette and physics.
KEPT_APART = {
    "losses": {"models", "data"},
    "samplers": {"models", "data"},
    "eval": {"models"},
}

Graph = dict[str, set[str]]


def sources(root: Path) -> dict[str, tuple[str, bool]]:
    """Every module below ``root`` by dotted name: its source, and whether it is a package's ``__init__``."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if package else parts)] = (path.read_text(), package)
    return found


def imports(modules: Mapping[str, tuple[str, bool]]) -> Graph:
    """For each module, the modules of the same package that it imports, wherever the import stands.

    Raises:
        ValueError: an import of a module that does not exist, or a relative one that leaves the package.
    """
    return {name: _imports_of(name, source, package, modules) for name, (source, package) in modules.items()}


def _imports_of(name: str, source: str, package: bool, modules: Mapping[str, tuple[str, bool]]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base(name, package, node)
            # 'from causvid import spec' names a module, 'from causvid.spec import load' something inside one.
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names]
        else:
            continue
        inside = {target for target in targets if target.split(".")[0] == PACKAGE}
        unknown = inside - set(modules)
        if unknown:
            raise ValueError(f"{name}, line {node.lineno}: no module {', '.join(sorted(unknown))}")
        found |= inside
    return found


def _base(name: str, package: bool, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    # One dot is the module's own folder: the module itself where it is a package.
    parts = name.split(".") if package else name.split(".")[:-1]
    up = node.level - 1
    if up >= len(parts):
        raise ValueError(f"{name}, line {node.lineno}: the relative import leaves the package")
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


def room(module: str) -> str:
    """The top-level module or folder that a dotted name lies in; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def violations(graph: Graph) -> list[str]:
    """Every broken rule as one line: modules without a level, imports upwards, sideways or kept apart."""
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    lines = [f"{module} has no level: add '{room(module)}' to LEVELS" for module in graph if _unplaced(module, level)]
    for module, targets in graph.items():
        here = room(module)
        for target in sorted(targets):
            there = room(target)
            if not here:
                lines.append(f"{module} imports {target}: the package itself imports nothing of its own")
            elif here == there or not there or _unplaced(module, level) or _unplaced(target, level):
                continue
            elif level[there] > level[here]:
                lines.append(f"{module} imports {target}, which lies above it")
            elif level[there] == level[here]:
                lines.append(f"{module} imports {target}, a room of its own level")
            elif there in KEPT_APART.get(here, ()):
                lines.append(f"{module} imports {target}, which is handed to it instead")
    return lines


def _unplaced(module: str, level: Mapping[str, int]) -> bool:
    return bool(room(module)) and room(module) not in level


def circle(graph: Graph) -> list[str]:
    """Modules of one circle of imports, the first repeated at the end; empty when there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for target in sorted(graph[module]):
                found = visit(target, [*path, module])
                if found:
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return imports(sources(ROOT))


def test_imports_run_downwards(graph: Graph) -> None:
    assert violations(graph) == []


def test_no_circles(graph: Graph) -> None:
    assert circle(graph) == []


def test_every_level_exists(graph: Graph) -> None:
    assert {name for names in LEVELS for name in names} == {room(module) for module in graph} - {""}


def test_the_graph_is_not_empty(graph: Graph) -> None:
    """Known imports of each kind are seen: of a module, from a module, and inside a function."""
    assert "causvid.schedule" in graph["causvid.types"]
    assert "causvid.attention.masks" in graph["causvid.attention.cache"]
    assert "causvid.experiment" in graph["causvid.cli"]


def small(**modules: str) -> dict[str, tuple[str, bool]]:
    """A package of a few modules; ``losses__dmd`` stands for ``causvid.losses.dmd``, with its folder."""
    found: dict[str, tuple[str, bool]] = {"causvid": ("", True)}
    for name, source in modules.items():
        dotted = "causvid." + name.replace("__", ".")
        if "__" in name:
            found.setdefault(dotted.rpartition(".")[0], ("", True))
        found[dotted] = (source, False)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import causvid.models.dit",
        "import causvid.models.dit as dit",
        "from causvid.models import dit",
        "from causvid.models.dit import VideoDiT",
        "from causvid.models.dit import *",
        "from ..models import dit",
        "from ..models.dit import VideoDiT",
        "def build():\n    from causvid.models import dit",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from causvid.models.dit import VideoDiT",
        "class A:\n    def b(self):\n        import causvid.models.dit",
        "try:\n    import causvid.models.dit\nexcept ImportError:\n    pass",
    ],
)
def test_every_form_of_import_is_seen(line: str) -> None:
    found = imports(small(losses__dmd=line, models__dit=""))
    assert found["causvid.losses.dmd"] == {"causvid.models.dit"}
    assert violations(found) == ["causvid.losses.dmd imports causvid.models.dit, which is handed to it instead"]


def test_a_name_from_the_package_is_a_module() -> None:
    modules = small(types="from causvid import schedule", schedule="from . import types")
    assert imports(modules)["causvid.types"] == {"causvid.schedule"}
    assert violations(imports(modules)) == ["causvid.schedule imports causvid.types, which lies above it"]


def test_dots_in_a_folder_count_from_the_folder() -> None:
    modules = small(losses__dmd="", losses__flow="", cli="")
    modules["causvid.losses"] = ("from . import dmd\nfrom .flow import x\nfrom .. import cli", True)
    found = imports(modules)
    assert found["causvid.losses"] == {"causvid.losses.dmd", "causvid.losses.flow", "causvid.cli"}
    assert violations(found) == ["causvid.losses imports causvid.cli, which lies above it"]


def test_sideways_within_a_room_and_not_across() -> None:
    within = imports(small(losses__dmd="from causvid.losses import flow", losses__flow=""))
    assert violations(within) == []
    across = imports(small(losses__dmd="from causvid.samplers.ode import Euler", samplers__ode=""))
    assert violations(across) == ["causvid.losses.dmd imports causvid.samplers.ode, a room of its own level"]


def test_only_metrics_know_the_data() -> None:
    line = "from causvid.data import shapes"
    assert violations(imports(small(eval__truth=line, data__shapes=""))) == []
    assert len(violations(imports(small(samplers__ode=line, data__shapes="")))) == 1


def test_a_module_without_a_level_is_told() -> None:
    found = imports(small(helpers="from causvid import spec", spec=""))
    assert violations(found) == ["causvid.helpers has no level: add 'helpers' to LEVELS"]


def test_the_package_itself_imports_nothing() -> None:
    modules = small(errors="")
    modules["causvid"] = ("from causvid.errors import UserError", True)
    assert len(violations(imports(modules))) == 1


def test_a_circle_is_told_even_within_a_room() -> None:
    modules = small(
        losses__a="from causvid.losses import b",
        losses__b="def f():\n    from . import c",
        losses__c="from .a import x",
    )
    found = imports(modules)
    assert violations(found) == []
    assert circle(found) == ["causvid.losses.a", "causvid.losses.b", "causvid.losses.c", "causvid.losses.a"]


def test_imports_of_others_are_ignored() -> None:
    assert (
        imports(small(types="import torch\nfrom torch import Tensor\nimport causvidlike.x"))["causvid.types"] == set()
    )


@pytest.mark.parametrize("line", ["import causvid.nothing", "from causvid.nothing import x", "from ... import x"])
def test_an_import_that_leads_nowhere_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match=r"causvid\.types, line 1"):
        imports(small(types=line))
