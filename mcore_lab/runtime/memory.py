"""How many bytes of tensors a rank holds, counted in the same way on CPU and on CUDA."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on: `held` now, and at most, `peak`.

    A tensor counts from the operation that made it until its storage is freed; views count once.
    What a kernel takes for itself while it runs, and what an allocator keeps, does not count: so a
    step on a laptop holds what it would hold on a GPU. Tensors made before are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._counted: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {_key(tensor) for tensor in tree_iter((args, kwargs)) if _has_storage(tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if _has_storage(tensor) and _key(tensor) not in given:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted:
            return

        def freed(_: object) -> None:
            self._counted.pop(key, None)
            self.held -= size

        self._counted[key] = weakref.ref(storage, freed)
        self.held += size
        self.peak = max(self.peak, self.held)


def _has_storage(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
