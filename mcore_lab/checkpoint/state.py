"""What a checkpoint holds: model, optimizer, schedule and step, as Megatron-LM names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mcore_lab.checkpoint.buckets import found_in_buckets


def model_keys(chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Return the state dict's key of each model chunk: `model`, or `model0`, `model1`, …"""
    return ["model"] if len(chunks) == 1 else [f"model{stage}" for stage in range(len(chunks))]


def unwrapped(chunk: torch.nn.Module) -> Any:
    """Return the Megatron-Core model inside its wrappers (DDP, `Float16Module`)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def content_metadata(chunks: Sequence[Any]) -> dict[str, Any]:
    """Return which of Megatron-Core's formats the state is in; it is saved with the checkpoint.

    With the distributed optimizer the one that can be read by any layout.
    """
    metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False}
    if any(chunk.ddp_config.use_distributed_optimizer for chunk in chunks):
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    return metadata


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return the sharded state of the weights."""
    return {
        key: unwrapped(chunk).sharded_state_dict(metadata=_with_group(content_metadata(chunks)))
        for key, chunk in zip(model_keys(chunks), chunks, strict=True)
    }


def full_state(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    step: int,
    *,
    is_loading: bool = False,
) -> dict[str, Any]:
    """Return the sharded state of a run: weights, optimizer, schedule and step.

    Before its first step the optimizer has no state, and is left out.
    """
    state = model_state(chunks)
    if step > 0 or is_loading:
        # The optimizer finds its parameters among the model's, by name.
        names = state["model"] if len(chunks) == 1 else dict(state)
        with found_in_buckets(optimizer):
            state["optimizer"] = optimizer.sharded_state_dict(
                names, is_loading=is_loading, metadata=_with_group(content_metadata(chunks))
            )
    state["opt_param_scheduler"] = scheduler.state_dict()
    state["iteration"] = step
    state["checkpoint_version"] = 3.0
    return state


def _with_group(metadata: dict[str, Any]) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return metadata | {"dp_cp_group": group}
