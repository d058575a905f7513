"""What a checkpoint holds: model, optimizer, schedule and step, as Megatron-LM names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


def model_keys(chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Return the state dict's key of each model chunk: `model`, or `model0`, `model1`, …"""
    return ["model"] if len(chunks) == 1 else [f"model{stage}" for stage in range(len(chunks))]


def unwrapped(chunk: torch.nn.Module) -> Any:
    """Return the Megatron-Core model inside its wrappers (DDP, `Float16Module`)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Return the sharded state of the weights."""
    keys = model_keys(chunks)
    return {
        key: unwrapped(chunk).sharded_state_dict() for key, chunk in zip(keys, chunks, strict=True)
    }


def full_state(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    step: int,
    *,
    is_loading: bool = False,
) -> dict[str, Any]:
    """Return the sharded state of a run: weights, optimizer, schedule and step."""
    state = model_state(chunks)
    # The optimizer finds its parameters among the model's, by name.
    names = state["model"] if len(chunks) == 1 else dict(state)
    state["optimizer"] = optimizer.sharded_state_dict(names, is_loading=is_loading)
    state["opt_param_scheduler"] = scheduler.state_dict()
    state["iteration"] = step
    state["checkpoint_version"] = 3.0
    return state
