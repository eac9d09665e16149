"""Trajectories (ODE pairs) in a store: ``states`` of a row, ``k f c h w`` in fp16, at the times in the store's header.

A row has the caption, and the embeddings of its text where the store has that field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causvid.data.latents import as_stored, open_store, text_of
from causvid.data.rows import Row
from causvid.errors import UserError
from causvid.schedule import state_indices
from causvid.types import Text, TextEncoder, Trajectory

STATES = "states"


def header(times: Tensor, shape: Sequence[int], text: Text, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a store of trajectories.

    Args:
        times: of the states, from noise to data.
        shape: (f, c, h, w) of a state.
        text: any embeddings of the encoder, for their size.
        identity: ``codec``, ``text_encoder`` and ``provenance``, in plain data.
    """
    length, dim = text.embeddings.shape[1:]
    return {
        "fields": {
            STATES: {"dtype": "float16", "shape": [len(times), *shape]},
            "text": {"dtype": as_stored(text.embeddings[0]).dtype.name, "shape": [None, dim]},
        },
        "times": times.tolist(), "text_length": length, "text_dim": dim, **identity,
    }  # fmt: skip


def key_of(sample: int) -> str:
    """The key of a sample's row; keys sort as samples do."""
    return f"{sample:08d}"


def rows_of(samples: Sequence[int], captions: Sequence[str], text: Text, trajectory: Trajectory) -> list[Row]:
    """Rows of a batch, whose states are ``k b f c h w``.

    Raises:
        ValueError: states beyond fp16.
    """
    states = trajectory.states.to("cpu", torch.float16).contiguous()
    if not torch.isfinite(states).all():
        raise ValueError("a trajectory holds numbers that are not finite in fp16")
    return [
        Row(
            key_of(sample), {STATES: states[:, i].numpy(), "text": as_stored(text.embeddings[i])},
            {"caption": captions[i]},
        )
        for i, sample in enumerate(samples)
    ]  # fmt: skip


class Trajectories:
    """The trajectories of a store, read as they are asked for.

    Args:
        path: the store: a folder, or an address that is fetched once.
        wanted: times of the states to read, from noise to data; each must be stored.
        shape: (f, c, h, w) of a state.
        expected: ``codec`` and ``text_encoder`` of the spec.
        where: the spec's key, for messages.

    Attributes:
        times: of the states that are read.

    Raises:
        UserError: no store of trajectories, of other times or another shape, or made by another codec.
    """

    def __init__(
        self, path: str, wanted: Sequence[float], shape: Sequence[int], expected: Mapping[str, Any], where: str
    ) -> None:
        self.reader = open_store(path, expected, where)
        field = self.reader.header["fields"].get(STATES)
        if field is None:
            raise UserError(
                f"{where}: {path} holds {', '.join(self.reader.header['fields'])} and no trajectories; pack the "
                "pairs of a finished run, or released ones with --times"
            )
        times = torch.tensor(self.reader.header.get("times") or [])
        count, *stored = field["shape"]
        if len(times) != count or not (times.diff() < 0).all() or times[0] > 1 or times[-1] != 0:
            raise UserError(f"{where}: {path} has {count} states at the times {times.tolist()}; expected 1 down to 0")
        if tuple(stored) != tuple(shape):
            raise UserError(f"{where}: {path} has states of shape {stored}; the spec's latents are {list(shape)}")
        self._chosen = state_indices(times, wanted)
        self.times = times[self._chosen]
        self.keys = list(self.reader.entries)
        if not self.keys:
            raise UserError(f"{where}: {path} holds no rows")

    def __len__(self) -> int:
        return len(self.keys)

    def ready_text(self, encoder: TextEncoder) -> None:
        """Have ``encoder`` make each text that the store lacks, so that one that keeps them can be let go of."""
        if "text" not in self.reader.header["fields"]:
            for entry in self.reader.entries.values():
                encoder.encode([str(entry.facts.get("caption", ""))])

    def rows(self, numbers: Sequence[int], encoder: TextEncoder) -> tuple[Trajectory, Text]:
        """Trajectories in fp32 and texts of some rows; ``encoder`` makes the text of a store that has none."""
        keys = [self.keys[number] for number in numbers]
        self.reader.prefetch(keys)
        rows = [self.reader.row(key) for key in keys]
        states = np.stack([row.arrays[STATES][self._chosen] for row in rows], axis=1, dtype=np.float32)
        if "text" in self.reader.header["fields"]:
            text = text_of(rows, self.reader.header["text_length"])
        else:
            text = encoder.encode([str(row.facts.get("caption", "")) for row in rows])
        return Trajectory(torch.from_numpy(states), self.times), text
