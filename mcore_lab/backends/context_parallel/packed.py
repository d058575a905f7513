"""Packed sequences: documents one after the other, in Megatron-Core's `thd` format."""

from __future__ import annotations

import itertools

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mcore_lab.backends.context_parallel.zigzag import Documents, check_lengths
from mcore_lab.errors import LayoutError


def packed_documents(packed: PackedSeqParams, tokens: int, size: int) -> Documents:
    """Return the documents of which each of `size` ranks holds `tokens` tokens.

    `cu_seqlens_q` counts the tokens of all ranks. Where documents are padded, each to a multiple of
    `2 * size`, `cu_seqlens_q_padded` says where they are stored.

    Raises LayoutError for documents that the ranks cannot share, or that are not all there.
    """
    _check_format(packed)
    lengths = _lengths(packed.cu_seqlens_q)
    padded = packed.cu_seqlens_q_padded
    stored = lengths if padded is None else _lengths(padded)
    check_lengths(stored, size)
    if len(stored) != len(lengths) or any(map(int.__gt__, lengths, stored)):
        raise LayoutError(
            f"cu_seqlens_q has documents of {lengths} tokens, which those of {stored} in "
            "cu_seqlens_q_padded do not hold"
        )
    if sum(stored) > tokens * size:
        raise LayoutError(
            f"cu_seqlens_q ends at {sum(stored)} tokens, and {size} ranks of {tokens} tokens have "
            f"{size * tokens}"
        )
    return Documents(
        ranks=size,
        tokens=tokens,
        stored=tuple(n // size for n in stored),
        lengths=tuple(lengths),
    )


def _check_format(packed: PackedSeqParams) -> None:
    for q, kv in (
        (packed.cu_seqlens_q, packed.cu_seqlens_kv),
        (packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded),
    ):
        if q is not kv and (q is None or kv is None or not q.equal(kv)):
            raise LayoutError("packed queries and keys must be of the same documents: cu_seqlens_q")
    if packed.local_cp_size is not None or packed.cp_group is not None:
        raise LayoutError(
            "a context-parallel size of its own for each packed sequence (local_cp_size, cp_group) "
            "needs Transformer Engine"
        )


def _lengths(cu_seqlens: Tensor | None) -> list[int]:
    if cu_seqlens is None:
        raise LayoutError("packed sequences in thd format need cu_seqlens_q and cu_seqlens_kv")
    ends = cu_seqlens.flatten().tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    if ends[:1] != [0] or min(lengths, default=0) < 0:
        raise LayoutError(f"cu_seqlens has to start at 0 and rise, and is {ends}")
    return lengths
