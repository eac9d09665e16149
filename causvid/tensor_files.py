"""Named tensors in files of other projects: safetensors, in one file or in shards with an index, and PyTorch's pickles.

Nothing is trusted: pickles are read as data alone, and whatever is wrong with a file is one ``UserError``. Tensors are
read one at a time, so a large model is loaded with little memory beside its own.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from causvid import weights
from causvid.errors import UserError

SHARD_BYTES = 5_000_000_000
INDEX = ".safetensors.index.json"
# Inside the names of weights that were saved from a wrapped model; they carry no meaning.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")


class TensorFiles:
    """Tensors by name, wherever they lie; a name's tensor is read when it is asked for.

    Attributes:
        path: the file or folder that was opened.
        shapes: shape of every tensor.
        dtypes: type of every tensor.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> None:
        self.path, self.shapes, self.dtypes = path, dict(shapes), dict(dtypes)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files that hold them."""
        return (self.path,)

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        raise KeyError(name)

    def part(self, name: str, place: tuple[slice, ...]) -> Tensor:
        """A part of it, without reading the rest where the file allows that."""
        return self.read(name)[place]


class _Safetensors(TensorFiles):
    """One safetensors file, or the shards of an index."""

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        self._where: dict[str, Path] = {}
        shapes, dtypes = {}, {}
        for file in files:
            try:
                with safe_open(str(file), framework="pt") as stream:
                    for name in stream.keys():  # noqa: SIM118
                        if name in shapes:
                            raise UserError(f"{file} and {self._where[name]} both hold '{name}'")
                        part = stream.get_slice(name)
                        shapes[name], dtypes[name] = tuple(part.get_shape()), _dtype(part.get_dtype(), name, file)
                        self._where[name] = file
            except (SafetensorError, OSError) as error:
                raise _damaged(file, error) from error
        super().__init__(path, shapes, dtypes)

    def part(self, name: str, place: tuple[slice, ...]) -> Tensor:
        with safe_open(str(self._where[name]), framework="pt") as stream:
            return stream.get_slice(name)[place]

    def read(self, name: str) -> Tensor:
        # Opened for each tensor: a mapping that stays open keeps every page that was read.
        with safe_open(str(self._where[name]), framework="pt") as stream:
            return stream.get_tensor(name)

    @property
    def sources(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(self._where.values()))


class _Pickle(TensorFiles):
    """A dictionary of tensors that ``torch.save`` wrote."""

    def __init__(self, path: Path, part: str | None, tensors: Mapping[str, Tensor]) -> None:
        self._part, self._tensors, self._read = part, tensors, 0
        # A mapping that stays open keeps every page that was read: it is opened anew each time it holds so many bytes.
        self._most = sum(tensor.nbytes for tensor in tensors.values()) // 20 if _is_zip(path) else float("inf")
        super().__init__(
            path,
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            {name: tensor.dtype for name, tensor in tensors.items()},
        )

    def read(self, name: str) -> Tensor:
        if self._read > self._most:
            self._tensors, self._read = _tensors_in(self.path, self._part), 0
        tensor = self._tensors[name]
        self._read += tensor.nbytes
        return tensor


def open_tensors(path: Path, stem: str = "diffusion_pytorch_model", part: str | None = None) -> TensorFiles:
    """Open a file, or the file or index named ``stem`` in a folder.

    Args:
        path: a .safetensors file, an index of shards, a .pt or .pth file, or a folder.
        stem: name of the file in a folder, without its ending.
        part: which dictionary to take from a pickle that holds several; needed only where there is a choice.

    Raises:
        UserError: missing, damaged, not tensors, or code instead of data; or a part of what has none.
    """
    if part and (path.is_dir() or path.name.endswith((".safetensors", INDEX))):
        raise UserError(f"{path} holds one model, and no part '{part}'")
    if path.is_dir():
        return _open_folder(path, stem)
    if not path.is_file():
        raise UserError(f"weights {path} do not exist")
    if path.name.endswith(INDEX):
        return _open_index(path)
    if _is_zip(path) or path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return _open_pickle(path, part)
    return _Safetensors(path, [path])


def _start(path: Path) -> bytes:
    """A file's first bytes.

    Raises:
        UserError: they are those of a web page or of a Git LFS pointer.
    """
    with path.open("rb") as stream:
        start = stream.read(512)
    # A letter must follow: a safetensors file may begin with the bytes of ' <', which are its header's length.
    if re.match(rb"(\xef\xbb\xbf)?\s*<[!?a-zA-Z]", start):
        raise UserError(f"{path} is a web page, not weights: the download failed or needs a login; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not weights; fetch the file itself (git lfs pull)")
    return start


def _is_zip(path: Path) -> bool:
    """Whether this is PyTorch's format since 1.6, which can be mapped into memory."""
    return _start(path).startswith(b"PK")


def _open_folder(folder: Path, stem: str) -> TensorFiles:
    index, shards = folder / f"{stem}{INDEX}", sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    whole = [folder / f"{stem}{ending}" for ending in (".safetensors", ".pth", ".pt")]
    whole = [file for file in whole if file.is_file()]
    found = [*whole, *([index] if index.is_file() else shards[:1])]
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{folder} holds the same weights more than once ({names}): move away all but one")
    if index.is_file():
        return _open_index(index)
    if whole:
        return open_tensors(whole[0])
    if not shards:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{folder} holds no {stem}.safetensors, .pth or .pt, and no index of shards; it holds {held}. 'causvid "
            "weights SPEC --weights DIR' lists what a spec needs, and where it comes from"
        )
    count = int(shards[0].stem.rpartition("-")[2])
    if len(shards) != count:
        raise UserError(f"{folder} holds {len(shards)} of {count} shards of {stem}; fetch the missing ones")
    return _Safetensors(folder, shards)


def _open_index(index: Path) -> TensorFiles:
    try:
        where = json.loads(index.read_text())["weight_map"]
        files = sorted({index.parent / str(name) for name in where.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of shards: {error!r}; fetch it again") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index.parent} lacks shards that its index names: {', '.join(missing)}; fetch them")
    opened = _Safetensors(index.parent, files)
    wrong = sorted(set(where) ^ set(opened.shapes))
    if wrong:
        raise UserError(f"{index} and its shards disagree on {some(wrong)}; fetch them again")
    return opened


def _open_pickle(path: Path, part: str | None) -> TensorFiles:
    return _Pickle(path, part, _tensors_in(path, part))


def _tensors_in(path: Path, part: str | None) -> dict[str, Tensor]:
    """The tensors of a pickle, or of a part of it, without wrappers' prefixes."""
    content = load_pickle(path)
    groups = {key: value for key, value in content.items() if isinstance(value, Mapping) and _all_tensors(value)}
    if _all_tensors(content):
        if part:
            raise UserError(f"{path} holds one model, and no part '{part}'")
        tensors = content
    elif part or len(groups) == 1:
        part = part or next(iter(groups))
        if part not in groups:
            raise UserError(f"{path} has no part '{part}'; it holds {', '.join(groups) or 'no tensors'}")
        tensors = groups[part]
    elif groups:
        raise UserError(f"{path} holds several models: choose one with --part: {', '.join(groups)}")
    else:
        raise UserError(f"{path} holds no dictionary of tensors; its keys are {some(list(map(str, content)))}")
    by_name = {_unwrapped(name): tensor for name, tensor in tensors.items()}
    if len(by_name) != len(tensors):
        names = [_unwrapped(name) for name in tensors]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"{path} holds tensors twice, with a training wrapper's prefix and without: {some(twice)}")
    return by_name


def parts(path: Path) -> list[str]:
    """Names of the models in a pickle that holds several; empty for any other file."""
    if not path.is_file() or path.suffix == ".safetensors":
        return []
    content = load_pickle(path)
    if _all_tensors(content):
        return []
    return [str(key) for key, value in content.items() if isinstance(value, Mapping) and _all_tensors(value)]


def load_pickle(path: Path) -> Mapping[str, Any]:
    """What ``torch.save`` wrote, read as data and mapped into memory where its format allows.

    Raises:
        UserError: damaged, no weights at all, or it would run code.
    """
    try:
        with warnings.catch_warnings():
            # What an unusual protocol holds is read, or refused below; torch would ask for a report to its developers.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except UserError:  # of a web page, say, which needs no words around it
        raise
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "weights_only" in str(error).lower():
            raise UserError(
                f"{path} holds Python objects and not only tensors, and reading it could run code: refused; "
                "save its state dictionary alone, or as safetensors"
            ) from error
        raise _damaged(path, error) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _all_tensors(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(name, str) and isinstance(v, Tensor) for name, v in content.items())


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _dtype(name: str, tensor: str, file: Path) -> torch.dtype:
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
             "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # fmt: skip
    if name not in known:
        raise UserError(f"{file}: tensor '{tensor}' has type {name}, which can't be read here")
    return known[name]


def _damaged(path: Path, error: Exception) -> UserError:
    if not path.is_file():
        return UserError(f"weights {path} do not exist")
    reason = str(error).split("\n", 1)[0] or type(error).__name__
    return UserError(f"{path} is damaged or not weights ({reason}); fetch or make it again")


def some(names: list[str], most: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def write_shards(
    folder: Path, stem: str, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write tensors as safetensors, in shards of at most ``shard_bytes`` with an index, or in one file if they fit.

    The files are in place only when all of them are written.

    Raises:
        UserError: the folder can't be written.
    """
    shards: list[tuple[Path, list[str], int]] = []
    held: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        partial = folder / f".{stem}.{os.getpid()}.{len(shards)}.partial"
        save_file(held, partial, {"format": "pt"})
        shards.append((partial, list(held), size))
        held.clear()

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensor in tensors:
            if held and size + tensor.nbytes > shard_bytes:
                flush()
                size = 0
            held[name] = tensor.detach().cpu().contiguous()
            size += tensor.nbytes
        flush()
        return _settle(folder, stem, shards)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} can't be written: {error}; choose another folder or free some space") from error
    finally:
        for partial in folder.glob(f".{stem}.{os.getpid()}.*.partial"):
            partial.unlink()


def _settle(folder: Path, stem: str, shards: list[tuple[Path, list[str], int]]) -> list[Path]:
    """Give the finished files their names, and write the index last."""
    if len(shards) == 1:
        return [shards[0][0].replace(folder / f"{stem}.safetensors")]
    final = [folder / f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for (partial, _, _), path in zip(shards, final, strict=True):
        partial.replace(path)
    where = {name: path.name for (_, names, _), path in zip(shards, final, strict=True) for name in names}
    total = sum(size for _, _, size in shards)
    weights.write_json(folder / f"{stem}{INDEX}", {"metadata": {"total_size": total}, "weight_map": where})
    return [*final, folder / f"{stem}{INDEX}"]
