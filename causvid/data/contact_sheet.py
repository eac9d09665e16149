"""What is in a store, at a glance: a summary, and a picture of its first rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from causvid.data.clips import png
from causvid.data.copies import cached
from causvid.data.folders import Folder, apart
from causvid.data.lmdb_store import Reader
from causvid.data.pack import sound
from causvid.data.rows import Row
from causvid.data.tally import Tally
from causvid.errors import UserError

COLUMNS, LONGEST_SIDE = 6, 192  # pictures of a row; pixels of one
Decode = Callable[[Tensor], Tensor]


def inspect(
    source: str, target: str, rows: int, decoder: Callable[[Mapping[str, Any]], Decode | None]
) -> tuple[Tally, dict[str, Any]]:
    """Survey a store and write ``contact_sheet.png``.

    Args:
        source: the store.
        target: folder for the sheet.
        rows: rows of the store on it.
        decoder: from the store's header to what decodes its latents, or None where nothing can; channels then show.

    Raises:
        UserError: no store, or one that can't be read, or the target is, or lies in, the store.
    """
    apart(source, target)
    output, path = Folder(target), cached(source)
    found = sound(path)
    if found["kind"] != "store":
        raise UserError(f"{source} is an LMDB of another layout; convert it with 'causvid data pack'")
    if not found["rows"]:
        raise UserError(f"nothing given: {source} holds no rows")
    tally = Tally(found["rows"], done=found["rows"] - len(found["damaged"]))
    for key, reason in found["damaged"].items():
        tally.put_aside(key, reason)
    reader = Reader(path, whole=False)
    decode = decoder(reader.header)
    keys = [key for key in reader.entries if key not in found["damaged"]][:rows]
    if keys:
        output.write("contact_sheet.png", png(sheet([strip(reader.row(key), decode) for key in keys])))
    return tally, found


def strip(row: Row, decode: Decode | None) -> np.ndarray:
    """Frames of one row from first to last, side by side: ``h w 3`` uint8."""
    latents = torch.from_numpy(next(array for array in row.arrays.values() if array.ndim >= 4).astype(np.float32))
    frames = latents[-1] if latents.ndim == 5 else latents  # the end of a trajectory
    if decode is not None:
        frames = decode(frames[None])[0]
    else:
        frames = frames[:, [min(i, frames.shape[1] - 1) for i in range(3)]]
        frames = frames / frames.abs().max().clamp(min=1e-6)
    chosen = frames[np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)]
    shrink = -(-max(chosen.shape[-2:]) // LONGEST_SIDE)
    chosen = torch.nn.functional.avg_pool2d(chosen, shrink) if shrink > 1 else chosen
    images = ((chosen.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    images = torch.nn.functional.pad(images, (1, 1, 1, 1))
    return rearrange(images, "f c h w -> h (f w) c").numpy()


def sheet(strips: list[np.ndarray]) -> np.ndarray:
    """Strips below one another, the narrower ones filled with black."""
    width = max(each.shape[1] for each in strips)
    return np.concatenate([np.pad(each, ((0, 0), (0, width - each.shape[1]), (0, 0))) for each in strips])
