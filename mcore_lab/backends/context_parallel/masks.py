"""What a mask may be where each rank sees a part of the sequence: causal, or none."""

from __future__ import annotations

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mcore_lab.backends.context_parallel.zigzag import zigzag_places
from mcore_lab.errors import LayoutError

_IS_CAUSAL = {
    AttnMaskType.causal: True,
    AttnMaskType.padding_causal: True,
    AttnMaskType.no_mask: False,
    AttnMaskType.padding: False,
}
_ROWS_AT_A_TIME = 1024
_INSTEAD = (
    "put padding behind the text and leave it out of the loss, keep documents apart by "
    "PackedSeqParams, and pass attention_mask=None"
)


def is_causal(mask_type: AttnMaskType) -> bool:
    """Say whether a type of mask is causal, or none; raise LayoutError where it is neither.

    Padding is told by `PackedSeqParams`, so the types with it are the same as those without.
    """
    if mask_type not in _IS_CAUSAL:
        known = ", ".join(known.name for known in _IS_CAUSAL)
        raise LayoutError(
            f"the torch backend has masks of the types {known} for context parallelism and packed "
            f"sequences, and not {mask_type.name}: {_INSTEAD}"
        )
    return _IS_CAUSAL[mask_type]


def check_mask(mask: Tensor | None, *, causal: bool, tokens: int, rank: int, size: int) -> None:
    """Raise LayoutError for a mask that says more than its type does.

    `mask` is `[b or 1, 1, tokens, tokens * size]` and True where hidden, with the rows of this
    rank's tokens, as Megatron-Core's datasets and `get_batch_on_this_cp_rank` make it.
    """
    if mask is None or (causal and _is_causal_mask(mask, tokens, rank, size)):
        return
    kind = "not the causal one" if causal else "more than none"
    raise LayoutError(
        f"the attention mask of shape {list(mask.shape)} is {kind}, of {tokens} queries and "
        f"{tokens * size} keys, which is all that the torch backend has with context parallelism: "
        + _INSTEAD
    )


def _is_causal_mask(mask: Tensor, tokens: int, rank: int, size: int) -> bool:
    if mask.shape[-2:] != (tokens, tokens * size):
        return False
    places = zigzag_places([tokens * size], rank, size).to(mask.device)
    keys = torch.arange(tokens * size, device=mask.device)
    parts = zip(mask.split(_ROWS_AT_A_TIME, -2), places.split(_ROWS_AT_A_TIME), strict=True)
    return all(bool((rows.bool() == (keys > at.unsqueeze(1))).all()) for rows, at in parts)
