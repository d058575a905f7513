"""What a checkpoint holds of a run, as Megatron-LM names it: see `full_state`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mcore_lab.checkpoint.buckets import found_in_buckets
from mcore_lab.checkpoint.random_state import random_state, rank_sizes
from mcore_lab.runtime.wrappers import unwrapped


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    """Optimizer steps that have been taken."""
    consumed_train_samples: int = 0
    """Samples that they took, over all data-parallel ranks: where in the data the run goes on."""

    def after_step_of(self, samples: int) -> Progress:
        """Return how far the run is after another step, of so many samples."""
        return Progress(self.step + 1, self.consumed_train_samples + samples)


def model_keys(chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Return the state dict's key of each model chunk: `model`, or `model0`, `model1`, …"""
    return ["model"] if len(chunks) == 1 else [f"model{stage}" for stage in range(len(chunks))]


def content_metadata(chunks: Sequence[Any]) -> dict[str, Any]:
    """Return which of Megatron-Core's formats the state is in; it is saved with the checkpoint.

    With the distributed optimizer the one that can be read by any layout. A chunk that is not
    trained has none, and no `ddp_config`.
    """
    metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False}
    ddp_configs = [chunk.ddp_config for chunk in chunks if hasattr(chunk, "ddp_config")]
    if any(config.use_distributed_optimizer for config in ddp_configs):
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
    progress: Progress,
    recipe: str,
) -> dict[str, Any]:
    """Return all that a run needs to go on as if it had not stopped; `recipe` is its TOML.

    Sharded: weights, optimizer, and the random generators of every rank. The same for all ranks:
    the schedule, how far the run has come, and which ranks there are. Before its first step the
    optimizer has no state, and is left out.
    """
    state = model_state(chunks)
    if progress.step > 0:
        state["optimizer"] = optimizer_state(optimizer, chunks, state)
    return state | {
        "rng_state": random_state(),
        "opt_param_scheduler": scheduler.state_dict(),
        "iteration": progress.step,
        "consumed_train_samples": progress.consumed_train_samples,
        "checkpoint_version": 3.0,
        "rank_sizes": rank_sizes(),
        "recipe": recipe,
    }


def optimizer_state(
    optimizer: MegatronOptimizer,
    chunks: Sequence[torch.nn.Module],
    model: dict[str, Any],
    *,
    is_loading: bool = False,
) -> dict[Any, Any]:
    """Return the sharded state of an optimizer of the parameters in `model_state`."""
    # The optimizer finds its parameters among the model's, by name.
    names = model["model"] if len(chunks) == 1 else dict(model)
    with found_in_buckets(optimizer):
        state: dict[Any, Any] = optimizer.sharded_state_dict(
            names, is_loading=is_loading, metadata=_with_group(content_metadata(chunks))
        )
    return state


def _with_group(metadata: dict[str, Any]) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return metadata | {"dp_cp_group": group}
