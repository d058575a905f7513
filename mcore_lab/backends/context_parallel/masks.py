"""What a mask may be where each rank sees a part of the sequence: causal, or none."""

from __future__ import annotations

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mcore_lab.backends.context_parallel.zigzag import zigzag_places
from mcore_lab.errors import LayoutError

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
_FULL = (AttnMaskType.no_mask, AttnMaskType.padding)
_ROWS_AT_A_TIME = 1024


def is_causal(
    mask_type: AttnMaskType, mask: Tensor | None, *, tokens: int, rank: int, size: int
) -> bool:
    """Say whether a mask is causal, or none at all.

    A mask tensor, `[b or 1, 1, tokens, tokens * size]` and True where hidden, is taken only where
    it says what a causal type says already: Megatron-Core's datasets make such. Raises LayoutError
    for any other.
    """
    if mask_type not in (*_CAUSAL, *_FULL):
        raise LayoutError(_refusal(f"attention masks of type {mask_type.name}"))
    causal = mask_type in _CAUSAL
    if mask is not None and not (causal and _is_causal_mask(mask, tokens, rank, size)):
        shape = list(mask.shape)
        raise LayoutError(_refusal(f"this {mask_type.name} attention mask of shape {shape}"))
    return causal


def _refusal(what: str) -> str:
    return (
        f"the torch backend's context-parallel attention cannot use {what}: it is causal, or sees "
        "all. Put padding behind the text and leave it out of the loss, keep documents apart by "
        "PackedSeqParams, and pass attention_mask=None"
    )


def _is_causal_mask(mask: Tensor, tokens: int, rank: int, size: int) -> bool:
    if mask.shape[-2:] != (tokens, tokens * size):
        return False
    places = zigzag_places([tokens * size], rank, size).to(mask.device)
    keys = torch.arange(tokens * size, device=mask.device)
    rows = zip(mask.bool().split(_ROWS_AT_A_TIME, -2), places.split(_ROWS_AT_A_TIME), strict=True)
    return all(bool((hidden == (keys > at.unsqueeze(1))).all()) for hidden, at in rows)
