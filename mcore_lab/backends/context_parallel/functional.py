"""Attention over a sequence that the ranks of a group share, as a function."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from mcore_lab.backends.context_parallel.all_gather import AllGather
from mcore_lab.backends.context_parallel.all_to_all import check_heads, gather_heads, scatter_heads
from mcore_lab.backends.context_parallel.blockwise import BlockwiseAttention, Communication
from mcore_lab.backends.context_parallel.ring import Ring
from mcore_lab.backends.context_parallel.zigzag import Documents
from mcore_lab.errors import LayoutError, nearest

COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")
"""Megatron-Core's names for how the ranks communicate (`TransformerConfig.cp_comm_type`)."""


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    groups: Sequence[dist.ProcessGroup],
    comm_type: str = "p2p",
    causal: bool = True,
    scale: float | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Attend within a sequence of which each rank holds its zigzag chunks.

    Takes queries `[s, b, n, d]`, keys `[s, b, g, d]` and values `[s, b, g, v]`, s being a rank's
    tokens and g query groups that divide the n heads; returns `[s, b, n, v]`. `groups` is the
    context-parallel group alone, or for `a2a+p2p` the inner group, which trades heads, and the
    outer one, a ring; no group for one rank. `scale` is `1 / sqrt(d)` if not given. `documents`
    says what the tokens are made of where they are not one sequence; their padding attends to
    nothing, and zeros are returned for it.

    Memory grows with s, not with its square: no matrix of scores is ever whole.

    Raises LayoutError for a sequence or heads that the ranks cannot share.
    """
    if len(key) != len(query):
        raise LayoutError(
            "context-parallel attention is of a sequence to itself: there are "
            f"{len(query)} queries and {len(key)} keys on this rank"
        )
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    documents = documents or Documents.one_sequence(len(query), math.prod(g.size() for g in groups))
    if not groups:
        return _attend(query, key, value, Ring(None, documents, causal=causal), scale)
    check_groups(comm_type, groups)
    if comm_type == "p2p":
        return _attend(query, key, value, Ring(groups[0], documents, causal=causal), scale)
    if comm_type == "all_gather":
        return _attend(query, key, value, AllGather(groups[0], documents, causal=causal), scale)

    trading, ring = groups[0], groups[1] if len(groups) > 1 else None
    check_heads(query.size(2), key.size(2), trading.size())
    query, key, value = (scatter_heads(x, trading) for x in (query, key, value))
    blocks = Ring(ring, documents, causal=causal, together=trading.size())
    return gather_heads(_attend(query, key, value, blocks, scale), trading)


def check_groups(comm_type: str, groups: Sequence[dist.ProcessGroup]) -> None:
    """Raise LayoutError for a name that is none of `COMM_TYPES`, or groups that it cannot use."""
    if comm_type not in COMM_TYPES:
        raise LayoutError(
            f"cp_comm_type {comm_type!r} is none of {', '.join(COMM_TYPES)}"
            + nearest(comm_type, COMM_TYPES)
        )
    wanted = 2 if comm_type == "a2a+p2p" else 1
    if len(groups) != wanted:
        raise LayoutError(
            f"cp_comm_type {comm_type} needs {wanted} process group{'s' * (wanted > 1)} and got "
            f"{len(groups)}; a2a+p2p takes two hierarchical_context_parallel_sizes, the ranks that "
            "trade heads and the ranks of the ring, such as [2, 2] for a context-parallel size of 4"
        )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, communication: Communication, scale: float
) -> Tensor:
    """Attend with every query group of every sample side by side, as the kernels take them."""
    tokens, batch, groups, _ = key.shape
    output: Tensor = BlockwiseAttention.apply(
        query.reshape(tokens, batch * groups, query.size(2) // groups, -1).contiguous(),
        key.flatten(1, 2).contiguous(),
        value.flatten(1, 2).contiguous(),
        communication,
        scale,
    )
    return output.reshape(tokens, batch, query.size(2), -1)
