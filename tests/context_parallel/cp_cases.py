"""Attention as one rank computes it in float64, with all scores, and ranks to hold to it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mcore_lab import cpu

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}
"""Largest error, as a part of the largest value."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An attention: its shapes, its mask, and the documents that its tokens are made of."""

    stored: tuple[int, ...] = (32,)
    """Tokens of each document over all ranks, padding included."""
    lengths: tuple[int, ...] | None = None
    """Those that are no padding; all if not set."""
    batch: int = 1
    heads: int = 4
    groups: int = 4
    channels: int = 8
    value_channels: int = 8
    causal: bool = True
    scale: float | None = None
    dtype: torch.dtype = torch.float32

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return query, key, value and the gradient of the output, of the whole sequence."""
        draw = torch.Generator().manual_seed(7)
        heads = (self.heads, self.channels), (self.groups, self.channels)
        shapes = *heads, (self.groups, self.value_channels), (self.heads, self.value_channels)
        query, key, value, grad = (
            torch.randn(sum(self.stored), self.batch, *shape, generator=draw).to(self.dtype)
            for shape in shapes
        )
        return query, key, value, grad * self.is_text.view(-1, 1, 1, 1)

    @property
    def is_text(self) -> Tensor:
        """Whether a token is no padding, `[s]`."""
        real = self.lengths or self.stored
        parts = [torch.arange(n) < length for n, length in zip(self.stored, real, strict=True)]
        return torch.cat(parts)

    def hidden(self) -> Tensor:
        """Return which keys a query does not see, `[s, s]`."""
        document = torch.repeat_interleave(
            torch.arange(len(self.stored)), torch.tensor(self.stored)
        )
        hidden = document[:, None] != document[None, :]
        hidden |= ~self.is_text[None, :]
        if self.causal:
            hidden |= torch.ones_like(hidden).triu(1)
        return hidden

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the output and the gradients of query, key and value, zero where padding is."""
        *inputs, grad = (x.double() for x in self.inputs())
        query, key, value = (x.requires_grad_() for x in inputs)
        repeated = self.heads // self.groups
        keys, values = (x.repeat_interleave(repeated, dim=2) for x in (key, value))
        scores = torch.einsum("sbnd,tbnd->bnst", query, keys)
        scores = scores * (self.scale or 1 / math.sqrt(self.channels))
        weights = scores.masked_fill(self.hidden(), -torch.inf).softmax(-1)
        output = torch.einsum("bnst,tbnv->sbnv", weights, values)
        # A padded query of full attention sees its document; ours sees nothing.
        output = output * self.is_text.view(-1, 1, 1, 1)
        return (output.detach(), *torch.autograd.grad(output, (query, key, value), grad))


@contextmanager
def context_parallel_ranks(
    cp: int, *, tp: int = 1, hierarchy: Sequence[int] | None = None
) -> Iterator[list[dist.ProcessGroup]]:
    """Join all ranks, and give the context-parallel group, or the groups of the hierarchy."""
    cpu.enable()
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        hierarchical_context_parallel_sizes=hierarchy,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    hierarchical = parallel_state.get_hierarchical_context_parallel_groups
    yield hierarchical() if hierarchy else [parallel_state.get_context_parallel_group()]
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def assert_close(name: str, got: Tensor, expected: Tensor) -> None:
    """Hold a tensor to the expected one, within the tolerance of its own precision."""
    assert got.shape == expected.shape, (name, got.shape, expected.shape)
    error = (got.double() - expected).abs().max().item()
    largest = TOLERANCE[got.dtype] * expected.abs().max().item()
    assert error <= largest, f"{name}: off by {error:.3g}, where {largest:.3g} is allowed"


def cumulative(lengths: Sequence[int]) -> Tensor:
    """Return where documents end, from 0 on, as `cu_seqlens` say it."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
