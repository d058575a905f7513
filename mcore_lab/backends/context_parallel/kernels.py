"""One tile of attention and its gradients, with the log-sum-exp that lets tiles be merged.

Queries are `[s, g, r, d]`, keys `[t, g, d]` and values `[t, g, v]`: g counts the query groups of
all samples, r the heads of a group. A log-sum-exp is `[s, g, r]`, in float32 (float64 if they are).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what sums over tiles are kept in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class Kernel(NamedTuple):
    """Attention of some queries to some keys, and what follows from it for their gradients."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    """`(query, key, value, causal, scale)` to the output `[s, g, r, v]` and its log-sum-exp."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """`(grad_output, query, key, value, output, lse, causal, scale)` to the three gradients.

    The output and its log-sum-exp are those over all keys, of which these may be a part: a
    probability is `exp(score - lse)`, whatever other keys there are.
    """
    largest_tile: int
    """Queries, and keys, that it is given at a time: what it returns for a tile stays small."""


def kernel_for(device: torch.device) -> Kernel:
    """Return the kernel for a device: on CPU the one that `scaled_dot_product_attention` runs.

    `torch.nn.functional.scaled_dot_product_attention` itself returns no log-sum-exp. On other
    devices the same is computed with matrix products, small tile by small tile.
    """
    return FLASH_ON_CPU if device.type == "cpu" else DENSE


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    width = max(query.size(-1), value.size(-1))
    heads = _heads_first(query, key, value, width)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *heads, 0.0, causal, scale=scale
    )
    return output.permute(2, 0, 1, 3)[..., : value.size(-1)], lse.permute(2, 0, 1)


def _flash_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    width = max(query.size(-1), value.size(-1))
    grad_query, grad_key, grad_value = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _widen(grad_output, width).permute(1, 2, 0, 3),
            *_heads_first(query, key, value, width),
            _widen(output, width).permute(1, 2, 0, 3),
            lse.permute(1, 2, 0),
            0.0,
            causal,
            scale=scale,
        )
    )
    return (
        grad_query.permute(2, 0, 1, 3)[..., : query.size(-1)],
        _sum_over_heads(grad_key)[..., : key.size(-1)],
        _sum_over_heads(grad_value)[..., : value.size(-1)],
    )


def _sum_over_heads(grad: Tensor) -> Tensor:
    """Return as `[t, g, d]` the gradient `[g, r, t, d]` of keys that a group's heads share."""
    dtype = accumulation_dtype(grad.dtype)
    summed = grad[:, 0] if grad.size(1) == 1 else grad.sum(1, dtype=dtype)
    return summed.transpose(0, 1)


def _heads_first(
    query: Tensor, key: Tensor, value: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three as `[g, r, s, width]`: the kernel knows no query groups, and one width.

    Keys and values are repeated over a group by a stride of 0. Channels of zeros change no score.
    """
    heads = query.size(2)
    keys, values = (
        _widen(x, width).transpose(0, 1).unsqueeze(1).expand(-1, heads, -1, -1)
        for x in (key, value)
    )
    return _widen(query, width).permute(1, 2, 0, 3), keys, values


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.size(-1) == width else F.pad(x, (0, width - x.size(-1)))


def _dense_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    query, key, value = _accurate(query, key, value)
    scores = _scores(query, key, causal, scale)
    lse = scores.logsumexp(-1)
    output = torch.einsum("sgrt,tgv->sgrv", (scores - lse.unsqueeze(-1)).exp(), value)
    return output, lse


def _dense_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, query, key, value, output = _accurate(grad_output, query, key, value, output)
    weights = (_scores(query, key, causal, scale) - lse.unsqueeze(-1)).exp()
    grad_weights = torch.einsum("sgrv,tgv->sgrt", grad_output, value)
    mean = (grad_output * output).sum(-1, keepdim=True)
    grad_scores = weights * (grad_weights - mean) * scale
    return (
        torch.einsum("sgrt,tgd->sgrd", grad_scores, key),
        torch.einsum("sgrt,sgrd->tgd", grad_scores, query),
        torch.einsum("sgrt,sgrv->tgv", weights, grad_output),
    )


def _scores(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    scores = torch.einsum("sgrd,tgd->sgrt", query, key) * scale
    if causal:
        later = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).triu(1)
        scores.masked_fill_(later[:, None, None], -torch.inf)
    return scores


def _accurate(*tensors: Tensor) -> list[Tensor]:
    return [x.to(accumulation_dtype(x.dtype)) for x in tensors]


FLASH_ON_CPU = Kernel(_flash_forward, _flash_backward, largest_tile=2048)
# Its scores are whole: a MiB for each head.
DENSE = Kernel(_dense_forward, _dense_backward, largest_tile=512)
