"""torch's Adam under Megatron-Core's distributed optimizer, which expects that of others.

Megatron-Core falls back on it where neither Transformer Engine nor Apex is installed. Theirs count
steps once a group; torch's counts them in the state of each parameter, where the distributed
optimizer, through 0.19, misses the count when it loads and then finds it where it does not expect
one.
"""

from __future__ import annotations

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
    members = members_of(optimizer)
    parts = [state] if len(members) == 1 else [part for _, part in sorted(state.items())]
    sharded = [
        (one, part.pop("param_state"))
        for one, part in zip(members, parts, strict=True)
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


def members_of(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers that one is made of: of dense layers and of experts, or itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _has_sharded_adam(one: Any) -> bool:
    return isinstance(one, DistributedOptimizer) and isinstance(
        one.optimizer, torch.optim.Adam | torch.optim.AdamW
    )
