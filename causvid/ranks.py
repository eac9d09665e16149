"""Several processes that train as one (``torchrun``): who this one is, its part of a batch, and means over all.

Alone, everything here is the identity, to the bit.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from causvid.errors import UserError

T = TypeVar("T")
# Stages that one process does alone keep the others waiting for as long as they take.
PATIENCE = timedelta(days=7)


def start(device: torch.device) -> torch.device:
    """Join the other processes, if ``torchrun`` started several; returns this process's own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        on_device = dist.Backend.default_device_backend_map.get(device.type)
        if on_device is None:
            raise UserError(f"runtime.device: several processes can't train together on '{device.type}'")
        backend = f"{device.type}:{on_device}" if device.type == "cpu" else f"cpu:gloo,{device.type}:{on_device}"
        if device.type != "cpu":
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    if count() > 1 and device.type != "cpu":
        return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
    return device


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def number() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this is the one that writes and speaks."""
    return number() == 0


def wait() -> None:
    """Go on when all have come here."""
    if count() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, where waiting costs nothing


def mean(value: Tensor) -> Tensor:
    """Mean over the processes, without gradient."""
    if count() == 1:
        return value
    out = value.detach().clone()
    dist.all_reduce(out)
    return out / count()


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of values by weight over the whole batch, of which each process holds a part of equal size.

    What the processes return differs; the mean of it is the mean over the batch, and so it is for gradients.
    """
    return (values * weights).sum() / mean(weights.sum()).clamp(min=1 / count())


def rows(samples: Sequence[int]) -> Sequence[int]:
    """This process's part of a batch.

    Raises:
        UserError: the batch can't be shared evenly.
    """
    if len(samples) % count():
        raise UserError(f"a batch of {len(samples)} can't be shared by {count()} processes; choose a multiple of them")
    share = len(samples) // count()
    return samples[number() * share : (number() + 1) * share]


def agreed(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; what it refuses is refused by all."""
    if count() == 1:
        return make()
    said: list[Any] = [None, None]
    if first():
        try:
            said[0] = make()
        except UserError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, device=torch.device("cpu"))
    if said[1] is not None:
        raise UserError(said[1])
    return said[0]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, in every process; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as ``like`` is; as it is where that is not sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    shards = cast(DTensor, like)
    # Every process has the whole, so nothing is sent.
    return distribute_tensor(tensor.to(shards.device), shards.device_mesh, shards.placements, src_data_rank=None)
