"""`a2a`: ranks trade tokens for heads, attend, and trade back.

DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mcore_lab.errors import LayoutError


def check_heads(heads: int, query_groups: int, size: int) -> None:
    """Raise LayoutError unless `size` ranks can share the heads that a tensor-parallel rank has."""
    if heads % size == 0 and (query_groups % size == 0 or size % query_groups == 0):
        return
    allowed = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (query_groups % n == 0 or n % query_groups == 0)
    ]
    raise LayoutError(
        f"all-to-all context parallelism spreads the {heads} attention heads and {query_groups} "
        f"query groups of a tensor-parallel rank over {size} ranks, which do not divide them; "
        f"sizes that do: {allowed}, or use cp_comm_type p2p or all_gather"
    )


def scatter_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Trade tokens for heads: `[s, b, n, d]` to `[s * size, b, n / size, d]`, rank by rank.

    Heads that are fewer than ranks are repeated, so that the heads of a query group find their keys
    on their own rank.
    """
    if x.size(2) < group.size():
        x = x.repeat_interleave(group.size() // x.size(2), dim=2)
    scattered: Tensor = _ScatterHeads.apply(x, group)
    return scattered


def gather_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Trade heads for tokens: `[s * size, b, n / size, d]` to `[s, b, n, d]`."""
    gathered: Tensor = _GatherHeads.apply(x, group)
    return gathered


class _ScatterHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scatter(grad, ctx.group), None


def _scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    by_rank = x.unflatten(2, (group.size(), -1)).movedim(2, 0)
    return _trade(by_rank, group).flatten(0, 1)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    by_rank = x.unflatten(0, (group.size(), -1))
    return _trade(by_rank, group).movedim(0, 2).flatten(2, 3)


def _trade(by_rank: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send entry i to rank i, and return what rank i sent as entry i."""
    sent = by_rank.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
