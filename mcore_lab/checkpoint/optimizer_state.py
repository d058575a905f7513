"""An optimizer's state, read into an optimizer of another layout, or of another kind.

What a checkpoint holds of an optimizer is tensors, which have the names and global shapes of the
model's parameters on every layout, and beside them a tree of plain values whose form depends on the
layout and on whether the optimizer is distributed. Of the plain values only the number of updates
is state: all others are the recipe's. So the tree is always the optimizer's own, into which tensors
and that number are put.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer import MegatronOptimizer

from mcore_lab.checkpoint import adam

_MAIN_WEIGHT = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""What an fp32 weight's name begins with in the distributed optimizer, and in others."""
_SHARDED = ShardedTensor | ShardedTensorFactory | ShardedObject


def give_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that an optimizer makes in its first step, for what is read to fill.

    Megatron-Core (to 0.19) has no function for it where the optimizer is SGD, and calls it.
    """
    adam.give_state(optimizer)
    for one in adam.members_of(optimizer):
        if one.init_state_fn is None:
            one.init_state_fn = _give_momentum


def _give_momentum(sgd: torch.optim.Optimizer, _: Any = None) -> None:
    for group in sgd.param_groups:
        for weight in group["params"] if group["momentum"] else ():
            sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def wanted_tensors(
    optimizer: MegatronOptimizer, own: dict[Any, Any], there: Iterable[str]
) -> dict[str, Any]:
    """Return what is to be read for an optimizer's own sharded state, by its place in that tree.

    `there` has the names of the checkpoint's tensors. Main weights have one name in the distributed
    optimizer and another in others, which in fp32 have none: the model's weights are the same.
    """
    wanted = {str(place): value for place, (_, _, value) in enumerate(_sharded(own))}
    written = next(
        (name for name in _MAIN_WEIGHT if any(key.startswith(name) for key in there)), ""
    )
    if not written and optimizer.config.bf16:
        return wanted
    main = {
        place: replace(value, key=written + value.key.removeprefix(name))
        for place, value in wanted.items()
        for name in _MAIN_WEIGHT
        if value.key.startswith(name)
    }
    return wanted | main


def put_optimizer(
    optimizer: MegatronOptimizer, own: dict[Any, Any], read: dict[str, Any], saved: Any
) -> None:
    """Load tensors that were read for `own`, and the number of updates of the `saved` values."""
    for place, (container, key, _) in enumerate(list(_sharded(own))):
        container[key] = read[str(place)]
    for container, key, value in list(nested_items_iter(own)):
        if isinstance(value, LocalNonpersistentObject):
            container[key] = value.unwrap()
    counts = list(_update_counts(saved))
    if counts:
        adam.set_updates(optimizer, own, int(max(counts)))
    adam.load_state(optimizer, own)


def _sharded(tree: dict[Any, Any]) -> Iterator[tuple[Any, Any, Any]]:
    for container, key, value in nested_items_iter(tree):
        if isinstance(value, _SHARDED):
            yield container, key, value


def _update_counts(saved: Any) -> Iterator[float]:
    """Yield Adam's counts of updates: with its groups, or one that parameters have in common."""
    for _, key, value in nested_items_iter(saved):
        if key in ("step", "common_step") and isinstance(value, int | float | torch.Tensor):
            yield float(value)
