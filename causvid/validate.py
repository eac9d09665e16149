"""Checks plain data against the schema and component signatures, and writes out every default.

All errors are collected, each with its path, what is accepted and the nearest known name; nothing is ever dropped.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal

from causvid import registry
from causvid.errors import UserError
from causvid.registry import did_you_mean
from causvid.schema import OPTIONS

# Arguments that the builder supplies; a spec may not set them.
SUPPLIED: dict[str, tuple[str, ...]] = {
    "model": ("channels", "text_dim", "mask", "position", "kernel", "precision"),
    "codec": ("weights", "device", "dtype"),
    "text_encoder": ("vocabulary", "weights", "store", "device", "dtype"),
    "dataset": ("codec", "text_encoder"),
    "discriminator": ("dim", "layers"),
    "optimizer": ("model",),
    "logger": ("folder", "start"),
    "monitor": ("context", "total"),
    "student_input": ("context_t",),
}
SAMPLER_SUPPLIED = ("times",)
# Annotations that mean "a component of this group" in a component's own signature.
NESTED = {"Loss": "loss", "StudentInput": "student_input", "Rule": "mask", "Position": "position", "Kernel": "kernel"}


class Bound(dict):
    """A validated component: its name and every option, and the group it belongs to."""

    def __init__(self, group: str, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.group = group


def section(schema: type, data: Any, path: str, errors: list[str]) -> dict[str, Any]:
    """Validate a mapping against a dataclass."""
    if not isinstance(data, Mapping):
        errors.append(f"{path or 'spec'}: expected a mapping of keys to values, got {data!r}")
        return {}
    known = {f.name: f for f in fields(schema)}
    hints = typing.get_type_hints(schema)
    for key in data:
        if key not in known:
            errors.append(_unknown(path, str(key), known))
    out: dict[str, Any] = {}
    for key, f in known.items():
        where = f"{path}.{key}" if path else key
        if key in data:
            value = data[key]
        elif f.default is not MISSING:
            value = f.default
        elif f.default_factory is not MISSING:
            value = f.default_factory()
        else:
            errors.append(f"{where}: required, and missing")
            continue
        if f.default_factory is not MISSING and isinstance(value, Mapping):
            value = {**_plain(f.default_factory()), **value}  # what is left open is as if the section were
        value = _plain(value)
        group = f.metadata.get("group")
        if group and isinstance(value, Mapping) and "name" not in value and isinstance(f.default, str):
            value = {"name": f.default, **value}  # options alone are options of the default component
        if is_dataclass(hints[key]):
            out[key] = section(typing.cast(type, hints[key]), value, where, errors)
        elif group and typing.get_origin(hints[key]) is not None:
            out[key] = _components(group, value, where, errors)
        elif group and value is None and f.default is None:
            out[key] = None
        elif group:
            out[key] = _component(group, value, where, errors)
        else:
            out[key] = _bounded(hints[key], value, f.metadata, where, errors)
    return out


def _plain(value: Any) -> Any:
    """A section's dataclass as a mapping; anything else as it is."""
    return {f.name: getattr(value, f.name) for f in fields(value)} if is_dataclass(value) else value


def _bounded(hint: Any, value: Any, bounds: Mapping[str, Any], path: str, errors: list[str]) -> Any:
    """Validate a value against a type, and the numbers in it against bounds, where there are any."""
    mistakes: list[str] = []
    value = _value(hint, value, path, mistakes)
    if bounds and not mistakes:
        if isinstance(value, list) and bounds["count"] not in (None, len(value)):
            mistakes.append(f"{path}: expected {bounds['count']} numbers, got {len(value)}")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, (int, float)) and not bounds["least"] <= item <= bounds["most"]:
                most = "" if bounds["most"] == float("inf") else f" and at most {bounds['most']:g}"
                mistakes.append(f"{path}: must be at least {bounds['least']:g}{most}, got {item}")
    errors += mistakes
    return value


def _unknown(path: str, key: str, known: Iterable[str]) -> str:
    where = f"{path}: " if path else ""
    known = list(known)
    return f"{where}unknown key '{key}'{did_you_mean(key, known)}; accepted: {', '.join(known)}"


def _components(group: str, value: Any, path: str, errors: list[str]) -> list[Any]:
    """Validate a list; where it may hold components of two groups, ``a|b``, one alone may stand without brackets."""
    if "|" in group and isinstance(value, (str, Mapping)):
        value = [value]
    if isinstance(value, str) or not isinstance(value, Sequence):
        errors.append(f"{path}: expected a list of {group.replace('|', ' or ')} components, got {value!r}")
        return []
    return [_component(_group_of(group, item), item, f"{path}[{i}]", errors) for i, item in enumerate(value)]


def _group_of(groups: str, value: Any) -> str:
    """Of several groups, ``a|b``, the one that has the component's name; the first where none has.

    A component of the user's own, ``module:Thing``, is of the last.
    """
    name, names = value.get("name") if isinstance(value, Mapping) else value, groups.split("|")
    if len(names) == 1:
        return groups
    if isinstance(name, str) and ":" in name:
        return names[-1]
    return next((group for group in names if isinstance(name, str) and name in registry.components(group)), names[0])


def _component(group: str, value: Any, path: str, errors: list[str]) -> dict[str, Any]:
    """Validate ``name`` or ``{name: ..., options}`` against the component's signature."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        errors.append(f"{path}: expected a name of group '{group}', or a mapping with a 'name', got {value!r}")
        return {}
    try:
        found = registry.find(group, value["name"])
    except registry.UnknownName as error:
        errors.append(f"{path}: {error}")
        return {}
    return Bound(group, {"name": value["name"], **_options(group, found, value, path, errors)})


def options_of(group: str, found: registry.Component) -> dict[str, inspect.Parameter]:
    """The options of a component that a spec may set."""
    supplied = (*SUPPLIED.get(group, ()), *(SAMPLER_SUPPLIED if group == "sampler" else ()))
    parameters = found.signature.parameters
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: p for name, p in parameters.items() if name not in supplied and p.kind not in variable}


def component(group: str, value: Any, path: str) -> Bound:
    """One component by name or mapping, outside a spec.

    Raises:
        UserError: everything that is wrong with it.
    """
    errors: list[str] = []
    out = _component(group, value, path, errors)
    if errors or not isinstance(out, Bound):
        raise UserError("; ".join(errors))
    return out


def _options(
    group: str, found: registry.Component, value: Mapping[str, Any], path: str, errors: list[str]
) -> dict[str, Any]:
    accepted = options_of(group, found)
    try:
        hints = typing.get_type_hints(found.target.__init__ if inspect.isclass(found.target) else found.target)
    except (NameError, TypeError, AttributeError) as error:
        errors.append(f"{path}: the types of {group} '{found.name}' can't be read: {error}")
        return {}
    limits = {} if ":" in found.name else OPTIONS
    out: dict[str, Any] = {}
    for key in value:
        if key != "name" and key not in accepted:
            suggestion = did_you_mean(str(key), accepted)
            listed = ", ".join(accepted) or "none"
            errors.append(f"{path}.{found.name}: unknown option '{key}'{suggestion}; accepted: {listed}")
    for key, parameter in accepted.items():
        where = f"{path}.{key}"
        if key in value:
            given = value[key]
        elif parameter.default is not parameter.empty:
            given = parameter.default
        else:
            errors.append(f"{where}: required by {group} '{found.name}', and missing")
            continue
        out[key] = _bounded(hints.get(key, Any), given, limits.get(key, {}), where, errors)
    return out


def _value(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    """Validate a value against a type; lists come back as lists, whole floats stay floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if getattr(hint, "__name__", None) in NESTED:
        return _component(NESTED[hint.__name__], value, path, errors)
    if origin in (typing.Union, types.UnionType):
        trials: list[list[str]] = []
        for option in arguments:
            trial: list[str] = []
            result = _value(option, value, path, trial)
            if not trial:
                return result
            trials.append(trial)
        errors.append(f"{path}: expected {_describe(hint)}, got {value!r}")
        return value
    if origin is Literal:
        if value not in arguments:
            near = did_you_mean(str(value), map(str, arguments))
            errors.append(f"{path}: '{value}' is not accepted{near}; accepted: {', '.join(map(str, arguments))}")
        return value
    if origin in (list, tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            errors.append(f"{path}: expected {_describe(hint)}, got {value!r}")
            return value
        return [_value(arguments[0], item, f"{path}[{i}]", errors) for i, item in enumerate(value)]
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if hint is float and whole:
        return float(value)
    plain = {int: int, float: float, str: str, bool: bool, dict: Mapping, type(None): type(None)}
    strange = (hint is int and not whole) or (hint is float and isinstance(value, float) and not math.isfinite(value))
    if hint not in plain or not isinstance(value, plain[hint]) or strange:
        errors.append(f"{path}: expected {_describe(hint)}, got {value!r}")
    return value


def _describe(hint: Any) -> str:
    if getattr(hint, "__name__", None) in NESTED:
        return f"a {NESTED[hint.__name__]} component"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple, Sequence):
        return f"a list of {_describe(typing.get_args(hint)[0]).removeprefix('a ').removeprefix('whole ')}s"
    return names.get(hint, "a mapping" if hint is dict else str(hint))
