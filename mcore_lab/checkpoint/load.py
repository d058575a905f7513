"""Read a sharded checkpoint into a model of any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mcore_lab.checkpoint.state import full_state, model_keys, model_state, unwrapped
from mcore_lab.errors import CheckpointError

_SHOWN = 3


def load_weights(
    path: Path, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer
) -> None:
    """Load the weights of the checkpoint at `path` and nothing else.

    Raises CheckpointError if it cannot be read or is of another model.
    """
    _put_weights(chunks, _load(path, model_state(chunks)))
    # Under bf16 the optimizer made its own copies of the weights before these were loaded.
    optimizer.reload_model_params()


def load_checkpoint(
    path: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> int:
    """Load weights, optimizer and schedule of the checkpoint at `path`; return its step.

    Raises CheckpointError if it cannot be read or is of another model.
    """
    state = _load(path, full_state(chunks, optimizer, scheduler, 0, is_loading=True))
    _put_weights(chunks, state)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["opt_param_scheduler"])
    return int(state["iteration"])


def _put_weights(chunks: Sequence[torch.nn.Module], state: dict[str, Any]) -> None:
    for key, chunk in zip(model_keys(chunks), chunks, strict=True):
        unwrapped(chunk).load_state_dict(state[key])


def _load(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        _require_same_model(path, wanted)
        return dist_checkpointing.load(wanted, str(path))
    except CheckpointError:
        raise
    except Exception as error:
        # Megatron-Core, torch, pickle and the file system each have errors of their own for this.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"cannot read the checkpoint {path}: {reason}") from error


def _require_same_model(path: Path, wanted: dict[str, Any]) -> None:
    """Compare names and global shapes before anything is read into the model."""
    there = dist_checkpointing.load_tensors_metadata(str(path))
    shapes = {key: tuple(tensor.global_shape) for key, tensor in there.items()}
    tensors = [value for value in nested_values(wanted) if isinstance(value, ShardedTensor)]
    off = []
    for tensor in tensors:
        shape = tuple(tensor.global_shape)
        if tensor.key not in shapes:
            off.append(f"{tensor.key} is not in it")
        elif shapes[tensor.key] != shape:
            off.append(f"{tensor.key} is {shapes[tensor.key]} in it and {shape} in this model")
    if off:
        more = f" (and {len(off) - _SHOWN} more)" if len(off) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint {path} is of another model: {'; '.join(off[:_SHOWN])}{more}"
        )
