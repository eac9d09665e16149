"""Training from a store of latents: the dataset ``store``, and a loader that reads ahead in workers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from causvid.data.folders import Folder, cached
from causvid.data.lmdb_store import Reader
from causvid.data.order import Order, place
from causvid.errors import UserError
from causvid.registry import register
from causvid.types import Text

# Views of the map are read-only on purpose; they are stacked into a batch, which is a copy.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def padded(text: np.ndarray, length: int) -> Tensor:
    """Embeddings ``l d`` with the zeros after the prompt put back."""
    out = torch.zeros(length, text.shape[1])
    out[: len(text)] = torch.from_numpy(text.astype(np.float32))
    return out


@register("dataset", "store")
class StoreDataset:
    """Latents and text embeddings of a store that 'causvid data pack' made.

    Args:
        path: the store: a folder, or an address that is fetched once.
        shape: (f, c, h, w) of the latents; rows of other shapes are left out.
        held_out: how many rows, the last by key, are for testing alone. 0 tests on the rows that are trained on: that
            shows what is memorised, and nothing of what is learnt.
        seed: of the order in which rows are read.
    """

    def __init__(
        self,
        path: str,
        shape: Sequence[int],
        held_out: int = 0,
        seed: int = 0,
        codec: Any = None,
        text_encoder: Any = None,
    ) -> None:
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"shape is f, c, h, w of the latents, got {list(shape)}")
        if held_out < 0:
            raise ValueError(f"held_out must be at least 0, got {held_out}")
        self.path, self.latent_shape, self.held_out, self.seed = path, tuple(shape), held_out, seed
        self._expected = {"codec": codec, "text_encoder": text_encoder}

    @property
    def files(self) -> tuple[Path, ...]:
        """The file by which an experiment knows its data; none as long as there is no store."""
        folder = Folder(self.path)
        if not folder.exists("digest.json"):
            return ()
        return (cached(self.path) / "digest.json",)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Words of all captions; none as long as there is no store."""
        if not self.files:
            return ()
        captions = (str(entry.facts.get("caption", "")) for entry in self.reader.entries.values())
        return tuple(sorted({word for caption in captions for word in caption.lower().split()}))

    @cached_property
    def reader(self) -> Reader:
        if not Folder(self.path).exists():
            raise UserError(
                f"world.dataset: there is no store at {self.path}; make it with 'causvid data process', 'encode' and "
                "'pack' (docs/data.md), or give another world.dataset.path"
            )
        reader = Reader(cached(self.path))
        for name, wanted in self._expected.items():
            there = reader.header.get(name)
            told = None if there is None else {k: v for k, v in there.items() if k not in ("source", "files")}
            # A released store says nothing of its codec; its text is encoded from the captions.
            if wanted is not None and there is not None and told != {"name": "unknown"} and told != dict(wanted):
                raise UserError(f"{self.path} was made with {name} {told}; the spec's world.{name} is {dict(wanted)}")
        return reader

    @cached_property
    def keys(self) -> dict[str, list[str]]:
        """Keys of the rows of the wanted shape, by split."""
        found = [key for key, entry in self.reader.entries.items() if entry.shape("latents") == self.latent_shape]
        if len(found) <= self.held_out:
            shapes = sorted({entry.shape("latents") for entry in self.reader.entries.values()})
            raise UserError(
                f"{self.path} has {len(found)} rows of shape {list(self.latent_shape)}, of which {self.held_out} are "
                f"held out; it holds the shapes {', '.join(str(list(shape)) for shape in shapes)}"
            )
        cut = len(found) - self.held_out
        return {"train": found[:cut], "test": found[cut:] or found}

    def latents(self, indices: Sequence[int], split: str = "train") -> tuple[Tensor, list[str], Text | None]:
        """Latents ``b f c h w`` in fp32, captions, and their embeddings where the store holds them.

        Training samples are counted through all epochs, each of which has an order of its own.
        """
        keys = self.keys[split]
        train = split == "train"
        chosen = [keys[place(self.seed, "rows", i, len(keys)) if train else i % len(keys)] for i in indices]
        self.reader.prefetch(chosen)
        return collate(self.reader, chosen)

    def unconditional(self) -> Tensor | None:
        """Embeddings ``l d`` of the empty prompt, where the store holds them."""
        return unconditional(self.reader.header)


def unconditional(header: Mapping[str, Any]) -> Tensor | None:
    """Embeddings ``l d`` of the empty prompt, where a store's header holds them."""
    if header.get("unconditional") is None:
        return None
    rows = np.array(header["unconditional"], np.float32).reshape(-1, header["text_dim"])
    return padded(rows, header["text_length"])


def collate(reader: Reader, keys: Sequence[str]) -> tuple[Tensor, list[str], Text | None]:
    """A batch of rows of one shape: latents in fp32, captions, text."""
    rows = [reader.row(key) for key in keys]
    latents = torch.stack([torch.from_numpy(row.arrays["latents"]) for row in rows]).float()
    text = None
    if "text" in reader.header["fields"]:
        text = Text(torch.stack([padded(row.arrays["text"], reader.header["text_length"]) for row in rows]))
    return latents, [str(row.facts.get("caption", "")) for row in rows], text


class _Batches(Dataset):
    """Batches by their keys, for workers: each opens the store for itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader: Reader | None = None

    def __getitems__(self, keys: list[str]) -> tuple[Tensor, list[str], Text | None]:
        if self._reader is None:
            self._reader = Reader(self.folder)
        self._reader.prefetch(keys)
        return collate(self._reader, keys)

    def __getitem__(self, key: str) -> Any:
        return self.__getitems__([key])


def _as_it_is(batch: Any) -> Any:
    return batch


def load(
    path: str, batch: int, start: int = 0, seed: int = 0, rank: int = 0, world: int = 1, workers: int = 0,
    image_batch: int | None = None, stop: int | None = None,
) -> Iterator[tuple[Tensor, list[str], Text | None]]:  # fmt: skip
    """Batches of a store, in buckets of shape, from step ``start`` on: a resumed run reads what it would have read.

    Args:
        path: the store.
        batch: rows of a batch on this rank.
        start: the step to begin with.
        seed: of the shuffling.
        rank, world: this process's number among how many.
        workers: processes that read ahead; the order does not depend on them.
        image_batch: rows of a batch of single frames, where it is another.
        stop: the step to end before; default never.
    """
    folder = cached(path)
    buckets = by_shape(Reader(folder))
    images = {shape: image_batch or batch for shape in buckets if shape[0] == 1}
    order = Order(buckets, batch, seed, rank, world, images)
    batches: Iterable[list[str]] = order.steps(start, stop)
    yield from DataLoader(
        _Batches(folder), batch_sampler=batches, num_workers=workers, collate_fn=_as_it_is,
        multiprocessing_context="spawn" if workers else None,
    )  # fmt: skip


def by_shape(reader: Reader) -> dict[tuple[int, ...], list[str]]:
    """Keys of a store's rows by the shape of their latents."""
    buckets: dict[tuple[int, ...], list[str]] = {}
    for key, entry in reader.entries.items():
        buckets.setdefault(entry.shape("latents"), []).append(key)
    return buckets
