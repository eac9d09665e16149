"""Wan2.1 (arXiv 2503.20314) as sizes of this project's one video transformer, and its weights under other names.

Layouts of a transformer's weights:

    ours       the names of ``VideoDiT``, with queries, keys and values fused
    official   the original names, as in the released folder (diffusion_pytorch_model*.safetensors, config.json)
    diffusers  the names of that library, in its folder ``transformer/``
    causvid    the original names behind ``model.``, in a ``model.pt`` that holds ``generator`` and its companions
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch

from causvid.attention.kernels import Kernel
from causvid.attention.masks import Rule
from causvid.attention.positions import Position
from causvid.errors import UserError
from causvid.models.dit import VideoDiT
from causvid.models.layouts import Link, same, shapes_of

Layout = Literal["ours", "official", "diffusers", "causvid"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True)
class Size:
    """Geometry of a Wan2.1 text-to-video transformer; the names are those of ``VideoDiT``."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    eps: float = 1e-6
    cross_norm: bool = True

    def build(
        self, mask: Rule | None = None, position: Position | None = None, kernel: Kernel | None = None
    ) -> VideoDiT:
        """The network, with fresh weights on the current device (``with torch.device("meta")`` makes none).

        Raises:
            UserError: the numbers do not fit together.
        """
        try:
            return VideoDiT(**asdict(self), mask=mask, position=position, kernel=kernel)
        except (ValueError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"this is no geometry of a transformer: {error}") from error

    def cut(self, layers: int) -> Size:
        """The same width at another depth."""
        return replace(self, layers=layers)


SIZES: dict[str, Size] = {
    "wan_1_3b": Size(dim=1536, ffn_dim=8960, heads=12, layers=30),
    "wan_14b": Size(dim=5120, ffn_dim=13824, heads=40, layers=40),
    "wan_test": Size(dim=48, ffn_dim=80, heads=4, layers=2, text_dim=32, freq_dim=32),
    "wan_test_wide": Size(dim=96, ffn_dim=128, heads=3, layers=3, text_dim=40, freq_dim=64),
}

# Ours -> the names that make it. What stands before a block's number is the same in all layouts.
_OFFICIAL: dict[str, tuple[str, ...]] = {
    "patch_embed": ("patch_embedding",),
    "text_embed.0": ("text_embedding.0",),
    "text_embed.2": ("text_embedding.2",),
    "time_embed.0": ("time_embedding.0",),
    "time_embed.2": ("time_embedding.2",),
    "time_project.1": ("time_projection.1",),
    "head": ("head.head",),
    "head_modulation": ("head.modulation",),
    "modulation": ("modulation",),
    "self_attention.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "self_attention.q_norm": ("self_attn.norm_q",),
    "self_attention.k_norm": ("self_attn.norm_k",),
    "self_attention.out": ("self_attn.o",),
    "cross_norm": ("norm3",),
    "cross_attention.q": ("cross_attn.q",),
    "cross_attention.kv": ("cross_attn.k", "cross_attn.v"),
    "cross_attention.q_norm": ("cross_attn.norm_q",),
    "cross_attention.k_norm": ("cross_attn.norm_k",),
    "cross_attention.out": ("cross_attn.o",),
    "ffn.0": ("ffn.0",),
    "ffn.2": ("ffn.2",),
}
_DIFFUSERS: dict[str, tuple[str, ...]] = {
    "patch_embed": ("patch_embedding",),
    "text_embed.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embed.2": ("condition_embedder.text_embedder.linear_2",),
    "time_embed.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embed.2": ("condition_embedder.time_embedder.linear_2",),
    "time_project.1": ("condition_embedder.time_proj",),
    "head": ("proj_out",),
    "head_modulation": ("scale_shift_table",),
    "modulation": ("scale_shift_table",),
    "self_attention.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "self_attention.q_norm": ("attn1.norm_q",),
    "self_attention.k_norm": ("attn1.norm_k",),
    "self_attention.out": ("attn1.to_out.0",),
    "cross_norm": ("norm2",),
    "cross_attention.q": ("attn2.to_q",),
    "cross_attention.kv": ("attn2.to_k", "attn2.to_v"),
    "cross_attention.q_norm": ("attn2.norm_q",),
    "cross_attention.k_norm": ("attn2.norm_k",),
    "cross_attention.out": ("attn2.to_out.0",),
    "ffn.0": ("ffn.net.0.proj",),
    "ffn.2": ("ffn.net.2",),
}


def links(size: Size, layout: Layout) -> tuple[Link, ...]:
    """How the weights of a network of this size are named and shaped in a layout."""
    with torch.device("meta"):
        model = size.build()
    shapes = shapes_of(model)
    if layout == "ours":
        return same(shapes)
    table = _DIFFUSERS if layout == "diffusers" else _OFFICIAL
    prefix = "model." if layout == "causvid" else ""
    patch = (1, *model.patch)
    return tuple(_link(name, shape, table, size.channels, patch).prefixed(prefix) for name, shape in shapes.items())


def _link(
    name: str, shape: tuple[int, ...], table: Mapping[str, tuple[str, ...]], channels: int, patch: tuple[int, ...]
) -> Link:
    before, inner, ending = "", name, ""
    if name.startswith("blocks."):
        _, number, inner = name.split(".", 2)
        before = f"blocks.{number}."
    if inner not in table:
        inner, _, ending = inner.rpartition(".")
        ending = f".{ending}"
    theirs = tuple(f"{before}{each}{ending}" for each in table[inner])
    if name == "patch_embed.weight":  # a convolution whose stride is its kernel
        return Link(name, theirs, (shape[0], channels, *patch), shape)
    if inner.endswith("modulation"):
        return Link(name, theirs, (1, *shape), shape)
    return Link(name, theirs, (shape[0] // len(theirs), *shape[1:]), shape)


# Beside these, a config may say anything about software; what says another architecture is refused below.
_CONFIG: dict[Layout, dict[str, str]] = {
    "official": {"dim": "dim", "ffn_dim": "ffn_dim", "heads": "num_heads", "layers": "num_layers",
                 "channels": "in_dim", "text_dim": "text_dim", "freq_dim": "freq_dim", "eps": "eps",
                 "cross_norm": "cross_attn_norm"},
    "diffusers": {"ffn_dim": "ffn_dim", "heads": "num_attention_heads", "layers": "num_layers",
                  "channels": "in_channels", "text_dim": "text_dim", "freq_dim": "freq_dim", "eps": "eps",
                  "cross_norm": "cross_attn_norm"},
}  # fmt: skip
_REQUIRED: dict[Layout, Mapping[str, Any]] = {
    "official": {"model_type": "t2v", "patch_size": [1, 2, 2], "qk_norm": True, "window_size": [-1, -1]},
    "diffusers": {"patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "added_kv_proj_dim": None,
                  "image_dim": None},
}  # fmt: skip


def size_from_config(config: Mapping[str, Any], source: str) -> Size:
    """The geometry that a config.json tells: the official one, diffusers' or our own.

    Raises:
        UserError: it tells none, or that of another kind of network.
    """
    if "num_attention_heads" in config:
        layout: Layout = "diffusers"
    elif "num_heads" in config:
        layout = "official"
    elif "heads" in config:
        return _size(dict(config), source)
    else:
        raise UserError(
            f"{source} does not tell the number of heads (num_heads, num_attention_heads or heads); "
            f"accepted: the config.json of a Wan2.1 folder, or one of {', '.join(SIZES)}"
        )
    for key, expected in _REQUIRED[layout].items():
        found = config.get(key, expected)
        # JSON's true and 1 are equal in Python.
        if json.dumps(found) != json.dumps(expected):
            raise UserError(f"{source}: {key} is {found!r}; only Wan2.1 text-to-video, {key} = {expected!r}, fits here")
    out_channels = config.get("out_dim", config.get("out_channels"))
    values = {ours: config[theirs] for ours, theirs in _CONFIG[layout].items() if theirs in config}
    if layout == "diffusers" and "attention_head_dim" in config:
        _whole({key: config[key] for key in ("attention_head_dim", "num_attention_heads")}, source)
        values["dim"] = config["attention_head_dim"] * config["num_attention_heads"]
    size = _size(values, source)
    if out_channels not in (None, size.channels):
        raise UserError(f"{source}: {size.channels} channels in and {out_channels} out; only text-to-video fits here")
    return size


def _size(values: dict[str, Any], source: str) -> Size:
    try:
        size = Size(**values)
    except TypeError as error:
        raise UserError(f"{source} is no complete geometry: {error}; accepted: {', '.join(SIZES)}") from error
    _whole({key: value for key, value in asdict(size).items() if key not in ("eps", "cross_norm")}, source)
    if type(size.eps) is not float or not 0 < size.eps < 1:
        raise UserError(f"{source}: eps must be a number between 0 and 1, got {size.eps!r}")
    if type(size.cross_norm) is not bool:
        raise UserError(f"{source}: cross_attn_norm must be true or false, got {size.cross_norm!r}")
    return size


def _whole(values: Mapping[str, Any], source: str) -> None:
    for key, value in values.items():
        if type(value) is not int or not 1 <= value <= 65536:
            raise UserError(f"{source}: {key} must be a whole number from 1 to 65536, got {value!r}")


def config_of(size: Size, layout: Layout) -> dict[str, Any]:
    """The config.json that goes with weights in a layout."""
    if layout == "diffusers":
        extra = {"_class_name": "WanTransformer3DModel", "attention_head_dim": size.dim // size.heads,
                 "out_channels": size.channels, **_REQUIRED["diffusers"]}  # fmt: skip
    elif layout == "official":
        extra = {"_class_name": "WanModel", "model_type": "t2v", "out_dim": size.channels, "text_len": 512}
    else:
        return asdict(size)
    return {theirs: asdict(size)[ours] for ours, theirs in _CONFIG[layout].items()} | extra
