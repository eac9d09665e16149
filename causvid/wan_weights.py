"""``causvid weights``: which files a spec of Wan2.1 needs, whether they are there, and fetching them when asked to.

Nothing else in causvid fetches anything: a missing file is an error that names this command.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causvid import progress
from causvid import spec as specs
from causvid.errors import UserError
from causvid.models.wan import SIZES

APACHE, NON_COMMERCIAL = "Apache-2.0", "CC BY-NC-SA 4.0"


@dataclass(frozen=True)
class File:
    """One file: its place in the folder, its size in GB where it is known, and its licence."""

    path: str
    gigabytes: float | None
    licence: str


_SHARED = (
    File("Wan2.1_VAE.pth", 0.51, APACHE),
    File("models_t5_umt5-xxl-enc-bf16.pth", 11.4, APACHE),
    *(
        File(f"google/umt5-xxl/{name}", 0.02, APACHE)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")
    ),
)
_STEM = "diffusion_pytorch_model"
# Folder of the released weights: where it is published, and its files.
FOLDERS: dict[str, tuple[str, tuple[File, ...]]] = {
    "wan_1_3b": (
        "hf://Wan-AI/Wan2.1-T2V-1.3B",
        (File("config.json", 0.0, APACHE), File(f"{_STEM}.safetensors", 5.68, APACHE), *_SHARED),
    ),
    "wan_14b": (
        "hf://Wan-AI/Wan2.1-T2V-14B",
        (
            File("config.json", 0.0, APACHE),
            File(f"{_STEM}.safetensors.index.json", 0.0, APACHE),
            *(File(f"{_STEM}-{i:05d}-of-00006.safetensors", None, APACHE) for i in range(1, 7)),
            *_SHARED,
        ),
    ),
    "causvid": (
        "hf://tianweiy/CausVid",
        (
            File("autoregressive_checkpoint/model.pt", None, NON_COMMERCIAL),
            File("bidirectional_checkpoint2/model.pt", None, NON_COMMERCIAL),
        ),
    ),
}


def folder_of(name: str) -> str:
    """Which folder of weights a spec, or a name of a folder, means.

    Raises:
        UserError: the spec is of no released size.
    """
    if name in FOLDERS:
        return name
    model = specs.load(name)["model"]
    for key, size in SIZES.items():
        if key in FOLDERS and (model.get("dim"), model.get("layers")) == (size.dim, size.layers):
            return key
    raise UserError(f"'{name}' is of no released size; accepted: a spec under wan/, or one of {', '.join(FOLDERS)}")


def survey(name: str, folder: Path) -> list[dict[str, Any]]:
    """For each file: where it was looked for, whether it is there, its size and licence."""
    source, files = FOLDERS[folder_of(name)]
    return [
        {"file": file.path, "where": str(folder / file.path), "there": (folder / file.path).is_file(),
         "gigabytes": file.gigabytes, "licence": file.licence, "source": f"{source}/{file.path}"}
        for file in files
    ]  # fmt: skip


def fetch(rows: Sequence[dict[str, Any]], origin: str | None) -> None:
    """Fetch the files that are not there, each whole or not at all.

    Args:
        rows: from :func:`survey`.
        origin: a URI that fsspec reads and that stands for the folder; default the place of publication.

    Raises:
        UserError: a file can't be fetched; those before it are there.
    """
    import fsspec

    for row in rows:
        if row["there"]:
            continue
        source = f"{origin.rstrip('/')}/{row['file']}" if origin else row["source"]
        target = Path(row["where"])
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        progress.console.print(f"fetching {source}", highlight=False)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with fsspec.open(source, "rb") as stream, partial.open("wb") as out:
                shutil.copyfileobj(stream, out, 16_000_000)  # type: ignore[arg-type]
            partial.replace(target)
        except Exception as error:  # a file system of any kind raises errors of its own
            reason = str(error).split("\n", 1)[0] or type(error).__name__
            raise UserError(
                f"{source} can't be fetched ({reason}); without a network, fetch it elsewhere and put it at {target}"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        row["there"] = True
