"""torch's Adam under Megatron-Core's distributed optimizer, which expects that of others.

Megatron-Core falls back on it where neither Transformer Engine nor Apex is installed. Theirs count
steps once a group; torch's counts them in the state of each parameter, where the distributed
optimizer, through 0.19, misses the count when it loads and then finds it where it does not expect
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def give_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that Adam makes in its first step, for the distributed optimizer to fill."""
    for one in members_of(optimizer):
        if _has_sharded_adam(one):
            for weight in (weight for group in one.param_groups for weight in group["params"]):
                one.optimizer.state[weight] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(weight),
                    "exp_avg_sq": torch.zeros_like(weight),
                }


def load_state(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Load an optimizer's state; where it is sharded, moments and counts of steps one by one."""
    sharded = [
        (one, part.pop("param_state"))
        for one, part in _parts(optimizer, state)
        if _has_sharded_adam(one)
    ]
    optimizer.load_state_dict(state)
    for one, moments in sharded:
        states = list(one.optimizer.state.values())
        steps = [kept.pop("step") for kept in states]
        one.load_parameter_state_from_fully_reshardable(moments)
        for kept, step in zip(states, steps, strict=True):
            # Each a count of its own: one that all share would count every parameter's updates.
            kept["step"] = step.clone()


def set_updates(optimizer: MegatronOptimizer, state: dict[Any, Any], count: int) -> None:
    """Set the number of updates in an optimizer's sharded state, where each kind of Adam has it."""
    for one, part in _parts(optimizer, state):
        inner = part.get("optimizer", part)
        if _is_of_torch(one) and not isinstance(one, DistributedOptimizer):
            inner["state"]["common_step"] = torch.tensor(float(count))
        else:
            for group in inner["param_groups"]:
                group["step"] = count


def members_of(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers that one is made of: of dense layers and of experts, or itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _parts(
    optimizer: MegatronOptimizer, state: dict[Any, Any]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield each member with its part of the state."""
    members = members_of(optimizer)
    parts = [state] if len(members) == 1 else [part for _, part in sorted(state.items())]
    yield from zip(members, parts, strict=True)


def _has_sharded_adam(one: Any) -> bool:
    return isinstance(one, DistributedOptimizer) and _is_of_torch(one)


def _is_of_torch(one: Any) -> bool:
    return isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW)
