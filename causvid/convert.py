"""``causvid convert``: a transformer's weights from one layout into another, with a certificate that nothing changed.

The certificate is made from what was written: it is read again, loaded, and run on a fixed input beside the source.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from causvid import progress, tensor_files
from causvid.errors import UserError
from causvid.models import wan_files
from causvid.models.wan import LAYOUTS, Layout, Size
from causvid.randomness import Draw
from causvid.registry import did_you_mean
from causvid.tensor_files import some
from causvid.types import Text
from causvid.weights import write_json


def convert(
    source: Path,
    target: Path,
    layout: str,
    config: str | None = None,
    part: str | None = None,
    shard_bytes: int = tensor_files.SHARD_BYTES,
) -> dict[str, Any]:
    """Write weights in another layout, and certify them.

    Args:
        source: a file or folder in any layout, which is recognised.
        target: what to write, which must not exist.
        layout: the layout to write.
        config: name of a size, or a config.json; default the one beside the source.
        part: which model of a ``model.pt`` to take.
        shard_bytes: most bytes of one file.

    Returns:
        The certificate, which also lies beside the weights.

    Raises:
        UserError: any doubt about the source, a target that exists, or a difference between the two; whatever ends
            this before the certificate is written, nothing is left.
    """
    if layout not in LAYOUTS:
        raise UserError(f"no layout '{layout}'{did_you_mean(layout, LAYOUTS)}; accepted: {', '.join(LAYOUTS)}")
    wan_files.refuse_existing(target, cast(Layout, layout))
    found = wan_files.find(source, part)
    size = wan_files.size_of(found, config)
    wan_files.checked(found, size)
    wan_files.agree(found, size, "that of --config")
    progress.console.print(f"{found.files.path}: {found.layout}, {size}", highlight=False)
    _refuse_not_finite(found)
    existed = target.exists()
    try:
        written = wan_files.write(found, size, cast(Layout, layout), target, shard_bytes)
        certificate = certify(found, wan_files.find(target), size)
        unequal, difference = certificate["unequal_tensors"], certificate["max_abs_difference"]
        if unequal or difference != 0:
            raise UserError(
                f"what was written to {target} differs from {source}, in {unequal} tensors and by {difference:g} in "
                "the outputs, and was removed again; check the disk, or choose another path"
            )
        place = written.with_suffix(".certificate.json") if written.is_file() else written / "certificate.json"
        write_json(place, certificate)
    except BaseException:  # an interruption, too: weights without a certificate would block the next attempt
        _take_away(target, existed)
        raise
    return certificate | {"path": str(written.resolve()), "certificate": str(place.resolve())}


def _take_away(target: Path, existed: bool) -> None:
    """Remove what was written to a target that was not there before, or was an empty folder."""
    if not target.is_dir():
        target.unlink(missing_ok=True)
        return
    for entry in target.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if not existed:
        target.rmdir()


def _refuse_not_finite(found: wan_files.Found) -> None:
    """Refuse weights that no network can compute with, and that no comparison finds equal to themselves."""
    wrong = [name for name in found.files.shapes if not found.files.read(name).isfinite().all()]
    if wrong:
        raise UserError(
            f"{found.files.path} holds NaN or infinite numbers, in {len(wrong)} of {len(found.files.shapes)} tensors: "
            f"{some(wrong)}. Nothing was written; take another checkpoint, or fetch this one again"
        )


def certify(source: wan_files.Found, target: wan_files.Found, size: Size) -> dict[str, Any]:
    """Compare two sets of weights tensor by tensor, bit by bit, and by the output of the network on a fixed input.

    ``dtypes`` counts the target's tensors by type; ``retyped_tensors`` are those of the source that have another type
    in the target: of different types, and one tensor there. Their values are the same.
    """
    unequal, retyped = 0, []
    before, after = source.files.dtypes, target.files.dtypes
    for one, other in zip(source.links(size), target.links(size), strict=True):
        ours, theirs = one.join(source.files.read), other.join(target.files.read)
        unequal += ours.dtype != theirs.dtype or not torch.equal(ours, theirs)
        whole = other.theirs * len(one.theirs) if len(other.theirs) == 1 else other.theirs
        retyped += [name for name, now in zip(one.theirs, whole, strict=False) if before[name] != after[now]]
    outputs = [run(found, size) for found in (source, target)]
    differences = (outputs[0] - outputs[1]).abs()
    # In half precision finite weights may give outputs beyond its range, in both alike.
    differences[(outputs[0] == outputs[1]) | (outputs[0].isnan() & outputs[1].isnan())] = 0.0
    return {
        "source": str(source.files.path),
        "source_layout": source.layout,
        "layout": target.layout,
        "tensors": len(target.files.shapes),
        "parameters": sum(_count(shape) for shape in target.files.shapes.values()),
        "dtypes": dict(Counter(str(dtype).removeprefix("torch.") for dtype in after.values())),
        "retyped_tensors": retyped,
        "unequal_tensors": unequal,
        "max_abs_difference": float(differences.max()),
        "max_abs_output": float(outputs[0].nan_to_num().abs().max()),
    }


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


@torch.no_grad()
def run(found: wan_files.Found, size: Size) -> Tensor:
    """The network's velocity on a fixed input of three small frames."""
    with torch.device("meta"):
        model = size.build()
    wan_files.load(model, size, found, None, "cpu")
    draw = Draw(0, "certificate", 0, [0])
    dtype = next(model.parameters()).dtype
    x = draw.normal("latents", 3, size.channels, 8, 12).to(dtype)
    t = torch.tensor([[1.0, 0.757, 0.522]], dtype=torch.float32)
    return model(x, t, Text(draw.normal("text", 16, size.text_dim).to(dtype))).velocity.float()
