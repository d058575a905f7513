"""Attention to keys and values that come block by block, and again in its backward pass.

The softmax over blocks is merged by its log-sum-exp, so no matrix of scores is ever whole
(FlashAttention, arXiv:2205.14135). Shapes are those of `kernels`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mcore_lab.backends.context_parallel.kernels import accumulation_dtype, kernel_for
from mcore_lab.backends.context_parallel.zigzag import Tile

# Of keys and values: enough for a message to be worth its start, little next to a long sequence.
_BYTES_AT_A_TIME = 2**20


class ForwardPass:
    """Some queries, and their attention to the keys and values seen so far."""

    def __init__(self, query: Tensor, value_channels: int, scale: float) -> None:
        dtype = accumulation_dtype(query.dtype)
        self._query, self._scale = query, scale
        self.output = query.new_zeros(*query.shape[:-1], value_channels, dtype=dtype)
        self.lse = query.new_full(query.shape[:-1], -torch.inf, dtype=dtype)

    def see(self, key: Tensor, value: Tensor, tiles: Iterable[Tile]) -> None:
        """Take in these keys and values; a tile says which queries see which of them."""
        kernel = kernel_for(key.device)
        for rows, keys, causal in _pieces(tiles, kernel.largest_tile):
            output, lse = kernel.forward(
                self._query[rows], key[keys], value[keys], causal, self._scale
            )
            before = self.lse[rows]
            # The share of these keys in the softmax over all that were seen; the first have all.
            share = torch.sigmoid(lse - before).unsqueeze(-1)
            self.output[rows].lerp_(output.to(share.dtype), share)
            self.lse[rows] = torch.logaddexp(before, lse)


class BackwardPass:
    """Some queries, what became of them, and their gradient from the keys seen so far."""

    def __init__(
        self, query: Tensor, output: Tensor, lse: Tensor, grad_output: Tensor, scale: float
    ) -> None:
        self._query, self._output, self._lse = query, output, lse
        self._grad_output, self._scale = grad_output, scale
        self.grad_query = torch.zeros_like(query, dtype=accumulation_dtype(query.dtype))

    def see(self, key: Tensor, value: Tensor, tiles: Iterable[Tile]) -> tuple[Tensor, Tensor]:
        """Return what these queries add to the gradients of these keys and values."""
        kernel = kernel_for(key.device)
        grad_key, grad_value = (
            torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (key, value)
        )
        for rows, keys, causal in _pieces(tiles, kernel.largest_tile):
            of_query, of_key, of_value = kernel.backward(
                self._grad_output[rows],
                self._query[rows],
                key[keys],
                value[keys],
                self._output[rows],
                self._lse[rows],
                causal,
                self._scale,
            )
            self.grad_query[rows] += of_query
            grad_key[keys] += of_key
            grad_value[keys] += of_value
        return grad_key, grad_value


class Communication(Protocol):
    """How the queries of a rank get to see the keys and values of all."""

    def forward(self, attention: ForwardPass, key: Tensor, value: Tensor) -> None:
        """Show every rank's keys and values to this rank's queries; `key` is this rank's."""
        ...

    def backward(
        self, attention: BackwardPass, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do it again, and return the gradients of this rank's keys and values, from all ranks."""
        ...


class BlockwiseAttention(torch.autograd.Function):
    """Queries `[s, g, r, d]`, keys `[s, g, d]`, values `[s, g, v]` to the output `[s, g, r, v]`.

    For the backward pass it keeps this rank's three inputs, its output and one number a row; what
    other ranks sent is sent again. Long blocks go a few query groups at a time, so that what is on
    its way stays small next to what is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        communication: Communication,
        scale: float,
    ) -> Tensor:
        """Attend, with what `communication` brings."""
        output = query.new_empty(*query.shape[:-1], value.size(-1))
        lse = query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))
        for groups in _rounds(key, value):
            attention = ForwardPass(query[:, groups], value.size(-1), scale)
            communication.forward(
                attention, key[:, groups].contiguous(), value[:, groups].contiguous()
            )
            output[:, groups], lse[:, groups] = attention.output, attention.lse
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.communication, ctx.scale = communication, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        query, key, value, output, lse = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        for groups in _rounds(key, value):
            attention = BackwardPass(
                query[:, groups],
                output[:, groups],
                lse[:, groups],
                grad_output[:, groups],
                ctx.scale,
            )
            grads[1][:, groups], grads[2][:, groups] = ctx.communication.backward(
                attention, key[:, groups].contiguous(), value[:, groups].contiguous()
            )
            grads[0][:, groups] = attention.grad_query
        return (*grads, None, None)


def _rounds(key: Tensor, value: Tensor) -> Iterator[slice]:
    """Yield the query groups that go together: as many as have a MiB of keys and values, or one."""
    groups = key.size(1)
    of_one = max(1, (key.nbytes + value.nbytes) // max(1, groups))
    together = max(1, _BYTES_AT_A_TIME // of_one)
    for first in range(0, groups, together):
        yield slice(first, min(first + together, groups))


def _pieces(tiles: Iterable[Tile], largest: int) -> Iterator[Tile]:
    """Cut tiles that are too large for a kernel; pieces above the diagonal are left out."""
    for tile in tiles:
        for row, queries in enumerate(_cut(tile.queries, largest)):
            for column, keys in enumerate(_cut(tile.keys, largest)):
                if not tile.causal or column <= row:
                    yield Tile(queries, keys, tile.causal and column == row)


def _cut(whole: slice, largest: int) -> Iterator[slice]:
    for start in range(whole.start, whole.stop, largest):
        yield slice(start, min(start + largest, whole.stop))
