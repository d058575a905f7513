"""From samples to the tokens that ranks can share: sequences padded, documents packed, both cut."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from torch.nn.functional import pad

from mcore_lab.backends.context_parallel import zigzag_places
from mcore_lab.compat import slice_for_context_parallel_rank
from mcore_lab.layout import ParallelLayout

Batch = dict[str, torch.Tensor]
"""`tokens`, `labels`, `loss_mask`, `position_ids`, each `[b, s]`; a rank's `[b, s / cp]`.

Packed documents are one row, `[1, t]`, with their ends in `cu_seqlens` and, where they are stored
with padding, in `cu_seqlens_padded`, both `[documents + 1]`, over all context-parallel ranks.
"""


def padded_share(batch: Batch, layout: ParallelLayout) -> Batch:
    """Pad each sequence to what the ranks can share, and return this rank's two chunks of it.

    Padding is token 0 at position 0, behind the sequence, where no other token sees it, and it has
    no part in the loss.
    """
    length = batch["tokens"].shape[1]
    padding = layout.padded(length) - length
    if padding:
        batch = {name: pad(value, (0, padding)) for name, value in batch.items()}
    return slice_for_context_parallel_rank(batch) if layout.cp > 1 else batch


def packed_share(batch: Batch, layout: ParallelLayout) -> Batch:
    """Pack the documents of all samples into one row, and return this rank's part of each of them.

    A document begins where positions do. Each is padded to two chunks for every context-parallel
    rank, the last one to what sequence parallelism needs of the row.
    """
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten()
    number = batch["position_ids"].numel()
    lengths = torch.diff(starts, append=torch.tensor([number]))
    chunks = 2 * layout.cp if layout.cp > 1 else 1
    stored = (lengths + chunks - 1) // chunks * chunks
    stored[-1] += layout.padded(int(stored.sum())) - stored.sum()
    ends, stored_ends = _cumulative(lengths), _cumulative(stored)
    places = torch.arange(number) + (stored_ends - ends)[:-1].repeat_interleave(lengths)
    row = {
        name: values.new_zeros(int(stored_ends[-1])).index_copy(0, places, values.flatten())
        for name, values in batch.items()
    }
    held = zigzag_places(stored.tolist(), _context_parallel_rank(layout), layout.cp)
    return {name: values[held].unsqueeze(0) for name, values in row.items()} | {
        "cu_seqlens": ends,
        "cu_seqlens_padded": stored_ends,
    }


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    return pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _context_parallel_rank(layout: ParallelLayout) -> int:
    return parallel_state.get_context_parallel_rank() if layout.cp > 1 else 0
