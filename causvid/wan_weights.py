"""``causvid weights``: which files a spec of Wan2.1 needs, whether they are there, and fetching them when asked to.

Nothing else in causvid fetches anything: a missing file is an error that names this command.
"""

from __future__ import annotations

import json
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
from causvid.tensor_files import load_pickle
from causvid.weights import digest

APACHE, NON_COMMERCIAL = "Apache-2.0", "CC BY-NC-SA 4.0"


@dataclass(frozen=True)
class File:
    """One file: its place in the folder and its licence; size in bytes and SHA-256, where they are known.

    Known means: at least two public records that do not copy each other give the same. The sizes alone of CausVid's
    file are from one record, and fit two models of 5,676 MB in it.
    """

    path: str
    licence: str
    size: int | None = None
    sha256: str | None = None


_SHARED = (
    File("Wan2.1_VAE.pth", APACHE, 507_609_880, "38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981"),
    File("models_t5_umt5-xxl-enc-bf16.pth", APACHE, 11_361_920_418,
         "7cace0da2b446bbbbc57d031ab6cf163a3d59b366da94e5afe36745b746fd81d"),
    File("google/umt5-xxl/tokenizer.json", APACHE, 16_837_417,
         "6e197b4d3dbd71da14b4eb255f4fa91c9c1f2068b20a2de2472967ca3d22602b"),
    File("google/umt5-xxl/tokenizer_config.json", APACHE, 61_728,
         "ed9a3a8b0faa71a70a32847e0435fe036e6e112d4df4edb7bb48a921e344dc05"),
    File("google/umt5-xxl/special_tokens_map.json", APACHE, 6_623,
         "7b8a9f5040adb67b5805abdfd42c1f8d0f3d0e711f10726580eb3789cd0ad61d"),
    File("google/umt5-xxl/spiece.model", APACHE, 4_548_313,
         "e3909a67b780650b35cf529ac782ad2b6b26e6d1f849d3fbb6a872905f452458"),
)  # fmt: skip
_STEM = "diffusion_pytorch_model"
_SHARDS_14B = (
    (9_887_603_256, "569d54a07279b89f8281421fccf27ee2459ea853ce6845d3536b8664b0070078"),
    (9_839_059_648, "b17ff172f262b4da91c31e8c46d3b7707f62cecfff6e18dd0072ab29eb350e46"),
    (9_839_059_744, "741fd1508cd0288f0bb0f4fb3df6734da521d5ff23746170c848564a367e2cea"),
    (9_839_059_744, "47b08ba289b127fc64979bc877ee07e1c87aeb8eb8cd47bcfd112682847981ba"),
    (9_839_059_744, "29e35f4cf0e3a61f4726c960f1babf71d65677a8c99fe704257d665c9498ee88"),
    (7_910_235_256, "91ac087a40b814331e87f5f015af11ba999275d48d2af49591b6bf7727d3c146"),
)
# Folder of the released weights: where it is published, and its files.
FOLDERS: dict[str, tuple[str, tuple[File, ...]]] = {
    "wan_1_3b": (
        "hf://Wan-AI/Wan2.1-T2V-1.3B",
        (
            File("config.json", APACHE, 249, "ab37994c43740513f94b3ba6233a784035a67b43c8cde83c8f31aa90468c67ce"),
            File(f"{_STEM}.safetensors", APACHE, 5_676_070_424,
                 "96b6b242ca1c2f24e9d02cd6596066fab6d310e2d7538f33ae267cb18d957e8f"),
            *_SHARED,
        ),
    ),
    "wan_14b": (
        "hf://Wan-AI/Wan2.1-T2V-14B",
        (
            File("config.json", APACHE),
            File(f"{_STEM}.safetensors.index.json", APACHE),
            *(File(f"{_STEM}-{i:05d}-of-00006.safetensors", APACHE, *known)
              for i, known in enumerate(_SHARDS_14B, start=1)),
            *_SHARED,
        ),
    ),
    "causvid": (
        "hf://tianweiy/CausVid",
        (
            File("autoregressive_checkpoint/model.pt", NON_COMMERCIAL, 11_352_649_716),
            File("autoregressive_checkpoint_warp_4step_cfg2/model.pt", NON_COMMERCIAL),
            File("bidirectional_checkpoint2/model.pt", NON_COMMERCIAL),
        ),
    ),
    "preview": (
        "https://github.com/madebyollin/taehv/raw/main",
        (File("taew2_1.pth", "see its repository"),),
    ),
}  # fmt: skip


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


def needs_student(name: str) -> bool:
    """Whether sampling a spec takes the weights of a student beside the folder."""
    return name not in FOLDERS and specs.load(name)["sample"] == "student"


def survey(name: str, folder: Path, verify: bool = False) -> list[dict[str, Any]]:
    """For each file: where it was looked for, its state, size, digest and licence.

    Args:
        verify: whether to compare digests where they are known, too, and not sizes alone.
    """
    source, files = FOLDERS[folder_of(name)]
    rows = []
    for file in files:
        where = folder / file.path
        rows.append(
            {"file": file.path, "where": str(where), "state": _state(file, where, verify), "bytes": file.size,
             "sha256": file.sha256, "licence": file.licence, "source": f"{source}/{file.path}"}
        )  # fmt: skip
    return rows


def _state(file: File, where: Path, verify: bool) -> str:
    if not where.is_file():
        return "missing"
    if file.size not in (None, where.stat().st_size):
        return "wrong size"
    if verify and file.sha256 not in (None, digest(where)):
        return "wrong digest"
    return "there" if file.size is not None or _reads(file, where) else "unreadable"


def _reads(file: File, where: Path) -> bool:
    """Whether a file of unknown size is of its kind, and not a page that says why it could not be had."""
    try:
        if file.path.endswith(".json"):
            json.loads(where.read_text())
        else:
            load_pickle(where)
    except (UserError, OSError, ValueError):
        return False
    return True


def page_of(uri: str) -> str:
    """The address of a place of publication, or of a file there, that a browser opens."""
    if not uri.startswith("hf://"):
        return uri
    owner, name, *path = uri.removeprefix("hf://").split("/")
    return "/".join(["https://huggingface.co", owner, name, *(["resolve", "main", *path] if path else [])])


def fetch(rows: Sequence[dict[str, Any]], origin: str | None) -> None:
    """Fetch the files that are not there or not whole, each whole, checked and in place, or not at all.

    Args:
        rows: from :func:`survey`.
        origin: a URI that fsspec reads and that stands for the folder; default the place of publication.

    Raises:
        UserError: a file can't be fetched; those before it are there.
    """
    import fsspec

    for row in rows:
        if row["state"] == "there":
            continue
        source = f"{origin.rstrip('/')}/{row['file']}" if origin else row["source"]
        target = Path(row["where"])
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        progress.console.print(f"fetching {source}", highlight=False)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with fsspec.open(source, "rb") as stream, partial.open("wb") as out:
                shutil.copyfileobj(stream, out, 16_000_000)  # type: ignore[arg-type]
            wrong = _state(File(row["file"], "", row["bytes"], row["sha256"]), partial, True)
            if wrong != "there":
                raise UserError(f"{wrong}: it is not the published file")
            partial.replace(target)
        except Exception as error:  # a file system of any kind raises errors of its own
            reason = str(error).split("\n", 1)[0] or type(error).__name__
            raise UserError(
                f"{source} can't be fetched ({reason}); without a network, fetch it elsewhere "
                f"(from {page_of(row['source'])}) and put it at {target}"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        row["state"] = "there"
