"""What the arms of a sweep are called: short names for readers, the same in tables, on the page and in messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from causvid import registry
from causvid.eval.sweep_page import SEED
from causvid.spec import Spec
from causvid.validate import Bound, options_of


def labels(arms: Sequence[tuple[Mapping[str, Any], Spec]], seeds: bool = False) -> list[str]:
    """A name of each arm of a sweep, from (what it sets, its whole spec): ``student.input=data, init=ode``.

    A component is its name, with those of the options that the arm sets and that are not its defaults. Where two values
    of a key would read alike, all options that they set are shown.

    Args:
        seeds: name the training seed, too.
    """
    given = {(key, _code(value)): (value, spec[key]) for values, spec in arms for key, value in values.items()}
    brief = {each: short(*value) for each, value in given.items()}
    alike = Counter((key, text) for (key, _), text in brief.items())
    texts = {
        each: short(*given[each], whole=True) if alike[each[0], text] > 1 else text for each, text in brief.items()
    }
    return [
        ", ".join(f"{key}={texts[key, _code(v)]}" for key, v in values.items() if seeds or key != SEED) or "base"
        for values, _ in arms
    ]


def _code(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def short(value: Any, node: Any, whole: bool = False) -> str:
    """One value of a sweep on a line: ``value`` as given, ``node`` as the validated spec has it.

    Args:
        whole: show the options that equal their defaults, too.
    """
    if isinstance(node, Bound):
        given = value if isinstance(value, Mapping) else {}
        accepted = options_of(node.group, registry.find(node.group, node["name"]))
        shown = {
            key: short(option, node[key], whole)
            for key, option in given.items()
            if key != "name" and (whole or _code(node[key]) != _code(accepted[key].default))
        }
        options = ", ".join(f"{key}={text}" for key, text in shown.items())
        return f"{node['name']} ({options})" if options else str(node["name"])
    if isinstance(node, Mapping) and isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {short(each, node[key], whole)}" for key, each in value.items()) + "}"
    if isinstance(node, list) and isinstance(value, list):
        return "[" + ", ".join(short(each, part, whole) for each, part in zip(value, node, strict=True)) + "]"
    if isinstance(node, list) and len(node) == 1:  # a list of one may be written without brackets
        return short(value, node[0], whole)
    return value if isinstance(value, str) else json.dumps(value)
