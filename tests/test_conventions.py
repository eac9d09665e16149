"""House rules that a reader of one file can't see broken elsewhere: each is a check of its own, shown to bite below."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest

from causvid import registry

ROOT = Path(__file__).resolve().parent.parent / "causvid"
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 350
SELF_EVIDENT = 3  # lines of body up to which a function's name may be all its documentation

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Check = Callable[[str], list[int]]


def long_file(source: str) -> list[int]:
    """The last line, of a file that is too long to read in one sitting."""
    count = len(source.splitlines())
    return [count] if count > MAX_LINES else []


def cuda_literal(source: str) -> list[int]:
    """Devices named in the code, rather than passed in."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        if text and re.search(r"\bcuda\b", str(node.value)):
            found.append(node.lineno)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            found.append(node.lineno)
    return found


def unsafe_load(source: str) -> list[int]:
    """``torch.load`` that may run code from the file. ``torch.load`` goes by its full name, so that this finds it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            found.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only"]
            if not (safe and isinstance(safe[0].value, ast.Constant) and safe[0].value.value is True):
                found.append(node.lineno)
    return found


SLOW_IMPORTS = ("torchtune", "diffusers", "transformers")


def eager_torchtune(source: str) -> list[int]:
    """torchtune and the like imported when a module is: that takes seconds, and a core install does without them."""
    tree = ast.parse(source)
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, FUNCTIONS) for node in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if id(node) not in inside and any(name.split(".")[0] in SLOW_IMPORTS for name in names):
            found.append(node.lineno)
    return found


def bare_except(source: str) -> list[int]:
    """``except:`` swallows interruptions too."""
    return [n.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ExceptHandler) and n.type is None]


def assertion(source: str) -> list[int]:
    """Assertions vanish under ``python -O`` and tell a user nothing."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def unfinished(source: str) -> list[int]:
    """Notes of work left over, and NotImplementedError outside an abstract method."""
    tree = ast.parse(source)
    abstract = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, FUNCTIONS)
        and any(ast.unparse(d).split(".")[-1] == "abstractmethod" for d in function.decorator_list)
        for node in ast.walk(function)
    }
    found = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "NotImplementedError" and id(node) not in abstract
    ]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        note = token.type in (tokenize.COMMENT, tokenize.STRING)
        if note and re.search(r"\b(TODO|FIXME|XXX)\b", token.string):
            found.append(token.start[0])
    return found


def undocumented(source: str) -> list[int]:
    """Modules, public classes and public functions without a docstring, but for those of very few lines."""
    tree = ast.parse(source)
    found = [1] if tree.body and ast.get_docstring(tree) is None else []
    for node in tree.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_") or ast.get_docstring(node):
            continue
        lines = (node.end_lineno or node.lineno) - node.body[0].lineno + 1
        if lines > SELF_EVIDENT or any(ast.unparse(d).startswith("register(") for d in node.decorator_list):
            found.append(node.lineno)
    return found


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        long_file,
        cuda_literal,
        unsafe_load,
        eager_torchtune,
        bare_except,
        assertion,
        unfinished,
        undocumented,
    )
}


@pytest.mark.parametrize("name", CHECKS)
def test_the_package_keeps_the_rule(name: str) -> None:
    places = [
        f"{path.relative_to(ROOT.parent)}:{line}" for path in FILES for line in CHECKS[name](path.read_text("utf-8"))
    ]
    assert places == []


DOC = '"""A module."""\n'
BROKEN = {
    "long_file": ["x = 1\n" * (MAX_LINES + 1)],
    "cuda_literal": ['x.to("cuda")', 'd = "cuda:0"', "def f(x):\n    return x.cuda()", 'd = f"cuda:{i}"'],
    "unsafe_load": [
        "import torch\ntorch.load(p)",
        "torch.load(p, weights_only=False)",
        "torch.load(p, weights_only=w)",
        "from torch import load",
    ],
    "eager_torchtune": [
        "import torchtune",
        "from torchtune.training import x",
        "try:\n    import torchtune.x\nexcept ImportError:\n    pass",
        "class A:\n    import torchtune",
        "from diffusers import AutoencoderKLWan",
        "import transformers",
    ],
    "bare_except": ["try:\n    pass\nexcept:\n    pass"],
    "assertion": ["assert x", "def f():\n    assert x, 'message'"],
    "unfinished": [
        "x = 1  # TODO later",
        '"""FIXME"""',
        "def f():\n    raise NotImplementedError",
        "class A:\n    def f(self):\n        raise NotImplementedError('f')",
    ],
    "undocumented": [
        "x = 1",
        DOC + "class A:\n    a = 1\n    b = 1\n    c = 1\n    d = 1",
        DOC + "def f():\n    a = 1\n    b = 2\n    c = 3\n    return a + b + c",
        DOC + '@register("loss", "f")\ndef f():\n    return 1',
    ],
}
KEPT = {
    "long_file": ["x = 1\n" * MAX_LINES],
    "cuda_literal": ['"""Never says cuda in the code."""', "x.to(device)", "torch.cuda.synchronize(device)"],
    "unsafe_load": ["torch.load(p, weights_only=True)", "json.load(p)"],
    "eager_torchtune": ["def f():\n    import torchtune", "import torch", "from torch import tuner"],
    "bare_except": ["try:\n    pass\nexcept OSError:\n    pass"],
    "assertion": ["x = 'assert'"],
    "unfinished": [
        "class A:\n    @abstractmethod\n    def f(self):\n        raise NotImplementedError",
        "class A:\n    @abc.abstractmethod\n    def f(self):\n        raise NotImplementedError('f')",
        "todo = 1  # the methodology",
    ],
    "undocumented": [
        "",
        DOC + "def f():\n    return 1",
        DOC + "def _f():\n    a = 1\n    b = 2\n    c = 3\n    return a",
        DOC + 'class A:\n    """An A."""',
    ],
}


def examples(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(name, source) for name in CHECKS for source in table[name]]


@pytest.mark.parametrize(("name", "source"), examples(BROKEN))
def test_the_check_finds_a_breach(name: str, source: str) -> None:
    assert CHECKS[name](source)


@pytest.mark.parametrize(("name", "source"), examples(KEPT))
def test_the_check_accepts_what_is_right(name: str, source: str) -> None:
    assert CHECKS[name](source) == []


@pytest.mark.parametrize("group", sorted(registry.GROUPS))
def test_every_component_says_what_it_is(group: str) -> None:
    """``causvid list`` shows the first line of each docstring: one sentence of its own, not a dataclass's signature."""
    for component in registry.components(group).values():
        assert component.target.__doc__, f"{group}.{component.name} has no docstring"
        assert component.summary.endswith((".", ":")), f"{group}.{component.name}: '{component.summary}'"
        assert not component.summary.startswith(component.target.__name__ + "("), f"{group}.{component.name}"
