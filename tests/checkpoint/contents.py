"""What a checkpoint holds, read without a process group, and where two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

_NOT_STATE = ("_extra_state", "common_state")
"""Of Transformer Engine, and where Megatron-Core from 0.17 on keeps what all ranks have alike."""


def sharded_of(checkpoint: Path) -> dict[str, Any]:
    """Return whole tensors, and the objects of ranks, by their keys."""
    state: dict[str, Any] = {}
    reader, planner = FileSystemReader(checkpoint), _EmptyStateDictLoadPlanner()
    _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
    return {k: value for k, value in state.items() if not any(name in k for name in _NOT_STATE)}


def common_of(checkpoint: Path) -> dict[str, Any]:
    """Return what all ranks have alike."""
    common: dict[str, Any] = load_common_state_dict(str(checkpoint))
    return common


def differences(one: Path, other: Path) -> list[str]:
    """Return the keys of what is not the same in both, bit for bit."""
    left, right = sharded_of(one), sharded_of(other)
    return sorted(
        key
        for key in left | right
        if not _same(left.get(key, "missing"), right.get(key, "missing"))
    )


def _same(left: Any, right: Any) -> bool:
    match left, right:
        case torch.Tensor(), torch.Tensor():
            return left.dtype == right.dtype and torch.equal(left, right)
        case {**pairs}, {**others}:
            return pairs.keys() == others.keys() and all(_same(pairs[k], others[k]) for k in pairs)
        case ((list() | tuple()), (list() | tuple())):
            return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)
