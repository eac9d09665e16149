"""Quality, semantic and total score of VBench from its sixteen dimensions.

A raw score is normalised to its dimension's range; a half is the weighted mean of its dimensions, the total four parts
quality and one part semantic (VBench, scripts/cal_final_score.py; published scores round the result). A dimension
that is missing makes what depends on it *not computable*: never 0, as upstream has it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from causvid.errors import UserError
from causvid.eval.dimensions import Half, Scale, scales
from causvid.registry import did_you_mean

QUALITY_PARTS, SEMANTIC_PARTS = 4, 1


@dataclass(frozen=True)
class Totals:
    """Scores as fractions; None is not computable. ``missing`` names the dimensions that were not given."""

    total: float | None
    quality: float | None
    semantic: float | None
    missing: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """In percent; ``missing`` only where something is."""
        named = {"total": self.total, "quality": self.quality, "semantic": self.semantic}
        out: dict[str, Any] = {name: None if value is None else 100 * value for name, value in named.items()}
        return out | ({"missing": list(self.missing)} if self.missing else {})

    @property
    def note(self) -> str:
        """What can't be computed, and why; empty where all can."""
        if not self.missing:
            return ""
        known, parts = scales(), []
        for half in ("quality", "semantic"):
            names = [name for name, scale in known.items() if scale.half == half]
            lacking = [name for name in names if name in self.missing]
            if lacking:
                have = len(names) - len(lacking)
                parts.append(
                    f"{half} is not computable ({have} of {len(names)} dimensions; missing: {', '.join(lacking)})"
                )
        return "; ".join(parts) + "; nor is the total"


def normalised(raw: float | Tensor, scale: Scale) -> Any:
    """A raw score, or many, in units of the dimension's range; outside [0, 1] where the score is outside it."""
    return (raw - scale.low) / (scale.high - scale.low)


def half_score(scores: Mapping[str, Any], half: Half) -> Any:
    """Weighted mean of a half's normalised scores; values may be floats or tensors of one shape.

    Raises:
        KeyError: a dimension of the half is missing.
    """
    parts = {name: scale for name, scale in scales().items() if scale.half == half}
    total = sum(scale.weight * normalised(scores[name], scale) for name, scale in parts.items())
    return total / sum(scale.weight for scale in parts.values())


def total_score(scores: Mapping[str, Any]) -> Any:
    """The total of all sixteen raw scores, floats or tensors of one shape."""
    weighted = QUALITY_PARTS * half_score(scores, "quality") + SEMANTIC_PARTS * half_score(scores, "semantic")
    return weighted / (QUALITY_PARTS + SEMANTIC_PARTS)


def aggregate(scores: Mapping[str, float]) -> Totals:
    """Totals of raw scores in [0, 1] by dimension.

    Raises:
        UserError: a name that is none of VBench's sixteen, so also a proxy's, or a value that is no score.
    """
    known = scales()
    problems = [_unknown(name, known) for name in scores if name not in known]
    problems += [f"{name} is {value!r}; a score is a number in [0, 1]" for name, value in scores.items() if _bad(value)]
    if problems:
        raise UserError("; ".join(problems))
    missing = tuple(name for name in known if name not in scores)
    halves: dict[str, float | None] = {}
    for half in ("quality", "semantic"):
        lacks = any(known[name].half == half for name in missing)
        halves[half] = None if lacks else half_score(scores, half)
    return Totals(None if missing else total_score(scores), halves["quality"], halves["semantic"], missing)


def _unknown(name: str, known: Mapping[str, Scale]) -> str:
    if name.startswith("proxy_"):
        return f"'{name}' is a proxy, which never enters a total; remove it"
    return f"unknown dimension '{name}'{did_you_mean(name, known)}; accepted: {', '.join(known)}"


def out_of_range(scores: Mapping[str, float]) -> str:
    """A warning where raw scores lie outside their dimension's range, as mixed units do; empty where none."""
    known = {name: scale for name, scale in scales().items() if name in scores}
    sides = {
        "below": [name for name, scale in known.items() if scores[name] < scale.low],
        "above": [name for name, scale in known.items() if scores[name] > scale.high],
    }
    told = [
        f"{side} the range of their dimension: " + ", ".join(f"{name} ({100 * scores[name]:.4g}%)" for name in names)
        for side, names in sides.items()
        if names
    ]
    return "; ".join([*told, "scores are all read as percent where one is over 1, else as fractions"]) if told else ""


def _bad(value: Any) -> bool:
    return not (is_finite(value) and 0 <= value <= 1)


def is_finite(value: Any) -> bool:
    """Whether a value of a JSON file is a number that a float can hold; NaN is none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names differ, upstream's spelling with spaces being the same as ours.

    Raises:
        UserError: a name twice.
    """
    out: dict[str, Any] = {}
    for name, value in pairs:
        name = name.strip().lower().replace(" ", "_")
        if name in out:
            raise UserError(f"'{name}' is given twice; keep one")
        out[name] = value
    return out


def read_scores(path: Path) -> dict[str, float]:
    """Raw scores in [0, 1] from a table ``{dimension: score}``, in percent if any is over 1.

    An upstream results file, ``{dimension: [score, details]}``, is read too: its scores are fractions.

    Raises:
        UserError: not such a file, a name that is unknown or given twice, a value that is not a finite score.
    """
    try:
        table = json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give a JSON file of {{dimension: score}}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} holds a {type(table).__name__}; a JSON object {{dimension: score}} is accepted")
    known, problems, out = scales(), [], {}
    for name, value in table.items():
        value = value[0] if isinstance(value, list) and value else value
        if name not in known:
            problems.append(_unknown(name, known))
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            problems.append(f"{name} is {json.dumps(value)}; leave a missing dimension out")
        elif not 0 <= value <= 100:  # nor is NaN; a whole number may be too large for a float
            problems.append(f"{name} is {str(value)[:40]}; a finite score in [0, 1], or in percent, is accepted")
        else:
            out[name] = float(value)
    if problems:
        raise UserError(f"{path}: " + "; ".join(problems))
    percent = any(value > 1 for value in out.values())
    return {name: value / 100 if percent else value for name, value in out.items()}
