"""The distributed optimizer's state of parameters that lie in more than one bucket.

Buckets are padded to a whole number of shards. Megatron-Core (to 0.19) gathers their state without
the padding, and then finds each parameter where it would be with it: after the first bucket every
parameter is saved with a neighbour's moments and weights. There are several buckets where gradients
are reduced while others are computed, and where embeddings are tied across pipeline stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from mcore_lab.checkpoint.adam import members_of


@contextmanager
def found_in_buckets(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let each parameter's state be found where it lies, while the sharded state is made."""
    sharded = [one for one in members_of(optimizer) if isinstance(one, DistributedOptimizer)]
    for one in sharded:
        one.get_parameter_state_dp_zero = partial(_padded, one, one.get_parameter_state_dp_zero)
    try:
        yield
    finally:
        for one in sharded:
            del one.get_parameter_state_dp_zero


def _padded(one: Any, gather: Any, *args: Any, **kwargs: Any) -> dict[Any, Any] | None:
    """Gather the state, `[unpadded]` for each buffer, and return it as buffers have it: `[all]`."""
    state: dict[Any, Any] | None = gather(*args, **kwargs)
    for number, buffer in enumerate(one.buffers if state else ()):
        for tensors in state[number].values():  # type: ignore[index]
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor) and len(tensor) == buffer.numel_unpadded:
                    tensors[name] = _with_padding(tensor, buffer)
    return state


def _with_padding(unpadded: torch.Tensor, buffer: Any) -> torch.Tensor:
    whole = unpadded.new_zeros(buffer.numel)
    parts = unpadded.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, part in zip(buffer.buckets, parts, strict=True):
        whole[bucket.offset : bucket.offset + len(part)] = part
    return whole
