"""Sharded tensors put together: by name, whole, and with a word on copies that differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from mcore_lab.checkpoint.state import model_state

Tensors = dict[str, torch.Tensor]

_LAYERS = re.compile(r"\blayers\.(?!\d)")
_EXPERTS = re.compile(r"\bexperts\.(?=linear_fc)")


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor, or of a copy of it only what tells whether it is the same."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    prepended: int
    data: np.ndarray | None
    """As an array: pickling one takes a fraction of what pickling a tensor does."""
    fingerprint: tuple[float, float]
    rank: int


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What all ranks hold together; on other ranks than 0 it is empty."""

    tensors: Tensors
    """Each layer's and each expert's by a name of its own, in fp32, on the CPU."""
    torn: dict[str, tuple[float, str]]
    """Names whose copies differ: by how much of their norm, and the ranks that hold them."""


def whole_tensors(state: Any) -> Whole:
    """Put together the sharded tensors of all ranks' `state`; every rank calls this."""
    rank = dist.get_rank()
    pieces = [_piece(shard, rank) for shard in _shards(nested_values(state))]
    of_ranks: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(pieces, of_ranks)
    if of_ranks is None:
        return Whole(tensors={}, torn={})
    everything = [piece for of_rank in of_ranks for piece in of_rank]
    tensors: Tensors = {}
    for key, whole, prepended in _assembled(everything):
        tensors |= dict(_named(key, whole, prepended))
    return Whole(tensors=tensors, torn=_torn(everything))


def gradients(model: Sequence[Any]) -> dict[str, Any]:
    """Return the sharded state of the model's reduced gradients, by the names of its weights.

    Under the distributed optimizer each data-parallel rank has reduced a part of every bucket: the
    parts are gathered first, in place, where the optimizer does not look.
    """
    for chunk in model:
        _gather_reduced(chunk)
    grads = {
        id(parameter): parameter.main_grad
        for chunk in model
        for parameter in chunk.parameters()
        if getattr(parameter, "main_grad", None) is not None
    }
    return {
        str(number): _with_data(shard, grads[id(shard.data)])
        for number, shard in enumerate(nested_values(model_state(model)))
        if isinstance(shard, ShardedTensor | ShardedTensorFactory) and id(shard.data) in grads
    }


def _gather_reduced(chunk: Any) -> None:
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            own = shard_buffer(bucket.grad_data, ranks.size())[ranks.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=ranks)


def _with_data(shard: Any, data: torch.Tensor) -> Any:
    """Return a shard of something else that is split as a weight is."""
    if isinstance(shard, ShardedTensorFactory):
        return replace(shard, data=data)
    return replace(shard, data=data, dtype=data.dtype)


def _shards(values: Iterable[Any]) -> Iterator[ShardedTensor]:
    for value in values:
        if isinstance(value, ShardedTensorFactory):
            yield from _shards(nested_values({"": value.build()}))
        elif isinstance(value, ShardedTensor) and value.data is not None:
            yield value


def _piece(shard: ShardedTensor, rank: int) -> _Piece:
    data = shard.data.detach().float().cpu()
    return _Piece(
        key=shard.key,
        shape=tuple(shard.global_shape),
        offset=tuple(shard.global_offset),
        prepended=shard.prepend_axis_num,
        data=data.numpy().copy() if is_main_replica(shard.replica_id) else None,
        fingerprint=_fingerprint(data),
        rank=rank,
    )


def _fingerprint(data: torch.Tensor) -> tuple[float, float]:
    """Return the norm of a tensor and its product with a fixed wave: equal for equal tensors."""
    values = data.flatten().double()
    wave = torch.arange(len(values), dtype=torch.float64).cos()
    return float(values.norm()), float(values @ wave)


def _assembled(pieces: list[_Piece]) -> Iterator[tuple[str, torch.Tensor, int]]:
    wholes: dict[str, tuple[torch.Tensor, int]] = {}
    for piece in pieces:
        if piece.data is None:
            continue
        if piece.key not in wholes:
            wholes[piece.key] = torch.full(piece.shape, torch.nan), piece.prepended
        whole, prepended = wholes[piece.key]
        data = torch.from_numpy(piece.data)
        data = data.reshape((1,) * prepended + tuple(data.shape))
        places = zip(piece.offset, data.shape, strict=True)
        whole[tuple(slice(first, first + size) for first, size in places)] = data
    for key, (whole, prepended) in wholes.items():
        yield key, whole, prepended


def _named(key: str, whole: torch.Tensor, prepended: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that axes in front hold together: of each layer, of each expert."""
    if prepended == 0:
        # A view would take all of the tensor that it is a part of along when it is pickled.
        yield key, whole.clone()
        return
    for number, part in enumerate(whole):
        name = _LAYERS.sub(f"layers.{number}.", key, count=1)
        if name == key:
            name = _EXPERTS.sub(f"experts.{number}.", key, count=1)
        if name == key:
            name = f"{key}[{number}]"
        yield from _named(name, part, prepended - 1)


def _torn(pieces: list[_Piece]) -> dict[str, tuple[float, str]]:
    copies: dict[tuple[str, tuple[int, ...]], list[_Piece]] = {}
    for piece in pieces:
        copies.setdefault((piece.key, piece.offset), []).append(piece)
    torn: dict[str, tuple[float, str]] = {}
    for (key, offset), same in copies.items():
        norms, waves = zip(*(piece.fingerprint for piece in same), strict=True)
        spread = max(max(norms) - min(norms), max(waves) - min(waves))
        if spread > 0:
            name = _name_at(key, offset, same[0].prepended)
            share = spread / max(max(norms), torch.finfo(torch.float32).tiny)
            ranks = ", ".join(str(piece.rank) for piece in same)
            torn[name] = max(torn.get(name, (0.0, "")), (share, ranks))
    return torn


def _name_at(key: str, offset: tuple[int, ...], prepended: int) -> str:
    for number in offset[:prepended]:
        name = _LAYERS.sub(f"layers.{number}.", key, count=1)
        key = name if name != key else _EXPERTS.sub(f"experts.{number}.", key, count=1)
    return key
