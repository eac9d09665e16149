"""Training from a store of latents: the dataset ``store``, and a loader that reads ahead in workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from causvid.data import digest
from causvid.data.copies import cached
from causvid.data.folders import Folder
from causvid.data.lmdb_store import Reader
from causvid.data.order import Order, place
from causvid.data.rows import Row, padded, trimmed
from causvid.errors import UserError
from causvid.registry import register
from causvid.types import Text


@register("dataset", "store")
class StoreDataset:
    """Latents and text embeddings of a store that 'causvid data pack' made.

    Args:
        path: the store: a folder, or an address that is fetched once.
        shape: (f, c, h, w) of the latents that are made and tested on; rows of other shapes are left out.
        held_out: how many rows, the last by key, are for testing alone. 0 tests on the rows that are trained on: that
            shows what is memorised, and nothing of what is learnt.
        also: shapes that are trained on beside ``shape``, such as [1, c, h, w] for pictures. Needs ``group``.
        group: so many samples that follow one another have one shape, drawn by how many rows each has; a multiple of
            every batch.
        seed: of the order in which rows are read.
    """

    def __init__(
        self,
        path: str,
        shape: Sequence[int],
        held_out: int = 0,
        also: Sequence[Sequence[int]] = (),
        group: int = 0,
        seed: int = 0,
        codec: Any = None,
        text_encoder: Any = None,
    ) -> None:
        shapes = [tuple(shape), *map(tuple, also)]
        for each in shapes:
            if len(each) != 4 or min(each) < 1:
                raise ValueError(f"a shape is f, c, h, w of the latents, got {list(each)}")
        if len(set(shapes)) < len(shapes) or len({each[1] for each in shapes}) > 1:
            raise ValueError(f"shape and also: different shapes of as many channels, got {list(map(list, shapes))}")
        if held_out < 0 or group < 0 or bool(also) != bool(group):
            raise ValueError(
                f"held_out at least 0, group at least 1 with 'also' and 0 without; got {held_out}, {group}"
            )
        self.path, self.latent_shape, self.held_out, self.seed = path, shapes[0], held_out, seed
        self.also, self.group = shapes[1:], group
        self._expected = {"codec": codec, "text_encoder": text_encoder}

    @property
    def files(self) -> tuple[Path, ...]:
        """The file by which an experiment knows its data; none as long as there is no store."""
        return digest_file(self.path)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Words of all captions; none as long as there is no store."""
        if not self.files:
            return ()
        captions = (str(entry.facts.get("caption", "")) for entry in self.reader.entries.values())
        return tuple(sorted({word for caption in captions for word in caption.lower().split()}))

    @cached_property
    def reader(self) -> Reader:
        return open_store(self.path, self._expected, "world.dataset")

    @cached_property
    def keys(self) -> dict[str, list[str]]:
        """Keys of the rows of ``shape``, by split."""
        found = self._buckets[self.latent_shape]
        cut = len(found) - self.held_out
        return {"train": found[:cut], "test": found[cut:] or found}

    @cached_property
    def _buckets(self) -> dict[tuple[int, ...], list[str]]:
        """Keys by each of the wanted shapes; there are some of every one."""
        there = by_shape(self.reader)
        found = {shape: there.get(shape, []) for shape in (self.latent_shape, *self.also)}
        for shape, keys in found.items():
            held_out = self.held_out if shape == self.latent_shape else 0
            if len(keys) <= held_out:
                raise UserError(
                    f"{self.path} has {len(keys)} rows of shape {list(shape)}, of which {held_out} are held out; it "
                    f"holds the shapes {', '.join(str(list(each)) for each in sorted(there))}"
                )
        return found

    @cached_property
    def _order(self) -> Order:
        return Order({**self._buckets, self.latent_shape: self.keys["train"]}, self.group, self.seed)

    def latents(self, indices: Sequence[int], split: str = "train") -> tuple[Tensor, list[str], Text | None]:
        """Latents ``b f c h w`` in fp32, captions, and their embeddings where the store holds them.

        Training samples are counted through all epochs, each of which has an order of its own.
        """
        keys = self.keys[split]
        if split != "train":
            chosen = [keys[i % len(keys)] for i in indices]
        elif not self.also:
            chosen = [keys[place(self.seed, "rows", i, len(keys))] for i in indices]
        else:
            groups = {i // self.group for i in indices}
            if len(groups) > 1:
                raise UserError(
                    f"world.dataset.group: a batch of {len(indices)} samples lies in several groups of {self.group}; "
                    "give a multiple of every batch of the spec"
                )
            group = self._order.step(groups.pop())
            chosen = [group[i % self.group] for i in indices]
        self.reader.prefetch(chosen)
        return collate(self.reader, chosen)

    def unconditional(self) -> Tensor | None:
        """Embeddings ``l d`` of the empty prompt, where the store holds them."""
        return unconditional(self.reader.header)


def digest_file(path: str) -> tuple[Path, ...]:
    """The file that tells a store's content; none as long as there is no finished store."""
    return (cached(path) / digest.NAME,) if Folder(path).exists(digest.NAME) else ()


def open_store(path: str, expected: Mapping[str, Any], where: str) -> Reader:
    """A store that a spec names.

    Args:
        path: the store: a folder, or an address that is fetched once.
        expected: ``codec`` and ``text_encoder`` of the spec.
        where: the spec's key, for messages.

    Raises:
        UserError: there is none, it is not finished, or another codec or text encoder made it.
    """
    if not Folder(path).exists():
        raise UserError(
            f"{where}: there is no store at {path}; make it with 'causvid data process', 'encode' and 'pack' "
            f"(docs/data.md), or give another path"
        )
    place = cached(path)
    if not (place / digest.NAME).is_file():  # it may lack rows, and an experiment could not know its data
        raise UserError(f"{where}: {path} is not finished: it has no {digest.NAME}; run 'causvid data pack' again")
    reader = Reader(place)
    for name, wanted in expected.items():
        there = reader.header.get(name)
        told = None if there is None else {k: v for k, v in there.items() if k not in ("source", "files")}
        # A released store says nothing of its codec; its text is encoded from the captions.
        if wanted is not None and there is not None and told != {"name": "unknown"} and told != dict(wanted):
            raise UserError(f"{path} was made with {name} {told}; the spec's world.{name} is {dict(wanted)}")
    return reader


def unconditional(header: Mapping[str, Any]) -> Tensor | None:
    """Embeddings ``l d`` of the empty prompt, where a store's header holds them."""
    if header.get("unconditional") is None:
        return None
    rows = np.array(header["unconditional"], np.float32).reshape(-1, header["text_dim"])
    return torch.from_numpy(padded(rows, header["text_length"]))


def text_of(rows: Sequence[Row], length: int) -> Text:
    """The embeddings that rows hold, as one batch."""
    return Text(torch.from_numpy(np.stack([padded(row.arrays["text"], length) for row in rows])))


def as_stored(text: Tensor) -> np.ndarray:
    """Embeddings ``l d`` as a row holds them: fp32 as it is, other types in fp16; without the zeros at the end."""
    return trimmed((text if text.dtype == torch.float32 else text.to(torch.float16)).cpu().numpy())


def collate(reader: Reader, keys: Sequence[str]) -> tuple[Tensor, list[str], Text | None]:
    """A batch of rows of one shape: latents in fp32, captions, text."""
    rows = [reader.row(key) for key in keys]
    latents = torch.from_numpy(np.stack([row.arrays["latents"] for row in rows], dtype=np.float32))
    text = None
    if "text" in reader.header["fields"]:
        text = text_of(rows, reader.header["text_length"])
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
    """Keys of a store's rows by the shape of their latents.

    Raises:
        UserError: it holds something else.
    """
    if "latents" not in reader.header["fields"]:
        raise UserError(
            f"{reader.folder} holds {', '.join(reader.header['fields'])}, no latents; is it a store of pairs?"
        )
    buckets: dict[tuple[int, ...], list[str]] = {}
    for key, entry in reader.entries.items():
        buckets.setdefault(entry.shape("latents"), []).append(key)
    return buckets
