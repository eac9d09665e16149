"""Bytes of tensors that are alive, counted operation by operation: exact, whatever the allocator keeps."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive after an operation, at their peak.

    PyTorch's own tracker refuses modules that are called several times, as a critic is and the VAE's parts are.
    """

    def __init__(self, *held: object) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = self.peak = 0
        self._note(held)

    def _note(self, tree: object) -> None:
        for each in tree_leaves(tree):
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                storage = each.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self.live:
                    self.live[reference.cdata] = (reference, storage.nbytes())
                    self.most += storage.nbytes()
        if self.most > self.peak:  # which of them are gone matters only now
            self.live = {key: found for key, found in self.live.items() if not found[0].expired()}
            self.most = sum(size for _, size in self.live.values())
            self.peak = max(self.peak, self.most)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._note((args, kwargs, out))
        return out
