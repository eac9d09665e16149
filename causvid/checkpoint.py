"""Exact resume: a tree of tensors and numbers in one safetensors file, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from causvid import weights
from causvid.errors import UserError


def save(path: Path, tree: dict[str, Any]) -> None:
    """Write a tree of dicts, lists, tensors, numbers, strings and None."""
    tensors: dict[str, Tensor] = {}
    skeleton = _take_apart(tree, tensors)
    weights.write_tensors(path, tensors, {"tree": json.dumps(skeleton)})


def load(path: Path) -> dict[str, Any]:
    """The tree that :func:`save` wrote.

    Raises:
        UserError: the file is damaged.
    """
    tensors, metadata = weights.read_tensors(path)
    if "tree" not in metadata:
        raise UserError(f"{path} is not a checkpoint")
    return _put_together(json.loads(metadata["tree"]), tensors)


def _take_apart(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        # Numbered, because paths of keys may meet; a clone, because safetensors refuses tensors that share memory.
        number = str(len(tensors))
        tensors[number] = node.detach().cpu().clone()
        return {"tensor": number}
    if isinstance(node, dict):
        return {"dict": [[key, _take_apart(value, tensors)] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        return {"list": [_take_apart(value, tensors) for value in node]}
    return {"value": node}


def _put_together(skeleton: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(value, tensors) for key, value in content}
    if kind == "list":
        return [_put_together(value, tensors) for value in content]
    return content
