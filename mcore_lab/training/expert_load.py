"""How many tokens each expert is given: the load of a mixture of experts, step by step.

Counted at the routers, from the map `[tokens, experts]` that each returns: every token of a step
counts once for each expert that it goes to, also what is padded. One that a capacity factor drops
does not. Counts are those of the whole global batch, and the same on every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import Router

from mcore_lab.runtime.wrappers import unwrapped
from mcore_lab.training.expert_balance import Load


class ExpertLoad:
    """Counts on this rank, from the time that it is made; every rank makes one."""

    def __init__(self, model: Sequence[Any]) -> None:
        own = dict(_routers(model))
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, {name: _experts(one) for name, one in own.items()})
        experts = {name: count for of_rank in of_ranks for name, count in of_rank.items()}
        self._layers = sorted(experts, key=_in_order)
        self._counts = torch.zeros(
            len(experts),
            max(experts.values(), default=0),
            dtype=torch.int64,
            device=torch.cuda.current_device(),
        )
        for name, router in own.items():
            # Without sequence parallelism, tensor-parallel ranks route the same tokens.
            if router.config.sequence_parallel or _tensor_parallel_rank() == 0:
                self._count(router, self._counts[self._layers.index(name)])

    def _count(self, router: Router, counts: torch.Tensor) -> None:
        def count(_: Any, __: Any, output: Any) -> None:
            # Without gradients it is a validation, or a pass that recomputation will repeat: the
            # rule of Megatron-Core's own counts (`TopKRouter._apply_expert_bias`).
            if torch.is_grad_enabled():
                counts.add_(output[1].detach().sum(dim=0))

        router.register_forward_hook(count)

    def take(self) -> Load:
        """Return what was counted on all ranks since the last call; every rank calls this."""
        if not self._layers:
            return {}
        dist.all_reduce(self._counts)
        load: Load = dict(zip(self._layers, self._counts.tolist(), strict=True))
        self._counts.zero_()
        return load


def _routers(model: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for chunk in model:
        for path, module in unwrapped(chunk).named_modules():
            if isinstance(module, Router):
                in_mtp, _, rest = path.partition("mtp.layers.")
                if rest and not in_mtp:
                    yield f"mtp_{int(rest.split('.')[0]) + 1}", module
                elif module.layer_number is not None:
                    yield f"layer_{module.layer_number}", module


def _experts(router: Any) -> int:
    return int(router.config.num_moe_experts)


def _in_order(name: str) -> tuple[str, int]:
    kind, _, number = name.partition("_")
    return kind, int(number)


def _tensor_parallel_rank() -> int:
    return int(parallel_state.get_tensor_model_parallel_rank())
