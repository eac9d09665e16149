"""Experiment specs: load, inherit, override, complete.

A spec is a tree, and ``schema.py`` says which. Everything is checked before anything runs, all errors are told at once,
and unknown keys are errors everywhere. The result, a ``Spec``, is complete: every default is written out, so what is
hashed is what is run.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from causvid.errors import UserError
from causvid.registry import did_you_mean
from causvid.schema import Schema
from causvid.validate import section


def experiments_folder() -> Path:
    """Where the shipped specs are: in a checkout, or inside an installed package.

    Raises:
        UserError: neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "experiments", package / "_experiments"):
        if (folder / "tiny").is_dir():
            return folder
    raise UserError("the shipped experiments are missing from this installation; reinstall causvid")


def find(name: str, beside: Path = Path()) -> Path:
    """The file of a spec, given by path (from the folder ``beside``, or from here) or by its name under experiments/.

    Raises:
        UserError: no such spec; near names are suggested.
    """
    root = experiments_folder()
    for candidate in (beside / name, Path(name), root / name, root / f"{name}.yaml"):
        try:
            if candidate.is_file():
                return candidate
        except OSError as error:
            raise UserError(f"no spec '{name}': {error.strerror}") from error
    known = sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
    raise UserError(f"no spec '{name}'{did_you_mean(name, known)}; shipped specs: {', '.join(known)}; or give a path")


def read(path: Path) -> dict[str, Any]:
    """One YAML file as plain data, without its base.

    Raises:
        UserError: not YAML, or not a mapping.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        data = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, RecursionError, AssertionError) as error:
        raise UserError(f"{path}: can't be read as YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a spec is a mapping of keys to values, got {type(data).__name__}")
    return typing.cast(dict[str, Any], data)


def inherited(path: Path, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(the spec with its bases merged in, its immediate base merged likewise or None)."""
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: its chain of bases comes back to itself")
    own = read(path)
    base_name = own.pop("base", None)
    if base_name is None:
        return own, None
    base, _ = inherited(find(str(base_name), path.parent), (*seen, path))
    base.pop("sweep", None)
    return merge(named(base), own), base


def merge(base: Any, own: Any) -> Any:
    """``own`` over ``base``. A component whose name changes is replaced whole: its old options must not leak."""
    if isinstance(own, str) and isinstance(base, Mapping) and "name" in base:
        return dict(base) if base["name"] == own else {"name": own}
    if isinstance(base, str) and isinstance(own, Mapping):
        base = {"name": base}
    if not (isinstance(base, Mapping) and isinstance(own, Mapping)):
        return own
    if "name" in own and own["name"] != base.get("name", own["name"]):
        return dict(own)
    merged = dict(base)
    for key, value in own.items():
        merged[key] = merge(merged[key], value) if key in merged else value
    return merged


def named(data: Mapping[str, Any], schema: type = Schema) -> dict[str, Any]:
    """The data with the default's name written into every component that holds options alone.

    Else its options would leak into a component of another name that is merged over it.
    """
    out = dict(data)
    hints = typing.get_type_hints(schema)
    for f in fields(schema):
        value = out.get(f.name)
        if isinstance(value, Mapping) and is_dataclass(hints[f.name]):
            out[f.name] = named(value, typing.cast(type, hints[f.name]))
        elif (
            isinstance(value, Mapping) and "name" not in value and "group" in f.metadata and isinstance(f.default, str)
        ):
            out[f.name] = {"name": f.default, **value}
    return out


def with_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply ``dotted.key=value`` overrides; values are read as YAML.

    Raises:
        UserError: an override without ``=``.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override '{override}' is not of the form key=value, as in student.steps=2")
        try:
            # As in files: YAML alone takes 1e-3 for text.
            plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)
            value = typing.cast(dict[str, Any], plain)["value"]
        except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"override '{override}': the value is not YAML: {error}") from error
        data = merge(named(data), nest(key, value))
    return data


def nest(dotted: str, value: Any) -> dict[str, Any]:
    """``nest("a.b", 1)`` is ``{"a": {"b": 1}}``."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


@dataclass(frozen=True)
class Spec:
    """A complete, validated experiment: plain data with every default written out."""

    name: str
    data: dict[str, Any]
    base: dict[str, Any] | None = None

    def __getitem__(self, path: str) -> Any:
        """Value at a dotted path."""
        value: Any = self.data
        for part in path.split("."):
            value = value[part]
        return value

    def differences(self) -> list[tuple[str, Any, Any]]:
        """(path, base's value, own value) of everything that differs from the base; empty without a base."""
        if self.base is None:
            return []
        left, right = flat(self.base), flat(self.data)
        ignored = ("about", "sweep", "runtime")
        keys = [key for key in dict.fromkeys([*left, *right]) if key.split(".")[0] not in ignored]
        return [(key, left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)]


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a tree by dotted path."""
    if not isinstance(data, Mapping) or not data:
        return {prefix: data}
    out: dict[str, Any] = {}
    for key, value in data.items():
        out.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return out


def load(name: str, overrides: Sequence[str] = ()) -> Spec:
    """Load a spec by name or path, with overrides, validated and completed.

    Raises:
        UserError: anything wrong, all of it in one message.
    """
    path = find(name)
    data, base = inherited(path)
    if overrides:
        base = base if base is not None else dict(data)
        data = with_overrides(data, overrides)
    return complete(data, spec_name(path), base)


def spec_name(path: Path) -> str:
    """The name under experiments/, or the path as it was given."""
    try:
        return str(path.resolve().relative_to(experiments_folder().resolve()).with_suffix(""))
    except (ValueError, UserError):
        return str(path)


def complete(data: dict[str, Any], name: str, base: dict[str, Any] | None = None) -> Spec:
    """Validate plain data and write out every default.

    Raises:
        UserError: all errors at once, each with its path.
    """
    errors: list[str] = []
    whole = section(Schema, data, "", errors)
    if errors:
        raise UserError(f"{name}: " + ("\n  ".join(["", *errors]) if len(errors) > 1 else errors[0]))
    base_whole = section(Schema, base, "", []) if base is not None else None
    return Spec(name, whole, base_whole)
