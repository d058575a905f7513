"""Read a sharded checkpoint into a model of any layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mcore_lab.checkpoint import adam
from mcore_lab.checkpoint.admission import admit
from mcore_lab.checkpoint.failures import failures_explained
from mcore_lab.checkpoint.state import (
    content_metadata,
    full_state,
    model_keys,
    model_state,
    unwrapped,
)
from mcore_lab.checkpoint.trust import require_harmless, weights_only
from mcore_lab.errors import CheckpointError
from mcore_lab.runtime.together import fail_together

Shape = tuple[int, ...]
_SHOWN = 3
_OPTIMIZER = "optimizer."
_SHARDING = "distrib_optim_sharding_type"
_OF_THE_RECIPE = ("betas", "eps", "max_lr", "min_lr", "start_wd", "end_wd")


def load_weights(
    path: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    *,
    verify: bool = True,
) -> None:
    """Load the weights of the checkpoint at `path` and nothing else.

    With `verify` its files are first held against its manifest. Raises CheckpointError, on every
    rank, if it cannot be read or is of another model.
    """
    admit(path, verify=verify)
    _put_weights(chunks, _read(path, model_state(chunks)))
    # Under bf16 the optimizer made its own copies of the weights before these were loaded.
    optimizer.reload_model_params()


def load_checkpoint(
    path: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    verify: bool = True,
) -> int:
    """Load weights, optimizer and schedule of the checkpoint at `path`; return its step.

    With `verify` its files are first held against its manifest. Raises CheckpointError, on every
    rank, if it cannot be read or is of another model.
    """
    admit(path, verify=verify)
    with fail_together(), failures_explained("read", path), weights_only():
        common = dist_checkpointing.load_common_state_dict(str(path))
        step = int(common["iteration"])
        if step > 0:
            _require_same_sharding(path, common, content_metadata(chunks))
    if step == 0:
        load_weights(path, chunks, optimizer, verify=False)
        return 0
    adam.give_state(optimizer)
    state = _read(path, full_state(chunks, optimizer, scheduler, step, is_loading=True))
    _put_weights(chunks, state)
    _put_optimizer(optimizer, state["optimizer"])
    scheduler.load_state_dict(state["opt_param_scheduler"])
    return step


def _put_weights(chunks: Sequence[torch.nn.Module], state: dict[str, Any]) -> None:
    with fail_together():
        for key in model_keys(chunks):
            _require_harmless_extras(state[key])
    with weights_only():
        for key, chunk in zip(model_keys(chunks), chunks, strict=True):
            unwrapped(chunk).load_state_dict(state[key])


def _require_harmless_extras(state: dict[str, Any]) -> None:
    for name, value in state.items():
        if name.endswith("_extra_state") and isinstance(value, torch.Tensor) and value.numel():
            require_harmless(name, value.cpu().numpy().tobytes())


def _put_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load the moments and the step; what the recipe says of Adam stays as the recipe says it."""
    own = [
        {name: group[name] for name in _OF_THE_RECIPE if name in group}
        for group in optimizer.param_groups
    ]
    # From 0.17 on Megatron-Core finds a group's state by these values: to be found it has to have
    # the checkpoint's, which are the same for all groups.
    there = next(_saved_groups(state), {})
    for group in optimizer.param_groups:
        group.update({name: there[name] for name in _OF_THE_RECIPE if name in there})
    adam.load_state(optimizer, state)
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


def _saved_groups(state: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    for key, value in state.items():
        if key == "param_groups":
            yield from value
        elif isinstance(value, dict):
            yield from _saved_groups(value)


def _read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    with fail_together(), failures_explained("read", path):
        there = dist_checkpointing.load_tensors_metadata(str(path))
    _require_same_model(path, there, wanted)
    with failures_explained("read", path), weights_only():
        return dist_checkpointing.load(wanted, str(path))


def _require_same_sharding(path: Path, common: dict[str, Any], own: dict[str, Any]) -> None:
    there = common.get("content_metadata") or {}
    if there.get(_SHARDING) != own.get(_SHARDING):
        has = "with" if _SHARDING in there else "without"
        raise CheckpointError(
            f"the checkpoint {path} was saved {has} the distributed optimizer: "
            f"--layout.use-distributed-optimizer {_SHARDING in there} to go on from it, or "
            "--checkpoint.load to take its weights alone"
        )


def _require_same_model(
    path: Path, there: dict[str, ShardedTensor], wanted: dict[str, Any]
) -> None:
    """Compare names and global shapes, of all ranks, before anything is read into the model."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, dict(_shapes(nested_values(wanted))))
    shapes = {key: shape for one in of_ranks for key, shape in one.items()}
    off = list(_differences(shapes, dict(_shapes(there.values()))))
    if off:
        more = f" (and {len(off) - _SHOWN} more)" if len(off) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint {path} is of another model: {'; '.join(off[:_SHOWN])}{more}"
        )


def _shapes(values: Iterable[Any]) -> Iterator[tuple[str, Shape]]:
    for value in values:
        if isinstance(value, ShardedTensorFactory):
            yield from _shapes(nested_values({"": value.build()}))
        elif isinstance(value, ShardedTensor):
            yield value.key, tuple(value.global_shape)


def _differences(wanted: dict[str, Shape], there: dict[str, Shape]) -> Iterator[str]:
    for key, shape in wanted.items():
        if key not in there:
            yield f"{key} is not in it"
        elif there[key] != shape:
            yield f"{key} is {there[key]} in it and {shape} in this model"
    for key in sorted(there.keys() - wanted.keys()):
        if not key.startswith(_OPTIMIZER):
            yield f"{key} is in it and not in this model"
