"""Transformer weights of Wan2.1 and CausVid on disk: which layout a file is in, how it is loaded, how it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causvid import tensor_files, weights
from causvid.errors import UserError
from causvid.models.dit import VideoDiT
from causvid.models.layouts import Link, check, fill
from causvid.models.wan import LAYOUTS, SIZES, Layout, Size, config_of, links, size_from_config
from causvid.registry import did_you_mean
from causvid.tensor_files import TensorFiles, open_tensors

OFFICIAL_STEM, OUR_STEM = "diffusion_pytorch_model", "weights"
# A tensor that is in every file of a layout and in no file of another.
_MARKS: dict[Layout, str] = {
    "ours": "time_project.1.weight",
    "official": "time_projection.1.weight",
    "diffusers": "condition_embedder.time_proj.weight",
}


@dataclass(frozen=True)
class Found:
    """Weights whose layout was recognised.

    Attributes:
        files: the tensors.
        layout: their layout.
        prefix: what stands before every name of the layout.
        config: content of the config.json beside them, where there is one.
    """

    files: TensorFiles
    layout: Layout
    prefix: str
    config: tuple[str, dict[str, Any]] | None

    def links(self, size: Size) -> tuple[Link, ...]:
        """How these files hold a network of a size."""
        base = links(size, "official" if self.layout == "causvid" else self.layout)
        return tuple(link.prefixed(self.prefix) for link in base)


def find(path: Path, part: str | None = None) -> Found:
    """Open weights and recognise their layout.

    Args:
        path: a file, a folder with weights, or a diffusers folder that has them in ``transformer/``.
        part: which model of a ``model.pt`` to take; needed where it holds both ``generator`` and ``generator_ema``.

    Raises:
        UserError: nothing there, damaged, ambiguous, or of no known layout.
    """
    folder = path
    if path.is_dir():
        if (path / "transformer").is_dir():
            path = folder = path / "transformer"
        ours = (path / f"{OUR_STEM}.safetensors").is_file() or (path / f"{OUR_STEM}{tensor_files.INDEX}").is_file()
        files = open_tensors(path, OUR_STEM if ours else OFFICIAL_STEM, part)
    else:
        folder = path.parent
        files = open_tensors(path, part=part or _only_generator(path))
    for layout, mark in _MARKS.items():
        for name in files.shapes:
            # 'official' has a longer name of its own, so a bare ending is enough to tell the three apart.
            if name == mark or name.endswith(f".{mark}"):
                prefix = name.removesuffix(mark)
                kind: Layout = "causvid" if layout == "official" and prefix == "model." else layout
                return Found(files, kind, prefix, _config(folder / "config.json"))
    some = ", ".join(list(files.shapes)[:4])
    raise UserError(f"{files.path} is in no known layout ({', '.join(LAYOUTS)}); its tensors are {some}, ...")


def _only_generator(path: Path) -> str | None:
    """The generator, where a file holds it and its companions and no average of it."""
    held = tensor_files.parts(path)
    return "generator" if "generator" in held and "generator_ema" not in held else None


def _config(path: Path) -> tuple[str, dict[str, Any]] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a mapping of options to values; fetch it again")
    return str(path), content


def size_of(found: Found, config: str | None = None) -> Size:
    """The geometry of weights: named, or from a config file, by default the one beside them.

    Raises:
        UserError: neither is there, or it does not say enough.
    """
    if config in SIZES:
        return SIZES[config]
    if config is not None:
        given = _config(Path(config))
        if given is None:
            near = did_you_mean(config, SIZES)
            raise UserError(f"no size or file '{config}'{near}; accepted: {', '.join(SIZES)}, or a config.json")
        return size_from_config(given[1], given[0])
    if found.config is None:
        raise UserError(
            f"{found.files.path} does not tell its number of heads, and no config.json lies beside it; "
            f"say it with --config: one of {', '.join(SIZES)}, or a config.json"
        )
    return size_from_config(found.config[1], found.config[0])


def agree(found: Found, size: Size, whose: str = "the spec's") -> None:
    """Refuse weights whose config tells another geometry, as a head count that no shape shows.

    Args:
        whose: who told the size, for the message.

    Raises:
        UserError: they differ.
    """
    if found.config is None:
        return
    told, wanted = asdict(size_of(found)), asdict(size)
    differing = [f"{key} {told[key]} ({whose} is {wanted[key]})" for key in wanted if told[key] != wanted[key]]
    if differing:
        raise UserError(f"{found.files.path} is another model than {whose}: {', '.join(differing)}")


def load(model: VideoDiT, size: Size, found: Found, dtype: torch.dtype | None, device: torch.device | str) -> VideoDiT:
    """Fill a network that was built on the meta device, tensor by tensor.

    Raises:
        UserError: the weights are not those of this size; every difference is listed.
    """
    fill(model, found.links(size), found.files, f"a Wan transformer of {size}", dtype, device)
    return model.eval()


def checked(found: Found, size: Size) -> Sequence[Link]:
    """The links of weights that fit a size.

    Raises:
        UserError: they do not; every difference is listed.
    """
    found_links = found.links(size)
    check(found_links, found.files, f"a Wan transformer of {size}")
    return found_links


def converted(found: Found, size: Size, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors in another layout, one after the other."""
    for source, target in zip(checked(found, size), links(size, layout), strict=True):
        yield from source.carried(target, found.files.read)


def refuse_existing(target: Path, layout: Layout) -> None:
    """Refuse to write where something is.

    Raises:
        UserError: a file, or a folder that is not empty; any folder, for the one file of ``causvid``.
    """
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} exists; give a new path, nothing is overwritten")
    if layout == "causvid" and target.is_dir():
        raise UserError(f"{target} is a folder, and layout 'causvid' is one file: give {target / 'model.pt'}")


def write(found: Found, size: Size, layout: Layout, target: Path, shard_bytes: int) -> Path:
    """Write weights in a layout; returns the file or folder that :func:`find` reads.

    ``official`` and ``ours`` are a folder with weights and config.json, ``diffusers`` has it in ``transformer/``,
    ``causvid`` is one ``model.pt`` whose ``generator`` it is.

    Raises:
        UserError: the target exists, or can't be written.
    """
    refuse_existing(target, layout)
    tensors = converted(found, size, layout)
    if layout == "causvid":
        _write_pickle(target, {"generator": dict(tensors)})
        return target
    folder = target / "transformer" if layout == "diffusers" else target
    stem = OUR_STEM if layout == "ours" else OFFICIAL_STEM
    tensor_files.write_shards(folder, stem, tensors, shard_bytes)
    weights.write_json(folder / "config.json", config_of(size, layout))
    return folder


def _write_pickle(target: Path, content: Any) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        partial.replace(target)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{target} can't be written: {error}; choose another path or free some space") from error
    finally:
        partial.unlink(missing_ok=True)
