"""How many bytes of a rank's memory are weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer


def held_bytes(
    model: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
) -> dict[str, int]:
    """Return the bytes of the tensors that a rank holds between two steps, by kind.

    Memory that several tensors share, as tied weights do or the views of a buffer, counts once, and
    for the first kind that it is of; the padding of a buffer counts.
    """
    counted: set[int] = set()
    kinds: dict[str, Iterable[torch.Tensor]] = {
        "weights": (weight for chunk in model for weight in chunk.parameters()),
        "gradients": (buffer.grad_data for chunk in model for buffer in _buffers(chunk)),
        "optimizer state": _optimizer_tensors(optimizer),
    }
    return {kind: _bytes_not_counted(tensors, counted) for kind, tensors in kinds.items()}


def _buffers(chunk: DistributedDataParallel) -> list[Any]:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def _optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    """Yield the moments, and the main weights where the model's own are of less precision."""
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        torchs = single.optimizer
        if torchs is None:  # A rank without parameters for it has none.
            continue
        for group in torchs.param_groups:
            yield from group["params"]
        for state in torchs.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _bytes_not_counted(tensors: Iterable[torch.Tensor], counted: set[int]) -> int:
    """Return the bytes of the storages that are not counted yet, and count them."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in counted:
            counted.add(storage._cdata)
            total += storage.nbytes()
    return total
