"""Bytes that torch's operations hold, counted while they run; also with tensors that have no memory."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until nothing holds them; to `nonzero` every token is supervised."""

    def __init__(self, parameters: Iterator[torch.Tensor], most_supervised: int):
        super().__init__()
        self.most_supervised = most_supervised  # a thousand chunks of the loss would show no more than a few
        self.live = self.peak = 0
        self.sums_in_place = False  # what autograd adds up in place; for fake tensors it would make a new one
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in parameters}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            num_found = min(args[0].numel(), self.most_supervised)
            output = args[0].new_empty((num_found, args[0].ndim), dtype=torch.int64)
        elif func is torch.ops.aten.add.Tensor and self.sums_in_place and not torch.is_grad_enabled():
            output = torch.ops.aten.alias.default(args[0])
        else:
            output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def take_peak(self) -> int:
        """The peak since this was asked last."""
        peak, self.peak = self.peak, self.live
        return peak
