"""The states of every rank's random generators, as Megatron-LM keeps them: `rng_state`.

There is an object for each pipeline- and tensor-parallel rank, which holds a state for each of its
data-parallel ranks, those of context parallelism included. Megatron-LM (0.16 to 0.19) reads it: the
first one, or with `--data-parallel-random-init` each rank its own.
"""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

KEY = "rng_state"

_LOGGER = logging.getLogger(__name__)


def random_state() -> ShardedObject:
    """Return the states of all generators of all ranks; every rank calls this."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    states: list[Any] = [None] * group.size()
    dist.all_gather_object(states, _own_state(), group=group)
    return replace(wanted_random_state(), data=states)


def wanted_random_state() -> ShardedObject:
    """Return what stands for the states where they are to be read."""
    return ShardedObject(
        KEY,
        None,
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        ),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def rank_sizes() -> dict[str, int]:
    """Return what decides which rank draws what, by Megatron-Core's names."""
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
    }


def has_own_states(saved: dict[str, int] | None) -> bool:
    """Say whether a checkpoint of these sizes has a state for every rank; if not, the log says why.

    Generators then go on from where the seed of the recipe has put them: there are no states of
    ranks that did not exist.
    """
    own = rank_sizes()
    if saved == own:
        return True
    if saved is None:
        why = "the checkpoint does not say which ranks they are of"
    else:
        off = [name for name in own if saved.get(name) != own[name]]
        why = "the checkpoint has those of other ranks: " + ", ".join(
            f"{name} {saved.get(name)} and not {own[name]}" for name in off
        )
    _LOGGER.warning("random states are taken from the recipe's seed, as %s", why)
    return False


def set_random_state(states: list[dict[str, Any]]) -> None:
    """Set all generators of this rank to its state among those of its data-parallel group."""
    state = states[parallel_state.get_data_parallel_rank(with_context_parallel=True)]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    if len(state["cuda_rng_state"]) != len(torch.cuda.get_rng_state()):
        _LOGGER.warning(
            "random states of the device are taken from the recipe's seed, as the checkpoint has "
            "those of another kind of device"
        )
        return
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    to_graphable = tensor_parallel.is_graph_safe_cuda_rng_tracker(tracker)
    tracker.set_states(
        {
            name: tensor_parallel.convert_cuda_rng_state(tracked, to_graphable=to_graphable)
            for name, tracked in state["rng_tracker_states"].items()
        }
    )


def _own_state() -> dict[str, Any]:
    kind, words, *rest = np.random.get_state()
    trackers = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "random_rng_state": random.getstate(),
        # Plain numbers, which can be read without trusting a pickle; numpy takes them as well.
        "np_rng_state": (kind, np.asarray(words).tolist(), *rest),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": {
            name: tensor_parallel.convert_cuda_rng_state(state) for name, state in trackers.items()
        },
    }
